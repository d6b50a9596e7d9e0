#!/usr/bin/env python
"""List all that is wrong with the images and annotations of a data set, before a training does.

python tools/check_data.py --config configs/voc2007_cpu.yaml --data.root data/VOCdevkit
python tools/check_data.py --pretrain --config configs/pretrain/tiny_imagenet_resnet18.yaml

Exit codes: 0 no problems, 1 problems found, 2 the command itself was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from detmix.data import DataCheck, check_coco, check_images, check_voc
from detmix.detectors import target_keys
from detmix.training import PretrainConfig, TrainConfig, parse_args
from detmix.training.console import run_tool


def main(args: Sequence[str]) -> None:
    """Check the images to train on and to evaluate on, and print what was found."""
    parsed, overrides = _parser().parse_known_args(args)
    if parsed.pretrain:
        found = check_classes(parse_args(PretrainConfig, overrides))
    else:
        found = check(parse_args(TrainConfig, overrides))
    if parsed.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(found.describe(parsed.show or None))
    if not found.is_clean:
        sys.exit(1)  # no error of the command's, but a shell must be able to tell


def check(config: TrainConfig) -> DataCheck:
    """Check the data of a detector's configuration."""
    data, files = config.data, config.data.coco
    if data.format == "voc":
        return check_voc(data.root, {"train": data.train, "test": data.test}, data.class_names)
    needed = target_keys(config.detector.name)
    subsets = {
        "train": (data.root / files.train_images, data.root / files.train_annotations),
        "test": (data.root / files.test_images, data.root / files.test_annotations),
    }
    return check_coco(
        subsets,
        masks="masks" in needed,
        keypoints="keypoints" in needed,
        classes=data.classes,
        num_keypoints=data.num_keypoints,
    )


def check_classes(config: PretrainConfig) -> DataCheck:
    """Check the data of a classifier's configuration."""
    data = config.data
    splits = {"train": data.train, "test": data.val}
    return check_images(data.root, splits, class_limit=data.class_limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="List all problems of a data set: missing and broken files, wrong sizes, "
        "unknown classes, bad boxes, images listed twice or in train and test.",
        epilog="All options of tools/train.py say what the data set is: --config, --data.root, ...",
    )
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help="check images by class, with the options of tools/pretrain.py",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--show", type=_count, default=20, help="lines of each kind, 0 for all; by default 20"
    )
    return parser


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, not negative, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(run_tool(main))
