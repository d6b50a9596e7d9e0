"""Cut the objects out of a detection data set: a classification set in ``ImageFolder`` layout.

What a detector's backbone is pretrained on where there are no other images: its own objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from detmix.data.voc import VOC_CLASSES, VOCDetection
from detmix.data.write_once import write_once

__all__ = ["write_object_crops"]

_FORMAT = 1  # raise it whenever the same arguments give other crops


def write_object_crops(
    root: str | Path,
    out: str | Path,
    *,
    train_sets: Sequence[tuple[str, str]] = (("2007", "trainval"),),
    val_sets: Sequence[tuple[str, str]] = (("2007", "test"),),
    classes: Sequence[str] = VOC_CLASSES,
    size: int = 48,
    context: float = 1.2,
) -> Path:
    """Write every object that is not difficult as a square image of its own.

    The square has its centre at the box's and ``context`` times the box's longer side. Where it
    reaches beyond the image it is moved inside, so that it shows what is really there; where it
    is larger than the image, the image's outermost pixels are repeated. It is resized, with
    antialiasing, and written as ``out/train/<class>/<image id>_<k>.png`` or ``out/val/...`` for
    the k-th such object of its image, from 0. A class without objects gets no folder.

    Like :func:`detmix.data.write_shapes` it leaves nothing unfinished behind, and does nothing
    if the same crops are there already. The same means: of the same objects of the same images,
    by their names, boxes and classes; pixels are not compared.

    Args:
        root: The devkit, as :class:`detmix.data.VOCDetection` takes it.
        out: The folder to write; must not exist, unless from an earlier call.
        train_sets: Pairs of year and split that the folder ``train`` is made from.
        val_sets: The same for the folder ``val``.
        classes: The data set's class names.
        size: Side of the crops that are written, in pixels.
        context: Side of the square relative to the box's longer side; at least 1.

    Returns:
        ``out``, as :class:`detmix.data.ImageClasses` takes it.

    Raises:
        FileExistsError: There is something else at ``out``.
        FileNotFoundError: The devkit or a part of it is missing.
        ValueError: An argument is out of its range, a class name cannot name a folder, a split
            has no object to cut out, or the data set cannot be read.
    """
    _check_arguments(classes, size, context)
    splits = {
        name: VOCDetection(root, image_sets, difficult="drop", classes=classes)
        for name, image_sets in (("train", train_sets), ("val", val_sets))
    }
    for name, dataset in splits.items():
        if dataset.report.num_objects == 0:
            raise ValueError(
                f"{root}: no object to cut out for {name!r} in {dataset.names[0]}, ..."
            )
    description = {
        "made_by": "detmix.data.write_object_crops",
        "format": _FORMAT,
        "size": size,
        "context": context,
        "objects": {name: _describe(dataset) for name, dataset in splits.items()},
    }
    out = Path(out)
    write_once(
        out, "crops.json", description, lambda draft: _write_splits(draft, splits, description)
    )
    return out


def crop_square(
    image: npt.NDArray[np.uint8], box: Sequence[float], context: float
) -> npt.NDArray[np.uint8]:
    """Cut the square around a box out of an image, as :func:`write_object_crops` says.

    Args:
        image: uint8 ``(H, W, 3)``.
        box: ``x1, y1, x2, y2`` in pixels, continuous coordinates.
        context: Side of the square relative to the box's longer side.

    Returns:
        uint8 ``(S, S, 3)``, with S the side rounded to whole pixels, at least 1.
    """
    x1, y1, x2, y2 = box
    side = max(round(context * max(x2 - x1, y2 - y1)), 1)
    rows = _indices((y1 + y2) / 2, side, image.shape[0])
    columns = _indices((x1 + x2) / 2, side, image.shape[1])
    return image[rows[:, None], columns]


def _indices(centre: float, side: int, length: int) -> npt.NDArray[np.int64]:
    """Return which ``side`` of an axis' ``length`` pixels are shown, one repeated if need be."""
    start = round(centre - side / 2)
    if side <= length:
        start = min(max(start, 0), length - side)
    return np.clip(np.arange(start, start + side), 0, length - 1)


def _write_splits(
    folder: Path, splits: dict[str, VOCDetection], description: dict[str, Any]
) -> None:
    for name, dataset in splits.items():
        for class_name in description["objects"][name]["classes"]:
            (folder / name / class_name).mkdir(parents=True)
        ids = _image_ids(dataset.names)
        for index, image_id in enumerate(ids):
            _write_crops(folder / name, image_id, dataset, index, description)


def _write_crops(
    folder: Path, image_id: str, dataset: VOCDetection, index: int, description: dict[str, Any]
) -> None:
    image, target = dataset[index]
    pixels = image.permute(1, 2, 0).numpy()
    size = (description["size"],) * 2
    objects = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
    for number, (box, label) in enumerate(objects):
        crop = Image.fromarray(crop_square(pixels, box, description["context"]))
        crop = crop.resize(size, Image.Resampling.BILINEAR)
        path = folder / dataset.classes[label - 1] / f"{image_id}_{number}.png"
        crop.save(path, compress_level=1)  # a quarter faster, a tenth more bytes


def _describe(dataset: VOCDetection) -> dict[str, Any]:
    """Count the objects of each class, in the classes' order, and make a digest of all."""
    digest = hashlib.blake2b("\n".join(dataset.names).encode(), digest_size=16)
    counts = np.zeros(len(dataset.classes), dtype=np.int64)
    for index in range(len(dataset)):
        target = dataset.target(index)
        labels = target["labels"].numpy()
        counts += np.bincount(labels - 1, minlength=len(counts))
        digest.update(np.int64(len(labels)).tobytes())
        digest.update(labels.tobytes() + target["boxes"].numpy().tobytes())
    named = zip(dataset.classes, counts.tolist(), strict=True)
    return {
        "images": len(dataset),
        "digest": digest.hexdigest(),
        "classes": {name: count for name, count in named if count},
    }


def _image_ids(names: Sequence[str]) -> list[str]:
    """Shorten ``"VOC2007/000005"`` to ``"000005"``, or ``"VOC2007_000005"`` over several years."""
    if len({name.partition("/")[0] for name in names}) > 1:
        return [name.replace("/", "_") for name in names]
    return [name.partition("/")[2] for name in names]


def _check_arguments(classes: Sequence[str], size: int, context: float) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if not 1 <= context < float("inf"):
        raise ValueError(f"context must be at least 1, got {context}")
    for name in classes:
        if name.startswith(".") or set(name) & set("/\\\0"):
            raise ValueError(f"class {name!r} cannot name a folder")
