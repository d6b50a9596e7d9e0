"""Read the annotations of a data set in the COCO format (https://cocodataset.org/#format-data).

All that the JSON says is checked here, once, and becomes flat columns. Legend: I images, M
objects of the whole file, C categories.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from detmix.data.coco.masks import pack_item, strip_item
from detmix.data.skipping import Report, raise_problem
from detmix.files import read_file

_PARTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoCategory:
    """One category: its number in the file, its name and the names of its keypoints."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class CocoImages:
    """The images, sorted by their ids."""

    ids: list[int]
    names: list[str]
    sizes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class CocoObjects:
    """The objects in the order of the file, M of them."""

    ids: npt.NDArray[np.int64]
    image_index: npt.NDArray[np.int64]
    category_index: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    area: npt.NDArray[np.float64]
    iscrowd: npt.NDArray[np.bool_]
    segmentations: list[bytes | ValueError | None]
    keypoints: list[Any]

    def take(self, rows: npt.NDArray[np.int64]) -> CocoObjects:
        """Return the objects at some rows, in their order."""
        picked = rows.tolist()
        return CocoObjects(
            ids=self.ids[rows],
            image_index=self.image_index[rows],
            category_index=self.category_index[rows],
            boxes=self.boxes[rows],
            area=self.area[rows],
            iscrowd=self.iscrowd[rows],
            segmentations=[self.segmentations[row] for row in picked],
            keypoints=[self.keypoints[row] for row in picked],
        )


@dataclass(frozen=True)
class CocoFile:
    """What an annotation file says."""

    categories: tuple[CocoCategory, ...]
    images: CocoImages
    objects: CocoObjects


def read_coco(path: str | Path, *, masks: bool = False, report: Report = raise_problem) -> CocoFile:
    """Read an instances or person_keypoints file."""
    content = _load(Path(path), masks)
    categories = _read_categories(content["categories"], f"{path}, category")
    images, rejected = _read_images(content["images"], f"{path}, image", report)
    where = f"{path}, annotation"
    objects = _read_objects(content["annotations"], images.ids, rejected, categories, where, report)
    return CocoFile(categories, images, objects)


def _load(path: Path, masks: bool) -> dict[str, list[dict[str, Any]]]:
    """Parse the JSON; segmentations are packed, or left out, while it is being parsed."""
    # As Python objects they would take several gigabytes for COCO's training images.
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected the JSON file of annotations")
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such annotation file") from None
    try:
        text = data.decode("utf-8-sig")
        del data  # of COCO's half a gigabyte
        content = json.loads(text, object_hook=pack_item if masks else strip_item)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        hint = " (a file of predictions?)" if isinstance(content, list) else ""
        raise ValueError(
            f"{path}: expected an object with {', '.join(_PARTS)}, got {_kind(content)}{hint}"
        )
    for part in _PARTS:
        _check_part(content, part, path)
    return content


def _check_part(content: dict[str, Any], part: str, path: Path) -> None:
    items = content.get(part)
    if not isinstance(items, list):
        found = _kind(items) if part in content else "nothing"
        raise ValueError(
            f'{path}: expected a list "{part}", got {found}; detection needs an instances or '
            f"person_keypoints file, this one has {', '.join(content) or 'nothing'}"
        )
    if not items and part != "annotations":
        raise ValueError(f'{path}: the list "{part}" is empty')
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f'{path}: item {number} of "{part}" must be an object, got {item!r}')


def _read_categories(items: list[dict[str, Any]], where: str) -> tuple[CocoCategory, ...]:
    categories = []
    for category_id, item in _by_id(items, where):
        name = item.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} {category_id}: expected a name, got {name!r}")
        keypoints = item.get("keypoints") or []
        if not isinstance(keypoints, list) or not all(isinstance(n, str) for n in keypoints):
            raise ValueError(
                f"{where} {category_id}: keypoints must be a list of names, got {keypoints!r}"
            )
        categories.append(CocoCategory(category_id, name, tuple(keypoints)))
    return tuple(categories)


