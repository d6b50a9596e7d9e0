"""Choose what of a COCO file is in the data set: which objects, boxes, keypoints, images.

Legend: I images, M objects of the whole data set, K keypoints.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detmix.data.boxes import CleanBoxes, clean_boxes, keep_boxes
from detmix.data.coco.file import CocoFile, CocoImages, CocoObjects
from detmix.data.coco.masks import rle_size
from detmix.data.images import read_image_size
from detmix.data.skipping import Report, is_of_the_data, raise_problem

_LARGEST = float(np.finfo(np.float32).max)
_SIDE = re.compile("left|right", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}


@dataclass(frozen=True)
class CocoReport:
    """What was found while the annotations were read.

    Attributes:
        num_images: Images.
        num_objects: Objects that are in the data set.
        num_crowd: How many of these are crowds.
        num_empty_images: Images of the data set without an object.
        num_clipped: Boxes that reached beyond the image and were clipped to it; 0 with
            ``clip=False``.
        num_without_area: Boxes dropped because no area was left inside the image; 0 with
            ``clip=False``.
        num_crowd_dropped: Objects left out by ``crowd="drop"``.
        num_images_dropped: Images left out by ``empty="drop"``.
        num_skipped: Images left out by ``on_error="skip"``; all other counts are without them.
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


