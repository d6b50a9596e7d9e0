"""Where a detector fails: every false positive gets one kind, every kind its price in AP.

Shape legend: D detections and G ground-truth objects of the whole data set, C classes.

Sources: Hoiem, Chodpathumwan and Dai, "Diagnosing Error in Object Detectors", ECCV 2012; Bolya,
Foley, Hays and Hoffman, "TIDE: A General Toolbox for Identifying Object Detection Errors",
arXiv 2008.08115.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.errors.result import KINDS, OUTCOMES, SIZES, ErrorAnalysis, MissedObjects
from detmix.evaluation.records import BoolArray, IntArray
from detmix.evaluation.voc.ap import average_precisions
from detmix.evaluation.voc.matching import (
    VOCMatching,
    best_overlaps,
    first_of_each,
    paired_overlap,
)

Groups = tuple[tuple[str, ...], ...]

HOIEM_GROUPS: Groups = (
    ("aeroplane", "bicycle", "boat", "bus", "car", "motorbike", "train"),
    ("bird", "cat", "cow", "dog", "horse", "person", "sheep"),
    ("chair", "diningtable", "sofa"),
    ("aeroplane", "bird"),
)
"""Hoiem et al.'s similar classes of Pascal VOC; bottle, pottedplant and tvmonitor have none."""

_VOC_NAMES = {"bottle", "pottedplant", "tvmonitor"}.union(*HOIEM_GROUPS)
_CORRECT, _IGNORED, _LOCALIZATION, _DUPLICATE, _SIMILAR, _OTHER, _BACKGROUND = range(len(OUTCOMES))
_MEDIUM_AREA, _LARGE_AREA = 32.0**2, 96.0**2  # square pixels


def analyze_errors(
    matching: VOCMatching,
    *,
    similar: Sequence[Collection[str]] | None = None,
    background_iou: float = 0.1,
) -> ErrorAnalysis:
    """Say of every detection what it is, what each kind of error costs and what was missed.

    What is ``correct`` (true) or ``ignored`` (on a difficult object) `VOCEvaluator` says. A false
    positive is of the first of these kinds that fits, with t for the matching's ``iou_threshold``,
    b for ``background_iou`` and overlaps with all objects of its image, difficult or not:

    * ``duplicate``: overlap above t with the best object of its class, which a better detection
      has taken.
    * ``localization``: overlap in [b, t] with the best object of its class.
    * ``similar_class``: overlap of at least b with an object of a similar class.
    * ``other_class``: overlap of at least b with an object of any other class.
    * ``background``: all others.

    This is Hoiem et al.'s division with TIDE's duplicates taken out of ``localization``.

    Each kind is repaired alone, and its gain is what the mean all-point AP over the classes with
    objects rises by, never below 0. A detection of kind ``localization`` gets the box of its best
    object; one of the two class kinds gets the class of the (similar or other) object that it
    overlaps most, and with it the place of its score there. It is then a detection of that object
    if the object is not difficult and overlapped by more than t; otherwise, and if it is a
    ``duplicate`` or ``background``, it is dropped. Of several detections of one object the first
    by score is the true positive, the others are dropped. (In TIDE a repaired detection never
    overtakes a true positive of lower score.)

    An object, difficult or not, is found where a detection of its class has it as best object with
    an overlap above t.

    Args:
        matching: of `VOCEvaluator.matching`.
        similar: groups of classes, which may be in several. Default: Hoiem et al.'s where
            all classes are among VOC's 20, else none.
        background_iou: b, in (0, t].
    """
    if not 0 < background_iou <= matching.iou_threshold:
        raise ValueError(
            f"background_iou is {background_iou}, expected a number in "
            f"(0, {matching.iou_threshold}], the matching's iou_threshold"
        )
    groups = _checked_groups(matching.classes, similar)
    kinds, right_gt = _diagnose(matching, groups, background_iou)
    thresholds = np.array([curve.best_f1().score for curve in matching.curves])
    # Comparisons with NaN are false: of a class without objects nothing is shown.
    is_shown = np.asarray(matching.det_scores >= thresholds[matching.det_labels - 1])
    counted = [rows[~matching.is_ignored[rows]] for rows in matching.by_class]
    top_n = [rows[:num] for rows, num in zip(counted, matching.num_objects, strict=True)]
    scopes = {
        "top_n": np.concatenate(top_n),
        "best_f1": np.flatnonzero(is_shown),
        "all": np.arange(len(kinds)),
    }
    has_found = matching.best_iou > matching.iou_threshold
    is_missed, is_missed_at_best_f1 = np.ones((2, len(matching.gt_labels)), dtype=bool)
    is_missed[matching.best_gt[has_found]] = False
    is_missed_at_best_f1[matching.best_gt[has_found & is_shown]] = False
    missed, missed_difficult = (
        _missed_by_size(matching, objects, is_missed, is_missed_at_best_f1)
        for objects in (~matching.gt_difficult, matching.gt_difficult)
    )
    _, mean_ap = average_precisions(matching.curves, matching.num_objects)
    return ErrorAnalysis(
        matching=matching,
        background_iou=background_iou,
        similar=groups,
        kinds=kinds,
        best_f1_scores=matching.by_name(thresholds.tolist()),
        num_objects=matching.by_name(matching.num_objects.tolist()),
        counts={scope: _counts(matching, kinds, rows) for scope, rows in scopes.items()},
        mean_ap=mean_ap,
        ap_gain={
            # No repair lowers a precision at any recall; the sum of the areas may by rounding.
            kind: float(np.maximum(_repaired(matching, kinds, right_gt, kind) - mean_ap, 0.0))
            for kind in KINDS
        },
        confusion=_confusion(matching, is_shown),
        missed=missed,
        missed_difficult=missed_difficult,
        is_shown=is_shown,
        is_missed=is_missed,
        is_missed_at_best_f1=is_missed_at_best_f1,
    )


