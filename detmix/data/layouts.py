"""Which images of a folder have which annotations, and what to train and to test on.

Files are found by their *key*, their path without folders that only tell what is in them; that of
an image and of its annotation are alike but for the suffix: images/train/a.jpg, labels/train/a.txt.
Parts (train, val, test) are named by data.yaml, lists, folders or JSON files; where there are none,
a hash of its name decides for each image. All paths are relative to the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from pathlib import PurePosixPath as Relative
from typing import Any, Literal, NamedTuple

import yaml
from torchvision.datasets.folder import IMG_EXTENSIONS

from detmix.data.coco.file import read_coco
from detmix.data.voc.corners import Corners
from detmix.files import read_file

Format = Literal["voc", "coco", "yolo"]
Split = Literal["named", "hash"]
TEST_SHARE = 0.2
"""Of the images, kept for the test where nothing says which."""

_FORMATS: dict[Format, tuple[str, bytes]] = {  # suffix and content of annotations
    "voc": (".xml", rb"<annotation[\s>]"),
    "coco": (".json", rb'(?s)(?=.*"images")(?=.*"annotations").*"categories"'),
    "yolo": (".txt", rb"\A\s*\d+([ \t]+-?\d[\d.e-]*){4,}\s*(\n|\Z)"),
}
_ROLES = {"images", "image", "img", "imgs", "jpegimages", "annotations", "labels", "xml", "xmls"}
_UNUSED = (".", "__MACOSX", "SegmentationClass", "SegmentationObject")
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, (*IMG_EXTENSIONS, '.xml', '.txt')))})$", re.I)
_PART = re.compile(r"(trainval|train|val|test)(?:ing|id|idation)?\d*", re.I)
# What to train on and what to score by: the first pair that is there.
_SPLITS = (("train", "val"), ("train", "test"), ("trainval", "test"))
_NAMES = ("labelmap.txt", "obj.names", "classes.txt", "_darknet.labels")
# What tells who wrote XML; CVAT and Datumaro leave a labelmap.txt beside it.
_WRITERS: dict[bytes, Corners] = {b"roboflow": "1-exclusive", b"Label Studio": "0-exclusive"}


class Part(NamedTuple):
    """Images to train or to test on: by the path of each that of its annotation, or "".

    Of COCO, by its ``file_name`` in the JSON file ``source`` its path.
    """

    source: str
    files: dict[str, str]


class Layout(NamedTuple):
    """What was recognised, and a line that tells it."""

    format: Format
    split: Split
    train: Part
    test: Part
    classes: tuple[str, ...] | None
    corners: Corners | None
    told: str


def find_layout(root: Path, kind: Format | None = None, split: Split | None = None) -> Layout:
    """Recognise by evidence what a folder holds; ``kind`` and ``split`` allow nothing else."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder")
    tree = _Tree(root)
    kinds = [kind] if kind else [name for name in tree.found if tree.found[name]]
    if len(kinds) != 1 or not tree.found[kinds[0]]:
        there = [
            f"{len(found)} {_FORMATS[name][0]} of {name}" for name, found in tree.found.items()
        ]
        raise ValueError(
            f"{root}: expected images with annotations of one format, {kind or 'voc, coco or yolo'}"
            f" (data.format), found {len(tree.images)} images and {', '.join(there)}; docs/data.md "
            "says how they may lie"
        )
    (kind,) = kinds
    classes, corners, notes = None, None, list[str]()
    if kind == "coco":
        parts = tree.coco_parts(split)
    else:
        pairs = tree.pair(kind)
        about = tree.read_yaml() if kind == "yolo" else {}
        classes = tree.read_classes(about)
        if num := sum(not annotation for _, annotation in pairs.values()):
            fate = "left out" if kind == "voc" else "background"
            notes.append(f"{num} images without annotations are {fate}")
        if kind == "voc":
            pairs = {key: pair for key, pair in pairs.items() if pair[1]}
            start = read_file(root / tree.found[kind][0])
            written = next((_WRITERS[writer] for writer in _WRITERS if writer in start), None)
            corners = "0-exclusive" if classes else written
            notes += [f"corners are {corners}, as their writer has them"] if corners else []
        named = [] if split == "hash" else tree.named_keys(pairs, about)
        parts = [
            Part(source, dict(pairs[key] for key in keys))
            for source, keys in named or [(".", list(pairs))]
        ]
    if len(parts) == 1 and split == "named":
        raise ValueError(f"{root}: expected lists or folders called train and val, or test")
    is_named = len(parts) == 2
    train, test = parts if is_named else _divide(root, *parts)
    counts = f"{len(train.files)} images to train and {len(test.files)} to test on"
    where = f"{train.source} and {test.source}" if is_named else "by a hash of their names"
    told = "; ".join([f"{root}: {kind}, {counts} ({where})", *notes])
    return Layout(kind, "named" if is_named else "hash", train, test, classes, corners, told)


