"""Detection data in the COCO format as a map-style data set.

Annotations are read once, at construction: mistakes show before training starts instead of in a
worker, and what is held afterwards is a few flat tensors, so that forked workers share them.
Legend: I images, M objects of the whole data set, N objects of one image, K keypoints.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.data.boxes import CleanBoxes
from detmix.data.coco.choose import (
    choose_categories,
    choose_objects,
    common_keypoints,
    fill_sizes,
    mirrored_order,
)
from detmix.data.coco.file import CocoFile, read_coco
from detmix.data.coco.masks import SegmentationBlock
from detmix.data.images import check_image_size, read_image
from detmix.data.skipping import Problem, attempt, check_on_error, read_usable


@dataclass(frozen=True)
class CocoReport:
    """What was found while the annotations were read.

    Attributes:
        num_images: Images.
        num_objects: Objects that are in the data set.
        num_crowd: How many of these are crowds.
        num_empty_images: Images of the data set without an object.
        num_clipped: Boxes that reached beyond the image and were clipped to it; 0 with
            ``clip=False``.
        num_without_area: Boxes dropped because no area was left inside the image; 0 with
            ``clip=False``.
        num_crowd_dropped: Objects left out by ``crowd="drop"``.
        num_images_dropped: Images left out by ``empty="drop"``.
        num_skipped: Images left out by ``on_error="skip"``; all other counts are without them.
    """

    num_images: int
    num_objects: int
    num_crowd: int
    num_empty_images: int
    num_clipped: int
    num_without_area: int
    num_crowd_dropped: int
    num_images_dropped: int
    num_skipped: int = 0


class CocoDetection(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and objects of an annotation file in the COCO format.

    A sample is ``(image, target)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an EXIF
    orientation is not applied); the target has ``boxes`` float32 ``(N, 4)`` (x1, y1, x2, y2 in
    pixels, continuous coordinates), ``labels`` int64 ``(N,)`` from 1, without the gaps between
    COCO's category ids, ``iscrowd`` int64 ``(N,)``, ``area`` float32 ``(N,)`` (the file's; that
    of the box where it gives none) and ``image_id``, the image's id in the file; on request
    ``masks`` uint8 ``(N, H, W)`` and ``keypoints`` float32 ``(N, K, 3)``, x, y and visibility.
    Images are sorted by their ids, the objects of one stand as in the file.

    Boxes are clipped to the image; those without area are dropped, as detectors need it. Both are
    counted in ``report`` and told in one warning. COCO's own evaluation does neither: evaluate
    on a data set with ``clip=False``.

    Of several categories of one name, as exports with a super-category have them, the one with
    annotations is in the data set; where none has any, the one with the highest id.

    Args:
        images: The folder that ``file_name`` is relative to.
        annotations: The JSON file: instances or person_keypoints.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        crowd: ``"drop"`` leaves crowds out, for training; the evaluation needs them.
        empty: ``"drop"`` leaves out images that have no object left.
        clip: False keeps all boxes as in the file, also those outside the image and without area;
            only a side of negative length becomes 0. The AP over such targets is what pycocotools
            computes from the file itself, but for the rounding to float32.
        masks: Whether targets have masks.
        keypoints: Whether targets have keypoints; zeros where an object has none.
        classes: Read only objects of these categories; label ``k`` is ``classes[k - 1]``. By
            default all names of the file, sorted by their categories' ids.
        on_error: ``"skip"`` leaves out images that are missing, cannot be decoded or have an
            annotation that cannot be used, tells so in one warning, and raises only for what is
            wrong with the file as a whole. Every image is decoded for it at once: what is left out
            depends on the files alone. Not for evaluation: a score without an image is another
            score.

    Attributes:
        classes: The class names.
        category_ids: The classes' ids in the file: label ``k`` is ``category_ids[k - 1]``.
        names: The images' ``file_name`` by index.
        image_ids: The images' ids by index, ascending.
        keypoint_names: The keypoints' names; ``()`` where they are not asked for.
        keypoint_flip: For each keypoint the index of the one in its place in an image mirrored
            left to right: ``left_*`` and ``right_*`` change places.
        report: Counts, see :class:`CocoReport`.
        skipped: The images that ``on_error="skip"`` left out, and why.

    Raises:
        FileNotFoundError: The folder, the annotation file or an image file is missing.
        ValueError: An argument or the annotation file cannot be used, as where two categories of
            one name both have annotations; the message names the file, the annotation or image,
            and the value. Also on access, for an image that cannot be decoded or is of another
            size.
        IndexError: On access, the index is out of range.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        transforms: Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]] | None = None,
        *,
        crowd: Literal["keep", "drop"] = "keep",
        empty: Literal["keep", "drop"] = "keep",
        clip: bool = True,
        masks: bool = False,
        keypoints: bool = False,
        classes: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_on_error(on_error)
        for name, value in (("crowd", crowd), ("empty", empty)):
            if value not in ("keep", "drop"):
                raise ValueError(f'{name} must be "keep" or "drop", got {value!r}')
        self.transforms = transforms
        self._folder, self._path = Path(images), Path(annotations)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{images}: there is no such folder of images")
        file = read_coco(self._path, masks=masks)
        categories = choose_categories(file, classes)
        self.classes = tuple(category.name for category in categories)
        self.category_ids = tuple(category.id for category in categories)
        self.keypoint_names = common_keypoints(categories, self._path) if keypoints else ()
        self.keypoint_flip = mirrored_order(self.keypoint_names)
        fill_sizes(file, self._folder)
        columns = choose_objects(
            file,
            categories,
            clip=clip,
            drop_crowd=crowd == "drop",
            masks=masks,
            num_keypoints=len(self.keypoint_names),
        )
        usable, self.skipped = read_usable(
            [name or f"image {id}" for name, id in zip(file.names, file.image_ids, strict=True)],
            lambda index: _find_problem(file, index, self._folder, decode=on_error == "skip"),
            on_error,
            self._path,
        )
        columns = _take(columns, np.isin(columns["images"], list(usable)))
        clean = CleanBoxes(columns["boxes"], columns["has_area"], columns["is_clipped"])
        message = clean.message(lambda index: file.describe_box(columns["rows"][index]))
        if message:
            warnings.warn(message, UserWarning, stacklevel=2)
        used = _take(columns, columns["is_used"])
        chosen = sorted(set(used["images"].tolist())) if empty == "drop" else list(usable)
        if not chosen:
            raise ValueError(f'{self._path}: no image has an object left, and empty="drop"')
        self.names = [file.names[index] for index in chosen]
        if on_error == "raise":
            _check_files(self._folder, self.names)
        self.image_ids = [file.image_ids[index] for index in chosen]
        self._sizes = torch.from_numpy(file.sizes[chosen])  # (I, 2) height, width
        # Image i owns the objects from offsets[i] to offsets[i + 1].
        offsets = np.searchsorted(used["images"], [*chosen, len(file.names)])
        self._offsets = torch.from_numpy(offsets)  # (I + 1,)
        dtypes = {"boxes": "f4", "labels": "i8", "iscrowd": "i8", "area": "f4"}
        dtypes |= {"keypoints": "f4"} if keypoints else {}
        self._columns = {  # each (M, ...)
            key: torch.from_numpy(used[key].astype(dtype)) for key, dtype in dtypes.items()
        }
        self._segmentations = SegmentationBlock(used["segmentations"].tolist()) if masks else None
        self.report = CocoReport(
            num_images=len(chosen),
            num_objects=len(used["rows"]),
            num_crowd=int(used["iscrowd"].sum()),
            num_empty_images=int((np.diff(offsets) == 0).sum()),
            num_clipped=int(columns["is_clipped"].sum()),
            num_without_area=int((~columns["has_area"]).sum()),
            num_crowd_dropped=int(columns["is_dropped"].sum()),
            num_images_dropped=len(usable) - len(chosen),
            num_skipped=len(self.skipped),
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        index = self._check_index(index)
        image, target = self._read_image(index), self.target(index)
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def target(self, index: int) -> dict[str, Any]:
        """Return a copy of one image's target, as stored and without ``transforms``."""
        index = self._check_index(index)
        first, last = self._offsets[index : index + 2].tolist()
        target: dict[str, Any] = {
            key: column[first:last].clone() for key, column in self._columns.items()
        }
        if self._segmentations is not None:
            target["masks"] = self._segmentations.decode(first, last, self.image_size(index))
        return target | {"image_id": self.image_ids[index]}

    def image_path(self, index: int) -> Path:
        """Return the path of one image's file."""
        return self._folder / self.names[self._check_index(index)]

    def image_size(self, index: int) -> tuple[int, int]:
        """Return one image's height and width in pixels without decoding it."""
        height, width = self._sizes[self._check_index(index)].tolist()
        return height, width

    def index_of(self, image_id: int) -> int:
        """Return the index of the image with this id.

        Raises:
            ValueError: There is no such image in the data set.
        """
        index = bisect_left(self.image_ids, image_id)
        if index == len(self) or self.image_ids[index] != image_id:
            raise ValueError(f"no image of {self._path} has the id {image_id}, or it was left out")
        return index

    def _read_image(self, index: int) -> Tensor:
        try:
            return _read_image(self.image_path(index), self.image_size(index), self._path)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"sample {index}: {error}") from error

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)


