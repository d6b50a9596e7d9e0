"""The synthetic shapes written in COCO's layout, with exact masks and keypoints.

The scenes are those of `write_shapes`. What is trained on them takes the very path that COCO takes:
JPEG files and an instances JSON.
"""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detmix.data.shapes import SHAPE_CLASSES, Scene, describe, save_image, scenes
from detmix.files import write_once

SHAPE_CATEGORY_IDS = (1, 3, 7, 8, 20)
"""The category ids of ``SHAPE_CLASSES``, with gaps as COCO's have."""

# The keypoints of every category: the outermost pixels that are seen of an object.
_KEYPOINTS = ["top", "bottom", "left_side", "right_side"]
_VISIBLE = 2


def write_shapes_coco(
    root: str | Path,
    num_train: int = 1600,
    num_test: int = 300,
    image_size: int = 128,
    seed: int = 0,
) -> Path:
    """Write the data set: ``root/train2017``, ``root/val2017`` and ``root/annotations``.

    The annotations are ``instances_train2017.json`` and ``instances_val2017.json``. Every object
    has its box, its mask as a polygon along the edges of pixels, which rasterizes to exactly the
    mask, the mask's pixels as ``area``, and as keypoints the outermost pixels of its mask (by their
    indices from 0, as COCO has it). Image and annotation ids run from 1 through both files.

    Arguments, errors and images are those of `write_shapes`. COCO has no ``difficult``: nearly
    transparent objects are objects like all others.
    """
    description = describe("write_shapes_coco", num_train, num_test, image_size, seed)
    root = Path(root)
    with suppress(OSError):
        root.rmdir()  # an empty folder is as good as none; any other stays
    write_once(root, "shapes.json", description, lambda draft: _write_splits(draft, description))
    return root


def _write_splits(root: Path, description: dict[str, Any]) -> None:
    (root / "annotations").mkdir(parents=True)
    annotation_ids = itertools.count(1)
    pairs = zip(SHAPE_CATEGORY_IDS, SHAPE_CLASSES, strict=True)
    categories = [{"id": id, "name": name, "keypoints": _KEYPOINTS} for id, name in pairs]
    for split, folder in enumerate((root / "train2017", root / "val2017")):
        folder.mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id, scene in scenes(description, split):
            name = f"{image_id:012d}.jpg"
            save_image(folder / name, scene)
            height, width = scene.owners.shape
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for number in range(len(scene.objects)):
                ids = {"id": next(annotation_ids), "image_id": image_id}
                annotations.append(ids | _describe_object(scene, number))
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = root / "annotations" / f"instances_{folder.name}.json"
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _describe_object(scene: Scene, number: int) -> dict[str, Any]:
    mask = scene.owners == number
    item = scene.objects[number]
    x1, y1, x2, y2 = item.box
    return {
        "category_id": SHAPE_CATEGORY_IDS[SHAPE_CLASSES.index(item.name)],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": [outline(mask)],
        "keypoints": [v for x, y in _outermost(mask) for v in (x, y, _VISIBLE)],
        "num_keypoints": len(_KEYPOINTS),
    }


def outline(mask: npt.NDArray[np.bool_]) -> list[float]:
    """Return x1, y1, x2, y2, ... of one polygon along the edges of a mask's pixels."""
    import cv2

    # OpenCV goes from the centre of one pixel to the next. Of pixels of 3 x 3 those centres are a
    # third off their edges and are rounded to them.
    fine = np.kron(mask, np.ones((3, 3))).astype(np.uint8)
    contours, _ = cv2.findContours(fine, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    # Each part or hole begins and ends at one point: the ways there are gone twice, and enclose
    # nothing.
    start = contours[0][:1]
    points = np.concatenate([[*contour, contour[0], *start] for contour in contours])
    corners = (points[:, 0] + 1) // 3
    is_new = np.any(corners != np.roll(corners, 1, axis=0), axis=1)
    return [float(value) for value in corners[is_new].ravel()]


def _outermost(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (x, y) of the top, bottom, leftmost and rightmost pixel, of several the middle one."""
    rows, columns = np.nonzero(mask)
    points = []
    for places in (rows, columns):
        for end in (places.min(), places.max()):
            found = np.flatnonzero(places == end)
            middle = found[(len(found) - 1) // 2]
            points.append((int(columns[middle]), int(rows[middle])))
    return points
