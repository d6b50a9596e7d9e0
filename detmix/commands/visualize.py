"""Draw what a detector is trained on, or what it finds.

detmix visualize pair --config quickstart --lam 0.6 --out pair.png
detmix visualize batch --config voc2007_cpu --out batch.png
detmix visualize weights --config voc2007_cpu --out weights.png
detmix visualize predictions runs/voc2007_cpu/best.pt --out predictions.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from detmix.data import collate
from detmix.pictures import plot_batch, plot_box_weights, plot_predictions
from detmix.pictures.images import nothing_found
from detmix.training import TrainConfig, load_detector, parse_args, preview
from detmix.training.build import with_data_noted
from detmix.training.processes import make_accelerator


def main(args: Sequence[str]) -> None:
    """Draw a mixed pair or batch, how boxes are weighted, or predictions beside the truth."""
    parsed, overrides = _parser().parse_known_args(args)
    if parsed.command == "predictions":
        model, config = load_detector(parsed.checkpoint, overrides)
        accelerator = make_accelerator(config)
        images, found, targets = preview.some_predictions(
            model.to(accelerator.device), config, accelerator, num_images=parsed.num_images
        )
        classes = config.data.class_names
        path = plot_predictions(images, found, targets, classes, parsed.out, parsed.score)
        if not any((each["scores"] >= parsed.score).any() for each in found):
            print(nothing_found(found, parsed.score))
    else:
        config = with_data_noted(parse_args(TrainConfig, overrides))
        if parsed.command != "pair":
            samples = islice(preview.mixed_samples(config, parsed.epoch), parsed.num_images)
        if parsed.command == "weights":
            alpha = config.mixing.alpha if config.mixing.name == "mixup" else None
            path = plot_box_weights(preview.join_weights(samples), parsed.out, alpha=alpha)
        elif parsed.command == "batch":
            path = plot_batch(*collate(list(samples)), config.data.class_names, parsed.out)
        else:
            pair = preview.mixed_pair(config, *parsed.indices, lam=parsed.lam)
            path = plot_batch(*pair, config.data.class_names, parsed.out)
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw what a detector is trained on, or what it finds.",
        epilog="Any option of `detmix train` changes the configuration.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser("pair", help="two images and their mixture, as mixing.name has it")
    batch = commands.add_parser("batch", help="a mixed batch with every box's weight")
    weights = commands.add_parser("weights", help="a histogram of the weights of boxes")
    found = commands.add_parser("predictions", help="predictions beside the ground truth")
    for command in (pair, batch, weights, found):
        command.add_argument("--out", type=Path, required=True, help="the picture to write")
    for command, num in ((batch, 8), (weights, 512), (found, 8)):
        command.add_argument("--num_images", type=_positive, default=num, help="how many images")
    for command in (batch, weights):
        command.add_argument("--epoch", type=int, default=0, help="as this epoch sees it, from 0")
    pair.add_argument("--indices", type=int, nargs=2, default=(0, 1), help="of two training images")
    pair.add_argument("--lam", type=float, default=0.6, help="blend ratio of the first image")
    found.add_argument("checkpoint", help="best.pt or last.pt of a run folder; goes first")
    found.add_argument("--score", "--score_threshold", type=float, default=0.5, help="the least")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
