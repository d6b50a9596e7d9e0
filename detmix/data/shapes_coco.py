"""The synthetic shapes written in COCO's layout, with exact masks and keypoints.

The scenes are those of ``shapes.write_shapes``. What is trained on them takes the very path that
COCO takes: JPEG files and an instances JSON read by :class:`detmix.data.CocoDetection`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detmix.data.shapes import (
    FORMAT,
    SHAPE_CLASSES,
    Scene,
    check_arguments,
    render_scene,
    save_image,
)
from detmix.files import write_once

SHAPE_CATEGORY_IDS = (1, 3, 7, 8, 20)
"""The category ids of ``SHAPE_CLASSES``, with gaps as COCO's have."""

SHAPE_KEYPOINTS = ("top", "bottom", "left_side", "right_side")
"""The keypoints of every category: the outermost pixels that are seen of an object."""

_SPLITS = (("train2017", "num_train"), ("val2017", "num_test"))
_SKELETON = [[1, 2], [3, 4]]  # counted from 1, as COCO's
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
    has its box, its mask as a compressed RLE, the mask's pixels as ``area``, and as keypoints the
    outermost pixels of its mask (by their indices from 0, as COCO has it). The same arguments
    give the same images as :func:`detmix.data.write_shapes`; COCO has no ``difficult``, so that
    nearly transparent objects are objects like all others. Image and annotation ids run from 1
    through both files.

    Like :func:`detmix.data.write_shapes` it leaves nothing unfinished behind, and does nothing
    where the same data set is there already.

    Args:
        root: The folder to write; made if it does not exist.
        num_train: Images in ``train2017``.
        num_test: Images in ``val2017``.
        image_size: The longest side in pixels; the other is between 3/4 of it and all of it.
        seed: Of all images; not negative.

    Returns:
        ``root``.

    Raises:
        FileExistsError: There is something else at ``root``.
        ValueError: A number is out of its range.
    """
    check_arguments(num_train, num_test, image_size, seed)
    root = Path(root)
    description = {
        "made_by": "detmix.data.write_shapes_coco",
        "format": FORMAT,
        "num_train": num_train,
        "num_test": num_test,
        "image_size": image_size,
        "seed": seed,
    }
    with suppress(OSError):
        root.rmdir()  # an empty folder is as good as none; any other stays
    write_once(root, "shapes.json", description, lambda draft: _write_splits(draft, description))
    return root


def _write_splits(root: Path, description: dict[str, Any]) -> None:
    (root / "annotations").mkdir(parents=True)
    image_id = annotation_id = 0
    for split, (name, key) in enumerate(_SPLITS):
        (root / name).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(description[key]):
            image_id += 1
            scene = render_scene(description["seed"], split, index, description["image_size"])
            images.append(_write_image(root / name, image_id, scene))
            for number in range(len(scene.objects)):
                annotation_id += 1
                annotations.append(_describe_object(annotation_id, image_id, scene, number))
        content = {
            "info": {"description": f"synthetic shapes, {name}", "version": "1.0"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": _describe_categories(),
        }
        path = root / "annotations" / f"instances_{name}.json"
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write_image(folder: Path, image_id: int, scene: Scene) -> dict[str, Any]:
    path = folder / f"{image_id:012d}.jpg"
    save_image(path, scene)
    height, width = scene.owners.shape
    return {"id": image_id, "file_name": path.name, "width": width, "height": height}


def _describe_object(
    annotation_id: int, image_id: int, scene: Scene, number: int
) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    mask = scene.owners == number
    item = scene.objects[number]
    x1, y1, x2, y2 = item.box
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": SHAPE_CATEGORY_IDS[SHAPE_CLASSES.index(item.name)],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "keypoints": [v for x, y in _outermost(mask) for v in (x, y, _VISIBLE)],
        "num_keypoints": len(SHAPE_KEYPOINTS),
    }


def _outermost(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (x, y) of the top, bottom, leftmost and rightmost pixel of a mask."""
    rows, columns = np.nonzero(mask)
    points = []
    for along, across, extreme in (
        (rows, columns, rows.min()),
        (rows, columns, rows.max()),
        (columns, rows, columns.min()),
        (columns, rows, columns.max()),
    ):
        candidates = np.sort(across[along == extreme])
        middle = candidates[(len(candidates) - 1) // 2]
        x, y = (middle, extreme) if along is rows else (extreme, middle)
        points.append((int(x), int(y)))
    return points


def _describe_categories() -> list[dict[str, Any]]:
    return [
        {
            "id": category_id,
            "name": name,
            "supercategory": "shape",
            "keypoints": list(SHAPE_KEYPOINTS),
            "skeleton": _SKELETON,
        }
        for category_id, name in zip(SHAPE_CATEGORY_IDS, SHAPE_CLASSES, strict=True)
    ]
