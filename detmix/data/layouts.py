"""Which images of a folder have which annotations, and what to train and to test on.

Files are found by their *key*: their path without folders that only tell what is in them. Images
and annotations have the same, but for the suffix: that of images/train/a.jpg and labels/train/a.txt
is train/a. Parts (train, val, test) are named by data.yaml, lists, folders or JSON files; where
there are none, a hash of its name decides for each image. All paths are relative to the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
Pairs = dict[str, tuple[str, str]]  # image and annotation, "" for none, by their key
TEST_SHARE = 0.2
"""Of the images, kept for the test where nothing says which."""

_WHAT = {"voc": "Pascal VOC's XML", "coco": "COCO's JSON", "yolo": "YOLO's text labels"}
_ROLES = {"images", "image", "img", "imgs", "jpegimages", "annotations", "labels", "xml", "xmls"}
_UNUSED = (".", "__MACOSX", "SegmentationClass", "SegmentationObject")
_SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, (*IMG_EXTENSIONS, '.xml', '.txt')))})$", re.I)
_PART = re.compile(r"(trainval|train|val|test)(?:ing|id|idation)?\d*", re.I)
# What to train on and what to score by: the first pair that is there.
_SPLITS = (("train", "val"), ("train", "test"), ("trainval", "test"))
_CONTENT = {".xml": rb"<annotation[\s>]", ".txt": rb"\A\s*\d+([ \t]+-?\d[\d.e-]*){4,}\s*(\n|\Z)"}
_NAMES = ("labelmap.txt", "obj.names", "classes.txt", "_darknet.labels")
# What tells the writer of XML; beside that of CVAT and Datumaro lies a labelmap.txt.
_WRITERS: dict[bytes, Corners] = {b"roboflow": "1-exclusive", b"Label Studio": "0-exclusive"}


class Part(NamedTuple):
    """Images of one purpose, and the list, folder or JSON file that says so.

    ``files`` has each image's annotation, "" for none; of COCO, the image of each ``file_name``.
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
    tree = _Tree(root)
    found = tree.find_annotations()
    kinds = [kind] if kind else [name for name in found if found[name]]
    if len(kinds) != 1 or not found[kinds[0]]:
        there = [f"{len(files)} files of {_WHAT[name]}" for name, files in found.items() if files]
        expected = " or ".join(_WHAT[name] for name in ([kind] if kind else found))
        raise ValueError(
            f"{root}: expected images with {expected}; found {len(tree.images)} images and "
            f"{' and '.join(there) or 'none of these'}; data.format says which to take, "
            "docs/data.md how they may lie"
        )
    (kind,), notes = kinds, list[str]()
    about = tree.read_yaml() if kind == "yolo" else {}
    classes = None if kind == "coco" else tree.read_classes(about)
    corners: Corners | None = None
    if kind == "voc":
        start = read_file(root / found[kind][0])
        written = next((_WRITERS[writer] for writer in _WRITERS if writer in start), None)
        corners = "0-exclusive" if classes else written
        notes += [f"corners are {corners}, as their writer has them"] if corners else []
    if kind == "coco":
        parts = tree.coco_parts(found[kind], split)
    else:
        pairs = tree.pair(found[kind])
        bare = [key for key, (_, annotation) in pairs.items() if not annotation]
        fate = "left out" if kind == "voc" else "background"
        notes += [f"{len(bare)} images without annotations are {fate}"] if bare else []
        if kind == "voc":
            pairs = {key: pair for key, pair in pairs.items() if pair[1]}
        parts = [] if split == "hash" else tree.named_parts(pairs, about)
        parts = parts or [_part(pairs, pairs)]
    if len(parts) == 1 and split == "named":
        raise ValueError(f"{root}: expected lists or folders called train and val, or test")
    how: Split = "named" if len(parts) == 2 else "hash"
    train, test = parts if len(parts) == 2 else _divide(root, *parts)
    where = f"{train.source} and {test.source}" if how == "named" else "by a hash of their names"
    counts = f"{len(train.files)} images to train and {len(test.files)} to test on"
    told = "; ".join([f"{root}: {_WHAT[kind]}, {counts} ({where})", *notes])
    return Layout(kind, how, train, test, classes, corners, told)


