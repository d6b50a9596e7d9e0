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
from detmix.evaluation.voc.ap import (
    BoolArray,
    FloatArray,
    IntArray,
    average_precision,
    best_overlaps,
)
from detmix.evaluation.voc.matching import VOCMatching
from detmix.evaluation.voc.result import PrecisionRecallCurve

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
_CORRECT, _IGNORED = OUTCOMES.index("correct"), OUTCOMES.index("ignored")


def analyze_errors(
    matching: VOCMatching,
    *,
    similar: Sequence[Collection[str]] | None = None,
    background_iou: float = 0.1,
) -> ErrorAnalysis:
    """Say of every detection what it is, what each kind of error costs and what was missed.

    True positives (``correct``) and detections matched to a difficult object (``ignored``) are
    those of the VOC rule, see `VOCEvaluator`. Every false positive is of the first of these kinds
    that fits, with t for the matching's ``iou_threshold``, b for ``background_iou`` and overlaps
    with all objects of its image, difficult or not, found or not:

    * ``duplicate``: overlap above t with the best object of its class, which a better detection
      has taken.
    * ``localization``: overlap in [b, t] with the best object of its class.
    * ``similar_class``: overlap of at least b with an object of a similar class.
    * ``other_class``: overlap of at least b with an object of any other class.
    * ``background``: all others.

    This is Hoiem et al.'s division with TIDE's duplicates taken out of ``localization``. TIDE asks
    for overlaps of at least t with the other class and calls those below "both".

    Each kind is repaired alone, and its gain is what the mean all-point AP over the classes with
    objects rises by, never below 0. A detection of kind ``localization`` gets the box of its best
    object; one of the two class kinds gets the class of the (similar or other) object that it
    overlaps most, and with it the place of its score there. It is then a detection of that object
    if the object is not difficult and overlapped by more than t; otherwise, and if it is a
    ``duplicate`` or ``background``, it is dropped. Of several detections of one object the first
    by score is the true positive, the others are dropped. Departures from TIDE: there a repaired
    detection never overtakes a true positive of lower score; missed objects are counted here, but
    not priced.

    An object is found where a detection of its class has it as best object with an overlap above
    t; difficult objects likewise.

    Args:
        matching: of `VOCEvaluator.matching`.
        similar: groups of names of similar classes; a class may be in several. Default: Hoiem et
            al.'s where all classes are among VOC's 20, else none.
        background_iou: b, in (0, t].

    Returns:
        Counts, gains and missed objects, and each detection's kind.

    Raises:
        ValueError: if ``background_iou`` is out of range or ``similar`` names an unknown class.
    """
    if not 0 < background_iou <= matching.iou_threshold:
        raise ValueError(
            f"background_iou is {background_iou}, expected a number in "
            f"(0, {matching.iou_threshold}], the matching's iou_threshold"
        )
    groups = _checked_groups(matching.classes, similar)
    kinds, right_gt = _diagnose(matching, _similarity(matching.classes, groups), background_iou)
    curves = curves_of(matching, rank(matching), kinds, right_gt)
    thresholds = np.array([curve.best_f1().score for curve in curves])
    # Comparisons with NaN are false: of a class without objects nothing is shown.
    is_shown = np.asarray(matching.det_scores >= thresholds[matching.det_labels - 1])
    num_objects = matching.num_objects
    scopes = {
        "top_n": _top_n(matching, num_objects),
        "best_f1": np.flatnonzero(is_shown),
        "all": np.arange(len(kinds)),
    }
    is_missed = _missed(matching, np.ones_like(is_shown))
    is_missed_at_best_f1 = _missed(matching, is_shown)
    mean_ap, gains = ap_gains(matching, kinds, right_gt)
    missed, missed_difficult = (
        _missed_by_size(matching, objects, is_missed, is_missed_at_best_f1)
        for objects in (~matching.gt_difficult, matching.gt_difficult)
    )
    return ErrorAnalysis(
        matching=matching,
        background_iou=background_iou,
        similar=groups,
        kinds=kinds,
        best_f1_scores=dict(zip(matching.classes, thresholds.tolist(), strict=True)),
        num_objects=dict(zip(matching.classes, num_objects.tolist(), strict=True)),
        counts={scope: _counts(matching, kinds, rows) for scope, rows in scopes.items()},
        mean_ap=mean_ap,
        ap_gain=gains,
        missed=missed,
        missed_difficult=missed_difficult,
        is_shown=is_shown,
        is_missed=is_missed,
        is_missed_at_best_f1=is_missed_at_best_f1,
    )


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


