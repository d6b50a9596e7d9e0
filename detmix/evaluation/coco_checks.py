"""Checking COCO files that anybody may have written, so that an error names the entry.

The backends take what they are given: a NaN is a box that matches nothing, an unknown category is
left out in silence, a missing key ends in a KeyError somewhere inside.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detmix.evaluation.coco_ap import SHAPE_KEYS
from detmix.evaluation.coco_result import IouType

_MIN_POLYGON = 6  # numbers: three corners


def check_ground_truth(path: Path, data: Any, iou_type: IouType) -> dict[str, Any]:
    """Return the content of an instances JSON, or raise ValueError.

    Args:
        path: the file, for the message.
        data: its content.
        iou_type: what the annotations must have.

    Raises:
        ValueError: naming the file, the entry, counted from 0, the value and what was expected.
    """
    keys = ("images", "categories", "annotations")
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is {_short(data)}, expected an object with {', '.join(keys)}")
    for key in keys:
        if not isinstance(data.get(key), list):
            raise ValueError(f"{path}: {key} is {_short(data.get(key))}, expected a list")
    images = _by_id(path, "images", data["images"])
    categories = _by_id(path, "categories", data["categories"])
    for index, category in enumerate(data["categories"]):
        if not isinstance(category.get("name"), str):
            name = _short(category.get("name"))
            raise ValueError(f"{path}, categories[{index}]: name is {name}, expected a str")
    checker = _Checker(path, "annotations", iou_type, images, categories)
    for index, entry in enumerate(data["annotations"]):
        checker.check(index, entry)
        checker.check_annotation(index, entry)
    return data


def check_predictions(
    path: Path, data: Any, ground_truth: Mapping[str, Any], iou_type: IouType
) -> list[dict[str, Any]]:
    """Return the content of a file in COCO's results format, or raise ValueError.

    Args:
        path: the file, for the message.
        data: its content.
        ground_truth: what `check_ground_truth` has returned.
        iou_type: what the predictions must have.

    Raises:
        ValueError: naming the file, the entry, counted from 0, the value and what was expected.
    """
    if not isinstance(data, list):
        raise ValueError(f"{path}: is {_short(data)}, expected a list with an object for each box")
    images = {image["id"]: image for image in ground_truth["images"]}
    categories = {category["id"]: category for category in ground_truth["categories"]}
    checker = _Checker(path, "predictions", iou_type, images, categories)
    if iou_type == "keypoints" and ground_truth["annotations"]:
        checker.num_coordinates = len(ground_truth["annotations"][0]["keypoints"])
    for index, entry in enumerate(data):
        checker.check(index, entry)
        checker.check_prediction(index, entry)
    return data


class _Checker:
    """Checks the entries of one list."""

    def __init__(
        self,
        path: Path,
        name: str,
        iou_type: IouType,
        images: Mapping[int, Mapping[str, Any]],
        categories: Mapping[int, Mapping[str, Any]],
    ) -> None:
        self.path, self.name, self.iou_type = path, name, iou_type
        self.images, self.categories = images, categories
        self.num_coordinates: int | None = None  # of an entry's keypoints, all alike

    def check(self, index: int, entry: Any) -> None:
        """What holds for annotations and predictions."""
        if not isinstance(entry, dict):
            raise self._error(index, f"is {_short(entry)}, expected an object")
        key = SHAPE_KEYS[self.iou_type]
        for needed in ("image_id", "category_id", key):
            if needed not in entry:
                raise self._error(
                    index, f"has no {needed!r}, only {sorted(entry)}; {self.iou_type!r} needs it"
                )
        for needed, known in (("image_id", self.images), ("category_id", self.categories)):
            if type(entry[needed]) is not int or entry[needed] not in known:
                raise self._error(
                    index,
                    f"{needed} is {_short(entry[needed])}, expected one of the annotation file's "
                    f"{len(known)}, such as {_short(sorted(known)[:3])}",
                )
        if self.iou_type == "bbox":
            self._check_box(index, entry["bbox"])
        elif self.iou_type == "keypoints":
            self._check_keypoints(index, entry["keypoints"])

    def check_annotation(self, index: int, entry: Mapping[str, Any]) -> None:
        """What holds for annotations alone."""
        if self.iou_type == "keypoints":  # where none is labelled, COCO measures from the box
            if "bbox" not in entry:
                raise self._error(index, f"has no 'bbox', only {sorted(entry)}")
            self._check_box(index, entry["bbox"])
        elif self.iou_type == "segm":
            self._check_segmentation(index, entry)
        if "area" in entry and not _is_number(entry["area"]):
            raise self._error(index, f"area is {_short(entry['area'])}, expected a number")
        for flag in ("iscrowd", "difficult"):
            if entry.get(flag, 0) not in (0, 1):
                raise self._error(index, f"{flag} is {_short(entry[flag])}, expected 0 or 1")

    def check_prediction(self, index: int, entry: Mapping[str, Any]) -> None:
        """What holds for predictions alone."""
        if not _is_number(entry.get("score")):
            raise self._error(index, f"score is {_short(entry.get('score'))}, expected a number")
        if self.iou_type == "segm":
            mask = entry["segmentation"]
            if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
                raise self._error(
                    index,
                    f"segmentation is {_short(mask)}, expected compressed run lengths: size "
                    "[height, width] and counts, a str",
                )
            self._check_size(index, mask, self._size(index, entry))

    def _check_box(self, index: int, box: Any) -> None:
        expected = "expected [x, y, width, height], finite, with sides of 0 or more"
        good = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        if not good or box[2] < 0 or box[3] < 0:
            raise self._error(index, f"bbox is {_short(box)}, {expected}")

    def _check_keypoints(self, index: int, values: Any) -> None:
        if not isinstance(values, list) or not values or not all(map(_is_number, values)):
            raise self._error(index, f"keypoints are {_short(values)}, expected finite numbers")
        self.num_coordinates = self.num_coordinates or len(values)
        if len(values) != self.num_coordinates or len(values) % 3:
            raise self._error(
                index,
                f"keypoints have {len(values)} numbers, expected x, y, visibility for each, as "
                f"many as there are elsewhere ({self.num_coordinates})",
            )

    def _check_segmentation(self, index: int, entry: Mapping[str, Any]) -> None:
        """Polygons, or run lengths, compressed or not."""
        mask, size = entry["segmentation"], self._size(index, entry)
        if isinstance(mask, dict) and isinstance(mask.get("counts"), str | list):
            self._check_size(index, mask, size)
        elif not (isinstance(mask, list) and mask and all(map(_is_polygon, mask))):
            raise self._error(
                index, f"segmentation is {_short(mask)}, expected polygons or run lengths"
            )

    def _check_size(self, index: int, mask: Mapping[str, Any], size: list[int]) -> None:
        """A mask of another size overlaps nothing, and the backends do not say so."""
        if mask.get("size") != size:
            raise self._error(
                index,
                f"segmentation has size {_short(mask.get('size'))}, expected that of the image, "
                f"{size}",
            )

    def _size(self, index: int, entry: Mapping[str, Any]) -> list[int]:
        """Height and width of the entry's image, which masks need."""
        image = self.images[entry["image_id"]]
        size = [image.get("height"), image.get("width")]
        if not all(type(side) is int and side > 0 for side in size):
            raise self._error(
                index,
                f"height and width of its image {entry['image_id']} are {size}, for 'segm'"
                " expected whole pixels",
            )
        return [int(side) for side in size if side]

    def _error(self, index: int, message: str) -> ValueError:
        return ValueError(f"{self.path}, {self.name}[{index}]: {message}")


def _by_id(path: Path, name: str, entries: list[Any]) -> dict[int, dict[str, Any]]:
    """The entries by their ids, each of which may occur only once."""
    found: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int:
            raise ValueError(f"{path}, {name}[{index}]: id is {_short(number)}, expected an int")
        if number in found:
            raise ValueError(f"{path}, {name}[{index}]: id {number} occurs twice, expected once")
        found[number] = entry
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < _MIN_POLYGON or len(value) % 2:
        return False
    return all(map(_is_number, value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
