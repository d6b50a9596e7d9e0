"""Detection data in the COCO format as a map-style data set.

Annotations are read once, at construction: mistakes show before training starts.
Legend: I images and M objects of the file, N chosen objects, or those of one image, K keypoints.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detmix.data.coco.categories import (
    CocoCategory,
    choose_categories,
    common_keypoints,
    mirrored_order,
)
from detmix.data.coco.file import CocoFile, Id, id_order, read_coco, read_keypoints
from detmix.data.coco.masks import SegmentationBlock, read_segmentation
from detmix.data.detection import (
    Array,
    Files,
    Problem,
    StoredDetection,
    Transforms,
    attempt,
    check_files,
    clean_boxes,
    keep_boxes,
    read_usable,
    warn_of_boxes,
)
from detmix.data.images import read_image_size, read_sized_image

Columns = dict[str, Array]  # of objects, by their names


@dataclass(frozen=True)
class CocoReport:
    """What was found while the annotations were read; without the images that were skipped.

    Attributes:
        num_empty_images: Images of the data set without an object.
        num_clipped: Boxes that reached beyond the image and were clipped to it.
        num_without_area: Boxes dropped because no area was left inside the image.
        num_crowd_dropped: Objects left out by ``crowd="drop"``.
        num_images_dropped: Images left out by ``empty="drop"``.
        num_skipped: Images left out by ``on_error="skip"``.
    """

    num_images: int
    num_objects: int
    num_crowd: int
    num_empty_images: int
    num_clipped: int
    num_without_area: int
    num_crowd_dropped: int
    num_images_dropped: int
    num_skipped: int = 0


class CocoDetection(StoredDetection):
    """Images and objects of an annotation file in the COCO format.

    A sample is ``(image, target)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an EXIF
    orientation is not applied); the target has ``boxes`` float32 ``(N, 4)`` (x1, y1, x2, y2 in
    pixels, continuous coordinates), ``labels`` int64 ``(N,)`` from 1, without the gaps between
    COCO's category ids, ``iscrowd`` int64 ``(N,)``, ``area`` float32 ``(N,)`` (the file's; that
    of the box where it gives none) and ``image_id``, the image's id in the file; on request
    ``masks`` uint8 ``(N, H, W)`` and ``keypoints`` float32 ``(N, K, 3)``, x, y and visibility.
    Images are sorted by their ids, the objects of one stand as in the file.

    Ids may be written as floats (``1.0``), those of images also be strings, which come last.

    Boxes are clipped to the image, and those without area dropped; one warning tells of both.

    Of several categories of one name, as exports with a super-category have them, the one with
    annotations is in the data set; where none has any, the one with the highest id. Where several
    have, each is a class of its own, with its id in its name, ``"dog (18)"``, as in
    `score_predictions`, and one warning tells so. Another one tells of categories that only stand
    above others, without objects: they are no classes unless ``classes`` names them.

    Args:
        images: The folder that ``file_name`` is relative to. Backslashes in it separate folders
            where there is no such file. Without it, as in LVIS v1, the last two parts of
            ``coco_url`` are taken, ``train2017/000000000009.jpg``.
        annotations: The JSON file: instances or person_keypoints.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        crowd: ``"drop"`` leaves crowds out, for training; the evaluation needs them.
        empty: ``"drop"`` leaves out images that have no object left.
        clip: False keeps all boxes as in the file, for evaluation, also those outside the image
            and without area; only a side of negative length becomes 0. The AP over such targets is
            what pycocotools computes from the file itself, but for the rounding to float32.
        masks: Whether targets have masks.
        keypoints: Whether targets have keypoints; zeros where an object has none.
        classes: Read only objects of these categories; label ``k`` is ``classes[k - 1]``. By
            default all names of the file, sorted by their categories' ids. ``"dog (18)"`` chooses
            among those of one name.
        on_error: As `VOCDetection` has it.
        files: Read only the images of these ``file_name``, at these paths within the folder.

    Attributes:
        category_ids: The classes' ids in the file: label ``k`` is ``category_ids[k - 1]``.
        names: The images' paths within the folder by index.
        image_ids: The images' ids in the file by index, ascending.
        keypoint_names: The keypoints' names; ``()`` where they are not asked for.
        keypoint_flip: For each keypoint the index of the one in its place in an image mirrored
            left to right: ``left_*`` and ``right_*`` change places.
        report: Counts, a `CocoReport`.
        skipped: The images that were left out, each a `SkippedImage`.

    Raises:
        FileNotFoundError: The folder, the annotation file or an image file is missing.
        ValueError: An argument, the annotation file or, on access, an image cannot be used.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        transforms: Transforms | None = None,
        *,
        crowd: Literal["keep", "drop"] = "keep",
        empty: Literal["keep", "drop"] = "keep",
        clip: bool = True,
        masks: bool = False,
        keypoints: bool = False,
        classes: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        files: Files | None = None,
    ) -> None:
        for name, value in (("crowd", crowd), ("empty", empty)):
            if value not in ("keep", "drop"):
                raise ValueError(f'{name} must be "keep" or "drop", got {value!r}')
        self.transforms = transforms
        self._folder, self._path = Path(images), Path(annotations)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{images}: there is no such folder of images")
        file = read_coco(self._path, masks=masks, named=files is None)
        asked = [i for i, name in enumerate(file.names) if files is None or name in files]
        if files is not None:
            file.names[:] = [files.get(name, "") for name in file.names]
        found = {file.categories[index].id for index in np.unique(file.category_index).tolist()}
        by_class = choose_categories(file.categories, found, classes, self._path)
        self.classes, categories = tuple(by_class), tuple(by_class.values())
        self.category_ids = tuple(category.id for category in categories)
        self.keypoint_names = common_keypoints(categories, self._path) if keypoints else ()
        self.keypoint_flip = mirrored_order(self.keypoint_names)
        _find_files(file, self._folder)
        _fill_sizes(file, self._folder)
        columns = _choose_objects(file, categories, clip=clip, drop_crowd=crowd == "drop")
        _read_shapes(file, columns, masks=masks, num_keypoints=len(self.keypoint_names))
        usable, self.skipped = read_usable(
            [name or f"image {id}" for name, id in zip(file.names, file.image_ids, strict=True)],
            file.problems.get,
            lambda index, _: read_sized_image(
                self._folder / file.names[index], file.size(index), self._path
            ),
            on_error,
            self._path,
            asked,
        )
        columns = _take(columns, np.isin(columns["images"], list(usable)))
        used = _take(columns, columns["is_used"])
        chosen = sorted(set(used["images"].tolist())) if empty == "drop" else list(usable)
        if not chosen:
            raise ValueError(f'{self._path}: no image has an object left, and empty="drop"')
        self.names = [file.names[index] for index in chosen]
        if on_error == "raise":
            check_files(self._folder, self.names)
        warn_of_boxes(
            columns["has_area"],
            columns["is_clipped"],
            lambda index: file.describe_box(columns["rows"][index]),
        )
        self.image_ids = [file.image_ids[index] for index in chosen]
        counts = np.bincount(used["images"], minlength=len(file.names))[chosen]
        dtypes = {"boxes": "f4", "labels": "i8", "iscrowd": "i8", "area": "f4"}
        dtypes |= {"keypoints": "f4"} if keypoints else {}
        stored = {key: used[key].astype(dtype) for key, dtype in dtypes.items()}
        self._store(file.sizes[chosen], counts, stored)
        self._segmentations = SegmentationBlock(used["segmentations"].tolist()) if masks else None
        self.report = CocoReport(
            num_images=len(chosen),
            num_objects=len(used["rows"]),
            num_crowd=int(used["iscrowd"].sum()),
            num_empty_images=int((counts == 0).sum()),
            num_clipped=int(columns["is_clipped"].sum()),
            num_without_area=int((~columns["has_area"]).sum()),
            num_crowd_dropped=int(columns["is_dropped"].sum()),
            num_images_dropped=len(usable) - len(chosen),
            num_skipped=len(self.skipped),
        )

    def target(self, index: int) -> dict[str, Any]:
        """Return a copy of one image's target, as stored and without ``transforms``."""
        target = super().target(index)
        if self._segmentations is not None:
            size = self.image_size(index)
            target["masks"] = self._segmentations.decode(*self._rows(index), size)
        return target

    def image_path(self, index: int) -> Path:
        """Return the path of one image's file."""
        return self._folder / self.names[index]

    def index_of(self, image_id: Id) -> int:
        """Return the index of the image with this id; ValueError if none has it."""
        index = bisect_left(self.image_ids, id_order(image_id), key=id_order)
        if index == len(self) or self.image_ids[index] != image_id:
            raise ValueError(
                f"no image of {self._path} has the id {image_id!r}, or it was left out"
            )
        return index

    def _annotation_path(self, index: int) -> Path:
        return self._path


