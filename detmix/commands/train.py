"""Train a detector.

detmix train --config voc2007_cpu --data.root data/VOCdevkit
"""

from __future__ import annotations

from collections.abc import Sequence

from detmix.training import DetectorTrainer, TrainConfig, parse_args
from detmix.training.console import next_commands


def main(args: Sequence[str]) -> None:
    """Train as the configuration says and print the last evaluation."""
    config = parse_args(TrainConfig, args, "Train a detector.", "voc2007_cpu")
    trainer = DetectorTrainer(config)
    result = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(result if result is not None else "nothing left to do")
        print(next_commands(config.run_dir, trainer.test_data.image_path(0)))
