"""What is wrong with a whole data set, all at once: what every check has in common.

The checks themselves are :func:`detmix.data.check_voc.check_voc`,
:func:`detmix.data.check_coco.check_coco` and :func:`detmix.data.check_images.check_images`.
Legend: N objects of one image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from detmix.data.clean_boxes import clean_boxes, keep_boxes
from detmix.data.image_file import MAX_IMAGE_BYTES, check_image_size
from detmix.data.skipping import in_threads
from detmix.regular_file import read_regular_file

__all__ = ["NOTES", "PROBLEMS", "DataCheck", "ImageCheck", "Problem"]

_TINY = 2

PROBLEMS = {
    "unusable list": "the list of images or the annotation file as a whole",
    "missing file": "a folder, a list, an image or an annotation that is not there",
    "name that leads outside": "refused wherever it stands",
    "listed twice": "in one list of images",
    "unusable annotation": "not readable, or a field is missing or wrong",
    "unknown class": "not among the classes",
    "unusable image": "not an image of a known format, or broken",
    "another size": "the image is not of the size that its annotation says",
    "box without area": "none inside the image; training drops it",
    "box beyond the image": "training clips it",
    "in train and test": "the same image is trained on and evaluated",
}
"""The kinds of problems, and what they mean."""

NOTES = {
    "same picture twice": "files with the same content, both in train or both in test",
    "image without objects": "all of it is background",
    "class without objects": "none to train on",
    "class that is not trained": "its objects are not evaluated",
    "tiny box": f"a side shorter than {_TINY} pixels",
    "same object twice": "the same box and class in one image",
}
"""What is worth a look, but may well be meant."""

_HARMLESS = {*NOTES, "box without area"}  # an image with these only is in the data set


@dataclass(frozen=True)
class Problem:
    """One problem, or a note.

    Attributes:
        kind: A key of :data:`PROBLEMS` or :data:`NOTES`.
        subset: ``"train"`` or ``"test"``, where the image was met first.
        message: Names the file and the value, and what was expected.
    """

    kind: str
    subset: str
    message: str


@dataclass
class ImageCheck:
    """What was found of one image.

    Attributes:
        num_objects: The usable objects of each class.
        digest: Of the image file's content; None where it cannot be read.
        found: Kinds and messages.
    """

    num_objects: Counter[str] = field(default_factory=Counter)
    digest: bytes | None = None
    found: list[tuple[str, str]] = field(default_factory=list)

    def report(self, kind: str, message: str, image: int | None = None) -> None:
        """Take a problem, as :class:`detmix.data.problems.Report` has it."""
        self.found.append((kind, message))

    def read_picture(
        self,
        path: Path,
        decode: Callable[[bytes, Path], Tensor],
        size: tuple[int, int],
        source: Path,
    ) -> tuple[int, int]:
        """Decode the image; report what hinders, and a size that is not the annotation's.

        Args:
            path: The image's file.
            decode: Turns its content into ``(3, H, W)``.
            size: The height and width of the annotation; 0 for unknown.
            source: The file that says so.

        Returns:
            The annotation's height and width; the image's where it says none.
        """
        image = self.decode(
            str(path),
            lambda: read_regular_file(path, MAX_IMAGE_BYTES),
            lambda data: decode(data, path),
        )
        if image is None:
            return size
        if min(size) == 0:
            return image.shape[-2], image.shape[-1]
        try:
            check_image_size(image, path, size, source)
        except ValueError as error:
            self.report("another size", str(error))
        return size

    def read_boxes(
        self,
        boxes: npt.NDArray[np.float64],
        names: Sequence[str],
        size: tuple[int, int],
        describe: Callable[[int], str],
        *,
        clip: bool = True,
        is_left_out: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Count the usable objects; report every box that is wrong, or worth a look.

        Args:
            boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels as they are in the file.
            names: The class of each.
            size: The image's height and width; if 0, the boxes cannot be checked.
            describe: Says in which file a box stands and how.
            clip: False where boxes are used as they are, also those without area.
            is_left_out: ``(N,)``, objects that do not count, such as crowds; None for none.
        """
        if is_left_out is None:
            is_left_out = np.zeros(len(names), dtype=bool)
        if min(size) == 0:
            self.num_objects.update(n for n, out in zip(names, is_left_out, strict=True) if not out)
            return
        clean = clean_boxes(boxes, np.tile(np.array(size, dtype=np.int64), (len(boxes), 1)))
        is_finite = np.isfinite(keep_boxes(boxes).boxes)
        is_usable = clean.has_area if clip else np.all(is_finite, axis=1)
        is_tiny = (clean.boxes[:, 2:] - clean.boxes[:, :2]).min(axis=1, initial=np.inf) < _TINY
        seen: set[tuple[Any, ...]] = set()
        for row, name in enumerate(names):
            self.num_objects[name] += int(is_usable[row] & ~is_left_out[row])
            if not clip and not is_usable[row]:
                self.report("unusable annotation", f"{describe(row)}: too large for float32")
            elif not clean.has_area[row]:
                self.report("box without area", describe(row))
            elif clean.is_clipped[row]:
                self.report("box beyond the image", describe(row))
            elif is_tiny[row]:
                self.report("tiny box", describe(row))
            identity = (name, *boxes[row].tolist())
            if identity in seen:
                self.report("same object twice", describe(row))
            seen.add(identity)

    def decode(
        self, where: str, read: Callable[[], bytes], decode: Callable[[bytes], Tensor]
    ) -> Tensor | None:
        """Return the decoded image ``(3, H, W)``; report what hinders and return None."""
        try:
            data = read()
            self.digest = hashlib.blake2b(data, digest_size=16).digest()
            return decode(data)
        except FileNotFoundError:
            self.report("missing file", f"{where}: there is no such image file")
        except (ValueError, OSError) as error:
            self.report("unusable image", str(error))
        return None


