#!/usr/bin/env python
"""See the whole of detmix work in a few minutes: data, weighted mixup, training, VOC mAP.

python tools/quickstart.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from detmix.data import write_shapes
from detmix.evaluation import (
    plot_batch,
    plot_learning_curve,
    plot_precision_recall,
    plot_predictions,
)
from detmix.training import DetectorTrainer, TrainConfig, parse_args
from detmix.training.console import run_tool
from detmix.training.preview import mixed_batch, some_predictions

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main(args: Sequence[str]) -> None:
    """Make the shapes data, train on them, and put tables and pictures into the run folder."""
    start = time.perf_counter()
    config = parse_args(
        TrainConfig,
        ["--config", str(CONFIG), *args],
        description="Train a small Faster R-CNN with weighted mixup on synthetic shapes.",
    )
    print(f"shapes data: {write_shapes(config.data.root)}")
    trainer = DetectorTrainer(config)
    result = trainer.fit()
    if result is None:  # resumed after its end
        result = trainer.evaluate().result
    if trainer.accelerator.is_main_process:
        print(result)
        folder, classes = config.run_dir, config.data.classes
        pictures = [
            plot_learning_curve(folder / "metrics.jsonl", folder / "learning_curve.png"),
            plot_precision_recall(result, folder / "precision_recall.png"),
            plot_batch(*mixed_batch(config), classes, folder / "mixed_batch.png"),
            plot_predictions(
                *some_predictions(trainer.eval_model, config, trainer.accelerator),
                classes,
                folder / "predictions.png",
            ),
        ]
        print(f"\nmAP {result.mean_ap:.4f} on {result.num_images} unseen images")
        print(f"run folder: {folder}, pictures: {', '.join(path.name for path in pictures)}")
        print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(run_tool(main))
