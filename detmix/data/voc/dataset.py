"""Pascal VOC detection (and any data set in its layout) as a map-style data set.

Annotations are read once, at construction: mistakes show before training starts instead of in a
worker, and what is held afterwards is a few flat tensors, so that forked workers share them.
Legend: I images, M objects of the whole data set, N objects of one image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.data.boxes import clean_boxes
from detmix.data.images import check_image_size, read_image_size, read_jpeg
from detmix.data.skipping import SkippedImage, check_on_error, find_unusable, skip_message
from detmix.data.voc.layout import ImageEntry, list_entries
from detmix.data.voc.xml import VOCAnnotation, read_annotation

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 classes of VOC 2007 to 2012 (devkit, ``VOCinit.m``); label 1 is the first of them."""


@dataclass(frozen=True)
class VOCReport:
    """What was found while the annotations were read.

    Attributes:
        num_images: Images.
        num_objects: Objects that are in the data set.
        num_difficult: How many of these are marked difficult.
        num_empty_images: Images left without an object.
        num_clipped: Boxes that reached beyond the image and were clipped to it.
        num_without_area: Boxes dropped because no area was left inside the image.
        num_difficult_dropped: Objects left out by ``difficult="drop"``.
        num_skipped: Images left out by ``on_error="skip"``; all other counts are without them.
    """

    num_images: int
    num_objects: int
    num_difficult: int
    num_empty_images: int
    num_clipped: int
    num_without_area: int
    num_difficult_dropped: int
    num_skipped: int = 0


class VOCDetection(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and objects of one or more splits of a Pascal VOC devkit.

    A sample is ``(image, target)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an EXIF
    orientation is not applied: VOC boxes are in stored pixels); the target has ``boxes`` float32
    ``(N, 4)`` (x1, y1, x2, y2 in pixels, continuous coordinates), ``labels`` int64 ``(N,)`` from
    1, ``difficult`` bool ``(N,)`` and ``image_id``, the sample's index.

    Boxes are clipped to the image; those without area are dropped. Both are counted in
    ``report`` and told in one warning.

    Args:
        root: The devkit (``root/VOC2007/...``), or the folder that holds ``VOCdevkit``.
        image_sets: Pairs of year and split, joined in this order; 07+12 is
            ``(("2007", "trainval"), ("2012", "trainval"))``.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        difficult: ``"keep"``, or ``"drop"`` to leave difficult objects out (as is usual for
            training; the evaluation needs them).
        classes: The class names; label ``k`` is ``classes[k - 1]``.
        on_error: ``"skip"`` leaves out images whose files are missing or cannot be used, tells so
            in one warning, and raises only for what is wrong with the data set as a whole. Every
            image is decoded for it at once, in threads: what is left out depends on the files
            alone, not on workers, processes or the order of access. Not for evaluation: a score
            without an image is another score.

    Attributes:
        classes: The class names.
        category_ids: 1 to C, the labels themselves: VOC has no numbers for its classes.
        names: The images' names by index, such as ``"VOC2007/000005"``.
        image_ids: Every sample's ``image_id`` by index: the index itself.
        image_sets: Every sample's year and split by index, such as ``("2007", "test")``.
        report: Counts, see :class:`VOCReport`.
        skipped: The images that ``on_error="skip"`` left out, and why.

    Raises:
        FileNotFoundError: The root, a year, a split, an image or an annotation is missing.
        ValueError: An argument, a split file or an annotation cannot be used; the message
            names the file and the value. Also on access, for an image that cannot be decoded
            or is not of the size its annotation says.
        IndexError: On access, the index is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        image_sets: Sequence[tuple[str, str]] = (("2007", "trainval"),),
        transforms: Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]] | None = None,
        difficult: Literal["keep", "drop"] = "keep",
        classes: Sequence[str] = VOC_CLASSES,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_on_error(on_error)
        if difficult not in ("keep", "drop"):
            raise ValueError(f'difficult must be "keep" or "drop", got {difficult!r}')
        self.classes = _check_classes(classes)
        self.transforms = transforms
        reader = _Reader(
            list_entries(root, image_sets, check_files=on_error == "raise"), self.classes
        )
        self._entries = reader.entries
        self.skipped: tuple[SkippedImage, ...] = ()
        if on_error == "skip":
            self._entries, self.skipped = reader.find_usable(f"{root} {tuple(image_sets)}")
        self.category_ids = tuple(range(1, len(self.classes) + 1))
        self.names = [entry.name for entry in self._entries]
        self.image_ids = list(range(len(self._entries)))
        self.image_sets = [entry.image_set for entry in self._entries]
        objects, report = reader.read(self._entries).clean(drop_difficult=difficult == "drop")
        self.report = replace(report, num_skipped=len(self.skipped))
        self._boxes = torch.from_numpy(objects.boxes)  # (M, 4) float32, as cleaned
        self._labels = torch.from_numpy(objects.labels)  # (M,)
        self._difficult = torch.from_numpy(objects.difficult)  # (M,)
        self._sizes = objects.sizes.tolist()  # I times [height, width]
        self._offsets = objects.offsets().tolist()  # I + 1

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        index = self._check_index(index)
        image, target = self._read_image(index), self.target(index)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def target(self, index: int) -> dict[str, Any]:
        """Return a copy of one image's target, as stored and without ``transforms``."""
        index = self._check_index(index)
        rows = slice(self._offsets[index], self._offsets[index + 1])
        return {
            "boxes": self._boxes[rows].clone(),
            "labels": self._labels[rows].clone(),
            "difficult": self._difficult[rows].clone(),
            "image_id": index,
        }

    def image_path(self, index: int) -> Path:
        """Return the path of one image's JPEG file."""
        return self._entries[self._check_index(index)].image

    def image_size(self, index: int) -> tuple[int, int]:
        """Return one image's height and width in pixels without decoding it."""
        height, width = self._sizes[self._check_index(index)]
        return height, width

    def index_of(self, image_id: int) -> int:
        """Return the index of the sample with this ``image_id``.

        Raises:
            ValueError: No sample has it.
        """
        if not 0 <= image_id < len(self):
            raise ValueError(f"no image has the image_id {image_id}: expected 0 to {len(self) - 1}")
        return image_id

    def _read_image(self, index: int) -> Tensor:
        try:
            return _read_image(self._entries[index], self.image_size(index))
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from error

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)


