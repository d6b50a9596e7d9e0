"""Precision/recall curves and the numbers that sum them up, by the rules of the Pascal VOC devkit.

Shape legend: K points of one class's curve, one for each detection that counts.

Source: ``VOCap.m`` of the development kits of 2007 and 2010 onwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.records import check_choice

Interpolation = Literal["11point", "all-point"]
"""How a curve becomes one AP: as in VOC 2007, or as from VOC 2010 on; see `average_precision`."""

# 0.1 steps exactly as np.arange(0, 1.1, 0.1) rounds them; a recall of 3/10 lies below the fourth.
_ELEVEN_RECALLS = np.arange(11) * 0.1


@dataclass(frozen=True)
class OperatingPoint:
    """What a class's detections of at least ``score`` come to; F1 is the harmonic mean."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class PrecisionRecallCurve:
    """Precision and recall of one class as the score threshold is lowered.

    Detections matched to difficult objects count neither way and are not points of the curve.

    Attributes:
        recall: ``(K,)`` float64, never decreasing; NaN throughout where the class has no objects.
        precision: ``(K,)`` float64.
        scores: ``(K,)`` float, the detection's score, never increasing.
    """

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: NDArray[Any]

    @classmethod
    def of(
        cls, is_true: NDArray[np.bool_], scores: NDArray[Any], num_objects: int
    ) -> "PrecisionRecallCurve":
        """The curve of ``is_true (K,)`` by decreasing score."""
        true_positives = np.cumsum(is_true, dtype=np.float64)
        recall = true_positives / num_objects if num_objects else np.full(len(is_true), np.nan)
        precision = true_positives / np.arange(1, len(is_true) + 1)
        return cls(recall, precision, scores)

    def best_f1(self) -> OperatingPoint:
        """The point of highest F1; of equal ones that of the highest score.

        NaN throughout for a class without objects. Without detections: score NaN, else zeros.
        """
        # A threshold keeps all of a run of equal scores or none: only its last point can be chosen.
        last_of_run = np.append(self.scores[1:] < self.scores[:-1], True)
        points = np.flatnonzero(last_of_run[: len(self.scores)])
        if len(points) == 0:
            return OperatingPoint(math.nan, 0.0, 0.0, 0.0)
        precision, recall = self.precision[points], self.recall[points]
        f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
        best = int(np.argmax(f1.round(12)))  # what differs by rounding alone is equal
        if math.isnan(recall[best]):
            return OperatingPoint(math.nan, math.nan, math.nan, math.nan)
        values = (self.scores[points], precision, recall, f1)
        return OperatingPoint(*(float(value[best]) for value in values))


def average_precision(
    recall: NDArray[np.float64],
    precision: NDArray[np.float64],
    interpolation: Interpolation = "all-point",
) -> float:
    """Summarise a precision/recall curve in one number in [0, 1], 0 for an empty curve.

    Args:
        recall: ``(K,)`` in order of decreasing score, hence not decreasing.
        precision: ``(K,)``.
        interpolation: ``"11point"`` (VOC2007): the mean, over the recalls 0, 0.1, ..., 1, of the
            highest precision at that recall or beyond. ``"all-point"`` (VOC2010 onwards): the area
            under the precision made non-increasing.
    """
    check_choice("interpolation", interpolation, Interpolation)
    # envelope[k] is the highest precision at recall[k] or beyond
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "11point":
        reached = np.searchsorted(recall, _ELEVEN_RECALLS, side="left")
        return float(np.append(envelope, 0.0)[reached].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def average_precisions(
    curves: Sequence[PrecisionRecallCurve],
    num_objects: NDArray[np.int64],
    interpolation: Interpolation = "all-point",
) -> tuple[list[float], float]:
    """Each class's AP, NaN where it has no objects, and the mean over those that have."""
    aps = [
        average_precision(curve.recall, curve.precision, interpolation) if num else math.nan
        for curve, num in zip(curves, num_objects, strict=True)
    ]
    valid = [ap for ap in aps if not math.isnan(ap)]
    return aps, float(np.mean(valid)) if valid else math.nan
