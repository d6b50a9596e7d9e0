#!/usr/bin/env python
"""Draw what a detector is trained on, or what it finds.

python tools/visualize.py pair --config configs/quickstart.yaml --lam 0.6 --out pair.png
python tools/visualize.py batch --config configs/voc2007_cpu.yaml --out batch.png
python tools/visualize.py predictions runs/voc2007_cpu/best.pt --out predictions.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detmix.evaluation import plot_batch, plot_predictions
from detmix.training import TrainConfig, load_detector, parse_args
from detmix.training.console import run_tool
from detmix.training.datasets import with_data_noted
from detmix.training.loop import make_accelerator
from detmix.training.preview import mixed_batch, mixed_pair, some_predictions


def main(args: Sequence[str]) -> None:
    """Draw a mixed pair or batch with every box's weight, or predictions beside the truth."""
    parser = _parser()
    parsed, overrides = parser.parse_known_args(args)
    if parsed.command == "pair":
        config = with_data_noted(parse_args(TrainConfig, overrides))
        images, targets = mixed_pair(config, *parsed.indices, lam=parsed.lam)
        path = plot_batch(images, targets, config.data.class_names, parsed.out)
    elif parsed.command == "batch":
        config = with_data_noted(parse_args(TrainConfig, overrides))
        images, targets = mixed_batch(config, epoch=parsed.epoch, num_images=parsed.num_images)
        path = plot_batch(images, targets, config.data.class_names, parsed.out, parsed.num_images)
    else:
        model, config = load_detector(parsed.checkpoint, overrides)
        accelerator = make_accelerator(config)
        images, predictions, targets = some_predictions(
            model.to(accelerator.device), config, accelerator, num_images=parsed.num_images
        )
        path = plot_predictions(
            images,
            predictions,
            targets,
            config.data.class_names,
            parsed.out,
            score_threshold=parsed.score_threshold,
            max_images=parsed.num_images,
        )
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, required=True, help="the picture to write")
    many = argparse.ArgumentParser(add_help=False)
    many.add_argument("--num_images", type=_positive, default=8, help="how many images to draw")
    parser = argparse.ArgumentParser(
        description="Draw what a detector is trained on, or what it finds.",
        epilog="Any option of tools/train.py changes the configuration.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser("pair", parents=[out], help="two images and their mixture")
    pair.add_argument("--indices", type=int, nargs=2, default=(0, 1), help="of training images")
    pair.add_argument("--lam", type=float, default=0.6, help="blend ratio of the first image")
    batch = commands.add_parser(
        "batch", parents=[out, many], help="a mixed batch with every box's weight"
    )
    batch.add_argument("--epoch", type=int, default=0, help="as this epoch sees it, from 0")
    predictions = commands.add_parser(
        "predictions", parents=[out, many], help="predictions beside the ground truth"
    )
    predictions.add_argument("checkpoint", help="best.pt or last.pt of a run folder; goes first")
    predictions.add_argument(
        "--score_threshold", type=float, default=0.5, help="draw detections from this score on"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(run_tool(main))