class _Tree:
    """The files of a folder, and which of them have the name of an image or hold annotations."""

    def __init__(self, root: Path) -> None:
        self.root, self.paths = root, list(_walk(root))
        self.images = [path for path in self.paths if path.suffix.lower() in IMG_EXTENSIONS]
        stems = {_stem(path) for path in self.images}
        self.found: dict[Format, list[Relative]] = {name: [] for name in _FORMATS}
        for path in self.paths:
            for name, (suffix, content) in _FORMATS.items():
                if path.suffix.lower() == suffix and (
                    (name != "coco" and _stem(path) in stems)
                    or re.search(content, read_file(root / path))
                ):
                    self.found[name].append(path)

    def pair(self, kind: Format) -> dict[str, tuple[str, str]]:
        """Return image and annotation, "" for none, by the stem of their key."""
        images = self.by_key(self.images, _stem)
        annotations = self.by_key(self.found[kind], _stem)
        # An image that is not there is missed by whoever reads the annotation.
        pairs = {key: path.with_suffix("") for key, path in annotations.items()} | images
        return {key: (str(pairs[key]), str(annotations.get(key, ""))) for key in sorted(pairs)}

    def by_key(
        self, paths: Iterable[Relative], key: Callable[[Relative], str]
    ) -> dict[str, Relative]:
        """Return paths by their keys, each of which must be there once."""
        found: dict[str, Relative] = {}
        for path in paths:
            if (other := found.setdefault(key(path), path)) != path:
                raise ValueError(f"{self.root}: expected one of {other} and {path}, found both")
        return found

    def coco_parts(self, split: Split | None) -> list[Part]:
        """Return the images of the JSON files to train and to test on, or of the only one."""
        images, jsons = self.by_key(self.images, _key), self.found["coco"]
        grouped = {} if split == "hash" else _group(jsons)
        parts = []
        for group in [grouped[name] for name in _choose(grouped)] or [jsons]:
            path, *others = [path for path in group if "instances" in path.stem] or group
            if others:
                raise ValueError(
                    f"{self.root}: expected one JSON file, or those of train and val, found "
                    f"{', '.join(map(str, group))}; data.coco says which to take"
                )
            words = ("", *re.split(r"[\W_]+", path.stem))  # "train" of instances_train
            bases = [parent / word for parent in path.parents for word in words]
            files = {}
            for name in read_coco(self.root / path, named=False).names:
                key = _find(name, bases, images)
                files[name] = str(images[key]) if key else PureWindowsPath(name).name
            parts.append(Part(str(path), files))
        return parts

    def named_keys(
        self, pairs: Mapping[str, Any], about: Mapping[str, Any]
    ) -> list[tuple[str, list[str]]]:
        """Return what data.yaml, or else lists or folders, name to train and to test on."""
        folders = {str(folder) for key in pairs for folder in Relative(key).parents}
        of_yaml: dict[str, list[str]] = {}
        for name in ("train", "val", "test"):
            given = about.get(name)
            for text in given if isinstance(given, list) else [given]:
                if folder := _find(str(text), about.get("bases", ()), folders):
                    start = "" if folder == "." else f"{folder}/"
                    of_yaml.setdefault(name, []).extend(k for k in pairs if k.startswith(start))
        if names := _choose(of_yaml):
            return [(str(about[name]), of_yaml[name]) for name in names]
        of_lists = _group(
            path
            for path in self.paths
            if path.suffix == ".txt"
            and _PART.fullmatch(path.stem)
            and _stem(path) not in pairs
            and ("ImageSets" not in path.parts or path.parent.name == "Main")
        )
        if names := _choose(of_lists):
            return [(str(of_lists[n][0]), self.read_lists(of_lists[n], pairs)) for n in names]
        of_folders: dict[str, list[str]] = {}
        for key in pairs:
            of_folders.setdefault(_part_of(Relative(key).parent), []).append(key)
        firsts = {name: pairs[keys[0]][0] for name, keys in of_folders.items()}
        return [(str(Relative(firsts[n]).parent), of_folders[n]) for n in _choose(of_folders)]

    def read_lists(self, paths: Iterable[Relative], pairs: Collection[str]) -> list[str]:
        """Return the keys of the images that lists name."""
        keys = []
        for path in paths:
            text = read_file(self.root / path).decode("utf-8-sig", errors="surrogateescape")
            for number, line in enumerate(text.splitlines(), 1):
                name = line.strip().strip('"')  # Datumaro quotes what has blanks
                key = _find(_SUFFIX.sub("", name), path.parents, pairs)
                if name and key is None:
                    where = f"{self.root / path}, line {number}"
                    raise FileNotFoundError(f"{where}: there is no annotated image {name!r}")
                keys += [key] if key else []
        return keys

    def read_yaml(self) -> dict[str, Any]:
        """Return what the file says that names YOLO's classes, and the ``bases`` of its paths."""
        found = {}
        for path in self.paths:
            if path.suffix.lower() in (".yaml", ".yml"):
                try:
                    content = yaml.safe_load(read_file(self.root / path))
                except (UnicodeDecodeError, yaml.YAMLError) as error:
                    raise ValueError(f"{self.root / path}: not readable as YAML: {error}") from None
                if isinstance(content, dict) and "names" in content:
                    found[str(path)] = {**content, "bases": [*path.parents]}
        if len(found) > 1:
            raise ValueError(f"{self.root}: expected one YAML file with names, found {[*found]}")
        return next(iter(found.values()), {})

    def read_classes(self, about: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the classes that data.yaml names, or else a list of names."""
        names = about.get("names")
        if isinstance(names, dict):  # by their numbers
            names = [names.get(number) for number in range(len(names))]
        found = {tuple(map(str, names))} if names else set()
        for path in self.paths if not names else ():
            if path.name in _NAMES:
                lines = read_file(self.root / path).decode("utf-8-sig").splitlines()
                if path.name == _NAMES[0]:  # label:colour:parts:actions
                    lines = [line.partition(":")[0] for line in lines if line[:1] != "#"]
                    lines = [line for line in lines if line != "background"]
                found.add(tuple(line.strip() for line in lines if line.strip()))
        if len(found) > 1:
            raise ValueError(f"{self.root}: expected one list of classes, found {[*found]}")
        return next(iter(found), None)


def _walk(root: Path) -> Iterator[Relative]:
    """Yield all files but hidden ones and masks; links are followed, but not in a circle."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        inside = Path(folder).resolve()
        subfolders[:] = [
            name
            for name in sorted(subfolders)
            if not name.startswith(_UNUSED)
            and not inside.is_relative_to(Path(folder, name).resolve())
        ]
        where = Relative(Path(folder).relative_to(root).as_posix())
        yield from (where / name for name in sorted(names) if not name.startswith("."))


def _key(path: Relative) -> str:
    return str(Relative(*(part for part in path.parts if part.lower() not in _ROLES)))


def _stem(path: Relative) -> str:
    return _SUFFIX.sub("", _key(path))


def _find(text: str, bases: Iterable[Relative], known: Collection[str]) -> str | None:
    """Return the key that a path means, by as much of its end as is there below one of ``bases``.

    What stands before, as of the machine that wrote it, is passed over: nothing leads outside.
    """
    path = PureWindowsPath(text.strip())  # which knows both kinds of slashes
    parts = [part for part in path.parts[bool(path.anchor) :] if part != ".."]
    tails = (parts[start:] for start in range(len(parts)))
    keys = (_key(Relative(base, *tail)) for tail in tails for base in bases)
    return next((key for key in keys if key in known), None)


def _part_of(path: Relative) -> str:
    """Return the part that a path names, the last if several, "" if it names none."""
    found = [_PART.fullmatch(word) for word in re.split(r"[\W_]+", str(path))]
    return next((match[1].lower() for match in reversed(found) if match), "")


def _group(paths: Iterable[Relative]) -> dict[str, list[Relative]]:
    grouped: dict[str, list[Relative]] = {}
    for path in paths:
        grouped.setdefault(_part_of(path), []).append(path)
    return grouped


def _choose(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return next((split for split in _SPLITS if all(parts.get(name) for name in split)), ())


def _divide(root: Path, whole: Part) -> tuple[Part, Part]:
    """Keep images for the test: the same ones where others are added, converted or moved."""
    shares = {}
    for name in whole.files:
        stem = unicodedata.normalize("NFC", PureWindowsPath(name).stem)  # macOS has another form
        digest = hashlib.blake2b(stem.encode(errors="surrogatepass"), digest_size=8).digest()
        shares[name] = int.from_bytes(digest, "little") / 2**64
    order = sorted({*shares.values()})
    if len(order) < 2:
        raise ValueError(f"{root}: expected two images or more, found {[*shares]}")
    limit = min(max(TEST_SHARE, order[1]), order[-1])  # one at least on each side
    test = {name: path for name, path in whole.files.items() if shares[name] < limit}
    train = {name: path for name, path in whole.files.items() if name not in test}
    return Part(whole.source, train), Part(whole.source, test)