def _similarity(classes: tuple[str, ...], groups: Groups) -> BoolArray:
    """Which label is similar to which, ``(C + 1, C + 1)``; none to itself."""
    member = np.array([[name in group for name in classes] for group in groups], dtype=np.int64)
    is_similar = np.zeros((len(classes) + 1, len(classes) + 1), dtype=bool)
    if len(groups):
        is_similar[1:, 1:] = member.T @ member > 0
    np.fill_diagonal(is_similar, False)
    return is_similar


def _diagnose(
    matching: VOCMatching, is_similar: BoolArray, background_iou: float
) -> tuple[NDArray[np.int8], IntArray]:
    """The kind of every detection and the object it would be a detection of, both ``(D,)``."""
    iou, threshold = matching.best_iou, matching.iou_threshold
    kinds = np.full(len(iou), _BACKGROUND, dtype=np.int8)
    kinds[iou >= background_iou] = _LOCALIZATION
    kinds[iou > threshold] = _DUPLICATE
    kinds[matching.is_true], kinds[matching.is_ignored] = _CORRECT, _IGNORED
    right_gt = np.full(len(iou), -1, dtype=np.int64)
    on_own = np.flatnonzero((kinds == _CORRECT) | (kinds == _LOCALIZATION))
    right_gt[on_own] = _unless_difficult(matching, matching.best_gt[on_own])

    # Of these the best object of their own class overlaps too little to be the best of all.
    rest = np.flatnonzero(kinds == _BACKGROUND)
    rest, iou, gt = _confused(matching, rest, np.arange(len(matching.gt_labels)), background_iou)
    kinds[rest] = _OTHER
    right_gt[rest] = np.where(iou > threshold, _unless_difficult(matching, gt), -1)
    for label in np.flatnonzero(is_similar.any(axis=1)):
        rows = rest[matching.det_labels[rest] == label]
        similar_gt = np.flatnonzero(is_similar[label, matching.gt_labels])
        rows, iou, gt = _confused(matching, rows, similar_gt, background_iou)
        kinds[rows] = _SIMILAR
        right_gt[rows] = np.where(iou > threshold, _unless_difficult(matching, gt), -1)
    return kinds, right_gt


def _confused(
    matching: VOCMatching, rows: IntArray, objects: IntArray, background_iou: float
) -> tuple[IntArray, FloatArray, IntArray]:
    """Those of the detections ``rows`` that overlap one of ``objects`` by enough."""
    iou, best = best_overlaps(
        matching.det_boxes[rows],
        matching.det_images[rows],
        matching.gt_boxes[objects],
        matching.gt_images[objects],
    )
    enough = iou >= background_iou
    return rows[enough], iou[enough], objects[best[enough]]


def _unless_difficult(matching: VOCMatching, gt: IntArray) -> IntArray:
    return np.where(matching.gt_difficult[gt], -1, gt)


def _top_n(matching: VOCMatching, num_objects: IntArray) -> IntArray:
    """Rows of each class's best detections that count, as many as it has objects."""
    return np.concatenate(
        [
            rows[~matching.is_ignored[rows]][:num]
            for rows, num in zip(matching.by_class, num_objects, strict=True)
        ]
    )


def _counts(
    matching: VOCMatching, kinds: NDArray[np.int8], rows: IntArray
) -> dict[str, dict[str, int]]:
    """How many of ``rows`` are what, by class and outcome."""
    num = len(OUTCOMES)
    cells = (matching.det_labels[rows] - 1) * num + kinds[rows]
    table = np.bincount(cells, minlength=len(matching.classes) * num).reshape(-1, num)
    return {
        name: dict(zip(OUTCOMES, counts, strict=True))
        for name, counts in zip(matching.classes, table.tolist(), strict=True)
    }


