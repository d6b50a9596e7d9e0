#!/usr/bin/env python
"""Draw what a detector is trained on, or what it finds.

python tools/visualize.py pair --config configs/quickstart.yaml --lam 0.6 --out pair.png
python tools/visualize.py batch --config configs/voc2007_cpu.yaml --out batch.png
python tools/visualize.py weights --config configs/voc2007_cpu.yaml --out weights.png
python tools/visualize.py predictions runs/voc2007_cpu/best.pt --out predictions.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detmix.pictures import plot_batch, plot_box_weights, plot_predictions
from detmix.training import TrainConfig, load_detector, parse_args
from detmix.training.build import with_data_noted
from detmix.training.console import run_tool
from detmix.training.preview import (
    mixed_batch,
    mixed_pair,
    sample_box_weights,
    some_predictions,
)
from detmix.training.processes import make_accelerator


def main(args: Sequence[str]) -> None:
    """Draw a mixed pair or batch, how boxes are weighted, or predictions beside the truth."""
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
    elif parsed.command == "weights":
        config = parse_args(TrainConfig, overrides)
        weights = sample_box_weights(config, num_images=parsed.num_images, epoch=parsed.epoch)
        alpha = config.mixing.alpha if config.mixing.name == "mixup" else None
        path = plot_box_weights(weights, parsed.out, alpha=alpha)
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
    epoch = argparse.ArgumentParser(add_help=False)
    epoch.add_argument("--epoch", type=int, default=0, help="as this epoch sees it, from 0")
    parser = argparse.ArgumentParser(
        description="Draw what a detector is trained on, or what it finds.",
        epilog="Any option of tools/train.py changes the configuration.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser(
        "pair",
        parents=[out],
        help="two images and their mixture, by mixup unless --mixing.name is cutmix",
        description="Draw two images and their mixture: by CutMix where --mixing.name is cutmix, "
        "else by mixup, also where it is mixup+cutmix.",
    )
    pair.add_argument("--indices", type=int, nargs=2, default=(0, 1), help="of two training images")
    pair.add_argument("--lam", type=float, default=0.6, help="blend ratio of the first image")
    commands.add_parser(
        "batch", parents=[out, many, epoch], help="a mixed batch with every box's weight"
    )
    weights = commands.add_parser(
        "weights", parents=[out, epoch], help="a histogram of the weights of boxes"
    )
    weights.add_argument(
        "--num_images", type=_positive, default=512, help="how many images to count"
    )
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
