"""Broken files made from good ones: each a function of a random generator."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

Rng = random.Random

SECONDS = 10.0  # that a case may take, on a machine with other work
GIBIBYTES = 2  # of address space that it may ask for

NUMBERS = (
    "", " ", "0", "-0", "-1", "1e308", "-1e308", "1e400", "nan", "inf", "-inf", "9" * 400,
    "9" * 20, "2147483648", "-9223372036854775809", "0.1", "1e-320", "0x10", "1_0", "١٢", " 7 ",
    "7,5", "None", "true", "[1]", "{}", "1" * 5000, "½", "\u00a0", "a" * 100_000,
)  # fmt: skip


XML = b"""<?xml version="1.0" encoding="UTF-8"?>
<annotation>
  <folder>VOC2007</folder>
  <filename>a.jpg</filename>
  <size><width>60</width><height>40</height><depth>3</depth></size>
  <segmented>0</segmented>
  <object>
    <name>person</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>12</xmin><ymin>7</ymin><xmax>15</xmax><ymax>9</ymax></bndbox></part>
  </object>
  <object>
    <name>dog</name><difficult>1</difficult>
    <bndbox><xmax>59.5</xmax><xmin>1</xmin><ymax>40</ymax><ymin>2</ymin></bndbox>
  </object>
</annotation>
"""

_LAUGHS = "".join(
    f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' if n else '<!ENTITY l0 "ha">' for n in range(10)
)
DOCTYPES = (
    f"<!DOCTYPE annotation [{_LAUGHS}]>",
    f'<!DOCTYPE annotation [<!ENTITY l9 "{"a" * 100_000}">]>',
    '<!DOCTYPE annotation [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE annotation [<!ENTITY % l9 SYSTEM "http://127.0.0.1:9/x"> %l9;]>',
    '<!DOCTYPE annotation SYSTEM "file:///dev/zero">',
    '<!DOCTYPE annotation PUBLIC "-//x//x" "http://127.0.0.1:9/x.dtd">',
    '<!DOCTYPE annotation [<!ATTLIST annotation a CDATA "b">]>',
    '<!DOCTYPE annotation [<!NOTATION n SYSTEM "x"><!ENTITY l9 SYSTEM "/dev/zero" NDATA n>]>',
)


@contextmanager
def limits() -> Iterator[None]:
    """Allow `GIBIBYTES` more address space than there is in use."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError after `SECONDS`."""

    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"took more than {SECONDS:g} s")

    before = signal(SIGALRM, stop)
    setitimer(ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, before)


def break_bytes(data: bytes, rng: Rng) -> bytes:
    """Flip bits, cut off, cut out, double or insert bytes."""
    broken = bytearray(data)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 2, 8, 100)))
    match rng.randrange(6):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        case 2:
            del broken[start:]
        case 3:
            del broken[start:end]
        case 4:
            broken[start:start] = broken[start:end] * rng.choice((1, 2, 1000))
        case _:
            broken[start:end] = rng.choice((b"\0", b"\xff", b"<", b"&", b"\xc3(")) * (end - start)
    return bytes(broken)


def break_xml(rng: Rng) -> bytes:
    """Break an annotation."""
    match rng.randrange(7):
        case 0 | 1:
            return break_bytes(XML, rng)
        case 2 | 3 | 4:
            return _break_tree(rng)
        case 5:
            text = XML.decode().replace("<annotation>", rng.choice(DOCTYPES) + "<annotation>", 1)
            return text.replace("dog", rng.choice(("&l9;", "dog", "&amp;", "&nothing;"))).encode()
        case _:
            name = rng.choice(("utf-8", "utf-16", "latin-1", "utf-32", "cp037", "ascii", "utf-7"))
            text = XML.decode().replace("Unspecified", "Gänsefüßchen")
            written = rng.choice((name, "UTF-8", "none", "hex", "undefined", "idna", "a" * 3000))
            return text.replace("UTF-8", written).encode(name, errors="replace")


