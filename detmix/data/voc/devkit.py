"""The files of a Pascal VOC devkit: where they are, and what an annotation says.

The layout is the one the official archives unpack to::

    root/VOC2007/JPEGImages/000005.jpg
    root/VOC2007/Annotations/000005.xml
    root/VOC2007/ImageSets/Main/trainval.txt

``root`` may also be the folder that holds ``VOCdevkit``, as torchvision's download leaves it.

VOC counts pixels from 1 and includes both ends: ``xmin = 1, xmax = 1`` is one pixel wide. detmix
uses continuous coordinates, in which that pixel spans [0, 1]. The conversion
(``xmin - 1, ymin - 1, xmax, ymax``) is done in this file and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from detmix.data.detection import check_files
from detmix.files import read_file

_LAYOUT = "expected ROOT/VOC<year>/{JPEGImages,Annotations,ImageSets/Main} or the same in VOCdevkit"
_FLAGS = ("-1", "0", "1")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_MAX_SIDE = 2**31


class ImageEntry(NamedTuple):
    """One image of a data set: its name, such as VOC2007/000005, its year and split, its files."""

    name: str
    image_set: tuple[str, str]
    image: Path
    annotation: Path


def list_entries(
    root: str | Path, image_sets: Sequence[tuple[str, str]], *, all_there: bool
) -> list[ImageEntry]:
    """List the images of several splits, one after the other, in the order of the split files."""
    pairs: list[object] = list(image_sets)
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            "image_sets must be pairs of year and split, such as (('2007', 'trainval'),), "
            f"got {image_sets!r}"
        )
    entries: dict[str, ImageEntry] = {}
    for year, split in image_sets:
        folder = _find_year(Path(root), str(year))  # YAML reads 2007 as an integer
        images, annotations = folder / "JPEGImages", folder / "Annotations"
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        image_ids = _read_split(path)
        if all_there:
            check_files(images, [f"{image_id}.jpg" for image_id in image_ids])
            check_files(annotations, [f"{image_id}.xml" for image_id in image_ids])
        for image_id in image_ids:
            name = f"{folder.name}/{image_id}"
            if name in entries:
                raise ValueError(f"{path}: image {name!r} is listed twice in {image_sets}")
            files = (images / f"{image_id}.jpg", annotations / f"{image_id}.xml")
            entries[name] = ImageEntry(name, (str(year), split), *files)
    return list(entries.values())


def _find_year(root: Path, year: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder; {_LAYOUT}")
    parents = (root, root / "VOCdevkit")
    for parent in parents:
        folder = parent / f"VOC{year}"
        if folder.is_dir():
            return folder
    found = sorted(p.name for parent in parents for p in parent.glob("VOC[0-9]*") if p.is_dir())
    hint = f" (is {root.parent} meant?)" if (root / "JPEGImages").is_dir() else ""
    raise FileNotFoundError(
        f"{root}: holds no VOC{year}{hint}; found {', '.join(found) or 'no year at all'}; {_LAYOUT}"
    )


def _read_split(path: Path) -> list[str]:
    """Read ``id`` or ``id flag`` lines; flag -1 (the class is not in the image) is left out."""
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"{path}: there is no split {path.stem!r}; found {', '.join(found) or 'none'}"
        )
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a list of image ids as UTF-8 text: {error}") from None
    ids = []
    for number, line in enumerate(text.splitlines(), 1):
        image_id, *flags = line.split() or [""]
        if len(flags) > 1 or not set(flags) <= set(_FLAGS):
            raise ValueError(
                f"{path}, line {number}: expected an image id, or an id and one of -1, 0, 1, "
                f"got {line.strip()!r}"
            )
        if image_id in (".", "..") or set(image_id) & set("/\\\0"):
            raise ValueError(
                f"{path}, line {number}: expected an image id, got {image_id!r}, which leads out "
                "of the devkit's folders; refused"
            )
        if image_id and flags != ["-1"]:
            ids.append(image_id)
    if not ids:
        raise ValueError(f"{path}: the split lists no image")
    return ids


@dataclass(frozen=True)
class VOCObject:
    """One ``<object>`` of an annotation.

    Its ``box`` is ``(x1, y1, x2, y2)`` in pixels, continuous coordinates; as written in the file,
    so it may lie outside the image or have no area.
    """

    name: str
    box: tuple[float, float, float, float]
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


def read_annotation(path: str | Path, classes: Collection[str] | None = None) -> VOCAnnotation:
    """Read one annotation file; fields are found by their names, in whatever order they stand.

    Only the annotation's own ``<object>`` elements count: the ``<part>`` boxes of the person
    layout task (head, hand, foot) are inside an object and are passed over.

    Args:
        path: The XML file.
        classes: The classes that objects may be of; None for any.

    Raises:
        OSError: The file is not there, or cannot be read.
        ValueError: It is not well-formed XML, has a document type declaration, or a field is not
            there or wrong. The message names the file, the object (from 0) and the value.
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

    `read_annotation` returns what was written. A coordinate that is not finite is a ValueError.
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
        root = defusedxml.ElementTree.fromstring(read_file(path), forbid_dtd=True)
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
