"""The images that a Pascal VOC devkit lists, and where their files are.

The layout is the one the official archives unpack to::

    root/VOC2007/JPEGImages/000005.jpg
    root/VOC2007/Annotations/000005.xml
    root/VOC2007/ImageSets/Main/trainval.txt

``root`` may also be the folder that holds ``VOCdevkit``, as torchvision's download leaves it.
Images may have other suffixes, all may have them in capitals, and ids may name subfolders.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from detmix.data.detection import Files, check_files
from detmix.files import read_file

_LAYOUT = "expected ROOT/VOC<year>/{JPEGImages,Annotations,ImageSets/Main} or the same in VOCdevkit"
_FLAGS = ("-1", "0", "1")


class ImageEntry(NamedTuple):
    """One image of a data set: its name, such as VOC2007/000005, its year and split, its files."""

    name: str
    image_set: tuple[str, str] | None
    image: Path
    annotation: Path


def list_entries(
    root: str | Path, image_sets: Sequence[tuple[str, str]], files: Files | None, all_there: bool
) -> list[ImageEntry]:
    """List the images of several splits in the order of the split files, or those of ``files``."""
    if files is not None:
        if all_there:
            check_files(Path(root), [*files], IMG_EXTENSIONS)
        return [ImageEntry(i, None, Path(root, i), Path(root, a or i)) for i, a in files.items()]
    pairs: list[object] = list(image_sets)
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            "image_sets must be pairs of year and split, such as (('2007', 'trainval'),), "
            f"got {image_sets!r}"
        )
    entries: dict[str, ImageEntry] = {}
    for year, split in image_sets:
        folder = _find_year(Path(root), str(year))  # YAML reads 2007 as an integer
        parts = (
            _Files(folder / "JPEGImages", IMG_EXTENSIONS),
            _Files(folder / "Annotations", (".xml",)),
        )
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        image_ids = _read_split(path, parts)
        paths = (part.locate(image_ids, all_there) for part in parts)
        for image_id, *found in zip(image_ids, *paths, strict=True):
            name = f"{folder.name}/{image_id}"
            if name in entries:
                raise ValueError(f"{path}: image {name!r} is listed twice in {image_sets}")
            entries[name] = ImageEntry(name, (str(year), split), *found)
    return list(entries.values())


class _Files:
    """The files of images below a folder, whose subfolders are listed once each."""

    def __init__(self, folder: Path, suffixes: Sequence[str]) -> None:
        self._folder, self._suffixes = folder, suffixes
        self._found: dict[str, dict[str, list[str]]] = {}

    def find(self, image_id: str) -> str | None:
        """Return the image's file within the folder, if there is one: two of one are refused."""
        parent, stem = posixpath.split(image_id)
        if parent not in self._found:
            listed = self._found[parent] = {}
            folder = self._folder / parent
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.suffix.lower() in self._suffixes:
                    listed.setdefault(path.stem, []).append(path.name)
        names = self._found[parent].get(stem, [])
        if len(names) > 1:
            raise ValueError(
                f"{self._folder}: image {image_id!r} is {' and '.join(sorted(names))}; expected one"
            )
        return posixpath.join(parent, names[0]) if names else None

    def locate(self, image_ids: Sequence[str], all_there: bool) -> list[Path]:
        """Return each image's file; where there is none, the one that the devkit would have."""
        names = [self.find(name) or f"{name}{self._suffixes[0]}" for name in image_ids]
        if all_there:
            check_files(self._folder, names, self._suffixes)
        return [self._folder / name for name in names]


def _find_year(root: Path, year: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder; {_LAYOUT}")
    parents = (root, root / "VOCdevkit")
    for parent in parents:
        folder = parent / f"VOC{year}"
        if folder.is_dir():
            return folder
    found = sorted(p.name for parent in parents for p in parent.glob("VOC[0-9]*") if p.is_dir())
    hint = f" (is {root.parent} meant?)" if (root / "JPEGImages").is_dir() else ""
    raise FileNotFoundError(
        f"{root}: holds no VOC{year}{hint}; found {', '.join(found) or 'no year at all'}; {_LAYOUT}"
        "; data.split=hash takes other layouts"
    )


def _read_split(path: Path, parts: Sequence[_Files]) -> list[str]:
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
    image_ids = []
    for number, line in enumerate(text.splitlines(), 1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        where = f"{path}, line {number}"
        if PureWindowsPath(name).anchor or "\0" in name or {"", ".", ".."} & {*name.split("/")}:
            raise ValueError(
                f"{where}: expected an image id such as 000005 or cam1/000005, got "
                f"{line.strip()!r}; what leads out of the devkit's folders is refused"
            )
        flags = {name: ""}  # of the images that are meant: where a name has blanks, files decide
        *before, last = name.rsplit(maxsplit=1)
        if before and last in _FLAGS:
            flags[before[0]] = last
        there = [image_id for image_id in flags if any(part.find(image_id) for part in parts)]
        image_id = there[0] if there else [*flags][-1]
        if len(there) > 1 or (not there and len(image_id.split()) > 1):
            raise ValueError(
                f"{where}: expected an image id, or an id and one of -1, 0, 1, got {name!r}; "
                f"images of such a name: {' and '.join(map(repr, there)) or 'none'}"
            )
        if flags[image_id] != "-1":
            image_ids.append(image_id)
    if not image_ids:
        raise ValueError(f"{path}: the split lists no image")
    return image_ids