@dataclass(frozen=True)
class CocoTable:
    """Images, and their objects sorted by image."""

    path: Path
    images: CocoImages
    objects: CocoObjects
    boxes: npt.NDArray[np.float64] | npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @classmethod
    def read(cls, file: CocoFile, category_ids: Sequence[int], path: Path) -> CocoTable:
        """Take the objects of some categories, and the sizes of all images."""
        label_of = {category_id: label for label, category_id in enumerate(category_ids, 1)}
        by_index = np.array([label_of.get(category.id, 0) for category in file.categories])
        labels = by_index[file.objects.category_index]
        order = np.argsort(file.objects.image_index, kind="stable")
        rows = order[labels[order] > 0]
        objects = file.objects.take(rows)
        return cls(path, file.images, objects, objects.boxes, labels[rows])

    def fill_sizes(self, folder: Path, report: Report = raise_problem) -> CocoTable:
        """Read the size of each image whose size the file does not give from its header."""
        images = self.images
        sizes: npt.NDArray[np.int64] = images.sizes.copy()
        for index in np.flatnonzero(np.any(sizes == 0, axis=1)).tolist():
            path = folder / images.names[index]
            try:
                sizes[index] = read_image_size(path)
            except FileNotFoundError:
                message = f"{path}: there is no such file to read the image's size from"
                if report is raise_problem:
                    raise FileNotFoundError(message) from None
                report("missing file", message, images.ids[index])
            except (ValueError, OSError) as error:
                if not is_of_the_data(error):
                    raise
                report("unusable image", str(error), images.ids[index])
        return replace(self, images=replace(images, sizes=sizes))

    def is_used(self, *, clip: bool, drop_crowd: bool) -> npt.NDArray[np.bool_]:
        """Return ``(M,)``, whether `clean` with these arguments keeps each object."""
        has_area = self._clean_boxes().has_area if clip else np.ones(len(self.labels), dtype=bool)
        return has_area & ~(self.objects.iscrowd & drop_crowd)

    def check_objects(
        self,
        report: Report,
        is_used: npt.NDArray[np.bool_],
        *,
        masks: bool = False,
        num_keypoints: int | None = None,
    ) -> None:
        """Report each object whose segmentation or keypoints cannot be used."""
        for row in np.flatnonzero(is_used).tolist():
            image = self.images.ids[int(self.objects.image_index[row])]
            try:
                if masks:
                    self._segmentation(row)
                if num_keypoints is not None:
                    read_keypoints(self.objects.keypoints[row], num_keypoints)
            except ValueError as error:
                report("unusable annotation", f"{self._where(row)}: {error}", image)

    def without_images(self, image_ids: Container[int]) -> CocoTable:
        """Leave out some images, and their objects with them."""
        is_kept = np.array([image_id not in image_ids for image_id in self.images.ids], bool)
        rows = np.flatnonzero(is_kept[self.objects.image_index])
        kept = replace(
            self,
            objects=self.objects.take(rows),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
        )
        return kept._only_images(is_kept)

    def clean(
        self, *, clip: bool, drop_crowd: bool, drop_empty: bool
    ) -> tuple[CocoTable, CocoReport]:
        """Clip boxes, drop those without area and what else is to be dropped, warn once."""
        clean = self._clean_boxes() if clip else self._keep_boxes()
        message = clean.message(self.describe_box)
        if message:
            warnings.warn(message, UserWarning, stacklevel=3)  # of who makes the data set
        is_dropped = self.objects.iscrowd & clean.has_area & drop_crowd
        keep = np.flatnonzero(clean.has_area & ~is_dropped)
        kept = replace(
            self,
            objects=self.objects.take(keep),
            boxes=clean.boxes[keep],
            labels=self.labels[keep],
        )
        table = kept._without_empty_images() if drop_empty else kept
        return table, table._report(clean, int(is_dropped.sum()), len(self.images.ids))

    def offsets(self) -> npt.NDArray[np.int64]:
        """Return ``(I + 1,)``: image ``i`` owns the rows ``offsets[i]`` to ``offsets[i + 1]``."""
        counts = np.bincount(self.objects.image_index, minlength=len(self.images.ids))
        return np.concatenate([[0], np.cumsum(counts)])

    def columns(self) -> dict[str, Tensor]:
        """Return ``boxes``, ``labels``, ``iscrowd`` and ``area`` of all objects as tensors."""
        x1, y1, x2, y2 = self.boxes.T
        area = np.where(np.isnan(self.objects.area), (x2 - x1) * (y2 - y1), self.objects.area)
        return {
            "boxes": torch.from_numpy(self.boxes.astype(np.float32)),
            "labels": torch.from_numpy(self.labels),
            "iscrowd": torch.from_numpy(self.objects.iscrowd.astype(np.int64)),
            "area": torch.from_numpy(area.astype(np.float32)),
        }

    def keypoints(self, num_keypoints: int) -> Tensor:
        """Return the keypoints of all objects, float32 ``(M, K, 3)``."""
        keypoints = np.zeros((len(self.labels), num_keypoints, 3), dtype=np.float32)
        for row, value in enumerate(self.objects.keypoints):
            try:
                keypoints[row] = read_keypoints(value, num_keypoints)
            except ValueError as error:
                raise ValueError(f"{self._where(row)}: {error}") from None
        return torch.from_numpy(keypoints)

    def segmentations(self) -> list[bytes]:
        """Return the packed segmentations of all objects."""
        packed = []
        for row in range(len(self.labels)):
            try:
                packed.append(self._segmentation(row))
            except ValueError as error:
                raise ValueError(f"{self._where(row)}: {error}") from None
        return packed

    def _segmentation(self, row: int) -> bytes:
        value = self.objects.segmentations[row]
        if not isinstance(value, bytes):
            raise ValueError(value or "segmentation is missing or empty, and masks=True needs it")
        height, width = self.images.sizes[self.objects.image_index[row]].tolist()
        if rle_size(value) not in (None, (height, width)):
            raise ValueError(
                f"the RLE's size (height, width) is {rle_size(value)}, but the image is "
                f"{height} x {width}"
            )
        return value

    def _clean_boxes(self) -> CleanBoxes:
        return clean_boxes(self.objects.boxes, self.images.sizes[self.objects.image_index])

    def _keep_boxes(self) -> CleanBoxes:
        kept = keep_boxes(self.objects.boxes)
        fits = np.isfinite(kept.boxes).all(axis=1)
        if not fits.all():
            where = self.describe_box(int(np.argmin(fits)))
            raise ValueError(f"{where}: too large for float32; expected less, or clip=True")
        return kept

    def _without_empty_images(self) -> CocoTable:
        has_objects = np.diff(self.offsets()) > 0
        if not has_objects.any():
            raise ValueError(f'{self.path}: no image has an object left, and empty="drop"')
        return self._only_images(has_objects)

    def _only_images(self, is_kept: npt.NDArray[np.bool_]) -> CocoTable:
        """Keep the images of a mask ``(I,)``; no object must be of another."""
        kept = np.flatnonzero(is_kept)
        images = CocoImages(
            ids=[self.images.ids[index] for index in kept],
            names=[self.images.names[index] for index in kept],
            sizes=self.images.sizes[kept],
        )
        new_index = np.cumsum(is_kept) - 1
        objects = replace(self.objects, image_index=new_index[self.objects.image_index])
        return replace(self, images=images, objects=objects)

    def _report(self, clean: CleanBoxes, num_crowd_dropped: int, num_read: int) -> CocoReport:
        return CocoReport(
            num_images=len(self.images.ids),
            num_objects=len(self.labels),
            num_crowd=int(self.objects.iscrowd.sum()),
            num_empty_images=int((np.diff(self.offsets()) == 0).sum()),
            num_clipped=int(clean.is_clipped.sum()),
            num_without_area=int((~clean.has_area).sum()),
            num_crowd_dropped=num_crowd_dropped,
            num_images_dropped=num_read - len(self.images.ids),
        )

    def _where(self, row: int) -> str:
        index = int(self.objects.image_index[row])
        image = f"image {self.images.ids[index]} ({self.images.names[index]})"
        return f"{self.path}, annotation {self.objects.ids[row]} of {image}"

    def describe_box(self, row: int) -> str:
        """Say where a box stands and how it is written there."""
        x1, y1, x2, y2 = self.objects.boxes[row]
        height, width = self.images.sizes[self.objects.image_index[row]]
        bbox = f"{x1:g}, {y1:g}, {x2 - x1:g}, {y2 - y1:g}"
        return f"{self._where(row)}, bbox = {bbox} in {width} x {height} pixels"


