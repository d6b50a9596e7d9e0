"""PNG and TIFF files of any pixel type, written byte by byte from the formats' specifications."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def ramp(dtype, channels=1, height=5, width=64):
    """Return pixels ``(H, W, C)`` that rise over the whole range of a type; of floats, to 1."""
    dtype = np.dtype(dtype)
    low, high = (0, 1) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    steps = np.linspace(0, 1, height * width * channels).reshape(height, width, channels)
    return (low + steps * (float(high) - low)).clip(low, high).astype(dtype)


def png(values, colour, bits):
    """Encode ``(H, W, C)`` values, as they are to stand in the file."""
    height, width, _ = values.shape
    rows = values.astype(">u2" if bits == 16 else "u1")
    if bits < 8:
        rows = np.packbits(_bits(values, bits), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def tiff(values, photometric, *, order="<", planes=1, bits=None, **tags):
    """Encode ``(H, W, C)`` values of any dtype, which says the bits and the sample format."""
    height, width, channels = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    ordered = values.transpose(2, 0, 1) if planes == 2 else values
    data = ordered.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits is not None:
        data = np.packbits(_bits(values, bits), axis=1).tobytes()
    strips, depth = channels if planes == 2 else 1, bits or 8 * values.dtype.itemsize
    entries = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [depth] * channels),
        259: ("H", [1]), 262: ("H", [photometric]), 273: ("I", [0] * strips),
        277: ("H", [channels]), 278: ("I", [height]), 279: ("I", [len(data) // strips] * strips),
        284: ("H", [planes]), 339: ("H", [kind] * channels),
        **{{"extra": 338, "orientation": 274}[name]: ("H", [tag]) for name, tag in tags.items()},
    }  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4  # of what does not fit into the entries
    longer = sum(n for code, items in entries.values() if (n := _size(code, items)) > 4)
    offsets = [start + longer + strip * (len(data) // strips) for strip in range(strips)]
    entries[273] = ("I", offsets)
    directory, beyond = struct.pack(f"{order}H", len(entries)), b""
    for tag, (code, items) in sorted(entries.items()):
        body = struct.pack(f"{order}{len(items)}{code}", *items)
        if len(body) > 4:
            body, beyond = struct.pack(f"{order}I", start + len(beyond)), beyond + body
        number = {"H": 3, "I": 4}[code]
        directory += struct.pack(f"{order}HHI", tag, number, len(items)) + body.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + directory + b"\0" * 4 + beyond + data


def _size(code, items):
    return struct.calcsize(f"<{len(items)}{code}")


def _bits(values, bits):
    """Return the bits of each row's values, the highest first."""
    places = np.arange(bits)[::-1]
    return ((values.astype(np.int64) >> places) & 1).astype(np.uint8).reshape(len(values), -1)
