"""PNG and TIFF files of any pixel type: their pixels and fields as the formats specify them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2


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
    ordered = values.transpose(2, 0, 1) if planes == 2 else values
    data = ordered.astype(values.dtype.newbyteorder(order)).tobytes()
    if bits is not None:
        data = np.packbits(_bits(values, bits), axis=1).tobytes()
    strips, depth = channels if planes == 2 else 1, bits or 8 * values.dtype.itemsize
    size, kind = len(data) // strips, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {
        256: width, 257: height, 258: [depth] * channels, 259: 1, 262: photometric,
        273: [size * strip for strip in range(strips)], 277: channels, 278: height,
        279: [size] * strips, 284: planes, 339: [kind] * channels,
        **{{"extra": 338, "orientation": 274}[name]: tag for name, tag in tags.items()},
    }  # fmt: skip
    directory = ImageFileDirectory_v2(prefix={"<": b"II", ">": b"MM"}[order])
    directory.update(entries)
    file = io.BytesIO()
    directory.save(file)  # which moves the strips behind itself
    return file.getvalue() + data


def _bits(values, bits):
    """Return the bits of each row's values, the highest first."""
    places = np.arange(bits)[::-1]
    return ((values.astype(np.int64) >> places) & 1).astype(np.uint8).reshape(len(values), -1)
