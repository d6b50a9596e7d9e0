"""Pascal VOC detection (and any data set in its layout) as a map-style data set.

Annotations are read once, at construction: mistakes show before training starts.
Legend: M objects of the whole data set, N objects of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from torchvision.models.segmentation import FCN_ResNet50_Weights

from detmix.data.detection import (
    Files,
    Problem,
    StoredDetection,
    Transforms,
    attempt,
    check_classes,
    clean_boxes,
    read_usable,
    warn_of_boxes,
)
from detmix.data.images import read_image_size, read_sized_image
from detmix.data.voc.corners import CornerEvidence, Corners, find_evidence, offsets
from detmix.data.voc.devkit import VOCAnnotation, read_annotation
from detmix.data.voc.lists import ImageEntry, list_entries

VOC_CLASSES = tuple(FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])
"""The 20 classes of VOC 2007 to 2012 (devkit, ``VOCinit.m``); label 1 is the first of them."""


@dataclass(frozen=True)
class VOCReport:
    """What was found while the annotations were read; without the images that were skipped.

    Attributes:
        num_clipped: Boxes that reached beyond the image and were clipped to it.
        num_without_area: Boxes dropped because no area was left inside the image.
        num_difficult_dropped: Objects left out by ``difficult="drop"``.
        num_skipped: Images left out by ``on_error="skip"``.
        corners: What tells how ``xmin, ymin, xmax, ymax`` are written, and what fits best; None of
            `YOLODetection`.
    """

    num_images: int
    num_objects: int
    num_difficult: int
    num_empty_images: int
    num_clipped: int
    num_without_area: int
    num_difficult_dropped: int
    num_skipped: int
    corners: CornerEvidence | None


class VOCDetection(StoredDetection):
    """Images and objects of one or more splits of a Pascal VOC devkit, or of any XML files.

    A sample is ``(image, target)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an EXIF
    orientation is not applied: VOC boxes are in stored pixels); the target has ``boxes`` float32
    ``(N, 4)`` (x1, y1, x2, y2 in pixels, continuous coordinates), ``labels`` int64 ``(N,)`` from
    1, ``difficult`` bool ``(N,)`` and ``image_id``, the sample's index.

    Boxes are clipped to the image, and those without area dropped; one warning tells of both, and
    which ``corners`` fit best: a corner of 0 in 1-based data, say, is one that was clipped.

    An image may be of any format that is read here, whatever its suffix (torchvision's
    ``IMG_EXTENSIONS``), and lie in a subfolder that its id names (``cam1/000005``).

    Args:
        root: The devkit (``root/VOC2007/...``), or the folder that holds ``VOCdevkit``.
        image_sets: Pairs of year and split, joined in this order; 07+12 is
            ``(("2007", "trainval"), ("2012", "trainval"))``.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        difficult: ``"keep"``, or ``"drop"`` as is usual for training; the evaluation needs them.
        classes: The class names; label ``k`` is ``classes[k - 1]``; None for those that occur.
        corners: How ``xmin, ymin, xmax, ymax`` are written: the number of the first pixel, and
            whether the last one is included. ``"1-inclusive"`` is the devkit's; CVAT, Datumaro and
            VoTT write ``"0-exclusive"``, Roboflow ``"1-exclusive"``, others ``"0-inclusive"``.
        on_error: ``"skip"`` leaves out images whose files are missing or cannot be used, tells so
            in one warning, and raises only for what is wrong with the data set as a whole. Every
            image is decoded for it at once: what is left out depends on the files alone. Not for
            evaluation: a score without an image is another score.
        files: In the place of ``image_sets``, the path of each image within ``root``, with that of
            its annotation.

    Attributes:
        category_ids: 1 to C, the labels themselves: VOC has no numbers for its classes.
        names: The images' names by index, such as ``"VOC2007/000005"``.
        image_ids: Every sample's ``image_id`` by index: the index itself.
        image_sets: Every sample's year and split by index, such as ``("2007", "test")``, if any.
        report: Counts, a `VOCReport`.
        skipped: The images that were left out, each a `SkippedImage`.

    Raises:
        FileNotFoundError: A folder, a split, an image or an annotation is missing.
        ValueError: An argument, a file or, on access, an image cannot be used.
    """

    _has_corners = True

    def __init__(
        self,
        root: str | Path,
        image_sets: Sequence[tuple[str, str]] = (("2007", "trainval"),),
        transforms: Transforms | None = None,
        difficult: Literal["keep", "drop"] = "keep",
        classes: Sequence[str] | None = VOC_CLASSES,
        on_error: Literal["raise", "skip"] = "raise",
        corners: Corners = "1-inclusive",
        files: Files | None = None,
    ) -> None:
        shift = offsets(corners)
        if difficult not in ("keep", "drop"):
            raise ValueError(f'difficult must be "keep" or "drop", got {difficult!r}')
        self.classes = () if classes is None else check_classes(classes)
        self.transforms = transforms
        entries = list_entries(root, image_sets, files, on_error == "raise")
        # Images are left out for an unknown class; else all unknown ones are told, of all images.
        known = self.classes if self.classes and on_error == "skip" else None
        found, self.skipped = read_usable(
            [entry.name for entry in entries],
            lambda index: self._read(entries[index], known, corners),
            lambda index, found: read_sized_image(
                entries[index].image, (found.height, found.width), entries[index].annotation
            ),
            on_error,
            f"{root} {tuple(image_sets)}" if files is None else root,
        )
        names = {item.name for annotation in found.values() for item in annotation.objects}
        self.classes = self.classes or check_classes(sorted(names))
        if unknown := sorted(names - {*self.classes}):
            problems = (self._read(entries[index], self.classes, corners) for index in found)
            error = next(each.error for each in problems if isinstance(each, Problem))
            raise ValueError(
                f"{error}; all unknown ones are {', '.join(unknown)}: name them in classes "
                "(data.classes), or give null for those that occur"
            )
        self._entries = [entries[index] for index in found]
        self.category_ids = tuple(range(1, len(self.classes) + 1))
        self.names = [entry.name for entry in self._entries]
        self.image_ids = list(range(len(self._entries)))
        self.image_sets = [entry.image_set for entry in self._entries if entry.image_set]
        sizes = np.array([(item.height, item.width) for item in found.values()], np.int64)

        objects = [item for annotation in found.values() for item in annotation.objects]
        counts = [len(annotation.objects) for annotation in found.values()]
        image_index = np.repeat(np.arange(len(counts)), counts)  # (M,)
        labels = np.array([self.classes.index(item.name) + 1 for item in objects], np.int64)
        is_difficult = np.array([item.difficult for item in objects], np.bool_)
        as_read = np.array([item.box for item in objects], np.float64).reshape(-1, 4)
        clean = clean_boxes(as_read, sizes[image_index])
        written = as_read - shift
        evidence = None
        if self._has_corners:
            evidence = find_evidence(written, sizes[image_index], corners)

        def describe(row: int) -> str:
            """Say where a box stands and how it is written there."""
            height, width = sizes[image_index[row]].tolist()
            return (
                f"{self._annotation_path(image_index[row])}, xmin, ymin, xmax, ymax = "
                f"{', '.join(f'{x:g}' for x in written[row])} in {width} x {height} pixels"
            )

        remedy = f"; read with corners={corners!r} (data.corners): {evidence}" if evidence else ""
        warn_of_boxes(clean.has_area, clean.is_clipped, describe, remedy)
        is_dropped = is_difficult & clean.has_area & (difficult == "drop")
        keep = clean.has_area & ~is_dropped
        is_difficult = is_difficult[keep]
        kept = np.bincount(image_index[keep], minlength=len(self))
        boxes, labels = clean.boxes[keep], labels[keep]
        self._store(sizes, kept, {"boxes": boxes, "labels": labels, "difficult": is_difficult})
        self.report = VOCReport(
            num_images=len(self),
            num_objects=int(keep.sum()),
            num_difficult=int(is_difficult.sum()),
            num_empty_images=int((kept == 0).sum()),
            num_clipped=int(clean.is_clipped.sum()),
            num_without_area=int((~clean.has_area).sum()),
            num_difficult_dropped=int(is_dropped.sum()),
            num_skipped=len(self.skipped),
            corners=evidence,
        )

    def image_path(self, index: int) -> Path:
        """Return the path of one image's file."""
        return self._entries[index].image

    def index_of(self, image_id: int) -> int:
        """Return the index of the sample with this ``image_id``; ValueError if none has it."""
        if not 0 <= image_id < len(self):
            raise ValueError(f"no image has the image_id {image_id}: expected 0 to {len(self) - 1}")
        return image_id

    def _annotation_path(self, index: int) -> Path:
        return self._entries[index].annotation

    def _read(
        self, entry: ImageEntry, classes: Sequence[str] | None, corners: Corners
    ) -> VOCAnnotation | Problem:
        """Read one annotation, with the size from the image's header if it lacks it."""
        read = attempt("unusable annotation", read_annotation, entry.annotation, classes, corners)
        if isinstance(read, Problem) or (read.width > 0 and read.height > 0):
            return read
        size = attempt("unusable image", read_image_size, entry.image)
        return size if isinstance(size, Problem) else replace(read, height=size[0], width=size[1])
