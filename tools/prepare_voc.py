"""Download and unpack Pascal VOC, or check what is there.

    python tools/prepare_voc.py --root data --years 2007 2012
    python tools/prepare_voc.py --root data --check-only

torchvision downloads the official archives, verifies their checksums and unpacks them to
ROOT/VOCdevkit. Exit codes: 0 all complete, 1 something is missing, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from detmix.data import VOCDetection

SPLITS = {"2007": ("trainval", "test"), "2012": ("trainval",)}
# The devkit's own counts of images.
IMAGES = {("2007", "trainval"): 5011, ("2007", "test"): 4952, ("2012", "trainval"): 11540}
ARCHIVES = {
    ("2007", "trainval"): "VOCtrainval_06-Nov-2007.tar",
    ("2007", "test"): "VOCtest_06-Nov-2007.tar",
    ("2012", "trainval"): "VOCtrainval_11-May-2012.tar",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse_arguments(arguments)
    image_sets = [(year, split) for year in options.years for split in SPLITS[year]]
    try:
        if not options.check_only:
            for year, split in image_sets:
                if not is_complete(options.root, year, split):
                    download(options.root, year, split)
        return report(options.root, image_sets)
    except DownloadError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command carries on", file=sys.stderr)
        return 130


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse itself explains an unknown year."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="where VOCdevkit goes")
    parser.add_argument("--years", nargs="+", default=["2007"], choices=tuple(SPLITS))
    parser.add_argument("--check-only", action="store_true", help="download nothing")
    options = parser.parse_args(arguments)
    options.years = list(dict.fromkeys(options.years))
    return options


class DownloadError(Exception):
    """An archive could not be had; the message says what to do."""


def is_complete(root: Path, year: str, split: str) -> bool:
    """Tell whether all images and annotations of a split are there and readable."""
    try:
        return len(VOCDetection(root, ((year, split),))) == IMAGES[year, split]
    except (FileNotFoundError, ValueError):
        return False


def download(root: Path, year: str, split: str) -> None:
    """Download one archive, unless it lies in ``root`` already, and unpack it."""
    import torchvision

    archive = ARCHIVES[year, split]
    print(f"VOC{year} {split}: fetching {archive} ...", flush=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
        torchvision.datasets.VOCDetection(str(root), year=year, image_set=split, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # URLError is an OSError
        archives = [ARCHIVES[year, split] for split in SPLITS[year]]
        raise DownloadError(
            f"{archive} could not be downloaded or unpacked: {error}\n"
            "Without a network:\n"
            f"  1. fetch {' and '.join(archives)}\n"
            "     from the official Pascal VOC site or a mirror, on a machine that has one;\n"
            f"  2. put the archives, as they are, into {root.resolve()};\n"
            "  3. run the same command again: it verifies their checksums and unpacks them."
        ) from error


def report(root: Path, image_sets: Sequence[tuple[str, str]]) -> int:
    """Print a table of what is there; return 0 if all of it is complete, else 1."""
    print(f"{'split':16}{'images':>8}{'official':>10}{'objects':>9}{'difficult':>11}")
    problems = []
    for year, split in image_sets:
        name, official = f"VOC{year} {split}", IMAGES[year, split]
        try:
            found = VOCDetection(root, ((year, split),)).report
        except (FileNotFoundError, ValueError) as error:
            print(f"{name:16}{'-':>8}{official:>10}{'-':>9}{'-':>11}")
            problems.append(f"{name}: {error}")
            continue
        counts = f"{found.num_objects:>9}{found.num_difficult:>11}"
        print(f"{name:16}{found.num_images:>8}{official:>10}{counts}")
        if found.num_images != official:
            problems.append(f"{name}: {found.num_images} images, expected {official}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"complete; next: {next_command(root, image_sets)}")
    return 1 if problems else 0


def next_command(root: Path, image_sets: Sequence[tuple[str, str]]) -> str:
    """Name the training command that uses what is there."""
    joined = {year for year, _ in image_sets} == set(SPLITS)
    config = "voc0712_fasterrcnn_resnet50" if joined else "voc2007_cpu"
    return f"python tools/train.py --config configs/{config}.yaml --data.root {root / 'VOCdevkit'}"


if __name__ == "__main__":
    sys.exit(main())