def _confusion(matching: VOCMatching, is_shown: BoolArray) -> IntArray:
    """Count what objects are taken for, as `ErrorAnalysis` has it."""
    background, shown = len(matching.classes), np.flatnonzero(is_shown)
    # Each detection with the objects of its image, which lie side by side.
    ends = np.bincount(matching.gt_images, minlength=len(matching.image_ids)).cumsum()
    starts = np.append(0, ends)[matching.det_images[shown]]
    times = ends[matching.det_images[shown]] - starts
    det, gt = np.repeat(shown, times), np.repeat(starts - times.cumsum() + times, times)
    gt += np.arange(len(gt))
    iou = paired_overlap(matching.det_boxes[det], matching.gt_boxes[gt])
    order = np.lexsort((-matching.det_scores[det], -iou))
    order = order[iou[order] > matching.iou_threshold]
    gt_of, det_of = np.full(len(matching.det_labels), -1), np.full(len(matching.gt_labels), -1)
    for row, column in zip(det[order], gt[order], strict=True):
        if gt_of[row] == det_of[column] == -1:
            gt_of[row], det_of[column] = column, row
    alone = shown[(gt_of[shown] == -1) & ~matching.is_ignored[shown]]
    found_as = np.append(matching.det_labels - 1, background)[det_of]  # the last one is for -1
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    np.add.at(counts, (matching.gt_labels - 1, found_as), ~matching.gt_difficult)
    np.add.at(counts, (background, matching.det_labels[alone] - 1), 1)
    return counts


def _checked_groups(classes: tuple[str, ...], similar: Sequence[Collection[str]] | None) -> Groups:
    if similar is None:
        return HOIEM_GROUPS if _VOC_NAMES.issuperset(classes) else ()
    for index, group in enumerate(similar):
        expected = f"expected a collection of names among {', '.join(classes)}"
        if isinstance(group, str):
            raise ValueError(f"similar[{index}] is {group!r}, {expected}")
        if unknown := sorted(set(group).difference(classes)):
            raise ValueError(f"similar[{index}] has {unknown}, {expected}")
    return tuple(tuple(group) for group in similar)


