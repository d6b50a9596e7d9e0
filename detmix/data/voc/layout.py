"""Find the files of a Pascal VOC devkit: years, splits, images and annotations.

The layout is the one the official archives unpack to::

    root/VOC2007/JPEGImages/000005.jpg
    root/VOC2007/Annotations/000005.xml
    root/VOC2007/ImageSets/Main/trainval.txt

``root`` may also be the folder that holds ``VOCdevkit``, as torchvision's download leaves it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detmix.files import read_file

_LAYOUT = "expected ROOT/VOC<year>/{JPEGImages,Annotations,ImageSets/Main} or the same in VOCdevkit"
_FLAGS = ("-1", "0", "1")


@dataclass(frozen=True)
class ImageEntry:
    """One image of a data set, in the folder of its year."""

    image_id: str
    folder: Path
    image_set: tuple[str, str]

    @property
    def name(self) -> str:
        """Its name in the data set, such as VOC2007/000005."""
        return f"{self.folder.name}/{self.image_id}"

    @property
    def image(self) -> Path:
        """The JPEG file."""
        return self.folder / "JPEGImages" / f"{self.image_id}.jpg"

    @property
    def annotation(self) -> Path:
        """The XML file."""
        return self.folder / "Annotations" / f"{self.image_id}.xml"


def list_entries(
    root: str | Path, image_sets: Sequence[tuple[str, str]], *, check_files: bool
) -> list[ImageEntry]:
    """List the images of several splits, one after the other, in the order of the split files."""
    entries: dict[str, ImageEntry] = {}
    for year, split in _check_image_sets(image_sets):
        folder = _find_year(Path(root), year)
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        listed = [ImageEntry(image_id, folder, (year, split)) for image_id in _read_split(path)]
        if check_files:
            _check_files([entry.image for entry in listed])
            _check_files([entry.annotation for entry in listed])
        for entry in listed:
            if entry.name in entries:
                raise ValueError(f"{path}: image {entry.name!r} is listed twice in {image_sets}")
            entries[entry.name] = entry
    return list(entries.values())


def _check_image_sets(image_sets: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    pairs: list[object] = list(image_sets)
    well_formed = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs)
    if not pairs or not well_formed:
        raise ValueError(
            "image_sets must be pairs of year and split, such as (('2007', 'trainval'),), "
            f"got {image_sets!r}"
        )
    return [(str(year), str(split)) for year, split in image_sets]  # YAML reads 2007 as an integer


def _find_year(root: Path, year: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder; {_LAYOUT}")
    parents = (root, root / "VOCdevkit")
    for parent in parents:
        folder = parent / f"VOC{year}"
        if folder.is_dir():
            for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
                if not (folder / part).is_dir():
                    raise FileNotFoundError(f"{folder / part}: there is no such folder; {_LAYOUT}")
            return folder
    found = sorted(p.name for parent in parents for p in parent.glob("VOC[0-9]*") if p.is_dir())
    hint = f" (is {root.parent} meant?)" if (root / "JPEGImages").is_dir() else ""
    raise FileNotFoundError(
        f"{root}: holds no VOC{year}{hint}; found {', '.join(found) or 'no year at all'}; {_LAYOUT}"
    )


def _read_split(path: Path) -> list[str]:
    """Read ``id`` or ``id flag`` lines; flag -1 (the class is not in the image) is left out."""
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"{path}: there is no split {path.stem!r}; found {', '.join(found) or 'none'}"
        )
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a list of image ids as UTF-8 text: {error}") from None
    ids = []
    for number, line in enumerate(text.splitlines(), 1):
        image_id, *flags = line.split() or [""]
        if len(flags) > 1 or not set(flags) <= set(_FLAGS):
            raise ValueError(
                f"{path}, line {number}: expected an image id, or an id and one of -1, 0, 1, "
                f"got {line.strip()!r}"
            )
        if image_id in (".", "..") or set(image_id) & set("/\\\0"):
            raise ValueError(
                f"{path}, line {number}: expected an image id, got {image_id!r}, which leads out "
                "of the devkit's folders; refused"
            )
        if image_id and flags != ["-1"]:
            ids.append(image_id)
    if not ids:
        raise ValueError(f"{path}: the split lists no image")
    return ids


def _check_files(paths: list[Path]) -> None:
    """One listing of their folder: thousands of ``stat`` calls are slow on network drives."""
    present = set(os.listdir(paths[0].parent))
    missing = [path for path in paths if path.name not in present]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: there is no such file "
            f"({len(missing)} of {len(paths)} listed files are missing)"
        )
