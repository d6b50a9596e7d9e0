"""Read and write one Pascal VOC annotation file (the devkit's ``Annotations/*.xml``).

VOC counts pixels from 1 and includes both ends: ``xmin = 1, xmax = 1`` is one pixel wide. detmix
uses continuous coordinates, in which that pixel spans [0, 1]. The conversion
(``xmin - 1, ymin - 1, xmax, ymax``) is done in this file and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from detmix.files import read_file

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_SIDE = 2**31


@dataclass(frozen=True)
class VOCObject:
    """One ``<object>`` of an annotation.

    Attributes:
        name: The class name.
        box: ``(x1, y1, x2, y2)`` in pixels, continuous coordinates; as written in the file, so
            it may lie outside the image or have no area.
        difficult: Whether the devkit leaves the object out of the evaluation.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool = False


@dataclass(frozen=True)
class VOCAnnotation:
    """The content of one annotation file, as far as detection needs it.

    Attributes:
        filename: The image's file name; ``""`` where the file does not give it.
        width: The image's width in pixels; like ``height``, 0 where the file does not give it.
        height: The image's height in pixels.
        objects: The objects in the order of the file.
    """

    filename: str
    width: int
    height: int
    objects: tuple[VOCObject, ...]


def read_annotation(path: str | Path, classes: Collection[str] | None = None) -> VOCAnnotation:
    """Read one annotation file; fields are found by their names, in whatever order they stand.

    Only the annotation's own ``<object>`` elements count: the ``<part>`` boxes of the person
    layout task (head, hand, foot) are inside an object and are passed over.

    Args:
        path: The XML file.
        classes: The classes that objects may be of; None for any.

    Raises:
        OSError: There is no such file (FileNotFoundError), or it cannot be read.
        ValueError: The file is not well-formed XML, carries a document type declaration, lacks
            a field, or has one that cannot be read or an unknown class. The message names the
            file, the object (counted from 0) and the value.
    """
    root = _parse(path)
    width, height = _read_size(root, path)
    objects = [
        _read_object(element, f"{path}, object {number}", classes)
        for number, element in enumerate(root.iterfind("object"))
    ]
    filename = (root.findtext("filename") or "").strip()
    return VOCAnnotation(filename, width, height, tuple(objects))


def write_annotation(path: str | Path, annotation: VOCAnnotation) -> None:
    """Write one annotation file in the devkit's layout, replacing one that is there.

    Whole coordinates are written as such, others with all their digits, so that
    :func:`read_annotation` returns what was written. One that is not finite is a ValueError.
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
        x1, y1, x2, y2 = item.box
        if not all(map(math.isfinite, item.box)):
            raise ValueError(f"{path}, object {index}: box {item.box} is not finite")
        corners = dict(zip(_CORNERS, (x1 + 1, y1 + 1, x2, y2), strict=True))
        _add_fields(SubElement(element, "bndbox"), **corners)
    ElementTree.indent(root, "\t")
    Path(path).write_text(ElementTree.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


def _parse(path: str | Path) -> Element:
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such annotation file") from None
    try:
        root = defusedxml.ElementTree.fromstring(data, forbid_dtd=True)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not well-formed XML: {error}") from error
    except DefusedXmlException as error:
        raise ValueError(
            f"{path}: document type declarations and entities are refused: {error}"
        ) from error
    except (LookupError, ValueError) as error:  # an encoding that Python or expat does not know
        raise ValueError(f"{path}: not readable as XML: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"{path}: expected the root element <annotation>, got <{root.tag}>")
    return root


def _read_size(root: Element, path: str | Path) -> tuple[int, int]:
    size = root.find("size")
    if size is None or size.find("width") is None or size.find("height") is None:
        return 0, 0
    width, height = (_read_number(size, key, f"{path}, <size>") for key in ("width", "height"))
    if not all(0 <= side <= _MAX_SIDE and side % 1 == 0 for side in (width, height)):
        raise ValueError(f"{path}, <size>: expected whole pixels, got {width:g} x {height:g}")
    return int(width), int(height)


def _read_object(element: Element, where: str, classes: Collection[str] | None) -> VOCObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{where}: <name> is missing or empty")
    if classes is not None and name not in classes:
        known = ", ".join(classes)
        raise ValueError(f"{where}: unknown class {name!r}; known are {known}")
    where = f"{where} ({name})"
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise ValueError(f"{where}: <bndbox> is missing")
    xmin, ymin, xmax, ymax = (_read_number(bndbox, key, where) for key in _CORNERS)
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"{where}: <difficult> must be 0 or 1, got {difficult!r}")
    return VOCObject(name, (xmin - 1, ymin - 1, xmax, ymax), difficult == "1")


def _read_number(parent: Element, key: str, where: str) -> float:
    text = parent.findtext(key)
    if text is None:
        raise ValueError(f"{where}: <{key}> is missing")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: <{key}> must be a finite number, got {text.strip()!r}")
    return value


def _add_fields(parent: Element, **fields: str | float) -> None:
    for key, value in fields.items():
        is_whole = isinstance(value, float) and value.is_integer()
        SubElement(parent, key).text = str(int(value) if is_whole else value)