def _break_tree(rng: Rng) -> bytes:
    """Shuffle, drop, double, rename or fill elements of a well-formed annotation."""
    root = ElementTree.fromstring(XML)
    for _ in range(rng.choice((1, 1, 2, 5))):
        parent = rng.choice([e for e in root.iter() if len(e)] or [root])
        if not len(parent):
            continue
        child = rng.choice(list(parent))
        match rng.randrange(6):
            case 0:
                children = list(parent)
                rng.shuffle(children)
                parent[:] = children
            case 1:
                parent.remove(child)
            case 2:
                parent.insert(0, child)
            case 3:
                child.tag = rng.choice(("object", "bndbox", "x", "size", "XMIN"))
            case _:
                leaf = rng.choice([e for e in root.iter() if not len(e)] or [root])
                leaf.text = rng.choice(NUMBERS)
    return ElementTree.tostring(root, encoding=rng.choice(("utf-8", "utf-16", "us-ascii")))


def good_image(rng: Rng, kind: str = "JPEG") -> bytes:
    """Encode a 60 x 40 image."""
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (40, 60, 3), np.uint8)
    mode = rng.choice(("RGB", "RGB", "L", "CMYK"))
    options: dict[str, Any] = {}
    if kind == "JPEG":
        options = {"progressive": rng.random() < 0.5, "subsampling": rng.choice((0, 1, 2))}
        options |= {"restart_marker_blocks": rng.choice((0, 3)), "quality": rng.choice((5, 75))}
    else:
        mode = rng.choice({"GIF": ("P",), "PNG": ("P", "RGBA", "I;16", "1")}.get(kind, ("RGB",)))
    image = Image.fromarray(pixels)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def break_jpeg(rng: Rng) -> bytes:
    """Break a JPEG file."""
    data = good_image(rng)
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    match rng.randrange(7):
        case 0 | 1 | 2:
            return break_bytes(data, rng)
        case 3:
            sides = [rng.choice((0, 1, 39, 41, 20_000, 65_500, 65_535)) for _ in range(2)]
            sizes = b"".join(side.to_bytes(2, "big") for side in sides)
            return data[: frame + 5] + sizes + data[frame + 9 :]
        case 4:
            segment = b"\xff" + rng.randbytes(1) + rng.choice((b"\0\0", b"\0\2", b"\xff\xff"))
            return data[:2] + segment + rng.randbytes(rng.choice((0, 5, 100))) + data[2:]
        case 5:
            return break_bytes(data[: frame + 20], rng) + data[frame + 20 :]
        case _:
            return data[:2] + rng.randbytes(rng.choice((0, 1, 10, 1000)))


def break_image(rng: Rng) -> bytes:
    """Break an image of another format."""
    data = good_image(rng, rng.choice(("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")))
    if data.startswith(b"\x89PNG") and rng.random() < 0.3:
        sides = [rng.choice((0, 1, 20_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
        return data[:16] + b"".join(side.to_bytes(4, "big") for side in sides) + data[24:]
    for _ in range(rng.choice((1, 1, 3))):
        data = break_bytes(data, rng) or b"x"
    return data


def zigzag(num_points: int, extent: float) -> list[float]:
    """Return a polygon to and fro, left to right: next to no area, and edges of any length."""
    return [value for n in range(num_points) for value in (extent * (-1) ** n, float(n))]


def break_values(value: Any, rng: Rng, values: tuple[Any, ...], times: int) -> Any:
    """Drop, double, rename or replace entries anywhere in nested dicts and lists."""
    for _ in range(times):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(values))
        container, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(("x", "", "name", "id"))] = container.pop(key)
            case 1:
                container.append(copy.deepcopy(container[key]))
            case _:
                container[key] = copy.deepcopy(rng.choice(values))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, item in items:
        yield value, key
        yield from _places(item)