def _diagnose(
    matching: VOCMatching, groups: Groups, background_iou: float
) -> tuple[NDArray[np.int8], IntArray]:
    """The kind of every detection and the object it would be a detection of, both ``(D,)``."""
    kinds = np.full(len(matching.best_iou), _BACKGROUND, dtype=np.int8)
    kinds[matching.best_iou >= background_iou] = _LOCALIZATION
    kinds[matching.best_iou > matching.iou_threshold] = _DUPLICATE
    kinds[matching.is_true], kinds[matching.is_ignored] = _CORRECT, _IGNORED
    is_on_own = (kinds == _CORRECT) | (kinds == _LOCALIZATION)
    right_gt = np.where(is_on_own, matching.best_gt, -1)

    def confuse(rows: IntArray, objects: IntArray, kind: int) -> None:
        """Let ``kind`` be that of the detections ``rows`` that overlap one of ``objects``."""
        iou, best = best_overlaps(
            matching.det_boxes[rows],
            matching.det_images[rows],
            matching.gt_boxes[objects],
            matching.gt_images[objects],
        )
        enough = iou >= background_iou
        kinds[rows[enough]] = kind
        gt = np.where(iou[enough] > matching.iou_threshold, objects[best[enough]], -1)
        right_gt[rows[enough]] = gt

    # Of these the best object of their own class overlaps too little to be the best of all.
    confuse(np.flatnonzero(kinds == _BACKGROUND), np.arange(len(matching.gt_labels)), _OTHER)
    for label, name in enumerate(matching.classes, start=1):
        near = set[str]().union(*(group for group in groups if name in group))
        labels = [k for k, other in enumerate(matching.classes, start=1) if other in near]
        objects = np.flatnonzero(np.isin(matching.gt_labels, labels))
        rows = np.flatnonzero((kinds == _OTHER) & (matching.det_labels == label))
        confuse(rows, objects, _SIMILAR)
    is_difficult = np.append(matching.gt_difficult, False)[right_gt]  # the last one is for -1
    right_gt[is_difficult] = -1
    return kinds, right_gt


def _counts(
    matching: VOCMatching, kinds: NDArray[np.int8], rows: IntArray
) -> dict[str, dict[str, int]]:
    """How many of ``rows`` are what, by class and outcome."""
    table = np.zeros((len(matching.classes), len(OUTCOMES)), dtype=np.int64)
    np.add.at(table, (matching.det_labels[rows] - 1, kinds[rows]), 1)
    return matching.by_name(dict(zip(OUTCOMES, row, strict=True)) for row in table.tolist())


def _missed_by_size(
    matching: VOCMatching, objects: BoolArray, is_missed: BoolArray, at_best_f1: BoolArray
) -> dict[str, MissedObjects]:
    """Count those of ``objects (G,)`` that are missed, by size of their box."""
    x1, y1, x2, y2 = matching.gt_boxes.T.astype(np.float64)
    size = np.digitize((x2 - x1) * (y2 - y1), (_MEDIUM_AREA, _LARGE_AREA))
    chosen = {name: objects & (size == index) for index, name in enumerate(SIZES)}
    return {
        name: MissedObjects(*(int(which[rows].sum()) for which in (rows, is_missed, at_best_f1)))
        for name, rows in {**chosen, "all": objects}.items()
    }


def _repaired(
    matching: VOCMatching, kinds: NDArray[np.int8], right_gt: IntArray, kind: str
) -> float:
    """The mean AP once the detections of one kind are right, or gone where they cannot be."""
    claims = (kinds == _CORRECT) | (kinds == OUTCOMES.index(kind))
    gt = np.where(claims, right_gt, -1)
    is_true = first_of_each(matching.ranked[gt[matching.ranked] >= 0], gt)
    labels = matching.det_labels.copy()
    labels[is_true] = matching.gt_labels[gt[is_true]]
    counts = is_true | ~(claims | (kinds == _IGNORED))
    curves = matching.curves_if(labels, is_true, counts)
    return average_precisions(curves, matching.num_objects)[1]
