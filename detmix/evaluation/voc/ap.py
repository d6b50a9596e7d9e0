"""Matching detections to objects and average precision, by the rules of the Pascal VOC devkit.

Pure NumPy, vectorised over all images and classes at once. Shape legend: D detections and
G ground-truth objects of the whole data set, P pairs of a detection and an object, K points of one
class's precision/recall curve.

Boxes are ``x1, y1, x2, y2`` in continuous pixel coordinates, so that a box is ``x2 - x1`` wide. The
devkit's inclusive coordinates make it ``xmax - xmin + 1`` wide, which is the same number once
``xmin - 1, ymin - 1, xmax, ymax`` has been taken as the continuous box.

Source: ``VOCevaldet.m`` and ``VOCap.m`` of the development kits of 2007 and 2010 onwards.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Interpolation = Literal["11point", "all-point"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Detections `best_overlaps` works off at once: about what a processor's cache holds.
CHUNK_SIZE = 1 << 14

# 0.1 steps exactly as np.arange(0, 1.1, 0.1) rounds them; a recall of 3/10 lies below the fourth.
_ELEVEN_RECALLS = np.arange(11) * 0.1


def paired_iou(boxes_a: NDArray[Any], boxes_b: NDArray[Any]) -> FloatArray:
    """Intersection over union of row i of one array with row i of the other, in float64."""
    ax1, ay1, ax2, ay2 = boxes_a.T.astype(np.float64, order="C")  # each coordinate in one piece
    bx1, by1, bx2, by2 = boxes_b.T.astype(np.float64, order="C")
    width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0.0)
    height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0.0)
    intersection = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    iou: FloatArray = intersection / np.where(intersection > 0, union, 1.0)
    return iou


def paired_cover(boxes_a: NDArray[Any], boxes_b: NDArray[Any]) -> FloatArray:
    """The share of row i of one array that row i of the other covers, in float64."""
    low = np.maximum(boxes_a[:, :2], boxes_b[:, :2]).astype(np.float64)
    high = np.minimum(boxes_a[:, 2:], boxes_b[:, 2:]).astype(np.float64)
    intersection = np.maximum(high - low, 0.0).prod(axis=1)
    area = (boxes_a[:, 2:].astype(np.float64) - boxes_a[:, :2]).prod(axis=1)
    cover: FloatArray = intersection / np.where(intersection > 0, area, 1.0)
    return cover


def best_overlaps(
    det_boxes: NDArray[Any],
    det_groups: IntArray,
    gt_boxes: NDArray[Any],
    gt_groups: IntArray,
    *,
    overlap: Callable[[NDArray[Any], NDArray[Any]], FloatArray] = paired_iou,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[FloatArray, IntArray]:
    """Find for every detection the object of its group that it overlaps most."""
    # VOC assigns a detection to its best object even where that is taken by a better detection. Of
    # several objects with the same overlap the first counts.
    best_iou = np.zeros(len(det_groups))
    best_gt = np.full(len(det_groups), -1, dtype=np.int64)
    if len(gt_groups) == 0:
        return best_iou, best_gt
    gt_order = np.argsort(gt_groups, kind="stable")
    groups, starts, sizes = np.unique(gt_groups[gt_order], return_index=True, return_counts=True)
    for first in range(0, len(det_groups), chunk_size):
        chunk = det_groups[first : first + chunk_size]
        slots = np.searchsorted(groups[:-1], chunk)  # what is beyond the last group gets the last
        paired = np.flatnonzero(groups[slots] == chunk)  # those with an object to overlap
        rows, slots = first + paired, slots[paired]
        best_iou[rows], best_gt[rows] = _best_of_group(
            overlap, det_boxes[rows], gt_boxes, gt_order, starts[slots], sizes[slots]
        )
    return best_iou, best_gt


def _best_of_group(
    overlap: Callable[[NDArray[Any], NDArray[Any]], FloatArray],
    boxes: NDArray[Any],
    gt_boxes: NDArray[Any],
    gt_order: IntArray,
    starts: IntArray,
    sizes: IntArray,
) -> tuple[FloatArray, IntArray]:
    """The highest overlap ``(P,)`` of each box and the index ``(P,)`` of its object."""
    best_gt = gt_order[starts]
    best_iou = overlap(boxes, gt_boxes[best_gt])
    # Then those with a second object with that, those with a third one with that, and so on.
    for place in range(1, int(sizes.max(initial=0))):
        rows = np.flatnonzero(sizes > place)
        gt = gt_order[starts[rows] + place]
        iou = overlap(boxes[rows], gt_boxes[gt])
        better = iou > best_iou[rows]
        best_iou[rows[better]], best_gt[rows[better]] = iou[better], gt[better]
    return best_iou, best_gt


def judge_detections(
    best_iou: FloatArray,
    best_gt: IntArray,
    order: IntArray,
    gt_difficult: BoolArray,
    iou_threshold: float,
) -> tuple[BoolArray, BoolArray]:
    """Tell true positives from false ones and from detections that count neither way."""
    hits = order[(best_iou > iou_threshold)[order]]
    on_difficult = gt_difficult[best_gt[hits]]
    is_true, is_ignored = np.zeros((2, len(best_iou)), dtype=bool)
    is_ignored[hits[on_difficult]] = True
    # Written from the lowest score to the highest: the highest stays, as the last one written.
    counted = hits[~on_difficult][::-1]
    finder = np.full(len(gt_difficult), -1, dtype=np.int64)
    finder[best_gt[counted]] = counted
    is_true[finder[finder >= 0]] = True
    return is_true, is_ignored


def average_precision(
    recall: FloatArray, precision: FloatArray, interpolation: Interpolation = "all-point"
) -> float:
    """Summarise a precision/recall curve in one number.

    Args:
        recall: ``(K,)`` in order of decreasing score, hence not decreasing.
        precision: ``(K,)``.
        interpolation: ``"11point"`` (VOC2007): the mean, over the recalls 0, 0.1, ..., 1, of the
            highest precision at that recall or beyond. ``"all-point"`` (VOC2010 onwards): the area
            under the precision made non-increasing.

    Returns:
        The average precision in [0, 1]; 0 for an empty curve.

    Raises:
        ValueError: if the interpolation is not one of the two.
    """
    check_interpolation(interpolation)
    # envelope[k] is the highest precision at recall[k] or beyond
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "11point":
        reached = np.searchsorted(recall, _ELEVEN_RECALLS, side="left")
        return float(np.append(envelope, 0.0)[reached].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def check_interpolation(interpolation: str) -> None:
    """Raise ValueError unless ``interpolation`` is a known one."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation is {interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}"
        )
