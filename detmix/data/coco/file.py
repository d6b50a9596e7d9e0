"""Read a file in the COCO format (https://cocodataset.org/#format-data) into checked columns.

Data sets and scoring read by it, so that what trains can be scored. Ids are integers, also where
they are written as 1.0; images and objects may have names in their place. Legend: I images, M
objects of the whole file, K keypoints.
"""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from detmix.data.coco.categories import CocoCategory, read_categories
from detmix.data.coco.masks import pack_item, shorten, strip_item
from detmix.data.detection import Problem
from detmix.files import read_file

_PARTS = ("images", "annotations", "categories")
_LARGEST = float(np.finfo(np.float32).max)
_MOST_PIXELS = 2**31  # of a side

Id = int | str


@dataclass(frozen=True)
class CocoFile:
    """Images sorted by their ids, objects in the order of the file, and what is wrong with them.

    An object that is among the ``problems`` of its image is not among the objects. ``items`` are
    the objects as in the file, of which segmentation and keypoints are read when they are used.
    """

    path: Path
    categories: tuple[CocoCategory, ...]
    image_ids: list[Id]
    names: list[str]
    sizes: npt.NDArray[np.int64]  # (I, 2) height, width; 0 where the file gives none
    items: list[dict[str, Any]]
    numbers: list[int]  # of the items in the file's list
    image_index: npt.NDArray[np.int64]  # (M,)
    category_index: npt.NDArray[np.int64]  # (M,)
    boxes: npt.NDArray[np.float64]  # (M, 4) x, y, width, height
    area: npt.NDArray[np.float64]  # (M,) NaN where the file gives none
    iscrowd: npt.NDArray[np.bool_]  # (M,)
    problems: dict[int, Problem]  # the first of each image, by its index

    def where(self, row: int) -> str:
        """Say where an object stands."""
        index = int(self.image_index[row])
        name = f" ({self.names[index]})" if self.names[index] else ""
        image = f"image {self.image_ids[index]}{name}"
        number = self.numbers[row]
        return (
            f"{self.path}, annotation {self.items[row].get('id')} of {image}, annotations[{number}]"
        )

    def size(self, index: int) -> tuple[int, int]:
        """Return an image's height and width."""
        height, width = self.sizes[index].tolist()
        return height, width

    def describe_box(self, row: int) -> str:
        """Say where a box stands and how it is written there."""
        height, width = self.size(self.image_index[row])
        bbox = ", ".join(f"{value:g}" for value in self.boxes[row])
        return f"{self.where(row)}, bbox = {bbox} in {width} x {height} pixels"


def read_coco(path: str | Path, *, masks: bool = False, named: bool = True) -> CocoFile:
    """Read an instances or person_keypoints file; what is wrong with the whole of it raises."""
    # Only with `named` must images have a file name and objects an id.
    path = Path(path)
    with paused_collection():
        content = load_json(path, "annotations", masks=masks)
        for part in _PARTS:
            _check_part(content, part, path, may_be_empty=not named or part == "annotations")
        where = f"{path}, category"
        categories = read_categories(_by_id(content["categories"], where), where)
        images = sorted(
            _by_id(content["images"], f"{path}, image"), key=lambda image: id_order(image[0])
        )
        image_ids = [image_id for image_id, _ in images]
        problems: dict[int, Problem] = {}
        names, sizes = [], []
        for index, (image_id, item) in enumerate(images):
            where = f"{path}, image {image_id}"
            names.append(_read_name(item, where, must_lead_inside=named))
            try:
                if named and (not names[-1] or "://" in names[-1]):
                    got = repr(item.get("file_name"))
                    raise ValueError(f"expected a file_name, a path within the folder, got {got}")
                sizes.append((_read_side(item, "height"), _read_side(item, "width")))
            except ValueError as error:
                problems[index] = Problem("unusable annotation", ValueError(f"{where}: {error}"))
                sizes.append((0, 0))
        if named:
            _by_id(content["annotations"], f"{path}, annotation")
        if any("neg_category_ids" in item for _, item in images):
            warnings.warn(
                f"{path}: not every category is annotated in every image (neg_category_ids, as in "
                "LVIS): COCO's AP takes what is found of the others for false, LVIS's does not",
                UserWarning,
                stacklevel=3,
            )
        columns = _read_objects(content["annotations"], image_ids, categories, path, problems)
        return CocoFile(
            path=path,
            categories=categories,
            image_ids=image_ids,
            names=names,
            sizes=np.array(sizes, dtype=np.int64),
            problems=problems,
            **columns,
        )


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keep the garbage collector from walking the entries again and again as they are made."""
    # There are several objects for each entry and no cycles among them: the collector would take a
    # third of the time of reading, and of the faster backend's.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_json(path: Path, what: str, *, masks: bool) -> Any:
    """Parse a JSON file; segmentations are packed, or left out, as it is parsed."""
    # As Python objects they would take several gigabytes for COCO's training images.
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a JSON file of {what}")
    try:
        text = str(read_file(path), "utf-8-sig")
        return json.loads(text, object_hook=pack_item if masks else strip_item)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON of {what}: {error}") from error


def read_id(value: Any) -> Id | None:
    """Return an id; None for what is none. A string is no number, whatever it says."""
    if type(value) is float and value.is_integer():  # pandas makes floats of a column with gaps
        value = int(value)
    is_number = type(value) is int and -(2**63) <= value < 2**63
    return value if is_number or (isinstance(value, str) and value) else None


def id_order(value: Id) -> tuple[bool, Id]:
    """Return what ids are sorted by: strings come last."""
    return isinstance(value, str), value


def look_up(item: Mapping[str, Any], key: str, known: Mapping[Any, int]) -> int:
    """Return the index of the image or category that an entry names."""
    index = known.get(read_id(item.get(key)))
    if index is None:
        raise ValueError(f"{key} must be one of the annotation file's, got {item.get(key)!r}")
    return index


def read_box(bbox: Any) -> tuple[float, float, float, float]:
    """Return an entry's x, y, width and height."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_finite, bbox)):
        raise ValueError(f"bbox must be 4 finite numbers (x, y, width, height), got {bbox!r}")
    x, y, width, height = map(float, bbox)
    return x, y, width, height


