"""What each kind of error costs: the AP once its detections are repaired or gone.

Shape legend: D detections and G ground-truth objects of the whole data set, C classes.
"""

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.errors.result import KINDS, OUTCOMES
from detmix.evaluation.voc.ap import IntArray, average_precision
from detmix.evaluation.voc.matching import VOCMatching
from detmix.evaluation.voc.result import PrecisionRecallCurve

_CORRECT, _IGNORED = OUTCOMES.index("correct"), OUTCOMES.index("ignored")


def ap_gains(
    matching: VOCMatching, kinds: NDArray[np.int8], right_gt: IntArray
) -> tuple[float, dict[str, float]]:
    """The mean all-point AP and, by kind, what it gains when that kind alone is repaired.

    Args:
        matching: of D detections.
        kinds: ``(D,)`` places in `OUTCOMES`.
        right_gt: ``(D,)``, the object that a detection is, or when repaired would be, a detection
            of; -1 where there is none, so that the repair drops it.

    Returns:
        NaN throughout where no class has objects.
    """
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
    """Each class's curve once the detections of kind ``repaired`` (default: none) are right.

    Of several detections of one object the first in ``order`` counts; the others are dropped.
    """
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
