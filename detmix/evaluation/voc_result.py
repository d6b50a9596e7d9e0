"""What a VOC evaluation found, as a table, as plain values and as curves.

Shape legend: K points of a class's curve, one for each detection that counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.voc_ap import Interpolation


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

    def as_dict(self) -> dict[str, Any]:
        """Everything but the curves as plain values for JSON; None stands for NaN."""
        return {
            "mean_ap": none_if_nan(self.mean_ap),
            "ap": {name: none_if_nan(value) for name, value in self.ap.items()},
            "classes": list(self.classes),
            "num_objects": dict(self.num_objects),
            "num_detections": dict(self.num_detections),
            "iou_threshold": self.iou_threshold,
            "interpolation": self.interpolation,
            "num_images": self.num_images,
        }

    def __str__(self) -> str:
        """The table: one line for each class, then the mean."""
        rows = [
            (name, ap_text(self.ap[name]), self.num_objects[name], self.num_detections[name])
            for name in self.classes
        ]
        objects, detections = sum(row[2] for row in rows), sum(row[3] for row in rows)
        mean = (self._mean_label(), ap_text(self.mean_ap), objects, detections)
        header = ("class", "AP", "objects", "detections")
        lines = align([header, *rows, mean])
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

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


def none_if_nan(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