def _take(columns: Columns, keep: Array) -> Columns:
    return {key: column[keep] for key, column in columns.items()}


def _find_files(file: CocoFile, folder: Path) -> None:
    """Take backslashes, as Windows writes them, for slashes where a file has none in its name."""
    for index, name in enumerate(file.names):
        if "\\" in name and not (folder / name).is_file():
            file.names[index] = name.replace("\\", "/")


def _fill_sizes(file: CocoFile, folder: Path) -> None:
    """Read the size of each image whose size the file does not give from its header."""
    for index in np.flatnonzero(np.any(file.sizes == 0, axis=1)).tolist():
        if index not in file.problems:
            size = attempt("unusable image", read_image_size, folder / file.names[index])
            if isinstance(size, Problem):
                file.problems[index] = size
            else:
                file.sizes[index] = size


def _choose_objects(
    file: CocoFile, categories: Sequence[CocoCategory], *, clip: bool, drop_crowd: bool
) -> Columns:
    """Return columns ``(N, ...)`` of the objects of some categories, sorted by image.

    Labels are 1, 2, ... in the order of the categories. Also what is not used is there, to be
    counted.
    """
    label_of = {category.id: label for label, category in enumerate(categories, 1)}
    labels = np.array([label_of.get(category.id, 0) for category in file.categories])
    order = np.argsort(file.image_index, kind="stable")
    rows = order[labels[file.category_index[order]] > 0]
    images, area = file.image_index[rows], file.area[rows]
    boxes = file.boxes[rows]
    with np.errstate(over="ignore"):  # what no float holds is beyond the image
        boxes[:, 2:] += boxes[:, :2]
    clean = clean_boxes(boxes, file.sizes[images]) if clip else keep_boxes(boxes)
    x1, y1, x2, y2 = clean.boxes.T
    is_dropped = file.iscrowd[rows] & clean.has_area & drop_crowd
    return {
        "rows": rows,
        "images": images,
        "boxes": clean.boxes,
        "labels": labels[file.category_index[rows]],
        "iscrowd": file.iscrowd[rows],
        "area": np.where(np.isnan(area), (x2 - x1) * (y2 - y1), area),
        "has_area": clean.has_area,
        "is_clipped": clean.is_clipped,
        "is_dropped": is_dropped,
        "is_used": clean.has_area & ~is_dropped,
    }


