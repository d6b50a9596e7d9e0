"""All that predictions are judged by, in one pass: VOC AP both ways, COCO AP, kinds of errors.

And the VOC devkit's result files of a data set, ``results/VOC2007/Main/comp4_det_test_cat.txt``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detmix.data import VOCDetection
from detmix.evaluation import (
    COCOEvaluator,
    COCOResult,
    ErrorAnalysis,
    VOCEvaluator,
    VOCResult,
    analyze_errors,
    read_voc_results,
    write_voc_results,
)
from detmix.evaluation.coco.backend import Backend, check_backend
from detmix.evaluation.results import (
    IouType,
    Table,
    align,
    ap_text,
    best_columns,
    class_table,
    count_columns,
)
from detmix.evaluation.voc.devkit_files import file_name
from detmix.files import write_text
from detmix.training.build import DetectionData, build_coco_evaluator
from detmix.training.config import TrainConfig
from detmix.training.inference import Prediction, score

_COCO_COLUMNS = {"bbox": "COCO AP", "segm": "mask AP", "keypoints": "keypoint AP"}
_COCO_NAMES = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


@dataclass(frozen=True, eq=False)
class FullEvaluation:
    """What a detector's predictions came to; ``print`` shows it as tables."""

    voc: VOCResult
    voc07: VOCResult
    coco: Mapping[IouType, COCOResult]
    errors: ErrorAnalysis

    def save(self, path: Path, **about: Any) -> Path:
        """Write everything as JSON, in which null stands for NaN."""
        values = {
            **about,
            "num_images": self.voc.num_images,
            "voc": self.voc.as_dict(),
            "voc07": self.voc07.as_dict(),
            "coco": {iou_type: result.as_dict() for iou_type, result in self.coco.items()},
            "errors": self.errors.as_dict(),
        }
        write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
        return path

    def class_table(self) -> Table:
        """Return the header, a row for each class and the mean's."""
        voc, voc07 = self.voc, self.voc07
        aps = [("AP", voc.ap, voc.mean_ap), ("AP 07", voc07.ap, voc07.mean_ap)]
        aps += [
            (_COCO_COLUMNS[name], coco.ap_by_class, coco.ap) for name, coco in self.coco.items()
        ]
        return class_table("mean", [*aps, *count_columns(voc), *best_columns(voc)])

    def __str__(self) -> str:
        """One line for each class, the means, COCO's AP by area, errors by kind."""
        lines = [
            *align(*self.class_table()),
            "",
            f"{self.voc.num_images} images; precision and recall at the score of the best F1",
            f"VOC, IoU > {self.voc.iou_threshold:g}",
            f"mAP, all-point (VOC 2010 and later): {ap_text(self.voc.mean_ap)}",
            f"mAP, 11-point (VOC 2007):            {ap_text(self.voc07.mean_ap)}",
        ]
        for iou_type, result in self.coco.items():
            title = f"COCO, {_COCO_NAMES[iou_type]}, IoU 0.50:0.95"
            lines += ["", title, *result.area_lines()]
        return "\n".join([*lines, "", str(self.errors)])


def check_before(dataset: DetectionData, backend: Backend) -> None:
    """Raise, before a detector is run, what would keep its evaluation from being made or saved."""
    check_backend(backend)
    if isinstance(dataset, VOCDetection) and dataset.image_sets:
        for name in dataset.classes:
            file_name("comp4", "test", name)


def evaluate_fully(
    found: Sequence[tuple[int, Prediction]],
    truth: DetectionData,
    config: TrainConfig,
    backend: Backend = "auto",
) -> tuple[FullEvaluation, COCOEvaluator]:
    """Judge what `detect` has found by all rules."""
    voc = VOCEvaluator(config.data.class_names)
    coco = build_coco_evaluator(config, truth, backend)
    score(found, [voc, coco], truth)
    evaluation = FullEvaluation(
        voc=voc.compute("all-point"),
        voc07=voc.compute("11point"),
        coco={iou_type: coco.compute(iou_type) for iou_type in coco.iou_types},
        errors=analyze_errors(voc.matching()),
    )
    return evaluation, coco


def save_devkit_results(
    folder: Path, dataset: VOCDetection, found: Sequence[tuple[int, Prediction]]
) -> Path:
    """Write what was found in the layout of the devkit, which its server takes as it is."""
    results, predictions = folder / "results", dict(found)
    for year, split, names in _image_sets(dataset):
        part = [index for index in names if index in predictions]
        write_voc_results(
            results / f"VOC{year}" / "Main",
            [names[index] for index in part],
            [predictions[index] for index in part],
            dataset.classes,
            image_set=split,
        )
    return results


def load_devkit_results(
    results: Path, dataset: VOCDetection, limit: int | None = None
) -> list[tuple[int, Prediction]]:
    """Read result files back, whoever wrote them."""
    found: dict[int, Prediction] = {}
    for year, split, names in _image_sets(dataset):
        below = (f"VOC{year}/Main", f"results/VOC{year}/Main", "Main", ".")
        folder = next((results / part for part in below if (results / part).is_dir()), results)
        predictions = read_voc_results(
            folder, list(names.values()), dataset.classes, image_set=split
        )
        found.update(zip(names, predictions, strict=True))
    return sorted(found.items())[:limit]


def _image_sets(dataset: VOCDetection) -> Iterator[tuple[str, str, dict[int, str]]]:
    """Yield each year and split with its images: their names in it by their indices."""
    for year, split in dict.fromkeys(dataset.image_sets):
        indices = [i for i, pair in enumerate(dataset.image_sets) if pair == (year, split)]
        yield year, split, {index: dataset.names[index].partition("/")[2] for index in indices}
