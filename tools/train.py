#!/usr/bin/env python
"""Train a detector.

python tools/train.py --config configs/voc2007_cpu.yaml --data.root data/VOCdevkit
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from detmix.training import DetectorTrainer, TrainConfig, parse_args
from detmix.training.console import run_tool


def main(args: Sequence[str]) -> None:
    """Train as the configuration says and print the last evaluation."""
    config = parse_args(TrainConfig, args, description="Train a detector.")
    trainer = DetectorTrainer(config)
    result = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(result if result is not None else "nothing left to do: all epochs are trained")
        print(f"run folder: {config.run_dir}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