class _Tree:
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: there is no such folder")
        self.root, self.paths = root, list(_walk(root))
        self.images: dict[str, str] = {}  # by their keys
        for path in self.paths:
            if path.suffix.lower() in IMG_EXTENSIONS:
                other = self.images.setdefault(_key(path), str(path))
                if other != str(path):
                    raise ValueError(f"{root}: expected one image, found {other} and {path}")

    def find_annotations(self) -> dict[Format, list[Relative]]:
        """Return what is named as an image is, or has the content of an annotation."""
        found: dict[Format, list[Relative]] = {"voc": [], "coco": [], "yolo": []}
        stems = {_SUFFIX.sub("", key) for key in self.images}
        for path in self.paths:
            suffix, file = path.suffix.lower(), self.root / path
            if suffix == ".json":
                data = read_file(file)
                if all(word in data for word in (b'"images"', b'"annotations"', b'"categories"')):
                    found["coco"].append(path)
            elif suffix in _CONTENT and (
                _SUFFIX.sub("", _key(path)) in stems or re.search(_CONTENT[suffix], read_file(file))
            ):
                found["voc" if suffix == ".xml" else "yolo"].append(path)
        return found

    def pair(self, annotations: Sequence[Relative]) -> Pairs:
        """Return images and annotations; an image that is missing is so for its reader."""
        pairs = {}
        for key, image in self.images.items():
            stem = _SUFFIX.sub("", key)
            if stem in pairs:
                raise ValueError(
                    f"{self.root}: expected one image, found {pairs[stem][0]} and {image}"
                )
            pairs[stem] = (image, "")
        for path in annotations:
            stem = _SUFFIX.sub("", _key(path))
            image, other = pairs.get(stem, (str(path.with_suffix("")), ""))
            if other:
                raise ValueError(f"{self.root}: expected one annotation, found {other} and {path}")
            pairs[stem] = (image, str(path))
        return dict(sorted(pairs.items()))

    def coco_parts(self, paths: Sequence[Relative], split: Split | None) -> list[Part]:
        """Return the images of the files to train and to test on, or those of the only one."""
        named: dict[str, list[Relative]] = {}
        for path in paths:
            named.setdefault(_part_of(path.with_suffix("")), []).append(path)
        chosen = None if split == "hash" else _choose(named)
        parts = []
        for group in [named[part] for part in chosen] if chosen else [paths]:
            path, *others = [path for path in group if "instances" in path.stem] or group
            if others:
                raise ValueError(
                    f"{self.root}: expected one file of COCO's JSON, or two called train and val, "
                    f"found {', '.join(map(str, group))}; data.coco says which to take"
                )
            words = ("", *re.split(r"[\W_]+", path.stem))  # those of instances_train, say
            bases = [parent / word for parent in path.parents for word in words]
            names = read_coco(self.root / path, named=False).names
            keys = {name: _find(name, bases, self.images) for name in names}
            files = {n: self.images.get(key, PureWindowsPath(n).name) for n, key in keys.items()}
            parts.append(Part(str(path), files))
        return parts

    def named_parts(self, pairs: Pairs, about: Mapping[str, Any]) -> list[Part]:
        """Return the images to train and to test on that data.yaml, lists or folders name."""
        lists = {_key(path): path for path in self.paths if path.suffix == ".txt"}
        folders = {str(folder) for key in pairs for folder in Relative(key).parents}
        of_yaml, of_lists, of_folders = (dict[str, list[str]]() for _ in range(3))
        for part in ("train", "val", "test"):
            given = about.get(part)
            for text in given if isinstance(given, list) else [given]:
                source = _find(str(text), about.get("bases", ()), folders | lists.keys())
                of_yaml.setdefault(part, []).extend([source] if source else [])
        for key, path in lists.items():
            match = _PART.fullmatch(path.stem)
            if match and ("ImageSets" not in path.parts or path.parent.name == "Main"):
                of_lists.setdefault(match[1].lower(), []).append(key)
        for sources in (of_yaml, of_lists):
            if chosen := _choose(sources):
                return [self._listed(pairs, lists, sources[part]) for part in chosen]
        for key in pairs:
            of_folders.setdefault(_part_of(Relative(key).parent), []).append(key)
        return [_part(pairs, of_folders[part]) for part in _choose(of_folders) or ()]

    def _listed(self, pairs: Pairs, lists: Mapping[str, Relative], sources: Sequence[str]) -> Part:
        """Return the images of lists and folders."""
        keys = []
        for source in sources:
            if source not in lists:
                start = "" if source == "." else f"{source}/"
                keys += [key for key in pairs if key.startswith(start)]
                continue
            path = lists[source]
            text = read_file(self.root / path).decode("utf-8-sig", errors="surrogateescape")
            for number, line in enumerate(text.splitlines(), 1):
                name = line.strip().strip('"')  # Datumaro quotes names with blanks
                key = _find(_SUFFIX.sub("", name), path.parents, pairs)
                if name and key is None:
                    raise FileNotFoundError(
                        f"{self.root / path}, line {number}: no annotated image {name!r} is there"
                    )
                keys += [key] if key else []
        return _part(pairs, keys, str(lists.get(sources[0], "")))

    def read_yaml(self) -> dict[str, Any]:
        """Return what the file says that names YOLO's classes, and ``bases`` of its paths."""
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
        """Return the classes that data.yaml names, or a list of names."""
        given = about.get("names")
        if isinstance(given, dict):  # by their numbers
            given = [given.get(number) for number in range(len(given))]
        found = {tuple(map(str, given))} if given else set()
        for path in self.paths if not given else ():
            if path.name in _NAMES:
                lines = read_file(self.root / path).decode("utf-8-sig").splitlines()
                is_map = path.name == _NAMES[0]  # label:colour:parts:actions
                names = [line.split(":")[0] if is_map else line.strip() for line in lines]
                unused = ("background",) if is_map else ()
                found.add(tuple(n for n in names if n and n[0] != "#" and n not in unused))
        if len(found) > 1 or (None in given if given else False):
            raise ValueError(f"{self.root}: expected one list of names, found {[*found]}")
        return next(iter(found), None)