class _Reader:
    """Reads the annotations of some images, each once."""

    def __init__(self, entries: list[ImageEntry], classes: tuple[str, ...]) -> None:
        self.entries = entries
        self._classes = classes
        self._labels = {name: label for label, name in enumerate(classes, 1)}
        self._read: dict[str, VOCAnnotation] = {}

    def find_usable(self, where: str) -> tuple[list[ImageEntry], tuple[SkippedImage, ...]]:
        """Return the images that can be used, and the others; warn once of these."""
        entries = self.entries
        checks = [
            ("unusable annotation", lambda index: self._annotation(entries[index])),
            (
                "unusable image",
                lambda index: _read_image(entries[index], self._size(entries[index])),
            ),
        ]
        unusable = find_unusable([entry.name for entry in entries], checks)
        skipped = tuple(unusable.values())
        if skipped:
            message = skip_message(skipped, len(entries), where)
            warnings.warn(message, UserWarning, stacklevel=3)  # of who makes the data set
        return [e for index, e in enumerate(entries) if index not in unusable], skipped

    def read(self, entries: list[ImageEntry]) -> _Objects:
        """Read the annotations of some of the images, as far as they are not read."""
        rows: list[tuple[int, int, bool]] = []
        boxes: list[tuple[float, float, float, float]] = []
        sizes: list[tuple[int, int]] = []
        for index, entry in enumerate(entries):
            sizes.append(self._size(entry))
            for item in self._annotation(entry).objects:
                rows.append((self._labels[item.name], index, item.difficult))
                boxes.append(item.box)
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return _Objects(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=columns[:, 0].copy(),
            difficult=columns[:, 2].astype(bool),
            image_index=columns[:, 1].copy(),
            sizes=np.array(sizes, dtype=np.int64),
            entries=entries,
        )

    def _annotation(self, entry: ImageEntry) -> VOCAnnotation:
        if entry.name not in self._read:
            annotation = read_annotation(entry.annotation)
            for number, item in enumerate(annotation.objects):
                if item.name not in self._labels:
                    raise ValueError(
                        f"{entry.annotation}: object {number} has the unknown class {item.name!r}; "
                        f"known are {', '.join(self._classes)}"
                    )
            self._read[entry.name] = annotation
        return self._read[entry.name]

    def _size(self, entry: ImageEntry) -> tuple[int, int]:
        """Return height and width, from the image's header where the annotation lacks them."""
        annotation = self._annotation(entry)
        if annotation.width > 0 and annotation.height > 0:
            return annotation.height, annotation.width
        return read_image_size(entry.image)


