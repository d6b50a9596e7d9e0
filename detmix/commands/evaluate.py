"""Score a checkpoint: VOC AP, COCO AP, what goes wrong; or saved predictions, without a model.

detmix evaluate runs/voc2007_cpu/best.pt --data.root data/VOCdevkit --report
detmix evaluate runs/voc2007_cpu/evaluation/results --data.root data/VOCdevkit
detmix evaluate runs/coco/evaluation/predictions.json --annotations instances_val2017.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from detmix.data import VOCDetection
from detmix.data.loaders import eval_loader
from detmix.evaluation import score_predictions
from detmix.evaluation.coco.backend import Backend
from detmix.evaluation.results import IouType
from detmix.training import TrainConfig, load_detector, parse_args
from detmix.training.build import build_test_set, open_dataset
from detmix.training.full_evaluation import (
    check_before,
    evaluate_fully,
    load_devkit_results,
    save_devkit_results,
)
from detmix.training.inference import detect
from detmix.training.processes import loader_share, make_accelerator
from detmix.training.run_report import write_run_report


def main(args: Sequence[str]) -> None:
    """Evaluate a checkpoint, a folder of the devkit's result files, or a ``predictions.json``."""
    parser = _parser()
    if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
        parser.error(f"expected the checkpoint or the predictions first, got {args[0]}")
    parsed, overrides = parser.parse_known_args(args)
    parsed.overrides = overrides
    source: Path = parsed.source
    takes: tuple[str, ...]
    if parsed.annotations is not None:
        score, takes, what = _score_json, ("iou_type",), "--annotations"
    elif source.suffix == ".json":
        parser.error(f"{source} needs --annotations, the ground truth to score it against")
    elif (source / "best.pt").exists():
        parser.error(f"{source} is a run: choose its best.pt or its last.pt")
    elif source.is_dir():
        score, takes, what = _score_devkit_results, ("overrides", "save"), "a folder of results"
    else:
        score, takes = _evaluate_checkpoint, ("overrides", "save", "report")
        what = "a checkpoint, without --annotations"
    for name in ("overrides", "save", "report", "iou_type"):
        if getattr(parsed, name) and name not in takes:
            got = " ".join(parsed.overrides) if name == "overrides" else f"--{name}"
            parser.error(f"no use for {got} with {what}")
    score(parsed)


def _evaluate_checkpoint(parsed: argparse.Namespace) -> None:
    source = parsed.source
    folder = parsed.save or source.parent / "evaluation"
    model, config = load_detector(source, parsed.overrides)
    accelerator = make_accelerator(config)
    dataset = open_dataset(config, train=False)
    check_before(dataset, parsed.backend)
    images, share = build_test_set(config, dataset), loader_share(accelerator, config.data.workers)
    loader = eval_loader(images, config.data.eval_batch_size, **share)
    if accelerator.is_main_process:  # what cannot be written to is told before the work
        folder.mkdir(parents=True, exist_ok=True)
    found = detect(model.to(accelerator.device), loader, accelerator, truth=dataset)
    if not accelerator.is_main_process:
        return
    evaluation, coco = evaluate_fully(found, dataset, config, parsed.backend)
    print(evaluation)
    about = {"checkpoint": str(source), "data": config.as_dict()["data"]}
    written = [evaluation.save(folder / "results.json", **about), *coco.save(folder)]
    if isinstance(dataset, VOCDetection) and dataset.image_sets:
        written.append(save_devkit_results(folder, dataset, found))
    if parsed.report:
        written.append(write_run_report(folder, evaluation, found, dataset, config, source))
    print(f"\nwrote {', '.join(path.name for path in written)} to {folder}")


def _score_devkit_results(parsed: argparse.Namespace) -> None:
    config = parse_args(TrainConfig, parsed.overrides)
    dataset = open_dataset(config, train=False)
    if not isinstance(dataset, VOCDetection) or not dataset.image_sets:
        raise ValueError(f"{parsed.source}: the devkit's result files need a devkit (VOC2007 …)")
    found = load_devkit_results(parsed.source, dataset, config.data.test_limit)
    evaluation, _ = evaluate_fully(found, dataset, config, parsed.backend)
    print(evaluation)
    if parsed.save is not None:
        about = {"detections": str(parsed.source), "data": config.as_dict()["data"]}
        print(f"\nwrote {evaluation.save(parsed.save / 'results.json', **about)}")


def _score_json(parsed: argparse.Namespace) -> None:
    chosen = {"iou_type": parsed.iou_type or "bbox", "backend": parsed.backend}
    print(score_predictions(parsed.source, parsed.annotations, **chosen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score a checkpoint of `detmix train` or the VOC devkit's result files (VOC "
        "AP by both rules, COCO AP, false positives by kind), or COCO's predictions (COCO AP).",
        epilog="Any option of `detmix train` changes what the checkpoint's configuration says.",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="best.pt or last.pt of a run, a folder of the devkit's files, or "
        "a predictions.json; goes first",
    )
    add(
        "--save",
        type=Path,
        help="folder for results.json and what was found, in the formats of "
        "the devkit and of COCO; by default 'evaluation' beside the checkpoint",
    )
    add("--report", action="store_true", help="write report.html and its pictures there, too")
    add("--annotations", type=Path, help="score predictions against this COCO annotation file")
    add("--iou_type", choices=get_args(IouType), help="with --annotations; bbox by default")
    add("--backend", choices=get_args(Backend), default="auto", help="what computes COCO's AP")
    return parser