class DataCheck:
    """What was found in a data set; prints itself.

    Args:
        classes: The class names.
        has_objects: Whether the images have objects with boxes; else each is of one class.

    Attributes:
        problems: All problems.
        notes: What is worth a look.
        num_images: The images of each subset.
        num_objects: The usable objects of each subset.
    """

    def __init__(self, classes: Sequence[str], *, has_objects: bool = True) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Problem] = []
        self.num_images: Counter[str] = Counter()
        self.num_objects: Counter[str] = Counter()
        self._classes = classes
        self._has_objects = has_objects
        self._by_class: Counter[str] = Counter()  # of train
        self._digests: dict[bytes, tuple[str, str]] = {}

    @property
    def is_clean(self) -> bool:
        """Whether there are no problems; there may be notes."""
        return not self.problems

    def add(self, kind: str, subset: str, message: str) -> None:
        """Add a problem or a note."""
        where = self.notes if kind in NOTES else self.problems
        where.append(Problem(kind, subset, message))

    def run(self, subset: str, images: Sequence[str], check: Callable[[int], ImageCheck]) -> None:
        """Check the images of a subset in threads, with a progress bar on a terminal.

        Args:
            subset: ``"train"`` or ``"test"``.
            images: The images' files, or where else they lie.
            check: Given an image's index, checks it.
        """
        checks = in_threads(check, len(images))
        bar = tqdm(checks, f"checking {subset}", len(images), leave=False, disable=None)
        for image, found in zip(images, bar, strict=True):
            for kind, message in found.found:
                self.add(kind, subset, message)
            total = found.num_objects.total()
            if self._has_objects and not total and {kind for kind, _ in found.found} <= _HARMLESS:
                self.add("image without objects", subset, image)
            self.num_images[subset] += 1
            self.num_objects[subset] += total
            if subset == "train":
                self._by_class += found.num_objects
            if found.digest is not None:
                self._compare(found.digest, subset, image)

    def finish(self) -> DataCheck:
        """Add what shows only when all images are read."""
        if self._has_objects and self.num_images["train"]:
            for name in self._classes:
                if not self._by_class[name]:
                    self.add("class without objects", "train", name)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON has them."""
        return {
            "num_images": dict(self.num_images),
            "num_objects": dict(self.num_objects),
            "num_problems": len(self.problems),
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [asdict(note) for note in self.notes],
        }

    def describe(self, num_shown: int | None = None) -> str:
        """Return the problems and notes by kind.

        Args:
            num_shown: How many of each kind; None for all.
        """
        counts = (
            f"{subset}: {number} images"
            + (f", {self.num_objects[subset]} objects" if self._has_objects else "")
            for subset, number in self.num_images.items()
        )
        parts = ["\n".join(counts) or "no images", *_groups(self.problems, PROBLEMS, num_shown)]
        parts.append(_count(len(self.problems)))
        if self.notes:
            parts += ["worth a look:", *_groups(self.notes, NOTES, num_shown)]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.describe(num_shown=20)

    def _compare(self, digest: bytes, subset: str, image: str) -> None:
        other, first = self._digests.setdefault(digest, (subset, image))
        if first == image and other == subset:
            return
        kind = "same picture twice" if other == subset else "in train and test"
        same = f"has the same content as {first} of" if first != image else "is in"
        self.add(kind, subset, f"{image} {same} {other}")


def _count(number: int) -> str:
    return "no problems" if not number else "1 problem" if number == 1 else f"{number} problems"


def _groups(found: Sequence[Problem], kinds: dict[str, str], num_shown: int | None) -> list[str]:
    parts = []
    for kind, meaning in kinds.items():
        messages = [problem.message for problem in found if problem.kind == kind]
        if messages:
            more = len(messages[num_shown:]) if num_shown is not None else 0
            lines = [f"{kind} ({len(messages)}): {meaning}"]
            lines += [f"  {message}" for message in messages[:num_shown]]
            parts.append("\n".join([*lines, *([f"  ... and {more} more"] if more else [])]))
    return parts