def read_flag(item: Mapping[str, Any], key: str) -> bool:
    """Return a flag of an object; False where it is absent or null."""
    flag = item.get(key)
    if flag not in (0, 1, None):
        raise ValueError(f"{key} must be 0 or 1, got {flag!r}")
    return bool(flag)


def read_keypoints(value: Any, num_keypoints: int) -> npt.NDArray[np.float64]:
    """Return an entry's ``keypoints`` as ``(K, 3)``: x, y, visibility; zeros where it has none."""
    if value is None:
        return np.zeros((num_keypoints, 3))
    if not isinstance(value, list) or len(value) != 3 * num_keypoints:
        got = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise ValueError(
            f"keypoints must be a list of 3 x {num_keypoints} = {3 * num_keypoints} numbers, "
            f"got {got}"
        )
    for number in value:
        if type(number) not in (int, float) or not abs(number) <= _LARGEST:  # false of NaN too
            raise ValueError(f"keypoints must be finite numbers, got {number!r}")
    return np.array(value, dtype=np.float64).reshape(num_keypoints, 3)


def is_finite(value: Any) -> bool:
    """Tell whether a value of a JSON file is a number that a float holds."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _check_part(content: Any, part: str, path: Path, may_be_empty: bool) -> None:
    items = content.get(part) if isinstance(content, dict) else None
    if not isinstance(items, list):
        has = list(content) if isinstance(content, dict) else shorten(content)
        raise ValueError(
            f'{path}: expected an instances or person_keypoints file with a list "{part}", got '
            f"{has}; {part} is {shorten(items)}"
        )
    if not items and not may_be_empty:
        raise ValueError(f'{path}: the list "{part}" is empty')
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{path}, {part}[{number}]: must be an object, got {shorten(item)}")


def _read_name(item: Mapping[str, Any], where: str, must_lead_inside: bool) -> str:
    """Return an image's ``file_name``, or as of LVIS the end of its URL; "" where it has none."""
    name, url = item.get("file_name"), item.get("coco_url")
    if name is None and isinstance(url, str):
        name = "/".join(url.split("/")[-2:])
    name = name if isinstance(name, str) else ""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    leads_out = path.root or PurePath(name).anchor or ".." in path.parts or "\0" in name
    if must_lead_inside and leads_out:
        raise ValueError(
            f"{where}: refused: file_name leads out of the images' folder, got {name!r}; expected "
            "a path within it: cut off what stands before"
        )
    return name


def _read_side(item: Mapping[str, Any], key: str) -> int:
    side = item.get(key) or 0
    if type(side) not in (int, float) or not 0 <= side <= _MOST_PIXELS or side % 1:
        raise ValueError(f"{key} must be a number of whole pixels, got {side!r}")
    return int(side)


def _read_objects(
    items: list[dict[str, Any]],
    image_ids: list[Id],
    categories: tuple[CocoCategory, ...],
    path: Path,
    problems: dict[int, Problem],
) -> dict[str, Any]:
    """Return the columns of the objects."""
    images: dict[Any, int] = {image_id: index for index, image_id in enumerate(image_ids)}
    known = {category.id: index for index, category in enumerate(categories)}
    numbers, rows, boxes = [], [], []
    for number, item in enumerate(items):
        try:
            row = (
                look_up(item, "image_id", images),
                look_up(item, "category_id", known),
                _read_area(item.get("area")),
                read_flag(item, "iscrowd"),
            )
            boxes.append(read_box(item.get("bbox")))
        except ValueError as error:
            hint = " (is this a captions file?)" if "caption" in item else ""
            where = f"{path}, annotation {item.get('id')}, annotations[{number}]"
            told = ValueError(f"{where}: {error}{hint}")
            image = images.get(read_id(item.get("image_id")))
            if image is None:
                raise told from None
            problems.setdefault(image, Problem("unusable annotation", told))
            continue
        rows.append(row)
        numbers.append(number)
    image_index, category_index, area, iscrowd = zip(*rows, strict=True) if rows else [()] * 4
    return {
        "items": [items[number] for number in numbers],
        "numbers": numbers,
        "image_index": np.array(image_index, dtype=np.int64),
        "category_index": np.array(category_index, dtype=np.int64),
        "boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
        "area": np.array(area, dtype=np.float64),
        "iscrowd": np.array(iscrowd, dtype=np.bool_),
    }


def _by_id(items: list[dict[str, Any]], where: str) -> list[tuple[Id, dict[str, Any]]]:
    """Return ids and items; each id must be there once."""
    ids = []
    for number, item in enumerate(items):
        value = read_id(item.get("id"))
        if value is None:
            raise ValueError(
                f"{where} number {number} (from 0): id must be an integer or a string, got "
                f"{shorten(item.get('id'))}"
            )
        ids.append(value)
    if len(set(ids)) < len(ids):
        twice = next(value for value, count in Counter(ids).items() if count > 1)
        raise ValueError(f"{where} {twice}: the id is there twice")
    return list(zip(ids, items, strict=True))


def _read_area(area: Any) -> float:
    if area is None:
        return math.nan
    if not is_finite(area) or area < 0:
        raise ValueError(f"area must be a finite number of pixels, not negative, got {area!r}")
    return float(area)
