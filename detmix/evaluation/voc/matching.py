"""Every detection of a data set with the object it is matched to, by the rule of Pascal VOC.

Pure NumPy, vectorised over all images and classes at once. Shape legend: D detections and
G ground-truth objects of the whole data set, C classes.

Boxes are ``x1, y1, x2, y2`` in continuous pixel coordinates, so that a box is ``x2 - x1`` wide. The
devkit's inclusive coordinates make it ``xmax - xmin + 1`` wide, which is the same number once
``xmin - 1, ymin - 1, xmax, ymax`` has been taken as the continuous box.

Source: ``VOCevaldet.m`` of the development kits of 2007 and 2010 onwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.records import BoolArray, Columns, FloatArray, ImageId, IntArray, where
from detmix.evaluation.voc.ap import PrecisionRecallCurve

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class VOCMatching:
    """What `VOCEvaluator` makes its curves of, row by row, for whoever asks why.

    Rows of detections and of objects are in the order in which they came, image by image. A
    detection is exactly one of true positive (``is_true``), ignored (``is_ignored``: its object is
    difficult, or it lies in a crowd) and false positive (neither).

    Attributes:
        classes: the C class names; label k stands for ``classes[k - 1]``.
        iou_threshold: a match overlaps by strictly more.
        image_ids: one for each image, None where it has none; ``det_images (D,)`` and ``gt_images
            (G,)`` are places in this list.
        det_boxes: ``(D, 4)`` float, ``x1, y1, x2, y2`` in pixels, with ``det_labels (D,)`` in 1..C
            and ``det_scores (D,)``.
        best_iou: ``(D,)`` float64, the highest overlap with an object of the same class and image.
        best_gt: ``(D,)`` int64, the row of that object, -1 where the overlap is 0 with all; also of
            objects that a better detection has taken.
        is_true: ``(D,)`` bool.
        is_ignored: ``(D,)`` bool.
        ranked: ``(D,)`` int64 rows of detections by decreasing score, equal ones as they came.
        gt_boxes: ``(G, 4)`` float, with ``gt_labels (G,)`` and ``gt_difficult (G,)`` bool.
    """

    classes: tuple[str, ...]
    iou_threshold: float
    image_ids: list[ImageId]
    det_images: IntArray
    det_boxes: NDArray[Any]
    det_labels: IntArray
    det_scores: NDArray[Any]
    best_iou: FloatArray
    best_gt: IntArray
    is_true: BoolArray
    is_ignored: BoolArray
    ranked: IntArray
    gt_images: IntArray
    gt_boxes: NDArray[Any]
    gt_labels: IntArray
    gt_difficult: BoolArray

    @cached_property
    def by_class(self) -> list[IntArray]:
        """``ranked`` in C arrays, one for each class."""
        return self.split(self.ranked, self.det_labels)

    @cached_property
    def num_objects(self) -> IntArray:
        """How many objects of each class ``(C,)`` are not difficult."""
        labels = self.gt_labels[~self.gt_difficult]
        return np.bincount(labels, minlength=len(self.classes) + 1)[1:]

    @cached_property
    def curves(self) -> list[PrecisionRecallCurve]:
        """Each class's curve."""
        return self.curves_if(self.det_labels, self.is_true, ~self.is_ignored)

    def curves_if(
        self, labels: NDArray[Any], is_true: BoolArray, counts: BoolArray
    ) -> list[PrecisionRecallCurve]:
        """Each class's curve if detections had these labels ``(D,)``, were true and counted so."""
        by_class = self.split(self.ranked[counts[self.ranked]], labels)
        return [
            PrecisionRecallCurve.of(is_true[rows], self.det_scores[rows], num)
            for rows, num in zip(by_class, self.num_objects.tolist(), strict=True)
        ]

    def by_name(self, values: Iterable[T]) -> dict[str, T]:
        """C values by the names of the classes."""
        return dict(zip(self.classes, values, strict=True))

    def split(self, rows: IntArray, labels: NDArray[Any]) -> list[IntArray]:
        """Rows of detections by class, each class's in their order."""
        num = len(self.classes)
        # NumPy sorts 16-bit integers by radix, several times faster than wider ones.
        narrow = labels[rows].astype(np.uint16 if num < 1 << 16 else np.int64)
        ends = np.cumsum(np.bincount(narrow, minlength=num + 1)[1:])
        return np.split(rows[np.argsort(narrow, kind="stable")], ends[:-1])


