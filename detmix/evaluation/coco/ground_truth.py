"""Checking COCO files that anybody may have written, so that an error names the entry.

The backends take what they are given: a NaN is a box that matches nothing, an unknown category is
left out in silence, a missing key ends in a KeyError somewhere inside.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detmix.data.coco.masks import read_polygons, read_rle
from detmix.evaluation.coco.backend import SHAPE_KEYS
from detmix.evaluation.coco.result import IouType


def check_ground_truth(path: Path, data: Any, iou_type: IouType) -> dict[str, Any]:
    """Return the content of an instances JSON as the backends need it, or raise ValueError."""
    keys = ("images", "categories", "annotations")
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is {_short(data)}, expected an object with {', '.join(keys)}")
    for key in keys:
        if not isinstance(data.get(key), list):
            raise ValueError(f"{path}: {key} is {_short(data.get(key))}, expected a list")
    categories = _by_id(path, "categories", data["categories"])
    images = _by_id(path, "images", data["images"])
    images = {number: _with_whole_sides(image) for number, image in images.items()}
    for index, category in enumerate(data["categories"]):
        if not isinstance(category.get("name"), str):
            name = _short(category.get("name"))
            raise ValueError(f"{path}, categories[{index}]: name is {name}, expected a str")
    checker = _Checker(path, "annotations", iou_type, images, categories)
    annotations = [
        checker.check_annotation(index, entry) for index, entry in enumerate(data["annotations"])
    ]
    if iou_type == "keypoints":
        annotations = checker.fill_keypoints(annotations)
    return data | {"images": list(images.values()), "annotations": annotations}


def check_predictions(
    path: Path, data: Any, ground_truth: Mapping[str, Any], iou_type: IouType
) -> list[dict[str, Any]]:
    """Return the content of a file in COCO's results format, or raise ValueError."""
    if not isinstance(data, list):
        raise ValueError(
            f"{path}: is {_short(data)}, expected predictions in COCO's results format: a list "
            "with an object for each box"
        )
    images = {image["id"]: image for image in ground_truth["images"]}
    categories = {category["id"]: category for category in ground_truth["categories"]}
    checker = _Checker(path, "predictions", iou_type, images, categories)
    if iou_type == "keypoints" and ground_truth["annotations"]:
        checker.num_coordinates = len(ground_truth["annotations"][0]["keypoints"])
    for index, entry in enumerate(data):
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

    def check_annotation(self, index: int, value: Any) -> dict[str, Any]:
        """Return an annotation as the backends need it."""
        self._check_object(index, value)
        entry = {key: item for key, item in value.items() if item is not None}
        # COCO measures keypoints from the box where none is labelled.
        shape = "bbox" if self.iou_type == "keypoints" else SHAPE_KEYS[self.iou_type]
        self._check_keys(index, entry, shape)
        if shape == "bbox":  # pycocotools counts one with negative sides; nothing overlaps it
            self._check_box(index, entry["bbox"], least=-math.inf)
        if self.iou_type == "keypoints" and "keypoints" in entry:
            self._check_keypoints(index, entry["keypoints"])
        if self.iou_type == "segm":
            entry["segmentation"] = self._read_segmentation(index, entry)
        if "area" in entry and not _is_number(entry["area"]):
            raise self._error(index, f"area is {_short(entry['area'])}, expected a number")
        for flag in ("iscrowd", "difficult"):
            if entry.get(flag, 0) not in (0, 1):
                raise self._error(index, f"{flag} is {_short(entry[flag])}, expected 0 or 1")
        return entry

    def fill_keypoints(self, annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return annotations that all have keypoints: those without get unlabelled ones."""
        if self.num_coordinates is None:
            names = (category.get("keypoints") for category in self.categories.values())
            self.num_coordinates = 3 * max(
                (len(n) for n in names if isinstance(n, list)), default=0
            )
        if annotations and not self.num_coordinates:
            self._check_keys(0, annotations[0], "keypoints")
        none = {"keypoints": [0] * self.num_coordinates, "num_keypoints": 0}
        return [entry if "keypoints" in entry else entry | none for entry in annotations]

    def check_prediction(self, index: int, entry: Any) -> None:
        """Check what the backends take as it is."""
        self._check_object(index, entry)
        self._check_keys(index, entry, SHAPE_KEYS[self.iou_type])
        if self.iou_type == "bbox":
            self._check_box(index, entry["bbox"], least=0)
        elif self.iou_type == "keypoints":
            self._check_keypoints(index, entry["keypoints"])
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
            self._check_run_lengths(index, mask, self._size(index, entry))

    def _check_object(self, index: int, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise self._error(index, f"is {_short(entry)}, expected an object")

    def _check_keys(self, index: int, entry: Mapping[str, Any], shape: str) -> None:
        """What every entry has: an image and a category of the file, and its shape."""
        for needed in ("image_id", "category_id", shape):
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

    def _check_box(self, index: int, box: Any, least: float) -> None:
        expected = "expected [x, y, width, height], finite"
        expected += ", with sides of 0 or more" if least == 0 else ""
        good = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        if not good or min(box[2:]) < least:
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

    def _read_segmentation(self, index: int, entry: Mapping[str, Any]) -> Any:
        """Polygons, of which those without area are left out, or run lengths of both kinds."""
        mask, size = entry["segmentation"], self._size(index, entry)
        wrong = f"segmentation is {_short(mask)}, expected polygons or run lengths"
        if isinstance(mask, list) and mask:
            try:
                return [polygon.tolist() for polygon in read_polygons(mask)]
            except ValueError as error:
                raise self._error(index, f"{wrong}: {error}") from None
        if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str | list):
            raise self._error(index, wrong)
        self._check_run_lengths(index, mask, size)
        return mask

    def _check_run_lengths(self, index: int, mask: Mapping[str, Any], size: list[int]) -> None:
        """A mask of another size overlaps nothing, and the backends do not say so."""
        if mask.get("size") != size:
            raise self._error(
                index,
                f"segmentation has size {_short(mask.get('size'))}, expected that of the image, "
                f"{size}",
            )
        try:
            read_rle(mask)
        except ValueError as error:
            raise self._error(index, f"segmentation is {_short(mask)}: {error}") from None

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


def _with_whole_sides(image: dict[str, Any]) -> dict[str, Any]:
    """The image with sides such as 60.0 as int, as the backends need them."""
    sides = {key: image.get(key) for key in ("height", "width")}
    whole = {k: int(v) for k, v in sides.items() if isinstance(v, float) and v.is_integer()}
    return image | whole


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
