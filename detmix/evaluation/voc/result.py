"""What a VOC evaluation found, as a table, as plain values and as curves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detmix.evaluation.voc.ap import Interpolation, OperatingPoint, PrecisionRecallCurve


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
        return plain(
            mean_ap=self.mean_ap,
            ap=self.ap,
            best_f1={name: vars(point) for name, point in self.best_f1().items()},
            classes=self.classes,
            num_objects=self.num_objects,
            num_detections=self.num_detections,
            iou_threshold=self.iou_threshold,
            interpolation=self.interpolation,
            num_images=self.num_images,
        )

    def __str__(self) -> str:
        """The table: one line for each class, the mean, and what some of the columns mean."""
        rows = [
            (
                name,
                ap_text(self.ap[name]),
                *(ap_text(value, 3) for value in (point.precision, point.recall, point.score)),
                self.num_objects[name],
                self.num_detections[name],
            )
            for name, point in self.best_f1().items()
        ]
        what = f"mean ({self.interpolation}, IoU > {self.iou_threshold:g})"
        objects, detections = sum(self.num_objects.values()), sum(self.num_detections.values())
        mean = (what, ap_text(self.mean_ap), "", "", "", objects, detections)
        header = ("class", "AP", "precision", "recall", "score", "objects", "detections")
        note = "precision, recall: of the detections from this score up, where F1 is highest"
        return "\n".join([*align([header], rows, [mean]), note])


def align(*parts: Sequence[tuple[Any, ...]]) -> list[str]:
    """Lines of equal width, the first column to the left; rules between the parts of the table."""
    columns = zip(*(row for part in parts for row in part), strict=True)
    widths = [max(len(str(cell)) for cell in column) for column in columns]
    lines: list[str] = []
    for part in filter(None, parts):
        if lines:
            lines.append("-" * len(lines[0]))
        for first, *rest in part:
            cells = (str(cell).rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
            lines.append("  ".join([str(first).ljust(widths[0]), *cells]))
    return lines


def ap_text(value: float, digits: int = 4) -> str:
    """An AP as a table shows it."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def plain(**values: Any) -> dict[str, Any]:
    """The values as JSON has them, which knows no NaN: None stands for it."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return none_if_nan(value) if isinstance(value, float) else value


def none_if_nan(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
