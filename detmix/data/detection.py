"""What data sets share, whatever their format: samples, clipped boxes, images that are left out.

A reader returns for each image what it reads, or the `Problem` with it; `read_usable` raises the
first of these, or leaves their images out.
Legend: I images, M objects of the whole data set, N objects of one image.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.contrib.concurrent import thread_map

from detmix.data.images import read_orientation, read_sized_image

Array = npt.NDArray[Any]
Files = Mapping[str, str]
Transforms = Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]]
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_OF_DATA = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# A link to itself, a socket, a name that is too long: those without a class.
_ERRNOS_OF_DATA = (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)
_NUM_SHOWN = 5


class StoredDetection(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images in files, and their objects in a few flat tensors, so that forked workers share them.

    A format sets ``names``, ``image_ids`` and ``transforms``, calls `_store`, and says of an image
    where its file and its annotation are.
    """

    names: list[str]
    classes: tuple[str, ...]
    image_ids: Sequence[int | str]
    transforms: Transforms | None

    def _store(self, sizes: Array, counts: Array, columns: Mapping[str, Array]) -> None:
        """Keep each image's size and number of objects, and the objects sorted by image."""
        self._sizes = torch.from_numpy(sizes)  # (I, 2) height, width
        # (I + 1,): image i owns the rows offsets[i] to offsets[i + 1].
        self._offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        self._columns = {key: torch.from_numpy(column) for key, column in columns.items()}
        # Whether an orientation was told; shared, so that workers tell it once.
        self._has_told = torch.zeros(1, dtype=torch.bool)
        self._has_told.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        index = check_index(index, len(self))
        path = self.image_path(index)
        try:
            image, orientation = read_sized_image(
                path, self.image_size(index), self._annotation_path(index)
            )
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"sample {index}: {error}") from error
        if orientation != 1 and not self._has_told:
            self._has_told.fill_(True)
            warnings.warn(
                f"{path}: has EXIF orientation {orientation}, which is not applied: its boxes are "
                "taken to be of the pixels as stored (told of the first such image only)",
                UserWarning,
                stacklevel=2,
            )
        target = self.target(index)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def target(self, index: int) -> dict[str, Any]:
        """Return a copy of one image's target, as stored and without ``transforms``."""
        rows = slice(*self._rows(index))
        columns = {key: column[rows].clone() for key, column in self._columns.items()}
        return {**columns, "image_id": self.image_ids[index]}

    def image_path(self, index: int) -> Path:
        """Return the path of one image's file."""
        raise NotImplementedError

    def image_size(self, index: int) -> tuple[int, int]:
        """Return one image's height and width in pixels without decoding it."""
        height, width = self._sizes[check_index(index, len(self))].tolist()
        return height, width

    def unused_classes(self) -> list[str]:
        """Return the classes of which there is no object."""
        used = set(self._columns["labels"].tolist())
        return [name for label, name in enumerate(self.classes, 1) if label not in used]

    def turned_images(self) -> list[tuple[Path, int]]:
        """Return the images that have an EXIF orientation, and it, from the heads of all files."""
        found = [(path, read_orientation(path)) for path in map(self.image_path, range(len(self)))]
        return [(path, orientation) for path, orientation in found if orientation != 1]

    def _rows(self, index: int) -> tuple[int, int]:
        index = check_index(index, len(self))
        first, end = self._offsets[index : index + 2].tolist()
        return first, end

    def _annotation_path(self, index: int) -> Path:
        raise NotImplementedError


class CleanBoxes(NamedTuple):
    """Boxes within their images; ``is_clipped`` of those that have an area there."""

    boxes: npt.NDArray[np.float32]  # (M, 4)
    has_area: npt.NDArray[np.bool_]  # (M,)
    is_clipped: npt.NDArray[np.bool_]  # (M,)


def clean_boxes(boxes: Array, sizes: Array) -> CleanBoxes:
    """Clip boxes to their images."""
    # All is compared in float32, in which boxes are kept: what is lost in the rounding is no area.
    limits = np.tile(sizes[:, ::-1], 2)  # (M, 4): W, H, W, H
    clipped: npt.NDArray[np.float32] = np.clip(boxes, 0, limits).astype(np.float32)
    has_area = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    with np.errstate(over="ignore"):  # what does not fit into float32 is beyond the image
        moved = np.any(clipped != boxes.astype(np.float32), axis=1)
    return CleanBoxes(clipped, has_area, moved & has_area)


def keep_boxes(boxes: Array) -> CleanBoxes:
    """Clip and drop nothing; a side of negative length becomes 0, which overlaps no more."""
    with np.errstate(over="ignore"):
        kept = boxes.astype(np.float32)
    kept[:, 2:] = np.maximum(kept[:, 2:], kept[:, :2])
    everyone = np.ones(len(boxes), dtype=np.bool_)
    return CleanBoxes(kept, everyone, ~everyone)