def _take(
    columns: dict[str, npt.NDArray[Any]], keep: npt.NDArray[np.bool_]
) -> dict[str, npt.NDArray[Any]]:
    return {key: column[keep] for key, column in columns.items()}


def _find_problem(file: CocoFile, index: int, folder: Path, *, decode: bool) -> Problem | None:
    """Return what is wrong with an image; whether it can be decoded is tried on request."""
    if index in file.problems or not decode:
        return file.problems.get(index)
    height, width = file.sizes[index].tolist()
    path = folder / file.names[index]
    image = attempt("unusable image", _read_image, path, (height, width), file.path)
    return image if isinstance(image, Problem) else None


def _read_image(path: Path, size: tuple[int, int], annotations: Path) -> Tensor:
    """Decode an image that must be of this height and width."""
    image = read_image(path)
    check_image_size(image, path, size, annotations)
    return image


def _check_files(folder: Path, names: Sequence[str]) -> None:
    """One listing of each folder: 118,000 ``stat`` calls are slow on network drives."""
    parents = {os.path.dirname(name) for name in names}
    present = {
        os.path.join(parent, name)
        for parent in parents
        if (folder / parent).is_dir()
        for name in os.listdir(folder / parent)
    }
    # A file may be there under another spelling: a/./b, or A.JPG where case does not matter.
    missing = [n for n in names if n not in present and not (folder / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]}: there is no such file "
            f"({len(missing)} of {len(names)} listed images are missing)"
        )
