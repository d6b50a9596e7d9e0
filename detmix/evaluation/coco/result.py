"""What a COCO evaluation found, as a table and as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from detmix.evaluation.voc.result import align, ap_text, none_if_nan

IouType = Literal["bbox", "segm", "keypoints"]


@dataclass(frozen=True, eq=False)
class COCOResult:
    """COCO's average precision and recall; ``print`` shows them as a table.

    All values lie in [0, 1] and are NaN where nothing defines them, for which pycocotools has -1: a
    class without objects, an area range without any; for keypoints the small objects and recall at
    1, 10 and 100 detections, which COCO does not define there. Unless said otherwise a value is the
    mean over the IoU thresholds 0.5, 0.55, ..., 0.95 and the classes that have objects, at 100
    detections by image and class (20 for keypoints). Small objects have an area of up to 32², large
    ones of 96² square pixels and more.

    Attributes:
        iou_type: ``"bbox"``, ``"segm"`` or ``"keypoints"``, whose overlap was measured.
        ap: average precision.
        ap50: average precision at IoU 0.5.
        ap75: average precision at IoU 0.75.
        ap_small: average precision of small objects.
        ap_medium: of medium ones.
        ap_large: of large ones.
        ar: average recall; the same as ``ar100`` but for keypoints.
        ar50: average recall at IoU 0.5.
        ar75: average recall at IoU 0.75.
        ar1: average recall at 1 detection by image and class.
        ar10: at 10.
        ar100: at 100.
        ar_small: average recall of small objects.
        ar_medium: of medium ones.
        ar_large: of large ones.
        ap_by_class: ``ap`` by class name.
        ap50_by_class: ``ap50`` by class name.
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
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        """The table: one line for each class, then the mean, then AP and AR by area."""
        rows = [
            (
                name,
                ap_text(self.ap_by_class[name]),
                ap_text(self.ap50_by_class[name]),
                self.num_objects[name],
                self.num_detections[name],
            )
            for name in self.classes
        ]
        objects, detections = sum(row[3] for row in rows), sum(row[4] for row in rows)
        mean = (self._mean_label(), ap_text(self.ap), ap_text(self.ap50), objects, detections)
        lines = align([("class", "AP", "AP50", "objects", "detections"), *rows, mean])
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *self.area_lines()])

    def _mean_label(self) -> str:
        return f"mean ({self.iou_type}, IoU 0.50:0.95)"

    def area_lines(self) -> list[str]:
        """AP and AR by IoU and area, as lines of a table."""
        header = ("", "all", "IoU 0.50", "IoU 0.75", "small", "medium", "large")
        rows = [
            (name.upper(), *(ap_text(getattr(self, name + end)) for end in ends))
            for name, ends in (
                ("ap", ("", "50", "75", "_small", "_medium", "_large")),
                ("ar", ("", "50", "75", "_small", "_medium", "_large")),
            )
        ]
        lines = align([header, *rows])
        if self.iou_type != "keypoints":
            values = (f"{ap_text(getattr(self, f'ar{most}'))} at {most}" for most in (1, 10, 100))
            lines.append(f"AR by detections: {', '.join(values)}")
        return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return none_if_nan(value) if isinstance(value, float) else value
