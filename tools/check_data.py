#!/usr/bin/env python
"""Print which images to train and to evaluate on cannot be used, and why, before a training does.

python tools/check_data.py --config configs/voc2007_cpu.yaml --data.root data/VOCdevkit

Exit codes: 0 all can be used, 1 some cannot, 2 the command or the data set as a whole is wrong.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from detmix.training import TrainConfig, parse_args
from detmix.training.build import (
    DetectionData,
    check_keypoints,
    check_same_keypoints,
    note_data,
    open_dataset,
)
from detmix.training.console import run_tool


def main(args: Sequence[str]) -> None:
    """Open both data sets as a training does, but with all that is wrong left out."""
    config = parse_args(TrainConfig, args, "Print which images cannot be used, and why.")
    train = _open(config, train=True)
    config = note_data(config, train)
    test = _open(config, train=False)
    check_keypoints(config, test, train=False)
    check_same_keypoints(train, test)
    if train.skipped or test.skipped:
        sys.exit(1)  # no error of the command's, but a shell must be able to tell


def _open(config: TrainConfig, *, train: bool) -> DetectionData:
    """Open a data set, and print what of it is left out or changed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* images left out")  # all of them are printed
        data = open_dataset(config, train=train, on_error="skip")
    found = data.report
    print(
        f"{'train' if train else 'test'}: {found.num_images} images with {found.num_objects} "
        f"objects; {found.num_clipped} boxes clipped, {found.num_without_area} without area "
        f"dropped; {len(data.skipped)} images left out"
    )
    for image in data.skipped:
        print(f"  {image.kind}: {image.reason}")
    return data


if __name__ == "__main__":
    sys.exit(run_tool(main))
