"""What VOC and COCO evaluations found: tables, plain values, and VOC's curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from detmix.evaluation.voc.ap import Interpolation, OperatingPoint, PrecisionRecallCurve

IouType = Literal["bbox", "segm", "keypoints"]
Row = tuple[Any, ...]
Table = tuple[list[Row], list[Row], list[Row]]
Column = tuple[str, Mapping[str, Any], Any]  # header, values by class, and what stands below them


@dataclass(frozen=True, eq=False)
class VOCResult:
    """Average precision of every class and its mean; ``print`` shows it as a table.

    Attributes:
        mean_ap: mean over the classes that have objects, in [0, 1]; NaN where none has.
        ap: by class name, NaN for a class without objects.
        classes: the class names in the order of their labels 1..C.
        num_objects: by class name, objects that are not difficult.
        num_detections: by class name, all detections, also those that count neither way.
        iou_threshold: a match overlaps by strictly more.
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
        values = vars(self) | {"best_f1": {k: vars(best) for k, best in self.best_f1().items()}}
        return {key: plain(value) for key, value in values.items() if key != "curves"}

    def __str__(self) -> str:
        """The table: one line for each class, the mean, and what some of the columns mean."""
        what = f"mean ({self.interpolation}, IoU > {self.iou_threshold:g})"
        columns = [("AP", self.ap, self.mean_ap), *best_columns(self, digits=3)]
        note = "precision, recall: of the detections from this score up, where F1 is highest"
        return "\n".join([*align(*class_table(what, [*columns, *count_columns(self)])), note])


@dataclass(frozen=True, eq=False)
class COCOResult:
    """COCO's average precision and recall; ``print`` shows them as a table.

    All values lie in [0, 1] and are NaN where nothing defines them, for which pycocotools has -1: a
    class without objects, an area range without any; for keypoints the small objects and recall at
    1, 10 and 100 detections, which COCO does not define there. Unless said otherwise a value is the
    mean over the IoU thresholds 0.5, 0.55, ..., 0.95 and the classes that have objects, at 100
    detections by image and class (20 for keypoints).

    Attributes:
        iou_type: ``"bbox"``, ``"segm"`` or ``"keypoints"``, whose overlap was measured.
        ap: average precision; ``ap50`` and ``ap75`` at one IoU threshold, ``ap_small`` to
            ``ap_large`` of objects with an area below 32², below 96² and from there on.
        ar: average recall, in the same way; ``ar1``, ``ar10`` and ``ar100`` at so many detections
            by image and class.
        ap_by_class: ``ap`` by class name, as ``ap50_by_class`` has ``ap50``.
        classes: the class names in the order of their labels 1..C.
        num_objects: by class name, objects that count: neither crowds nor difficult, and for
            keypoints with a labelled one.
        num_detections: by class name, all detections.
        num_images: distinct images evaluated.
    """

    iou_type: IouType
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: float
    ar50: float
    ar75: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    ap_by_class: Mapping[str, float]
    ap50_by_class: Mapping[str, float]
    classes: tuple[str, ...]
    num_objects: Mapping[str, int]
    num_detections: Mapping[str, int]
    num_images: int

    @property
    def mean_ap(self) -> float:
        """The same as ``ap``: what `VOCResult` calls its one number."""
        return self.ap

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; None stands for NaN."""
        return {name: plain(value) for name, value in vars(self).items()}

    def __str__(self) -> str:
        """The table: one line for each class, then the mean, then AP and AR by area."""
        what = f"mean ({self.iou_type}, IoU 0.50:0.95)"
        aps = [("AP", self.ap_by_class, self.ap), ("AP50", self.ap50_by_class, self.ap50)]
        lines = align(*class_table(what, [*aps, *count_columns(self)]))
        return "\n".join([*lines, "", *self.area_lines()])

    def area_lines(self) -> list[str]:
        """AP and AR by IoU and area, as lines of a table."""
        header = ("", "all", "IoU 0.50", "IoU 0.75", "small", "medium", "large")
        ends = ("", "50", "75", "_small", "_medium", "_large")
        rows = [
            (name.upper(), *(ap_text(getattr(self, name + end)) for end in ends))
            for name in ("ap", "ar")
        ]
        lines = align([header, *rows])
        if self.iou_type != "keypoints":
            values = (f"{ap_text(getattr(self, f'ar{most}'))} at {most}" for most in (1, 10, 100))
            lines.append(f"AR by detections: {', '.join(values)}")
        return lines


def count_columns(result: VOCResult | COCOResult) -> list[Column]:
    """Objects and detections."""
    counts = {"objects": result.num_objects, "detections": result.num_detections}
    return [(name, of_class, sum(of_class.values())) for name, of_class in counts.items()]


def best_columns(result: VOCResult, digits: int = 4) -> list[Column]:
    """Precision, recall and score where F1 is highest."""
    best = result.best_f1().items()
    return [
        (key, {name: ap_text(getattr(point, key), digits) for name, point in best}, "")
        for key in ("precision", "recall", "score")
    ]


def class_table(last: str, columns: Sequence[Column], first: str = "class") -> Table:
    """The header, a row for each class and the row named ``last``; of text and integers."""
    headers, by_class, below = zip(*columns, strict=True)

    def row(name: str, values: Iterable[Any]) -> Row:
        return name, *(ap_text(each) if isinstance(each, float) else each for each in values)

    rows = [row(name, (values[name] for values in by_class)) for name in by_class[0]]
    return [(first, *headers)], rows, [row(last, below)]


def align(*parts: Sequence[Row]) -> list[str]:
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


def plain(value: Any) -> Any:
    """The value as JSON has it, which knows no NaN: None stands for it."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
