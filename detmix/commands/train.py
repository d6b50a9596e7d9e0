"""Train a detector.

detmix train --config voc2007_cpu --data.root data/VOCdevkit
"""

from __future__ import annotations

from collections.abc import Sequence

from detmix.training import DetectorTrainer, TrainConfig, parse_args


def main(args: Sequence[str]) -> None:
    """Train as the configuration says and print the last evaluation."""
    config = parse_args(TrainConfig, args, description="Train a detector.")
    trainer = DetectorTrainer(config)
    result = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(result if result is not None else "nothing left to do: all epochs are trained")
        print(f"run folder: {config.run_dir}")
