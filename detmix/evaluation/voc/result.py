"""What a VOC evaluation found, as a table, as plain values and as curves.

Shape legend: K points of a class's curve, one for each detection that counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.voc.ap import Interpolation


@dataclass(frozen=True)
class OperatingPoint:
    """What a class's detections come to when those below ``score`` are left out.

    Attributes:
        score: the threshold; detections of just this score are kept.
        precision: in [0, 1].
        recall: in [0, 1].
        f1: harmonic mean of precision and recall.
    """

    score: float
    precision: float
    recall: float
    f1: float

    def as_dict(self) -> dict[str, float | None]:
        """The four by name for JSON; None stands for NaN."""
        return {name: none_if_nan(value) for name, value in vars(self).items()}


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
        """The curve of one class; its arrays are read-only, as results share them.

        Args:
            is_true: ``(K,)`` true and false positives by decreasing score.
            scores: ``(K,)``.
            num_objects: of the class, difficult ones left out.
        """
        true_positives = np.cumsum(is_true, dtype=np.float64)
        recall = true_positives / num_objects if num_objects else np.full(len(is_true), np.nan)
        precision = true_positives / np.arange(1, len(is_true) + 1)
        for values in (recall, precision, scores):
            values.setflags(write=False)
        return cls(recall, precision, scores)

    def best_f1(self) -> OperatingPoint:
        """The point of highest F1; of equal ones that of the highest score.

        A threshold keeps all detections of one score or none, so that only the last of a run of
        equal scores is a point to choose.

        Returns:
            NaN throughout for a class without objects. Without detections: score NaN, else zeros.
        """
        last_of_run = np.append(self.scores[1:] < self.scores[:-1], True)
        points = np.flatnonzero(last_of_run[: len(self.scores)])
        if len(points) == 0:
            return OperatingPoint(math.nan, 0.0, 0.0, 0.0)
        precision, recall = self.precision[points], self.recall[points]
        f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
        best = int(np.argmax(f1.round(12)))  # what differs by rounding alone is equal
        if math.isnan(recall[best]):
            return OperatingPoint(math.nan, math.nan, math.nan, math.nan)
        return OperatingPoint(
            float(self.scores[points[best]]),
            float(precision[best]),
            float(recall[best]),
            float(f1[best]),
        )


@dataclass(frozen=True, eq=False)
class VOCResult:
    """Average precision of every class and its mean; ``print`` shows it as a table.

    Attributes:
        mean_ap: mean over the classes that have objects, in [0, 1]; NaN where none has.
        ap: average precision by class name, NaN for a class without objects.
        classes: the class names in the order of their labels 1..C.
        num_objects: by class name, objects that are not difficult.
        num_detections: by class name, all detections, also those that count neither way.
        curves: by class name.
        iou_threshold: a match overlaps by strictly more.
        interpolation: ``"11point"`` or ``"all-point"``.
        num_images: distinct images evaluated.
    """

    mean_ap: float
    ap: Mapping[str, float]
    classes: tuple[str, ...]
    num_objects: Mapping[str, int]
    num_detections: Mapping[str, int]
    curves: Mapping[str, PrecisionRecallCurve] = field(repr=False)
    iou_threshold: float
    interpolation: Interpolation
    num_images: int

    def best_f1(self) -> dict[str, OperatingPoint]:
        """Each class's `PrecisionRecallCurve.best_f1`; NaN throughout where it has no objects."""
        nowhere = OperatingPoint(math.nan, math.nan, math.nan, math.nan)
        return {
            name: self.curves[name].best_f1() if self.num_objects[name] else nowhere
            for name in self.classes
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything but the curves as plain values for JSON; None stands for NaN."""
        return {
            "mean_ap": none_if_nan(self.mean_ap),
            "ap": {name: none_if_nan(value) for name, value in self.ap.items()},
            "best_f1": {name: point.as_dict() for name, point in self.best_f1().items()},
            "classes": list(self.classes),
            "num_objects": dict(self.num_objects),
            "num_detections": dict(self.num_detections),
            "iou_threshold": self.iou_threshold,
            "interpolation": self.interpolation,
            "num_images": self.num_images,
        }

    def __str__(self) -> str:
        """The table: one line for each class, the mean, and what some of the columns mean."""
        rows = [
            (
                name,
                ap_text(self.ap[name]),
                *(_short(value) for value in (point.precision, point.recall, point.score)),
                self.num_objects[name],
                self.num_detections[name],
            )
            for name, point in self.best_f1().items()
        ]
        objects, detections = sum(self.num_objects.values()), sum(self.num_detections.values())
        mean = (self._mean_label(), ap_text(self.mean_ap), "", "", "", objects, detections)
        header = ("class", "AP", "precision", "recall", "score", "objects", "detections")
        lines = align([header, *rows, mean])
        rule = "-" * len(lines[0])
        note = "precision, recall: of the detections from this score up, where F1 is highest"
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], note])

    def _mean_label(self) -> str:
        return f"mean ({self.interpolation}, IoU > {self.iou_threshold:g})"


def align(rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of equal width: the first column to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [str(first).ljust(widths[0])]
            + [str(cell).rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        )
        for first, *rest in rows
    ]


def ap_text(value: float) -> str:
    """An AP as a table shows it."""
    return "n/a" if math.isnan(value) else f"{value:.4f}"


def _short(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def none_if_nan(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
