"""Annotations of Pascal VOC: what an XML file says of an image and its objects.

Encodings, namespaces and words for truth are taken as labelling programs write them; `corners` has
what the corners of a box mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from detmix.data.voc.corners import Box, Corners, offsets
from detmix.files import read_file

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_SIDE = 2**31
# As programs write nothing, and truth values.
_NOTHING = ("", "none", "null", "nan", "unspecified")
_FALSE = (*_NOTHING, "0", "0.0", "false", "no")
_TRUE = ("1", "1.0", "true", "yes")
_ENCODING = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([\w.-]+)""")


@dataclass(frozen=True)
class VOCObject:
    """One ``<object>`` of an annotation.

    Its ``box`` is ``(x1, y1, x2, y2)`` in pixels, continuous coordinates; as written in the file,
    so it may lie outside the image or have no area.
    """

    name: str
    box: Box
    difficult: bool = False


@dataclass(frozen=True)
class VOCAnnotation:
    """The content of one annotation file, as far as detection needs it.

    Where the file does not give them, ``filename`` is ``""``, ``width`` and ``height`` are 0.
    """

    filename: str
    width: int
    height: int
    objects: tuple[VOCObject, ...]


def read_annotation(
    path: str | Path, classes: Collection[str] | None = None, corners: Corners = "1-inclusive"
) -> VOCAnnotation:
    """Read one annotation file; fields are found by their names, in whatever order they stand.

    Only the annotation's own ``<object>`` elements count: the ``<part>`` boxes of the person
    layout task (head, hand, foot) are inside an object and are passed over. ``<difficult>`` may be
    a truth value in words, or ``Unspecified``, which is false; a width or height may be empty. The
    encoding is the one that the file declares, else UTF-8; namespaces are passed over, and a
    document type that is declared elsewhere is not read.

    Args:
        path: The XML file.
        classes: The classes that objects may be of; None for any.
        corners: How the corners are written, as `VOCDetection` has it.

    Raises:
        OSError: The file is not there, or cannot be read.
        ValueError: It is not well-formed XML or not in its encoding, declares entities, or a field
            is not there or wrong. The message names the file, the object (from 0) and the value.
    """
    root = _parse(path)
    width, height = _read_size(root, path)
    objects = [
        _read_object(element, f"{path}, object {number}", classes, offsets(corners))
        for number, element in enumerate(root.iterfind("object"))
    ]
    filename = _read_text(root, "filename")
    return VOCAnnotation(filename, width, height, tuple(objects))


def write_annotation(path: str | Path, annotation: VOCAnnotation) -> None:
    """Write one annotation file in the devkit's layout, replacing one that is there.

    `read_annotation` returns what was written, in the devkit's 1-inclusive corners. A coordinate
    that is not finite is a ValueError.
    """
    root = Element("annotation")
    _add_fields(root, filename=annotation.filename)
    size = SubElement(root, "size")
    _add_fields(size, width=annotation.width, height=annotation.height, depth=3)
    _add_fields(root, segmented=0)
    for index, item in enumerate(annotation.objects):
        element = SubElement(root, "object")
        _add_fields(element, name=item.name, pose="Unspecified", truncated=0)
        _add_fields(element, difficult=int(item.difficult))
        if not all(map(math.isfinite, item.box)):
            raise ValueError(f"{path}, object {index}: box {item.box} is not finite")
        moved = zip(_CORNERS, item.box, offsets("1-inclusive"), strict=True)
        _add_fields(SubElement(element, "bndbox"), **{key: x - move for key, x, move in moved})
    ElementTree.indent(root, "\t")
    Path(path).write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


def _parse(path: str | Path) -> Element:
    data = read_file(path)
    try:
        parser = DefusedXMLParser(target=ElementTree.TreeBuilder())  # the default one is slow
        parser.feed(_decode(data))
        root: Element = parser.close()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not well-formed XML: {error}") from error
    except DefusedXmlException as error:
        raise ValueError(f"{path}: entities are refused: {error}") from error
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"{path}: not readable as XML: {error}; expected UTF-8, or the encoding that the file "
            "begins with, as in <?xml version='1.0' encoding='gbk'?>"
        ) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # without its namespace
    if root.tag != "annotation":
        raise ValueError(f"{path}: expected the root element <annotation>, got <{root.tag}>")
    return root


def _decode(data: bytes) -> str | bytes:
    """Decode with Python, which knows more encodings than XML's parser, GBK among them."""
    if data[:1] in (b"\xfe", b"\xff") or b"\0" in data[:4]:
        return data  # UTF-16, which the parser knows by itself
    declared = _ENCODING.match(data)
    encoding = declared[1].decode() if declared else "utf-8"
    text = data.decode(encoding)
    if declared and not text.startswith("<?xml"):
        raise ValueError(f"it is not in the encoding {encoding!r} that it declares")
    return text


def _read_size(root: Element, path: str | Path) -> tuple[int, int]:
    keys = ("size/width", "size/height")
    if any(_read_text(root, key).lower() in _NOTHING for key in keys):
        return 0, 0
    width, height = (_read_number(root, key, str(path)) for key in keys)
    if not all(0 <= side <= _MAX_SIDE and side % 1 == 0 for side in (width, height)):
        raise ValueError(f"{path}, <size>: expected whole pixels, got {width:g} x {height:g}")
    return int(width), int(height)


def _read_object(
    element: Element, where: str, classes: Collection[str] | None, moves: Box
) -> VOCObject:
    name = _read_text(element, "name")
    if not name:
        raise ValueError(f"{where}: <name> is missing or empty")
    if classes is not None and name not in classes:
        known = ", ".join(classes)
        hint = "" if name.isascii() else "; is the file in UTF-8, or what it declares?"
        raise ValueError(f"{where}: unknown class {name!r}; known are {known}{hint}")
    where = f"{where} ({name})"
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise ValueError(f"{where}: <bndbox> is missing")
    x1, y1, x2, y2 = (
        _read_number(bndbox, key, where) + move for key, move in zip(_CORNERS, moves, strict=True)
    )
    difficult = _read_text(element, "difficult")
    if difficult.lower() not in (*_FALSE, *_TRUE):
        raise ValueError(f"{where}: <difficult> must be 0 or 1, got {difficult!r}")
    return VOCObject(name, (x1, y1, x2, y2), difficult.lower() in _TRUE)


def _read_text(parent: Element, key: str) -> str:
    return (parent.findtext(key) or "").strip()


def _read_number(parent: Element, key: str, where: str) -> float:
    text = _read_text(parent, key)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: <{key}> must be a finite number, got {text!r}")
    return value


def _add_fields(parent: Element, **fields: str | float) -> None:
    for key, value in fields.items():
        is_whole = isinstance(value, float) and value.is_integer()
        SubElement(parent, key).text = str(int(value) if is_whole else value)
