"""Which images of a folder have which annotations, and what to train and to test on.

Files are found by their *key*, their path without suffix and without folders that only tell what is
in them: that of images/train/a.jpg and of labels/train/a.txt is train/a. Parts (train, val, test)
are named by data.yaml, lists, folders or JSON files; where there are none, a hash of its name
decides for each image. All paths are relative to the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from pathlib import PurePosixPath as Relative
from typing import Any, NamedTuple

import yaml
from torchvision.datasets.folder import IMG_EXTENSIONS

from detmix.data.coco.file import read_coco
from detmix.files import read_file

TEST_SHARE = 0.2
"""Of the images, kept for the test where nothing says which."""

_FORMATS = {  # of annotations, with what is in them, by their suffix
    ".xml": ("voc", rb"<annotation[\s>]"),
    ".json": ("coco", rb'(?s)\A(?=.*"images")(?=.*"annotations").*"categories"'),
    ".txt": ("yolo", rb"\A\s*\d+([ \t]+-?\d[\d.e-]*){4,}\s*(\n|\Z)"),
}
_ROLES = {"images", "image", "img", "imgs", "jpegimages", "annotations", "annotation", "labels"}
_ROLES |= {"label", "xml", "xmls"}
_UNUSED = {"__MACOSX", "SegmentationClass", "SegmentationObject"}
# What is in folders that detmix writes, of a run and of an evaluation.
_OUTPUTS = ({"versions.json", "metrics.jsonl"}, {"predictions.json", "ground_truth.json"})
_IMAGES = (*IMG_EXTENSIONS, ".avif", ".gif", ".jp2")
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, (*_IMAGES, '.xml', '.txt')))})$", re.I)
_PART = re.compile(r"(trainval|train|val|test)(?:ing|id|idation)?\d*", re.I)
# What to train on and what to score by: the first pair that is there.
_SPLITS = (("train", "val"), ("train", "test"), ("trainval", "test"))
_NAMES = {"voc": ("labelmap.txt",), "yolo": ("obj.names", "classes.txt", "_darknet.labels")}
# What in XML tells who wrote it; CVAT and Datumaro leave a labelmap.txt beside it.
_WRITERS = {b"roboflow": "1-exclusive", b"Label Studio": "0-exclusive", b"labelmap": "0-exclusive"}


class Part(NamedTuple):
    """Images to train or to test on, and what says so: of COCO, the JSON file."""

    source: str
    files: dict[str, str]  # annotations, "" for none, by their images; of COCO these, by file_name


class Layout(NamedTuple):
    """What was recognised: options of the data to be noted, images, and a line that tells it."""

    noted: dict[str, Any]
    train: Part
    test: Part
    told: str


def find_layout(root: Path, kind: str | None = None, split: str | None = None) -> Layout:
    """Recognise by evidence what a folder holds; ``kind`` and ``split`` allow nothing else."""
    tree = _Tree(root)
    kinds = [kind] if kind else [name for name in tree.found if tree.found[name]]
    if len(kinds) != 1 or not tree.found[kinds[0]]:
        there = [f"{len(found)} files of {name}" for name, found in tree.found.items()]
        raise ValueError(
            f"{root}: expected images with files of one format, {kind or 'voc, coco or yolo'} "
            f"(data.format, docs/data.md); found {len(tree.images)} images, {', '.join(there)}"
        )
    (kind,) = kinds
    noted: dict[str, Any] = {"format": kind}
    notes = []
    if kind == "coco":
        parts = tree.coco_parts(split)
    else:
        noted["classes"], about = tree.read_names(kind)
        if "kpt_shape" in about:  # half of them would pass for polygons
            raise ValueError(
                f"{root}: expected YOLO's boxes or polygons, found keypoints (kpt_shape)"
            )
        pairs, backgrounds, unused = tree.pair(kind)
        for number, fate in ((backgrounds, "background"), (unused, "left out")):
            notes += [f"{number} images without annotations are {fate}"] * bool(number)
        if kind == "voc":
            start = read_file(root / tree.found["voc"][0])
            writers = [b"labelmap"] if noted["classes"] else [w for w in _WRITERS if w in start]
            noted["corners"] = _WRITERS[writers[0]] if writers else "1-inclusive"
            notes += [f"corners are {noted['corners']}, as their writer has them"] * len(writers)
        parts = tree.paired_parts(pairs, about, split)
    if len(parts) < 2 and split == "named":
        raise ValueError(f"{root}: expected lists or folders called train and val, or test")
    noted["split"] = "named" if len(parts) == 2 else "hash"
    train, test = parts if len(parts) == 2 else _divide(root, *parts)
    if shared := train.files.items() & test.files.items():
        notes.append(f"{len(shared)} images are in both")
    where = "by a hash of their names" if len(parts) < 2 else f"{train.source} and {test.source}"
    counts = f"{len(train.files)} images to train and {len(test.files)} to test on ({where})"
    return Layout(noted, train, test, "; ".join([f"{root}: {kind}, {counts}", *notes]))


class _Tree:
    """The files of a folder: images by their key, annotations by their format."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"data.root is {root}: no such folder, in {Path.cwd()}")
        self.root, self.paths = root, list[Relative]()
        for parent, folders, files in os.walk(root, followlinks=True):
            place = Path(parent)
            is_output = place != root and any(output <= {*files} for output in _OUTPUTS)
            folders[:] = [each for each in folders if not is_output and _is_entered(place / each)]
            names = [name for name in files if not (is_output or name.startswith("."))]
            self.paths += [Relative((place / name).relative_to(root).as_posix()) for name in names]
        self.paths.sort()
        self.images = self.by_key(p for p in self.paths if p.suffix.lower() in _IMAGES)
        self.found: dict[str, list[Relative]] = {name: [] for name, _ in _FORMATS.values()}
        for path in self.paths:
            name, content = _FORMATS.get(path.suffix.lower(), ("", b""))
            is_named = name != "coco" and _key(path) in self.images
            if name and (is_named or re.search(content, read_file(root / path))):
                self.found[name].append(path)

    def by_key(self, paths: Iterable[Relative]) -> dict[str, Relative]:
        """Return paths by their keys, each of which must be there once."""
        found: dict[str, Relative] = {}
        for path in paths:
            if (other := found.setdefault(_key(path), path)) != path:
                raise ValueError(f"{self.root}: expected one of {other} and {path}, found both")
        return found

    def pair(self, kind: str) -> tuple[dict[str, tuple[str, str]], int, int]:
        """Return image and annotation, "" for none, by key; how many have none, or are left out."""
        annotations = self.by_key(self.found[kind])
        # An image that is not there is missed by whoever reads the annotation.
        images = {key: path.with_suffix("") for key, path in annotations.items()}
        # Background has labels beside it; what a run or another program draws has none.
        places = {Relative(key).parent for key in annotations if kind == "yolo"}
        images |= {
            k: p for k, p in self.images.items() if k in images or Relative(k).parent in places
        }
        pairs = {key: (str(images[key]), str(annotations.get(key, ""))) for key in sorted(images)}
        return pairs, len(images) - len(annotations), len(self.images.keys() - images.keys())

    def coco_parts(self, split: str | None) -> list[Part]:
        """Return the images of the JSON files to train and to test on, or of the only one."""
        jsons = self.found["coco"]
        grouped: dict[str, list[Relative]] = {}
        for path in jsons:
            grouped.setdefault(_part_of(path) if split != "hash" else "", []).append(path)
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
                key = _find(name, bases, self.images)
                files[name] = str(self.images[key]) if key else PureWindowsPath(name).name
            parts.append(Part(str(path), files))
        return parts

    def paired_parts(
        self, pairs: Mapping[str, tuple[str, str]], about: Mapping[str, Any], split: str | None
    ) -> list[Part]:
        """Return the images that data.yaml, or else lists or folders, name; or else all."""
        of_yaml, of_lists, of_folders = (dict[str, list[str]]() for _ in range(3))
        folders = {str(folder) for key in pairs for folder in Relative(key).parents}
        for name in ("train", "val", "test"):
            given = about.get(name)
            for text in given if isinstance(given, list) else [given]:
                folder = _find(str(text), about.get("bases", ()), folders)
                # Of valid/images, where no valid is, images alone would be the whole, ".".
                found = [key for key in pairs if folder and key.startswith(f"{folder}/")]
                of_yaml.setdefault(name, []).extend(found)
        for path in self.paths if split != "hash" else ():
            match = _PART.fullmatch(path.stem) if path.suffix == ".txt" else None
            if match and ("ImageSets" not in path.parts or path.parent.name == "Main"):
                of_lists.setdefault(match[1].lower(), []).extend(self.read_list(path, pairs))
        for key in pairs:
            of_folders.setdefault(_part_of(Relative(key).parent), []).append(key)
        ways = {"data.yaml's": of_yaml, "lists": of_lists, "folders": of_folders}
        for way, named in ways.items() if split != "hash" else ():
            if names := _choose(named):
                return [
                    Part(f"{way} {name}", dict(pairs[key] for key in named[name])) for name in names
                ]
        return [Part("", dict(pairs.values()))]

    def read_list(self, path: Relative, pairs: Collection[str]) -> list[str]:
        """Return the keys of the images that a list names; none, if it is no list of images."""
        text = read_file(self.root / path).decode("utf-8-sig", errors="surrogateescape")
        lines = [line.strip().strip('"') for line in text.splitlines() if line.strip()]
        keys = {line: _find(line, path.parents, pairs) for line in lines}
        missing = [line for line, key in keys.items() if key is None]
        if 0 < len(missing) < len(keys):
            told = f"{len(missing)} of {len(keys)} have no image or annotation: {missing[:3]}"
            raise FileNotFoundError(f"{self.root / path}: {told}")
        return [key for key in keys.values() if key]

    def read_names(self, kind: str) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
        """Return the classes that a file names, and what data.yaml says, with its ``bases``."""
        found, about = dict[tuple[str, ...], Relative](), {}
        for path in self.paths:
            names: Any = []
            if kind == "yolo" and path.suffix.lower() in (".yaml", ".yml"):
                try:
                    content = yaml.safe_load(read_file(self.root / path))
                except yaml.YAMLError as error:
                    raise ValueError(f"{self.root / path}: not readable as YAML: {error}") from None
                if isinstance(content, dict) and (names := content.get("names")):
                    if isinstance(names, dict) and all(isinstance(key, int) for key in names):
                        names = [names.get(number, number) for number in range(max(names) + 1)]
                    if isinstance(names, list):
                        about = {**content, "bases": [*path.parents]}
            elif path.name in _NAMES[kind]:
                lines = read_file(self.root / path).decode("utf-8-sig").splitlines()
                if kind == "voc":  # label:colour:parts:actions, and comments
                    others = ("#", "background:")
                    lines = [line.split(":")[0] for line in lines if not line.startswith(others)]
                names = [line.strip() for line in lines if line.strip()]
            if isinstance(names, list) and names:
                found[tuple(map(str, names))] = path
        if len(found) > 1:
            told = " and ".join(map(str, found.values()))
            raise ValueError(f"{self.root}: {told} name different classes, expected one to do so")
        return next(iter(found), None), about