_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}


def common_keypoints(names: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the keypoints' names that all categories share; one without any does not count."""
    with_keypoints = [(category, keypoints) for category, keypoints in names if keypoints]
    if not with_keypoints:
        raise ValueError("keypoints=True, but no category names keypoints")
    first, expected = with_keypoints[0]
    for category, keypoints in with_keypoints[1:]:
        if keypoints != expected:
            raise ValueError(
                f"category {category!r} has {len(keypoints)} keypoints ({', '.join(keypoints)}), "
                f"but {first!r} has {len(expected)} ({', '.join(expected)}); expected the same "
                "for all categories that have any"
            )
    return expected


def mirrored_order(names: Sequence[str]) -> tuple[int, ...]:
    """Return which keypoint takes each one's place when the image is mirrored left to right."""
    partners = [_SIDE.sub(lambda side: _OTHER_SIDE.get(side[0], side[0]), name) for name in names]
    indices = {name: index for index, name in enumerate(names)}
    return tuple(indices.get(partner, index) for index, partner in enumerate(partners))


def read_keypoints(value: Any, num_keypoints: int) -> npt.NDArray[np.float32]:
    """Check one annotation's ``keypoints`` and return them as ``(K, 3)``: x, y, visibility."""
    if value is None:
        return np.zeros((num_keypoints, 3), dtype=np.float32)
    if not isinstance(value, list) or len(value) != 3 * num_keypoints:
        got = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise ValueError(
            f"keypoints must be a list of 3 x {num_keypoints} = {3 * num_keypoints} numbers, "
            f"got {got}"
        )
    for number in value:
        if type(number) not in (int, float) or not abs(number) <= _LARGEST:  # false of NaN too
            raise ValueError(f"keypoints must be finite numbers, got {number!r}")
    keypoints = np.array(value, dtype=np.float32).reshape(num_keypoints, 3)
    for visibility in keypoints[:, 2].tolist():
        if visibility not in (0, 1, 2):
            raise ValueError(f"a keypoint's visibility must be 0, 1 or 2, got {visibility:g}")
    return keypoints