def _read_images(
    items: list[dict[str, Any]], where: str, report: Report
) -> tuple[CocoImages, set[int]]:
    """Return the images, and the ids of those whose names cannot be used."""
    ids, names, sizes = [], [], []
    rejected = set()
    for image_id, item in _by_id(items, where):
        name = item.get("file_name")
        if not isinstance(name, str) or not name:
            message = f"{where} {image_id}: expected a file_name, got {name!r}"
            report("unusable annotation", message, image_id)
            rejected.add(image_id)
            continue
        if PurePath(name).anchor or ".." in PurePath(name).parts or "\0" in name:
            raise ValueError(
                f"{where} {image_id}: refused: file_name leads out of the images' folder, "
                f"got {name!r}"
            )
        height, width = (item.get(key) or 0 for key in ("height", "width"))
        for key, side in (("height", height), ("width", width)):
            if type(side) not in (int, float) or not 0 <= side <= 2**31 or side % 1:
                message = f"{key} must be a number of whole pixels, got {side!r}"
                report("unusable annotation", f"{where} {image_id}: {message}", image_id)
                height = width = 0
        ids.append(image_id)
        names.append(name)
        sizes.append((height, width))
    return CocoImages(ids, names, np.array(sizes, dtype=np.int64).reshape(-1, 2)), rejected


def _read_objects(
    items: list[dict[str, Any]],
    image_ids: list[int],
    rejected: set[int],
    categories: tuple[CocoCategory, ...],
    where: str,
    report: Report,
) -> CocoObjects:
    images = {image_id: index for index, image_id in enumerate(image_ids)}
    known = {category.id: index for index, category in enumerate(categories)}
    rows = []
    boxes = []
    kept = []
    for number, item in enumerate(items):
        annotation_id = _read_id(item, number, where)
        try:
            row = (
                annotation_id,
                _look_up(item, "image_id", images),
                _look_up(item, "category_id", known),
                _read_area(item.get("area")),
                _read_iscrowd(item.get("iscrowd")),
            )
            boxes.append(_read_box(item.get("bbox")))
        except ValueError as error:
            image = item.get("image_id")
            image = image if type(image) is int else None
            if image in rejected:  # what is wrong with it has been said
                continue
            hint = " (is this a captions file?)" if "caption" in item else ""
            message = f"{where} {annotation_id}: {error}{hint}"
            if image is None or image not in images:
                raise ValueError(message) from None
            report("unusable annotation", message, image)
            continue
        rows.append(row)
        kept.append(item)
    columns = list(zip(*rows, strict=True)) or [()] * 5
    _check_no_repeats(columns[0], where)
    return CocoObjects(
        ids=np.array(columns[0], dtype=np.int64),
        image_index=np.array(columns[1], dtype=np.int64),
        category_index=np.array(columns[2], dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        area=np.array(columns[3], dtype=np.float64),
        iscrowd=np.array(columns[4], dtype=np.bool_),
        segmentations=[item.get("segmentation") or None for item in kept],
        keypoints=[item.get("keypoints") for item in kept],
    )


def _by_id(items: list[dict[str, Any]], where: str) -> list[tuple[int, dict[str, Any]]]:
    """Return ids and items, sorted by the ids."""
    ids = [_read_id(item, number, where) for number, item in enumerate(items)]
    _check_no_repeats(ids, where)
    return sorted(zip(ids, items, strict=True), key=lambda pair: pair[0])


def _read_id(item: dict[str, Any], number: int, where: str) -> int:
    value = item.get("id")
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    got = repr(value) if "id" in item else "none"
    raise ValueError(f"{where} number {number} (from 0): id must be an integer, got {got}")


def _check_no_repeats(ids: Sequence[int], where: str) -> None:
    for number, count in Counter(ids).items():
        if count > 1:
            raise ValueError(f"{where} {number}: the id is there twice")


def _look_up(item: dict[str, Any], key: str, known: dict[int, int]) -> int:
    value = item.get(key)
    index = known.get(value) if type(value) is int else None
    if index is None:
        raise ValueError(f"{key} must be one of the file's, got {value!r}")
    return index


def _read_box(bbox: Any) -> tuple[float, float, float, float]:
    """Return x1, y1, x2, y2 of COCO's x, y, width, height."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise ValueError(f"bbox must be 4 finite numbers (x, y, width, height), got {bbox!r}")
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


def _read_area(area: Any) -> float:
    if area is None:
        return math.nan
    if not _is_finite(area) or area < 0:
        raise ValueError(f"area must be a finite number of pixels, not negative, got {area!r}")
    return float(area)


def _read_iscrowd(iscrowd: Any) -> bool:
    if iscrowd not in (0, 1, None):
        raise ValueError(f"iscrowd must be 0 or 1, got {iscrowd!r}")
    return bool(iscrowd)


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")
