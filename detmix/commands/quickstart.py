"""See the whole of detmix work in a few minutes: CutMix pretraining, weighted mixup, VOC mAP.

detmix quickstart
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detmix.data import write_shape_crops, write_shapes
from detmix.pictures import plot_learning_curve
from detmix.training import (
    ClassifierTrainer,
    DetectorTrainer,
    PretrainConfig,
    TrainConfig,
    parse_args,
)
from detmix.training.console import next_commands
from detmix.training.full_evaluation import evaluate_fully
from detmix.training.parse import CONFIGS
from detmix.training.run_report import write_run_report


def main(args: Sequence[str]) -> None:
    """Make the shapes data, pretrain, train, and put tables and pictures into the run folder."""
    start = time.perf_counter()
    args = ["--config", str(CONFIGS / "quickstart.yaml"), "--resume", "auto", *args]
    config = parse_args(TrainConfig, args, "Pretrain on shapes, and train a detector from that.")
    print(f"shapes data: {write_shapes(config.data.root)}")
    if config.backbone.weights is None and config.detector.weights is None:
        weights = pretrain(config)
        config = replace(config, backbone=replace(config.backbone, weights=str(weights)))
    trainer = DetectorTrainer(config)
    trainer.fit()
    data = trainer.test_data
    found = trainer.found or trainer.detect()  # of a run that was whole already
    if trainer.accelerator.is_main_process:
        evaluation, _ = evaluate_fully(found, data, trainer.config)
        print(f"mAP {evaluation.voc.mean_ap:.4f} on {evaluation.voc.num_images} unseen images")
        last, folder = config.run_dir / "last.pt", config.run_dir / "evaluation"
        evaluation.save(folder / "results.json", checkpoint=str(last))
        took = f"{time.perf_counter() - start:.0f} s with what was left to train"
        made = folder, evaluation, found, data, trainer.config, last
        report = write_run_report(*made, trainer.accelerator, took)
        print(f"all tables and pictures, in {took}: {report}")
        print(next_commands(config.run_dir, data.image_path(0)))


def pretrain(config: TrainConfig) -> Path:
    """Pretrain the detector's backbone on the objects of its images; return the best weights."""
    base = parse_args(PretrainConfig, ["--config", str(CONFIGS / "pretrain" / "quickstart.yaml")])
    run_dir = config.run_dir.with_name(f"{config.run_dir.name}_pretrain")
    crops = write_shape_crops(config.data.root)
    data = replace(base.data, root=crops, workers=config.data.workers)
    norm = config.backbone.norm if config.backbone.norm in ("sync", "group") else "batch"
    model = replace(base.model, name=config.backbone.name, stem=config.backbone.stem, norm=norm)
    names = ("resume", "seed", "precision", "channels_last", "device", "threads")
    shared = {name: getattr(config, name) for name in names}
    trainer = ClassifierTrainer(replace(base, run_dir=run_dir, data=data, model=model, **shared))
    trainer.fit()
    if trainer.accelerator.is_main_process:
        plot_learning_curve(run_dir / "metrics.jsonl", run_dir / "learning_curve.png")
        print(f"pretrained with {base.mix}: {run_dir}")
    trainer.accelerator.wait_for_everyone()
    return run_dir / "best.pt"