def _missed(matching: VOCMatching, among: BoolArray) -> BoolArray:
    """Which objects ``(G,)`` none of the detections ``among (D,)`` has found."""
    is_missed = np.ones(len(matching.gt_labels), dtype=bool)
    is_missed[matching.best_gt[among & (matching.best_iou > matching.iou_threshold)]] = False
    return is_missed


def _missed_by_size(
    matching: VOCMatching, objects: BoolArray, is_missed: BoolArray, at_best_f1: BoolArray
) -> dict[str, MissedObjects]:
    """Count those of ``objects (G,)`` that are missed, by size of their box."""
    x1, y1, x2, y2 = matching.gt_boxes.T.astype(np.float64)
    size = np.digitize((x2 - x1) * (y2 - y1), (_MEDIUM_AREA, _LARGE_AREA))
    chosen = {name: objects & (size == index) for index, name in enumerate(SIZES)}
    return {
        name: MissedObjects(
            int(rows.sum()), int(is_missed[rows].sum()), int(at_best_f1[rows].sum())
        )
        for name, rows in {**chosen, "all": objects}.items()
    }


def ap_gains(
    matching: VOCMatching, kinds: NDArray[np.int8], right_gt: IntArray
) -> tuple[float, dict[str, float]]:
    """The mean all-point AP and, by kind, what it gains when that kind alone is repaired."""
    order, num_objects = rank(matching), matching.num_objects
    mean_ap = _mean_ap(curves_of(matching, order, kinds, right_gt), num_objects)
    gains = {}
    for kind in KINDS:
        repaired = curves_of(matching, order, kinds, right_gt, OUTCOMES.index(kind))
        # No repair lowers a precision at any recall; the sum of the areas may by rounding.
        gains[kind] = float(np.maximum(_mean_ap(repaired, num_objects) - mean_ap, 0.0))
    return mean_ap, gains


def rank(matching: VOCMatching) -> IntArray:
    """All rows of detections ``(D,)`` by decreasing score, equal ones as they came."""
    return np.argsort(-matching.det_scores, kind="stable")


def curves_of(
    matching: VOCMatching,
    order: IntArray,
    kinds: NDArray[np.int8],
    right_gt: IntArray,
    repaired: int = -1,
) -> list[PrecisionRecallCurve]:
    """Each class's curve once the detections of kind ``repaired`` (default: none) are right."""
    claims = (kinds == _CORRECT) | (kinds == repaired)
    gt = np.where(claims, right_gt, -1)
    ranked = order[gt[order] >= 0]
    # Written from the lowest score to the highest: the highest stays, as the last one written.
    finder = np.full(len(matching.gt_labels), -1, dtype=np.int64)
    finder[gt[ranked[::-1]]] = ranked[::-1]
    is_true = np.zeros(len(kinds), dtype=bool)
    is_true[finder[finder >= 0]] = True
    labels = matching.det_labels.astype(np.int64)
    labels[is_true] = matching.gt_labels[gt[is_true]]

    kept = order[(is_true | (~claims & (kinds != _IGNORED)))[order]]
    kept = kept[np.argsort(labels[kept], kind="stable")]
    ends = np.cumsum(np.bincount(labels[kept], minlength=len(matching.classes) + 1)[1:])
    by_class = np.split(kept, ends[:-1])
    return [
        PrecisionRecallCurve.of(is_true[rows], matching.det_scores[rows], num)
        for rows, num in zip(by_class, matching.num_objects.tolist(), strict=True)
    ]


def _mean_ap(curves: list[PrecisionRecallCurve], num_objects: IntArray) -> float:
    """Mean all-point AP over the classes that have objects."""
    aps = [
        average_precision(curve.recall, curve.precision)
        for curve, num in zip(curves, num_objects, strict=True)
        if num
    ]
    return float(np.mean(aps)) if aps else float("nan")