@dataclass(frozen=True)
class _Objects:
    """All objects of the data set in flat arrays, with the image each belongs to."""

    boxes: npt.NDArray[Any]  # (M, 4) float64 as read, float32 as cleaned
    labels: npt.NDArray[np.int64]  # (M,)
    difficult: npt.NDArray[np.bool_]  # (M,)
    image_index: npt.NDArray[np.int64]  # (M,)
    sizes: npt.NDArray[np.int64]  # (I, 2) height, width
    entries: list[ImageEntry]

    def clean(self, *, drop_difficult: bool) -> tuple[_Objects, VOCReport]:
        """Clip boxes, drop those without area (and difficult ones), count and warn once."""
        clean = clean_boxes(self.boxes, self.sizes[self.image_index])
        message = clean.message(self._describe)
        if message:
            warnings.warn(message, UserWarning, stacklevel=3)  # of who makes the data set
        is_dropped = self.difficult & clean.has_area & drop_difficult
        keep = clean.has_area & ~is_dropped
        cleaned = _Objects(
            boxes=clean.boxes[keep],
            labels=self.labels[keep],
            difficult=self.difficult[keep],
            image_index=self.image_index[keep],
            sizes=self.sizes,
            entries=self.entries,
        )
        report = VOCReport(
            num_images=len(self.entries),
            num_objects=int(keep.sum()),
            num_difficult=int(cleaned.difficult.sum()),
            num_empty_images=int((np.diff(cleaned.offsets()) == 0).sum()),
            num_clipped=int(clean.is_clipped.sum()),
            num_without_area=int((~clean.has_area).sum()),
            num_difficult_dropped=int(is_dropped.sum()),
        )
        return cleaned, report

    def offsets(self) -> npt.NDArray[np.int64]:
        """Return ``(I + 1,)``: image ``i`` owns the rows ``offsets[i]`` to ``offsets[i + 1]``."""
        counts = np.bincount(self.image_index, minlength=len(self.entries))
        return np.concatenate([[0], np.cumsum(counts)])

    def _describe(self, row: int) -> str:
        """Say where a box stands and how it is written there, for a warning."""
        x1, y1, x2, y2 = (float(value) for value in self.boxes[row])
        height, width = self.sizes[self.image_index[row]]
        return (
            f"{self.entries[self.image_index[row]].annotation}, xmin, ymin, xmax, ymax = "
            f"{x1 + 1:g}, {y1 + 1:g}, {x2:g}, {y2:g} in {width} x {height} pixels"
        )


def _check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    names = () if isinstance(classes, str) else tuple(classes)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"classes must be a sequence of class names, got {classes!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"classes names {twice!r} twice")
    return names


def _read_image(entry: ImageEntry, size: tuple[int, int]) -> Tensor:
    """Decode an image that must be of this height and width."""
    image = read_jpeg(entry.image)
    check_image_size(image, entry.image, size, entry.annotation)
    return image