def _is_entered(folder: Path) -> bool:
    """Tell whether a folder may hold data, and is no link to one that it lies in."""
    target = folder.resolve() if folder.is_symlink() else None
    if target and any(parent.resolve().is_relative_to(target) for parent in folder.parents):
        return False
    return folder.name not in _UNUSED and not folder.name.startswith(".")


def _key(path: Relative) -> str:
    folders = Relative(*(part for part in path.parts if part.lower() not in _ROLES))
    return unicodedata.normalize("NFC", _SUFFIX.sub("", str(folders)))  # macOS has another form


def _find(text: str, bases: Iterable[Relative], known: Collection[str]) -> str | None:
    """Return the key that a path means, by as much of its end as is there below one of ``bases``.

    What stands before, as of the machine that wrote it, is passed over: nothing leads outside.
    """
    parts = PureWindowsPath(text.strip()).parts  # by both kinds of slashes
    tails = (Relative(*parts[start:]) for start in range(len(parts)))
    keys = (_key(base / tail) for tail in tails for base in bases)
    return next((key for key in keys if key in known), None)


def _part_of(path: Relative) -> str:
    """Return the part that a path names, the last if several, "" if it names none."""
    found = [_PART.fullmatch(word) for word in re.split(r"[\W_]+", str(path))]
    return next((match[1].lower() for match in reversed(found) if match), "")


def _choose(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return next((split for split in _SPLITS if all(parts.get(name) for name in split)), ())


def _divide(root: Path, whole: Part) -> tuple[Part, Part]:
    """Keep images for the test: the same ones where others are added, converted or moved."""
    shares = {}
    for name in whole.files:
        stem = unicodedata.normalize("NFC", PureWindowsPath(name).stem)
        stem = stem.partition(".rf.")[0]  # Roboflow's copies of one image stay together
        digest = hashlib.blake2b(stem.encode(errors="surrogatepass"), digest_size=8).digest()
        shares[name] = int.from_bytes(digest, "little") / 2**64
    others = sorted({*shares.values()})[1:]
    if not others:
        raise ValueError(f"{root}: expected two images or more, found {[*shares]}")
    limit = min(max(TEST_SHARE, others[0]), others[-1])  # one at least on each side
    test = {name: path for name, path in whole.files.items() if shares[name] < limit}
    train = {name: path for name, path in whole.files.items() if name not in test}
    return whole._replace(files=train), whole._replace(files=test)
