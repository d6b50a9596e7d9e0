"""Print which images to train and to evaluate on cannot be used, and why, before a training does.

detmix check --config voc2007_cpu --data.root data/VOCdevkit

Exit codes: 0 all can be used, 1 some cannot, 2 the command or the data set as a whole is wrong.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from detmix.data import VOCReport
from detmix.training import TrainConfig, parse_args
from detmix.training.build import open_datasets


def main(args: Sequence[str]) -> None:
    """Open both data sets as a training does, but with all that is wrong left out."""
    config = parse_args(TrainConfig, args, "Print which images cannot be used, and why.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* images left out")  # they are printed below
        config, *datasets = open_datasets(config, on_error="skip")
    for name, data in zip(("train", "test"), datasets, strict=True):
        found = data.report
        print(
            f"{name}: {found.num_images} images with {found.num_objects} objects; "
            f"{found.num_clipped} boxes clipped, {found.num_without_area} without area dropped; "
            f"{len(data.skipped)} images left out"
        )
        if isinstance(found, VOCReport) and found.corners:
            print(f"  corners: {found.corners}, data.corners is {config.data.corners}")
        for image in data.skipped:
            print(f"  {image.kind}: {image.reason}")
        if turned := data.turned_images():
            path, orientation = turned[0]
            print(f"  {len(turned)} with an EXIF orientation, not applied: {orientation} in {path}")
    if any(data.skipped for data in datasets):
        sys.exit(1)  # no error of the command's, but a shell must be able to tell
