"""Choose what of a COCO file is in the data set: which categories and objects, boxes, keypoints.

Legend: I images and M objects of the file, N chosen objects, K keypoints.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detmix.data.coco.file import CocoCategory, CocoFile, read_keypoints
from detmix.data.detection import check_classes, clean_boxes, keep_boxes
from detmix.data.images import read_image_size
from detmix.data.skipping import Problem, attempt

_SIDE = re.compile("left|right", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}


def choose_objects(
    file: CocoFile,
    categories: Sequence[CocoCategory],
    *,
    clip: bool,
    drop_crowd: bool,
    masks: bool,
    num_keypoints: int,
) -> dict[str, npt.NDArray[Any]]:
    """Return columns ``(N, ...)`` of the objects of some categories, sorted by image.

    Labels are 1, 2, ... in the order of the categories. Also what is not used is there, to be
    counted; of what is used the ``segmentations`` and ``keypoints`` are read.
    """
    label_of = {category.id: label for label, category in enumerate(categories, 1)}
    by_index = np.array([label_of.get(category.id, 0) for category in file.categories])
    labels = by_index[file.category_index]
    order = np.argsort(file.image_index, kind="stable")
    rows = order[labels[order] > 0]
    boxes = file.boxes[rows]
    with np.errstate(over="ignore"):  # what no float holds is beyond the image
        boxes[:, 2:] += boxes[:, :2]
    clean = clean_boxes(boxes, file.sizes[file.image_index[rows]]) if clip else keep_boxes(boxes)
    x1, y1, x2, y2 = clean.boxes.T
    is_dropped = file.iscrowd[rows] & clean.has_area & drop_crowd
    columns: dict[str, npt.NDArray[Any]] = {
        "rows": rows,
        "images": file.image_index[rows],
        "boxes": clean.boxes,
        "labels": labels[rows],
        "iscrowd": file.iscrowd[rows],
        "area": np.where(np.isnan(file.area[rows]), (x2 - x1) * (y2 - y1), file.area[rows]),
        "has_area": clean.has_area,
        "is_clipped": clean.is_clipped,
        "is_dropped": is_dropped,
        "is_used": clean.has_area & ~is_dropped,
        "segmentations": np.empty(len(rows), dtype=np.object_),
        "keypoints": np.zeros((len(rows), num_keypoints, 3), dtype=np.float32),
    }
    _read_shapes(file, columns, masks=masks)
    return columns


def _read_shapes(file: CocoFile, columns: dict[str, npt.NDArray[Any]], *, masks: bool) -> None:
    """Read segmentations and keypoints of what is used, and note what cannot be used."""
    num_keypoints = columns["keypoints"].shape[1]
    fits = np.isfinite(columns["boxes"]).all(axis=1)
    is_read = columns["is_used"] & (masks or num_keypoints > 0 or ~fits)
    for index in np.flatnonzero(is_read).tolist():
        row, image = int(columns["rows"][index]), int(columns["images"][index])
        item = file.items[row]
        try:
            if not fits[index]:
                raise ValueError(f"bbox {item['bbox']} is too large for float32, without clip=True")
            if masks:
                columns["segmentations"][index] = file.segmentation(item, image)
            if num_keypoints:
                keypoints = _read_visible(item.get("keypoints"), num_keypoints)
                columns["keypoints"][index] = keypoints
        except ValueError as error:
            problem = Problem("unusable annotation", ValueError(f"{file.where(row)}: {error}"))
            file.problems.setdefault(image, problem)


def fill_sizes(file: CocoFile, folder: Path) -> None:
    """Read the size of each image whose size the file does not give from its header."""
    for index in np.flatnonzero(np.any(file.sizes == 0, axis=1)).tolist():
        if index not in file.problems:
            size = attempt("unusable image", read_image_size, folder / file.names[index])
            if isinstance(size, Problem):
                file.problems[index] = size
            else:
                file.sizes[index] = size


def choose_categories(file: CocoFile, classes: Sequence[str] | None) -> list[CocoCategory]:
    """Return the category of each class, for each name one."""
    by_name: dict[str, list[CocoCategory]] = {}
    for category in sorted(file.categories, key=lambda category: category.id):
        by_name.setdefault(category.name, []).append(category)
    names = tuple(by_name) if classes is None else check_classes(classes)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(
            f"{file.path}: there is no category {unknown[0]!r}; known are {', '.join(by_name)}"
        )
    used = {file.categories[index].id for index in set(file.category_index.tolist())}
    chosen = [_choose_one(by_name[name], used, file.path) for name in names]
    return chosen if classes is not None else sorted(chosen, key=lambda category: category.id)


def _choose_one(categories: list[CocoCategory], used: set[int], path: Path) -> CocoCategory:
    """Return the one that has annotations, of categories that share a name."""
    with_objects = [category for category in categories if category.id in used]
    if len(with_objects) > 1:
        ids = " and ".join(str(category.id) for category in with_objects)
        raise ValueError(
            f"{path}: the categories {ids} are all named {categories[0].name!r} and have "
            "annotations; expected one, or classes without this name"
        )
    # Super-categories come first: with none annotated, as in a small split, the last is the class.
    return (with_objects or categories)[-1]


def common_keypoints(categories: Sequence[CocoCategory], path: Path) -> tuple[str, ...]:
    """Return the keypoints' names that all categories share; one without any does not count."""
    found = {category.keypoints: category.name for category in categories if category.keypoints}
    if len(found) != 1:
        got = [f"{name!r} has {len(names)} ({', '.join(names)})" for names, name in found.items()]
        raise ValueError(
            f"{path}: keypoints=True, expected the same keypoints for all categories that name "
            f"any, got {'; '.join(got) or 'none'}"
        )
    (names,) = found
    return names


def mirrored_order(names: Sequence[str]) -> tuple[int, ...]:
    """Return which keypoint takes each one's place when the image is mirrored left to right."""
    partners = [_SIDE.sub(lambda side: _OTHER_SIDE.get(side[0], side[0]), name) for name in names]
    indices = {name: index for index, name in enumerate(names)}
    return tuple(indices.get(partner, index) for index, partner in enumerate(partners))


def _read_visible(value: Any, num_keypoints: int) -> npt.NDArray[np.float64]:
    keypoints = read_keypoints(value, num_keypoints)
    for visibility in keypoints[:, 2].tolist():
        if visibility not in (0, 1, 2):
            raise ValueError(f"a keypoint's visibility must be 0, 1 or 2, got {visibility:g}")
    return keypoints