def warn_of_boxes(
    has_area: Array, is_clipped: Array, describe: Callable[[int], str], remedy: str = ""
) -> None:
    """Tell once of all boxes that are not as in the files, whoever opens the data set."""
    parts = []
    for mask, what in (
        (is_clipped, "clipped: they reached beyond their image"),
        (~has_area, "dropped: they have no area inside their image"),
    ):
        if mask.any():
            first = describe(int(np.argmax(mask)))
            parts.append(f"{mask.sum()} of {len(mask)} boxes were {what} (first: {first})")
    if parts:
        warnings.warn("; ".join(parts) + remedy, UserWarning, stacklevel=3)


def check_index(index: int, size: int) -> int:
    """Return an index counted from 0; IndexError where there is no such sample."""
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for {size} samples")
    return index % size


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes, each of which must be there once."""
    names = () if isinstance(classes, str) else tuple(classes)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"classes is {classes!r}, expected a list of at least one name")
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise ValueError(
            f"classes names {', '.join(repeated)} more than once, expected once: got {classes!r}"
        )
    return names


def check_files(folder: Path, names: Sequence[str], suffixes: Sequence[str] = ()) -> None:
    """Raise FileNotFoundError unless all are there; with ``suffixes`` they were looked for."""
    # By one listing of each folder: 118,000 `stat` calls are slow on network drives.
    present = {
        os.path.join(parent, name)
        for parent in {os.path.dirname(name) for name in names}
        if (folder / parent).is_dir()
        for name in os.listdir(folder / parent)
    }
    # A file may be there under another spelling: a/./b, or A.JPG where case does not matter.
    missing = [n for n in names if n not in present and not (folder / n).is_file()]
    if missing:
        others = f", with any suffix of {', '.join(suffixes)}" if suffixes else ""
        raise FileNotFoundError(
            f"{folder / missing[0]}: there is no such file{others} "
            f"({len(missing)} of {len(names)} listed files are missing)"
        )


@dataclass(frozen=True)
class SkippedImage:
    """An image that was left out.

    Attributes:
        name: Its name, as in the data set's ``names``.
        kind: ``"missing file"``, ``"unusable annotation"`` or ``"unusable image"``.
        reason: The error that it would have been.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Problem:
    """Why an image cannot be used: a kind as in `SkippedImage`, and the error that it is."""

    kind: str
    error: ValueError | OSError


def attempt(
    kind: str, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | Problem:
    """Return what a call returns, or the problem with the file that it reads."""
    try:
        return call(*args, **kwargs)
    except (ValueError, OSError) as error:
        # A retry may go well where the machine is at fault, and not a file: then the images of two
        # runs would not be the same.
        if not isinstance(error, _OF_DATA) and error.errno not in _ERRNOS_OF_DATA:
            raise
        return Problem("missing file" if isinstance(error, FileNotFoundError) else kind, error)


def read_usable(
    names: Sequence[str],
    read: Callable[[int], Result | Problem],
    decode: Callable[[int, Result], object],
    on_error: str,
    where: object,
    indices: Sequence[int] | None = None,
) -> tuple[dict[int, Result], tuple[SkippedImage, ...]]:
    """Return what is read of each image that can be used, by index, and the other images.

    With ``"raise"`` the first problem is raised. With ``"skip"`` images are decoded too, in
    threads, and all problems told in one warning, of whoever calls this function's caller.
    """

    def read_whole(index: int) -> Result | Problem:
        result = read(index)
        if isinstance(result, Problem):
            return result
        image = attempt("unusable image", decode, index, result)
        return image if isinstance(image, Problem) else result

    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    results: dict[int, Result] = {}
    skipped = []
    indices = range(len(names)) if indices is None else indices
    found: Iterable[Result | Problem] = map(read, indices)
    if on_error == "skip":  # disable=None: a bar only where standard error is a terminal
        found = thread_map(
            read_whole, indices, desc="checking images", leave=False, disable=None, delay=2
        )
    for index, result in zip(indices, found, strict=True):
        if not isinstance(result, Problem):
            results[index] = result
        elif on_error == "raise":
            raise result.error
        else:
            skipped.append(SkippedImage(names[index], result.kind, str(result.error)))
    if skipped:
        message = f"{where}: {len(skipped)} of {len(indices)} images left out {_summary(skipped)}"
        if not results:
            raise ValueError(f"{message}; there is none left")
        warnings.warn(message, UserWarning, stacklevel=3)
    return results, tuple(skipped)


def _summary(skipped: Sequence[SkippedImage]) -> str:
    counts = Counter(image.kind for image in skipped)
    kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()))
    reasons = [image.reason for image in skipped[:_NUM_SHOWN]]
    more = len(skipped) - len(reasons)
    return f"({kinds}): " + "; ".join([*reasons, *([f"and {more} more"] if more else [])])