def _walk(root: Path) -> Iterator[Relative]:
    """Yield all files but hidden ones and masks; links are followed, but not in a circle."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        inside = os.path.join(os.path.realpath(folder), "")
        subfolders[:] = [
            name
            for name in sorted(subfolders)
            if not name.startswith(_UNUSED)
            and not inside.startswith(
                os.path.join(os.path.realpath(os.path.join(folder, name)), "")
            )
        ]
        where = Relative(Path(folder).relative_to(root).as_posix())
        yield from (where / name for name in sorted(names) if not name.startswith("."))


def _key(path: Relative) -> str:
    return str(Relative(*(part for part in path.parts if part.lower() not in _ROLES)))


def _find(text: str, bases: Iterable[Relative], known: Collection[str]) -> str | None:
    """Return the key that a path means, by as much of its end as is there, below one of ``bases``.

    What stands before, as of the machine that wrote it, is passed over: it cannot lead outside.
    """
    path = PureWindowsPath(text.strip())  # which knows both kinds of slashes
    parts = [part for part in path.parts[bool(path.anchor) :] if part != ".."]
    for start in range(len(parts)):
        for base in bases:
            if (key := _key(Relative(base, *parts[start:]))) in known:
                return key
    return None


def _part_of(path: Relative) -> str:
    """Return the part that the innermost folder of a path names, "" if none does."""
    words = re.split(r"[^A-Za-z0-9]+", str(path))
    return next((m[1].lower() for word in reversed(words) if (m := _PART.fullmatch(word))), "")


def _part(pairs: Pairs, keys: Iterable[str], source: str = "") -> Part:
    files = dict(pairs[key] for key in keys)
    return Part(source or str(Relative(next(iter(files), "")).parent), files)


def _choose(parts: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((split for split in _SPLITS if all(parts.get(name) for name in split)), None)


def _divide(root: Path, whole: Part) -> tuple[Part, Part]:
    """Keep images for the test: the same ones where others are added, converted or moved."""
    shares = {}
    for name in whole.files:
        stem = unicodedata.normalize("NFC", PureWindowsPath(name).stem)  # macOS writes another form
        digest = hashlib.blake2b(stem.encode(errors="surrogatepass"), digest_size=8).digest()
        shares[name] = int.from_bytes(digest, "little") / 2**64
    order = sorted({*shares.values()})
    if len(order) < 2:
        raise ValueError(
            f"{root}: expected two images or more to train and to test on, got {[*shares]}"
        )
    limit = min(max(TEST_SHARE, order[1]), order[-1])  # of few images one at least on each side
    sides = ([name for name in shares if (shares[name] < limit) == test] for test in (False, True))
    train, test = (Part(whole.source, {n: whole.files[n] for n in side}) for side in sides)
    return train, test