def match(
    image_ids: list[ImageId],
    found: Columns,
    objects: Columns,
    classes: tuple[str, ...],
    iou_threshold: float,
) -> VOCMatching:
    """Match all detections of a data set."""
    there, crowds = where(objects, ~objects["iscrowd"]), where(objects, objects["iscrowd"])
    det_groups, gt_groups, crowd_groups = (
        each["images"] * len(classes) + (each["labels"] - 1) for each in (found, there, crowds)
    )
    iou, gt = best_overlaps(found["boxes"], det_groups, there["boxes"], gt_groups)
    ranked = np.argsort(-found["scores"], kind="stable")
    hits = ranked[iou[ranked] > iou_threshold]
    on_difficult = there["difficult"][gt[hits]]
    is_true = first_of_each(hits[~on_difficult], gt)
    in_crowds = found["boxes"], det_groups, crowds["boxes"], crowd_groups
    cover, _ = best_overlaps(*in_crowds, of_first=True)
    is_ignored = (cover > iou_threshold) & ~is_true
    is_ignored[hits[on_difficult]] = True
    return VOCMatching(
        classes=classes,
        iou_threshold=iou_threshold,
        image_ids=image_ids,
        **{f"det_{key}": values for key, values in found.items()},
        best_iou=iou,
        best_gt=gt,
        is_true=is_true,
        is_ignored=is_ignored,
        ranked=ranked,
        **{f"gt_{key}": values for key, values in there.items() if key != "iscrowd"},
    )


def first_of_each(rows: IntArray, gt: IntArray) -> BoolArray:
    """Which detections ``(D,)`` are the first of their object ``gt (D,)`` among ``rows``."""
    # Written from the last to the first: the first stays, as the last one written.
    finder = np.full(gt.max(initial=-1) + 1, -1)
    finder[gt[rows[::-1]]] = rows[::-1]
    is_first = np.zeros(len(gt), dtype=bool)
    is_first[finder[finder >= 0]] = True
    return is_first


def best_overlaps(
    det_boxes: NDArray[Any],
    det_groups: IntArray,
    gt_boxes: NDArray[Any],
    gt_groups: IntArray,
    *,
    of_first: bool = False,
) -> tuple[FloatArray, IntArray]:
    """The highest overlap of every detection with an object of its group, and that object's row."""
    # VOC assigns a detection to its best object even where that is taken by a better detection. Of
    # several objects with the same overlap the first counts.
    best_iou = np.zeros(len(det_groups))
    best_gt = np.full(len(det_groups), -1, dtype=np.int64)
    if len(gt_groups) == 0:
        return best_iou, best_gt
    gt_order = np.argsort(gt_groups, kind="stable")
    groups, starts, sizes = np.unique(gt_groups[gt_order], return_index=True, return_counts=True)
    slots = np.searchsorted(groups[:-1], det_groups)  # what is beyond the last group gets the last
    rows = np.flatnonzero(groups[slots] == det_groups)  # those with an object to overlap
    slots = slots[rows]
    # First all with the first object of their group, then those that have a second one, and so on.
    for place in range(int(sizes[slots].max(initial=0))):
        more = sizes[slots] > place
        rows, slots = rows[more], slots[more]
        gt = gt_order[starts[slots] + place]
        iou = paired_overlap(det_boxes[rows], gt_boxes[gt], of_first=of_first)
        better = iou > best_iou[rows]
        best_iou[rows[better]], best_gt[rows[better]] = iou[better], gt[better]
    return best_iou, best_gt


def paired_overlap(
    boxes_a: NDArray[Any], boxes_b: NDArray[Any], *, of_first: bool = False
) -> FloatArray:
    """IoU of row i with row i, or the share of ``boxes_a[i]`` that is covered, in float64."""
    ax1, ay1, ax2, ay2 = boxes_a.T.astype(np.float64, order="C")  # each coordinate in one piece
    bx1, by1, bx2, by2 = boxes_b.T.astype(np.float64, order="C")
    width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0.0)
    height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0.0)
    intersection = width * height
    whole = (ax2 - ax1) * (ay2 - ay1)
    if not of_first:
        whole = whole + (bx2 - bx1) * (by2 - by1) - intersection
    overlap: FloatArray = intersection / np.where(intersection > 0, whole, 1.0)
    return overlap
