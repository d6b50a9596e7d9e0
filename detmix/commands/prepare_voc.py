"""Download and unpack Pascal VOC, or check what is there.

    detmix prepare voc --root data --years 2007 2012
    detmix prepare voc --root data --check-only

torchvision downloads the official archives, verifies their checksums and unpacks them to
ROOT/VOCdevkit. Exit codes: 0 all complete, 1 something is missing, 2 it could not be downloaded,
130 interrupted; the same command carries on.
"""

from __future__ import annotations

import sys
import tarfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from detmix.data import VOCDetection, VOCReport

# The archive of each year and split, and the devkit's own count of images.
PARTS = {
    ("2007", "trainval"): ("VOCtrainval_06-Nov-2007.tar", 5011),
    ("2007", "test"): ("VOCtest_06-Nov-2007.tar", 4952),
    ("2012", "trainval"): ("VOCtrainval_11-May-2012.tar", 11540),
}
YEARS = ("2007", "2012")


def main(args: Sequence[str]) -> None:
    """Download what is not there, and say what is."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where VOCdevkit goes")
    parser.add_argument("--years", nargs="+", default=["2007"], choices=YEARS)
    parser.add_argument("--check-only", action="store_true", help="download nothing")
    options = parser.parse_args(args)
    image_sets = [part for part in PARTS if part[0] in options.years]
    is_complete = True
    for year, split in image_sets:
        found = find(options.root, year, split)
        if isinstance(found, str) and not options.check_only:
            download(options.root, year, split)
            found = find(options.root, year, split)
        if isinstance(found, str):
            print(f"VOC{year} {split}: {found}", file=sys.stderr)
            is_complete = False
        else:
            print(
                f"VOC{year} {split}: {found.num_images} images, {found.num_objects} objects, "
                f"{found.num_difficult} of them difficult"
            )
    if not is_complete:
        sys.exit(1)
    config = "voc0712_fasterrcnn_resnet50" if len(image_sets) == len(PARTS) else "voc2007_cpu"
    command = f"detmix train --config {config}"
    print(f"complete; next: {command} --data.root {options.root / 'VOCdevkit'}")


def find(root: Path, year: str, split: str) -> VOCReport | str:
    """Return what there is of a split, or why it is not complete or not readable."""
    try:
        found = VOCDetection(root, ((year, split),)).report
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    _, official = PARTS[year, split]
    if found.num_images != official:
        return f"{found.num_images} images, expected {official}"
    return found


def download(root: Path, year: str, split: str) -> None:
    """Download one archive, unless it lies in ``root`` already, and unpack it."""
    import torchvision

    archive, _ = PARTS[year, split]
    print(f"VOC{year} {split}: fetching {archive} ...", flush=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        torchvision.datasets.VOCDetection(str(root), year=year, image_set=split, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # URLError is an OSError
        archives = " and ".join(name for part, (name, _) in PARTS.items() if part[0] == year)
        raise OSError(
            f"{archive} could not be downloaded or unpacked: {error}. Without a network: put "
            f"{archives}, from the official Pascal VOC site or a mirror, as they are into "
            f"{root.resolve()} and run the same command again: it verifies and unpacks them"
        ) from error
