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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from detmix.files import read_file

_LAYOUT = "expected ROOT/VOC<year>/{JPEGImages,Annotations,ImageSets/Main} or the same in VOCdevkit"
_FLAGS = ("-1", "0", "1")


class ImageEntry(NamedTuple):
    """One image of a data set: its name, such as VOC2007/000005, its year and split, its files."""

    name: str
    image_set: tuple[str, str]
    image: Path
    annotation: Path


def list_entries(
    root: str | Path, image_sets: Sequence[tuple[str, str]], *, all_there: bool
) -> list[ImageEntry]:
    """List the images of several splits, one after the other, in the order of the split files."""
    pairs: list[object] = list(image_sets)
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            "image_sets must be pairs of year and split, such as (('2007', 'trainval'),), "
            f"got {image_sets!r}"
        )
    entries: dict[str, ImageEntry] = {}
    for year, split in image_sets:
        folder = _find_year(Path(root), str(year))  # YAML reads 2007 as an integer
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        lines = _read_split(path)
        parents = {posixpath.dirname(image_id) for flags in lines.values() for image_id in flags}
        images = _list_files(folder / "JPEGImages", parents, IMG_EXTENSIONS)
        annotations = _list_files(folder / "Annotations", parents, (".xml",))
        present = images.keys() | annotations.keys()
        chosen = [_choose(where, flags, present) for where, flags in lines.items()]
        image_ids = [image_id for image_id, flag in chosen if flag != "-1"]
        if not image_ids:
            raise ValueError(f"{path}: the split lists no image")
        image_paths = _pick(images, folder / "JPEGImages", IMG_EXTENSIONS, image_ids, all_there)
        xml_paths = _pick(annotations, folder / "Annotations", (".xml",), image_ids, all_there)
        for image_id, *paths in zip(image_ids, image_paths, xml_paths, strict=True):
            name = f"{folder.name}/{image_id}"
            if name in entries:
                raise ValueError(f"{path}: image {name!r} is listed twice in {image_sets}")
            entries[name] = ImageEntry(name, (str(year), split), *paths)
    return list(entries.values())


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
    )


def _read_split(path: Path) -> dict[str, dict[str, str]]:
    """Return for each line, by where it stands, the images it may mean, with their flags or ""."""
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"{path}: there is no split {path.stem!r}; found {', '.join(found) or 'none'}"
        )
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a list of image ids as UTF-8 text: {error}") from None
    lines = {}
    for number, line in enumerate(text.splitlines(), 1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        flags = lines[f"{path}, line {number}"] = {name: ""}
        *before, last = name.rsplit(maxsplit=1)
        if before and last in _FLAGS:
            flags[before[0]] = last
        parts = {part for image_id in flags for part in image_id.split("/")}
        if PureWindowsPath(name).anchor or "\0" in name or parts & {"", ".", ".."}:
            raise ValueError(
                f"{path}, line {number}: expected an image id such as 000005 or cam1/000005, got "
                f"{line.strip()!r}; what leads out of the devkit's folders is refused"
            )
    return lines


def _choose(where: str, flags: Mapping[str, str], present: Collection[str]) -> tuple[str, str]:
    """Return a line's image and its flag: where a name may have a blank, the files decide."""
    line, image_id = next(iter(flags)), [*flags][-1]
    found = [name for name in flags if name in present]
    if len(found) > 1 or (not found and len(image_id.split()) > 1):
        raise ValueError(
            f"{where}: expected an image id, or an id and one of -1, 0, 1, got {line!r}; images "
            f"of such a name: {' and '.join(map(repr, found)) or 'none'}"
        )
    image_id = found[0] if found else image_id
    return image_id, flags[image_id]


def _list_files(
    folder: Path, parents: Collection[str], suffixes: Sequence[str]
) -> dict[str, list[Path]]:
    """List the files of some subfolders by image id: 118,000 `stat` calls are slow on networks."""
    found: dict[str, list[Path]] = {}
    for parent in parents:
        for path in (folder / parent).iterdir() if (folder / parent).is_dir() else ():
            if path.suffix.lower() in suffixes:
                found.setdefault(posixpath.join(parent, path.stem), []).append(path)
    return found


def _pick(
    found: Mapping[str, list[Path]],
    folder: Path,
    suffixes: Sequence[str],
    image_ids: Sequence[str],
    all_there: bool,
) -> list[Path]:
    """Return each image's file; where there is none, the one that the devkit would have."""
    paths = [found.get(name, [folder / f"{name}{suffixes[0]}"]) for name in image_ids]
    for image_id, files in zip(image_ids, paths, strict=True):
        if len(files) > 1:
            names = " and ".join(sorted(path.name for path in files))
            raise ValueError(f"{folder}: image {image_id!r} is {names}; expected one file of it")
    # A file may be there under another spelling, as where case does not matter.
    lacking = [file for name, (file,) in zip(image_ids, paths, strict=True) if name not in found]
    missing = [path for path in lacking if all_there and not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: there is no such file, with any suffix of {', '.join(suffixes)} "
            f"({len(missing)} of {len(paths)} listed files are missing)"
        )
    return [file for (file,) in paths]
