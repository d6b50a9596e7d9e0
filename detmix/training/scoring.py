"""Which evaluators a configuration asks for, and what their results come to in a training's log."""

from __future__ import annotations

import math

from detmix.detectors import target_keys
from detmix.evaluation import COCOEvaluator, COCOResult, VOCEvaluator, VOCResult
from detmix.evaluation.coco.backend import Backend
from detmix.evaluation.coco.result import IouType
from detmix.training.config import TrainConfig
from detmix.training.datasets import DetectionData
from detmix.training.progress import Evaluation

__all__ = ["Score", "build_coco_evaluator", "build_evaluator", "summarize"]

Score = VOCResult | COCOResult

# What COCO calls the overlap of each thing that a target may need.
_IOU_TYPES: dict[str, IouType] = {"masks": "segm", "keypoints": "keypoints"}


def build_evaluator(config: TrainConfig, dataset: DetectionData) -> VOCEvaluator | COCOEvaluator:
    """Return what a training on this kind of data is scored by.

    Args:
        config: The training's configuration.
        dataset: What is evaluated on.
    """
    if config.data.format == "voc":
        return VOCEvaluator(config.data.class_names)
    return build_coco_evaluator(config, dataset)


def build_coco_evaluator(
    config: TrainConfig, dataset: DetectionData, backend: Backend | None = None
) -> COCOEvaluator:
    """Return an evaluator of COCO's AP, of masks or keypoints too where the detector finds any.

    Args:
        config: The training's configuration.
        dataset: What is evaluated on.
        backend: What computes it; None for the configuration's.
    """
    more = [_IOU_TYPES[key] for key in target_keys(config.detector.name)]
    return COCOEvaluator(
        config.data.class_names,
        category_ids=dataset.category_ids,
        iou_types=("bbox", *more),
        backend=backend or config.data.coco.backend,
    )


def summarize(evaluator: VOCEvaluator | COCOEvaluator) -> Evaluation[Score]:
    """Compute what an evaluator has gathered, for the log and for the choice of a checkpoint."""
    if isinstance(evaluator, VOCEvaluator):
        return _summarize_voc(evaluator)
    result = evaluator.compute("bbox")
    metrics = {
        "mean_ap": result.ap,
        "ap50": result.ap50,
        "ap75": result.ap75,
        "ap_small": result.ap_small,
        "ap_medium": result.ap_medium,
        "ap_large": result.ap_large,
    }
    summary = f"AP {result.ap:.4f}, AP50 {result.ap50:.4f}, AP75 {result.ap75:.4f}"
    for iou_type in evaluator.iou_types:
        if iou_type != "bbox":
            name = {"segm": "mask", "keypoints": "keypoint"}[iou_type]
            metrics[f"{name}_ap"] = evaluator.compute(iou_type).ap
            summary += f", {name} AP {metrics[f'{name}_ap']:.4f}"
    plain = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    return Evaluation(result, plain["mean_ap"], plain, summary)


def _summarize_voc(evaluator: VOCEvaluator) -> Evaluation[Score]:
    result = evaluator.compute()
    eleven = evaluator.compute(interpolation="11point").mean_ap
    score = None if math.isnan(result.mean_ap) else result.mean_ap
    return Evaluation(
        result=result,
        score=score,
        metrics={"mean_ap": score, "mean_ap_11point": None if score is None else eleven},
        summary=f"mAP {result.mean_ap:.4f} (all-point), {eleven:.4f} (11-point)",
    )
