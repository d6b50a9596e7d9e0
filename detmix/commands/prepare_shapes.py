"""Write the synthetic shapes, in COCO's layout or as a Pascal VOC devkit.

detmix prepare shapes --root data/shapes_coco
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detmix.data import write_shapes, write_shapes_coco

WRITERS = {"coco": write_shapes_coco, "voc": write_shapes}


def main(args: Sequence[str]) -> None:
    """Write the data set, unless it is there already, and say where it is."""
    parser = argparse.ArgumentParser(
        description="Write images of shapes with boxes, and in COCO's layout with masks and "
        "keypoints. If the same data set is there already, nothing is done."
    )
    parser.add_argument("--root", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--format", choices=tuple(WRITERS), default="coco")
    parser.add_argument("--num_train", type=int, default=1600, help="images to train on")
    parser.add_argument("--num_test", type=int, default=300, help="images to test on")
    parser.add_argument("--image_size", type=int, default=128, help="the longest side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(args))
    root = WRITERS[options.pop("format")](**options)
    print(f"shapes data: {root} ({options['num_train']} + {options['num_test']} images)")
