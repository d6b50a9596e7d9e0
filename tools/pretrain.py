#!/usr/bin/env python
"""Pretrain a classifier with CutMix, for a detector to start from.

python tools/pretrain.py --config configs/pretrain/tiny_imagenet_resnet18.yaml --mix cutmix
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from detmix.training import ClassifierTrainer, PretrainConfig, parse_args
from detmix.training.console import run_tool


def main(args: Sequence[str]) -> None:
    """Train as the configuration says and print the last validation."""
    config = parse_args(PretrainConfig, args, description="Pretrain a classifier.")
    trainer = ClassifierTrainer(config)
    result = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(result if result is not None else "nothing left to do: all epochs are trained")
        print(f"run folder: {config.run_dir}")
        print(f"a detector starts from it with --backbone.weights {config.run_dir / 'best.pt'}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
