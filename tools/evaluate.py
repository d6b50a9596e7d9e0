#!/usr/bin/env python
"""Print the AP of a checkpoint, or of predictions in COCO's format.

python tools/evaluate.py runs/voc2007_cpu/best.pt --data.root data/VOCdevkit
python tools/evaluate.py runs/coco/best.pt --save runs/coco/test
python tools/evaluate.py runs/coco/test/predictions.json --annotations instances_val2017.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detmix.data.loaders import eval_loader
from detmix.evaluation import COCOEvaluator, VOCEvaluator, score_predictions
from detmix.training import TrainConfig, evaluate, load_detector
from detmix.training.console import run_tool
from detmix.training.datasets import DetectionData, build_test_set, check_keypoints, open_dataset
from detmix.training.loop import make_accelerator
from detmix.training.scoring import build_coco_evaluator, build_evaluator


def main(args: Sequence[str]) -> None:
    """Evaluate on the test images of the checkpoint's configuration, which arguments change."""
    parser = _parser()
    parsed, overrides = parser.parse_known_args(args)
    if parsed.annotations is not None:
        if overrides or parsed.save is not None:
            parser.error(f"no use for {' '.join(overrides) or '--save'} with --annotations")
        chosen = {"iou_type": parsed.iou_type, "backend": parsed.backend}
        given = {name: value for name, value in chosen.items() if value is not None}
        print(score_predictions(parsed.source, parsed.annotations, **given))
        return
    if Path(parsed.source).suffix == ".json":
        parser.error(f"{parsed.source} needs --annotations, the ground truth to score it against")
    if parsed.iou_type is not None or parsed.backend is not None:
        parser.error(
            "--iou_type and --backend are for --annotations; a checkpoint is scored for all that "
            "its detector finds, by --data.coco.backend"
        )
    _evaluate_checkpoint(parsed.source, overrides, parsed.save)


def _evaluate_checkpoint(path: str, overrides: Sequence[str], save: Path | None) -> None:
    model, config = load_detector(path, overrides)
    accelerator = make_accelerator(config)
    dataset = open_dataset(config, train=False)
    check_keypoints(config, dataset, train=False)
    loader = eval_loader(
        build_test_set(config, dataset),
        config.data.eval_batch_size,
        workers=config.data.workers,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    evaluators = _evaluators(config, dataset, save)
    evaluate(model.to(accelerator.device), loader, evaluators, accelerator, truth=dataset)
    if accelerator.is_main_process:
        for number, evaluator in enumerate(evaluators):
            print("\n" * bool(number), end="")
            _report(evaluator, save)


def _evaluators(
    config: TrainConfig, dataset: DetectionData, save: Path | None
) -> list[VOCEvaluator | COCOEvaluator]:
    """Return what the data set is usually scored by, and COCO's where that is to be saved."""
    usual = build_evaluator(config, dataset)
    if save is None or isinstance(usual, COCOEvaluator):
        return [usual]
    return [usual, build_coco_evaluator(config, dataset)]


def _report(evaluator: VOCEvaluator | COCOEvaluator, save: Path | None) -> None:
    if isinstance(evaluator, VOCEvaluator):
        result = evaluator.compute()
        eleven = evaluator.compute(interpolation="11point")
        print(result)
        print(f"\n{result.num_images} images; IoU > {result.iou_threshold}")
        print(f"mAP, all-point (VOC 2010 and later): {result.mean_ap:.4f}")
        print(f"mAP, 11-point (VOC 2007):            {eleven.mean_ap:.4f}")
        return
    print("\n\n".join(str(evaluator.compute(iou_type)) for iou_type in evaluator.iou_types))
    if save is not None:
        predictions, annotations = evaluator.save(save)
        print(f"\nwrote {predictions}, and what it was scored against: {annotations}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Print the AP of a checkpoint of tools/train.py, or of predictions in COCO's "
        "result format, whoever wrote them.",
        epilog="Any option of tools/train.py changes what the checkpoint's configuration says.",
    )
    parser.add_argument(
        "source", help="best.pt or last.pt of a run folder, or a predictions.json; goes first"
    )
    parser.add_argument(
        "--save", type=Path, help="folder to write predictions.json and ground_truth.json to"
    )
    parser.add_argument(
        "--annotations", type=Path, help="score predictions against this COCO annotation file"
    )
    parser.add_argument(
        "--iou_type",
        choices=("bbox", "segm", "keypoints"),
        help="what to score, with --annotations; bbox by default",
    )
    parser.add_argument(
        "--backend",
        choices=("pycocotools", "faster-coco-eval"),
        help="what computes COCO's AP, with --annotations; pycocotools by default",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_tool(main))