def _read_shapes(file: CocoFile, columns: Columns, *, masks: bool, num_keypoints: int) -> None:
    """Add segmentations and keypoints of what is used, and note what cannot be used."""
    num = len(columns["rows"])
    columns["segmentations"] = np.empty(num, dtype=np.object_)
    columns["keypoints"] = np.zeros((num, num_keypoints, 3), dtype=np.float32)
    fits = np.all(np.isfinite(columns["boxes"]), axis=1)
    is_read = columns["is_used"] & (masks or num_keypoints > 0 or ~fits)
    for index in np.flatnonzero(is_read).tolist():
        row, image = int(columns["rows"][index]), int(columns["images"][index])
        item = file.items[row]
        try:
            if not fits[index]:
                raise ValueError(f"bbox {item['bbox']} is too large for float32, without clip=True")
            if masks:
                columns["segmentations"][index] = read_segmentation(item, file.size(image))
            if num_keypoints:
                keypoints = read_keypoints(item.get("keypoints"), num_keypoints)
                visibility = keypoints[:, 2].tolist()
                if not {0, 1, 2}.issuperset(visibility):
                    raise ValueError(f"keypoints' visibility must be 0, 1 or 2, got {visibility}")
                columns["keypoints"][index] = keypoints
        except ValueError as error:
            problem = Problem("unusable annotation", ValueError(f"{file.where(row)}: {error}"))
            file.problems.setdefault(image, problem)
