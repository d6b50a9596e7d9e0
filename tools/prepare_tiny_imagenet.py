"""Download and unpack Tiny-ImageNet, or check what is there.

    python tools/prepare_tiny_imagenet.py --root data/tiny-imagenet
    python tools/prepare_tiny_imagenet.py --root data/tiny-imagenet --check-only

The official archive is downloaded to ROOT, its checksum verified, and its images laid out as
ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG; its test images have no labels and are left
out. It may be deleted then. Exit codes: 0 all complete, 1 something is missing, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from detmix.data import ImageClasses

ROOT = Path("data/tiny-imagenet")
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ARCHIVE = "tiny-imagenet-200.zip"
CLASSES = 200
IMAGES = {"train": 100_000, "val": 10_000}

_ANNOTATIONS = "tiny-imagenet-200/val/val_annotations.txt"
_ANNOTATION = re.compile(r"^(\w+\.JPEG)\t(n[0-9]{8})\t", re.ASCII | re.MULTILINE)
_IMAGE = re.compile(r"tiny-imagenet-200/(train|val)/(?:(n[0-9]{8})/)?images/(\w+\.JPEG)", re.ASCII)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse_arguments(arguments)
    try:
        if not options.check_only:
            prepare(options.root)
        return report(options.root)
    except PreparationError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command carries on", file=sys.stderr)
        return 130


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--root", type=Path, default=ROOT, help="where train/ and val/ go")
    parser.add_argument("--check-only", action="store_true", help="download nothing")
    return parser.parse_args(arguments)


class PreparationError(Exception):
    """The archive could not be had or unpacked; the message says what to do."""


def prepare(root: Path) -> None:
    """Download the archive and unpack what is missing; a complete split is left as it is."""
    problems = {split: found for split in IMAGES if (found := find_problem(root, split))}
    for split, problem in problems.items():
        for there in [root / split, *root.glob(f"{split}*.tar")]:
            if there.exists():
                raise PreparationError(f"{problem}\nMove {there} away and run again.")
    if problems:
        download(root)
    for split in problems:
        unpack(root, split)


def find_problem(root: Path, split: str) -> str | None:
    """Say what is wrong with a split, or return None if all its images and classes are there."""
    try:
        found = ImageClasses(root, split)
    except (FileNotFoundError, ValueError) as error:
        return f"{split}: {error}"
    counts = f"{len(found)} images of {len(found.classes)} classes"
    expected = f"{IMAGES[split]} images of {CLASSES} classes"
    return None if counts == expected else f"{split}: {root} has {counts}, expected {expected}"


def download(root: Path) -> None:
    """Download the archive, unless it lies in ``root`` already, and verify its checksum."""
    from torchvision.datasets.utils import download_url

    print(f"{ARCHIVE} (237 MiB): fetching or verifying ...", flush=True)
    try:
        download_url(URL, str(root), ARCHIVE, MD5)
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError
        raise PreparationError(
            f"{ARCHIVE} could not be downloaded: {error}\n"
            "Without a network:\n"
            f"  1. fetch {URL} on a machine that has one;\n"
            f"  2. put the archive, as it is, into {root.resolve()};\n"
            "  3. run the same command again: it verifies the checksum and unpacks it."
        ) from error


def unpack(root: Path, split: str) -> None:
    """Write ``root/<split>/<class>/*.JPEG`` as a whole: an interruption leaves nothing of it."""
    try:
        with (
            zipfile.ZipFile(root / ARCHIVE) as archive,
            tempfile.TemporaryDirectory(prefix=f".{split}-", dir=root) as temporary,
        ):
            # A subfolder: the temporary folder itself is readable by its owner alone.
            draft = Path(temporary) / split
            images = list_images(archive, split)
            for member, class_name, name in tqdm(images, split, IMAGES[split], disable=None):
                (draft / class_name).mkdir(parents=True, exist_ok=True)
                (draft / class_name / name).write_bytes(archive.read(member))
            os.rename(draft, root / split)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PreparationError(f"{root / ARCHIVE}: cannot unpack {split}: {error}") from error


def list_images(archive: zipfile.ZipFile, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield member, class and file name of a split's images; no name leads out of its folder."""
    labels = dict(_ANNOTATION.findall(archive.read(_ANNOTATIONS).decode()))
    for member in archive.namelist():
        match = _IMAGE.fullmatch(member)
        if match and match[1] == split:
            class_name = match[2] or labels.get(match[3])
            if class_name is None:
                raise ValueError(f"{member} has no class in {_ANNOTATIONS}")
            yield member, class_name, match[3]


def report(root: Path) -> int:
    """Say what is there; return 0 if all of it is complete, else 1."""
    problems = [problem for split in IMAGES if (problem := find_problem(root, split))]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        config = "configs/pretrain/tiny_imagenet_resnet18.yaml"
        print(f"complete; next: python tools/pretrain.py --config {config} --data.root {root}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
