"""All that predictions are judged by, in one pass: VOC AP both ways, COCO AP, kinds of errors.

And the VOC devkit's result files of a data set, ``results/VOC2007/Main/comp4_det_test_cat.txt``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detmix.data import VOCDetection
from detmix.evaluation import (
    COCOEvaluator,
    COCOResult,
    ErrorAnalysis,
    VOCEvaluator,
    VOCMatching,
    VOCResult,
    analyze_errors,
    read_voc_results,
    write_voc_results,
)
from detmix.evaluation.coco.backend import Backend, check_choices
from detmix.evaluation.coco.result import IouType
from detmix.evaluation.voc.devkit_files import check_file_names
from detmix.evaluation.voc.result import align, ap_text
from detmix.files import write_text
from detmix.training.build import DetectionData, build_coco_evaluator
from detmix.training.config import TrainConfig
from detmix.training.inference import Prediction, score

_COCO_COLUMNS: dict[str, str] = {
    "bbox": "COCO AP",
    "segm": "mask AP",
    "keypoints": "keypoint AP",
}


@dataclass(frozen=True, eq=False)
class FullEvaluation:
    """What a detector's predictions came to; ``print`` shows it as tables."""

    voc: VOCResult
    voc07: VOCResult
    coco: Mapping[IouType, COCOResult]
    matching: VOCMatching
    errors: ErrorAnalysis

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; None stands for NaN."""
        return {
            "num_images": self.voc.num_images,
            "voc": self.voc.as_dict(),
            "voc07": self.voc07.as_dict(),
            "coco": {iou_type: result.as_dict() for iou_type, result in self.coco.items()},
            "errors": self.errors.as_dict(),
        }

    def save(self, path: Path, **about: Any) -> Path:
        """Write `as_dict` as JSON under a temporary name and rename it."""
        text = json.dumps({**about, **self.as_dict()}, indent=2, allow_nan=False)
        write_text(path, text + "\n")
        return path

    def class_table(self) -> tuple[list[str], list[tuple[Any, ...]], tuple[Any, ...]]:
        """Return the header, a row for each class and the row of the mean, of text and integers."""
        header = ["class", "AP", "AP 07", *(_COCO_COLUMNS[iou_type] for iou_type in self.coco)]
        header += ["objects", "detections", "precision", "recall", "score"]
        rows = [self._class_row(name) for name in self.voc.classes]
        mean = ["mean", ap_text(self.voc.mean_ap), ap_text(self.voc07.mean_ap)]
        mean += [ap_text(result.ap) for result in self.coco.values()]
        totals = (
            sum(counts.values()) for counts in (self.voc.num_objects, self.voc.num_detections)
        )
        return header, rows, (*mean, *totals, "", "", "")

    def _class_row(self, name: str) -> tuple[Any, ...]:
        best = self.voc.best_f1()[name]
        values = [self.voc.ap[name], self.voc07.ap[name]]
        values += [result.ap_by_class[name] for result in self.coco.values()]
        counts = (self.voc.num_objects[name], self.voc.num_detections[name])
        at_best = (ap_text(value) for value in (best.precision, best.recall, best.score))
        return (name, *(ap_text(value) for value in values), *counts, *at_best)

    def __str__(self) -> str:
        """One line for each class, the means, COCO's AP by area, errors by kind."""
        header, rows, mean = self.class_table()
        first, *lines, last = align([tuple(header), *rows, mean])
        rule = "-" * len(first)
        return "\n".join(
            [
                *(first, rule, *lines, rule, last, ""),
                f"{self.voc.num_images} images; precision and recall at the score of the best F1",
                f"VOC, IoU > {self.voc.iou_threshold:g}",
                f"mAP, all-point (VOC 2010 and later): {ap_text(self.voc.mean_ap)}",
                f"mAP, 11-point (VOC 2007):            {ap_text(self.voc07.mean_ap)}",
                *(f"\n{_summary(result)}" for result in self.coco.values()),
                f"\n{self.errors}",
            ]
        )


def _summary(result: COCOResult) -> str:
    what = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}[result.iou_type]
    return "\n".join([f"COCO, {what}, IoU 0.50:0.95", *result.area_lines()])


def check_before(dataset: DetectionData, config: TrainConfig, backend: Backend | None) -> None:
    """Raise, before a detector is run, what would keep its evaluation from being made or saved."""
    check_choices("bbox", backend or config.data.coco.backend)
    if isinstance(dataset, VOCDetection):
        check_file_names(dataset.classes)


def evaluate_fully(
    found: Sequence[tuple[int, Prediction]],
    truth: DetectionData,
    config: TrainConfig,
    backend: Backend | None = None,
) -> tuple[FullEvaluation, COCOEvaluator]:
    """Judge what `detect` has found by all rules."""
    voc = VOCEvaluator(config.data.class_names)
    coco = build_coco_evaluator(config, truth, backend)
    score(found, [voc, coco], truth)
    result = voc.compute("all-point")
    evaluation = FullEvaluation(
        voc=result,
        voc07=voc.compute("11point"),
        coco={iou_type: coco.compute(iou_type) for iou_type in coco.iou_types},
        matching=voc.matching(),
        errors=analyze_errors(voc.matching()),
    )
    return evaluation, coco


def save_devkit_results(
    folder: Path, dataset: VOCDetection, found: Sequence[tuple[int, Prediction]]
) -> Path:
    """Write what was found in the layout of the devkit, which its server takes as it is."""
    results = folder / "results"
    for year, split in dict.fromkeys(dataset.image_sets):  # also those of which nothing is found
        part = [each for each in found if dataset.image_sets[each[0]] == (year, split)]
        write_voc_results(
            results / f"VOC{year}" / "Main",
            [_bare_name(dataset, index) for index, _ in part],
            [prediction for _, prediction in part],
            dataset.classes,
            image_set=split,
        )
    return results


def load_devkit_results(
    results: Path, dataset: VOCDetection, limit: int | None = None
) -> list[tuple[int, Prediction]]:
    """Read result files back, whoever wrote them."""
    found: dict[int, Prediction] = {}
    for year, split in dict.fromkeys(dataset.image_sets):
        indices = [i for i, pair in enumerate(dataset.image_sets) if pair == (year, split)]
        below = (f"VOC{year}/Main", f"results/VOC{year}/Main", "Main", ".")
        predictions = read_voc_results(
            next((results / part for part in below if (results / part).is_dir()), results),
            [_bare_name(dataset, index) for index in indices],
            dataset.classes,
            image_set=split,
        )
        found.update(zip(indices, predictions, strict=True))
    return sorted(found.items())[:limit]


def _bare_name(dataset: VOCDetection, index: int) -> str:
    return dataset.names[index].rpartition("/")[2]
