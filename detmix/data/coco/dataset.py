"""Detection data in the COCO format as a map-style data set.

Annotations are read once, at construction: mistakes show before training starts.
Legend: I images, M objects of the whole data set, N objects of one image, K keypoints.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from detmix.data.coco.choose import (
    choose_categories,
    choose_objects,
    common_keypoints,
    fill_sizes,
    mirrored_order,
)
from detmix.data.coco.file import CocoFile, read_coco
from detmix.data.coco.masks import SegmentationBlock
from detmix.data.detection import StoredDetection, Transforms, check_files, warn_of_boxes
from detmix.data.images import read_sized_image
from detmix.data.skipping import Problem, attempt, read_usable


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

    Boxes are clipped to the image; those without area are dropped, as detectors need it. Both are
    counted in ``report`` and told in one warning. COCO's own evaluation does neither: evaluate
    on a data set with ``clip=False``.

    Of several categories of one name, as exports with a super-category have them, the one with
    annotations is in the data set; where none has any, the one with the highest id.

    Args:
        images: The folder that ``file_name`` is relative to.
        annotations: The JSON file: instances or person_keypoints.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        crowd: ``"drop"`` leaves crowds out, for training; the evaluation needs them.
        empty: ``"drop"`` leaves out images that have no object left.
        clip: False keeps all boxes as in the file, also those outside the image and without area;
            only a side of negative length becomes 0. The AP over such targets is what pycocotools
            computes from the file itself, but for the rounding to float32.
        masks: Whether targets have masks.
        keypoints: Whether targets have keypoints; zeros where an object has none.
        classes: Read only objects of these categories; label ``k`` is ``classes[k - 1]``. By
            default all names of the file, sorted by their categories' ids.
        on_error: ``"skip"`` leaves out images that are missing, cannot be decoded or have an
            annotation that cannot be used, as `VOCDetection` does.

    Attributes:
        classes: The class names.
        category_ids: The classes' ids in the file: label ``k`` is ``category_ids[k - 1]``.
        names: The images' ``file_name`` by index.
        image_ids: The images' ids by index, ascending.
        keypoint_names: The keypoints' names; ``()`` where they are not asked for.
        keypoint_flip: For each keypoint the index of the one in its place in an image mirrored
            left to right: ``left_*`` and ``right_*`` change places.
        report: Counts, a `CocoReport`.
        skipped: The images that were left out, each a `SkippedImage`.

    Raises:
        FileNotFoundError: The folder, the annotation file or an image file is missing.
        ValueError: An argument or the annotation file cannot be used, as where two categories of
            one name both have annotations, or on access an image; the message names the file, the
            annotation and the value.
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
    ) -> None:
        for name, value in (("crowd", crowd), ("empty", empty)):
            if value not in ("keep", "drop"):
                raise ValueError(f'{name} must be "keep" or "drop", got {value!r}')
        self.transforms = transforms
        self._folder, self._path = Path(images), Path(annotations)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{images}: there is no such folder of images")
        file = read_coco(self._path, masks=masks)
        categories = choose_categories(file, classes)
        self.classes = tuple(category.name for category in categories)
        self.category_ids = tuple(category.id for category in categories)
        self.keypoint_names = common_keypoints(categories, self._path) if keypoints else ()
        self.keypoint_flip = mirrored_order(self.keypoint_names)
        fill_sizes(file, self._folder)
        columns = choose_objects(
            file,
            categories,
            clip=clip,
            drop_crowd=crowd == "drop",
            masks=masks,
            num_keypoints=len(self.keypoint_names),
        )
        usable, self.skipped = read_usable(
            [name or f"image {id}" for name, id in zip(file.names, file.image_ids, strict=True)],
            lambda index: _find_problem(file, index, self._folder, decode=on_error == "skip"),
            on_error,
            self._path,
        )
        columns = _take(columns, np.isin(columns["images"], list(usable)))
        warn_of_boxes(
            columns["has_area"],
            columns["is_clipped"],
            lambda index: file.describe_box(columns["rows"][index]),
        )
        used = _take(columns, columns["is_used"])
        chosen = sorted(set(used["images"].tolist())) if empty == "drop" else list(usable)
        if not chosen:
            raise ValueError(f'{self._path}: no image has an object left, and empty="drop"')
        self.names = [file.names[index] for index in chosen]
        if on_error == "raise":
            check_files(self._folder, self.names)
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

    def index_of(self, image_id: int) -> int:
        """Return the index of the image with this id; ValueError if none has it."""
        index = bisect_left(self.image_ids, image_id)
        if index == len(self) or self.image_ids[index] != image_id:
            raise ValueError(f"no image of {self._path} has the id {image_id}, or it was left out")
        return index

    def _annotation_path(self, index: int) -> Path:
        return self._path


def _take(
    columns: dict[str, npt.NDArray[Any]], keep: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    return {key: column[keep] for key, column in columns.items()}


def _find_problem(file: CocoFile, index: int, folder: Path, *, decode: bool) -> Problem | None:
    """Return what is wrong with an image; whether it can be decoded is tried on request."""
    if index in file.problems or not decode:
        return file.problems.get(index)
    path, size = folder / file.names[index], tuple(file.sizes[index].tolist())
    image = attempt("unusable image", read_sized_image, path, size, file.path)
    return image if isinstance(image, Problem) else None
