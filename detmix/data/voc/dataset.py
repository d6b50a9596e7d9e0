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
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.data.boxes import clean_boxes
from detmix.data.images import check_image_size, read_image, read_image_size
from detmix.data.skipping import Problem, attempt, check_on_error, read_usable
from detmix.data.voc.layout import ImageEntry, list_entries
from detmix.data.voc.xml import VOCAnnotation, VOCObject, read_annotation

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

    Boxes are clipped to the image, and those without area dropped; one warning tells of both.

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
            alone. Not for evaluation: a score without an image is another score.

    Attributes:
        category_ids: 1 to C, the labels themselves: VOC has no numbers for its classes.
        names: The images' names by index, such as ``"VOC2007/000005"``.
        image_ids: Every sample's ``image_id`` by index: the index itself.
        image_sets: Every sample's year and split by index, such as ``("2007", "test")``.
        report: Counts, see :class:`VOCReport`.
        skipped: The images that ``on_error="skip"`` left out, and why.

    Raises:
        FileNotFoundError: The root, a year, a split, an image or an annotation is missing.
        ValueError: An argument, a split file or an annotation cannot be used, or on access an
            image; the message names the file and the value.
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
        entries = list_entries(root, image_sets, check_files=on_error == "raise")
        found, self.skipped = read_usable(
            [entry.name for entry in entries],
            lambda index: _read(entries[index], self.classes, decode=on_error == "skip"),
            on_error,
            f"{root} {tuple(image_sets)}",
        )
        self._entries = [entries[index] for index in found]
        self.category_ids = tuple(range(1, len(self.classes) + 1))
        self.names = [entry.name for entry in self._entries]
        self.image_ids = list(range(len(self._entries)))
        self.image_sets = [entry.image_set for entry in self._entries]
        self._sizes = [(annotation.height, annotation.width) for annotation in found.values()]

        objects = [item for annotation in found.values() for item in annotation.objects]
        counts = [len(annotation.objects) for annotation in found.values()]
        image_index = np.repeat(np.arange(len(counts)), counts)  # (M,)
        labels = np.array([self.classes.index(item.name) + 1 for item in objects], np.int64)
        is_difficult = np.array([item.difficult for item in objects], np.bool_)
        boxes = np.array([item.box for item in objects], np.float64).reshape(-1, 4)
        clean = clean_boxes(boxes, np.array(self._sizes)[image_index])
        message = clean.message(lambda row: self._describe(objects[row], image_index[row]))
        if message:
            warnings.warn(message, UserWarning, stacklevel=2)
        is_dropped = is_difficult & clean.has_area & (difficult == "drop")
        keep = clean.has_area & ~is_dropped

        self._boxes = torch.from_numpy(clean.boxes[keep])  # (M, 4) float32
        self._labels = torch.from_numpy(labels[keep])  # (M,)
        self._difficult = torch.from_numpy(is_difficult[keep])  # (M,)
        kept = np.bincount(image_index[keep], minlength=len(self))
        # (I + 1,): image i owns the rows offsets[i] to offsets[i + 1].
        self._offsets = [0, *np.cumsum(kept).tolist()]
        self.report = VOCReport(
            num_images=len(self),
            num_objects=len(self._boxes),
            num_difficult=int(self._difficult.sum()),
            num_empty_images=int((kept == 0).sum()),
            num_clipped=int(clean.is_clipped.sum()),
            num_without_area=int((~clean.has_area).sum()),
            num_difficult_dropped=int(is_dropped.sum()),
            num_skipped=len(self.skipped),
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        target = self.target(index)
        entry, size = self._entries[index], self.image_size(index)
        try:
            image = _read_image(entry, size)
        except ValueError as error:
            raise ValueError(f"sample {target['image_id']}: {error}") from error
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
        return self._sizes[self._check_index(index)]

    def index_of(self, image_id: int) -> int:
        """Return the index of the sample with this ``image_id``; ValueError if none has it."""
        if not 0 <= image_id < len(self):
            raise ValueError(f"no image has the image_id {image_id}: expected 0 to {len(self) - 1}")
        return image_id

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)

    def _describe(self, item: VOCObject, index: int) -> str:
        """Say where a box stands and how it is written there, for a warning."""
        (x1, y1, x2, y2), (height, width) = item.box, self._sizes[index]
        return (
            f"{self._entries[index].annotation}, xmin, ymin, xmax, ymax = "
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


def _read(entry: ImageEntry, classes: tuple[str, ...], *, decode: bool) -> VOCAnnotation | Problem:
    """Read the annotation of one image, with the image's size, and decode the image if asked to."""
    annotation = attempt("unusable annotation", read_annotation, entry.annotation, classes)
    if isinstance(annotation, Problem):
        return annotation
    return attempt("unusable image", _with_size, annotation, entry, decode=decode)


def _with_size(annotation: VOCAnnotation, entry: ImageEntry, *, decode: bool) -> VOCAnnotation:
    """Fill in the size from the image's header where the annotation lacks it."""
    if not (annotation.width > 0 and annotation.height > 0):
        height, width = read_image_size(entry.image)
        annotation = replace(annotation, height=height, width=width)
    if decode:
        _read_image(entry, (annotation.height, annotation.width))
    return annotation


def _read_image(entry: ImageEntry, size: tuple[int, int]) -> Tensor:
    """Decode an image that must be of this height and width."""
    image = read_image(entry.image)
    check_image_size(image, entry.image, size, entry.annotation)
    return image
