"""Detection data in the COCO format as a map-style data set.

Annotations are read once, at construction: mistakes show before training starts instead of in a
worker, and what is held afterwards is a few flat tensors, so that forked workers share them.
Legend: I images, M objects of the whole data set, N objects of one image, K keypoints.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.data.coco.file import CocoCategory, CocoFile, read_coco
from detmix.data.coco.masks import SegmentationBlock
from detmix.data.coco.table import CocoTable, common_keypoints, mirrored_order
from detmix.data.images import check_image_size, read_image
from detmix.data.skipping import (
    Problem,
    SkippedImage,
    attempt,
    check_on_error,
    raise_problem,
    read_usable,
)


class CocoDetection(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and objects of an annotation file in the COCO format.

    A sample is ``(image, target)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an EXIF
    orientation is not applied); the target has ``boxes`` float32 ``(N, 4)`` (x1, y1, x2, y2 in
    pixels, continuous coordinates), ``labels`` int64 ``(N,)`` from 1, without the gaps between
    COCO's category ids, ``iscrowd`` int64 ``(N,)``, ``area`` float32 ``(N,)`` (the file's; that
    of the box where it gives none) and ``image_id``, the image's id in the file; on request
    ``masks`` uint8 ``(N, H, W)`` and ``keypoints`` float32 ``(N, K, 3)``, x, y and visibility as
    in the file. Images are sorted by their ids, the objects of one stand as in the file.

    Boxes are clipped to the image; those without area are dropped, as detectors need it. Both are
    counted in ``report`` and told in one warning. COCO's own evaluation does neither: evaluate
    on a data set with ``clip=False``.

    Exports may have several categories of one name, such as a super-category with id 0 that no
    object is of. Of these the one that has annotations is in the data set and the others are left
    out; where none has any, it is the one with the highest id.

    Args:
        images: The folder that ``file_name`` is relative to.
        annotations: The JSON file: instances or person_keypoints.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        crowd: ``"keep"``, or ``"drop"`` to leave crowds out (as is usual for training; the
            evaluation needs them).
        empty: ``"keep"``, or ``"drop"`` to leave out images that have no object left.
        clip: False keeps all boxes as in the file, those beyond or outside the image and without
            area too; only a side of negative length becomes 0. The AP over such targets is what
            pycocotools computes from the file itself, but for the rounding to float32.
        masks: Whether targets have masks.
        keypoints: Whether targets have keypoints. A category without any gives zeros.
        classes: Read only objects of these categories; label ``k`` is ``classes[k - 1]``. By
            default all names of the file, sorted by their categories' ids.
        on_error: ``"skip"`` leaves out images that are missing or cannot be decoded, and those
            with an annotation that cannot be used, tells so in one warning, and raises only for
            what is wrong with the file as a whole. Every image is decoded for it at once, in
            threads: what is left out depends on the files alone, not on workers, processes or the
            order of access. Not for evaluation: a score without an image is another score.

    Attributes:
        classes: The class names.
        category_ids: The classes' ids in the file: label ``k`` is ``category_ids[k - 1]``.
        names: The images' ``file_name`` by index.
        image_ids: The images' ids by index, ascending.
        keypoint_names: The keypoints' names; ``()`` where they are not asked for.
        keypoint_flip: For each keypoint the index of the one that takes its place in an image
            mirrored left to right: ``left_*`` and ``right_*`` change places.
        report: Counts, see :class:`CocoReport`.
        skipped: The images that ``on_error="skip"`` left out, and why.

    Raises:
        FileNotFoundError: The folder, the annotation file or an image file is missing.
        ValueError: An argument or the annotation file cannot be used (as where two categories of
            one name, if it is among ``classes``, both have annotations); the message names the
            file, the annotation or image by its id, and the value. Also on access, for an image
            that cannot be decoded or is not of the size its annotation says.
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
        rejected = _Rejected()
        report = rejected if on_error == "skip" else raise_problem
        file = read_coco(annotations, masks=masks, report=report)
        chosen = _choose_categories(file, classes, self._path)
        self.classes = tuple(category.name for category in chosen)
        self.category_ids = tuple(category.id for category in chosen)
        self.keypoint_names = _keypoint_names(chosen, self._path) if keypoints else ()
        self.keypoint_flip = mirrored_order(self.keypoint_names)
        table = CocoTable.read(file, [c.id for c in chosen], self._path)
        table = table.fill_sizes(self._folder, report)
        self.skipped: tuple[SkippedImage, ...] = ()
        if on_error == "skip":
            table.check_objects(
                rejected,
                table.is_used(clip=clip, drop_crowd=crowd == "drop"),
                masks=masks,
                num_keypoints=len(self.keypoint_names) or None,
            )
            names, read = _candidates(table, rejected, self._folder)
            usable, self.skipped = read_usable(names, read, on_error, table.path)
            unusable = {id for index, id in enumerate(table.images.ids) if index not in usable}
            table = table.without_images(unusable)
        table, counts = table.clean(
            clip=clip, drop_crowd=crowd == "drop", drop_empty=empty == "drop"
        )
        self.report = replace(counts, num_skipped=len(self.skipped))
        if on_error == "raise":
            _check_files(self._folder, table.images.names)
        self.names, self.image_ids = table.images.names, table.images.ids
        self._sizes = torch.from_numpy(table.images.sizes)  # (I, 2) height, width
        self._offsets = torch.from_numpy(table.offsets())  # (I + 1,)
        self._columns = table.columns()  # each (M, ...)
        if keypoints:
            self._columns["keypoints"] = table.keypoints(len(self.keypoint_names))
        self._segmentations = SegmentationBlock(table.segmentations()) if masks else None

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
        except FileNotFoundError as error:
            raise FileNotFoundError(f"sample {index}: {error}") from None
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from error

    def _check_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return index % len(self)


class _Rejected(dict[int, tuple[str, str]]):
    """Kind and message of the first error of each image, by its id."""

    def __call__(self, kind: str, message: str, image: int) -> None:
        self.setdefault(image, (kind, message))


def _candidates(
    table: CocoTable, rejected: _Rejected, folder: Path
) -> tuple[list[str], Callable[[int], Problem | None]]:
    """Return the names of all images, those without one last, and what tries to read each."""
    ids, names, sizes = table.images.ids, table.images.names, table.images.sizes.tolist()
    nameless = sorted(rejected.keys() - set(ids))

    def read(index: int) -> Problem | None:
        image_id = ids[index] if index < len(ids) else nameless[index - len(ids)]
        if image_id in rejected:
            kind, message = rejected[image_id]
            return Problem(kind, ValueError(message))
        path = folder / names[index]
        image = attempt("unusable image", _read_image, path, tuple(sizes[index]), table.path)
        return image if isinstance(image, Problem) else None

    return [*names, *(f"image {image_id}" for image_id in nameless)], read


def _read_image(path: Path, size: tuple[int, int], annotations: Path) -> Tensor:
    """Decode an image that must be of this height and width."""
    image = read_image(path)
    check_image_size(image, path, size, annotations)
    return image


def _choose_categories(
    file: CocoFile, classes: Sequence[str] | None, path: Path
) -> list[CocoCategory]:
    """Return the category of each class, for each name one."""
    by_name: dict[str, list[CocoCategory]] = {}
    for category in file.categories:
        by_name.setdefault(category.name, []).append(category)
    names = tuple(by_name) if classes is None else _checked_names(classes)
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(
            f"{path}: there is no category {unknown[0]!r}; known are {', '.join(by_name)}"
        )
    used = {file.categories[index].id for index in set(file.objects.category_index.tolist())}
    chosen = [_choose_one(by_name[name], used, path) for name in names]
    return chosen if classes is not None else sorted(chosen, key=lambda category: category.id)


def _checked_names(classes: Sequence[str]) -> tuple[str, ...]:
    names = () if isinstance(classes, str) else tuple(classes)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"classes must be a sequence of different names, got {classes!r}")
    return names


def _choose_one(categories: list[CocoCategory], used: set[int], path: Path) -> CocoCategory:
    """Return the one that has annotations, of categories that share a name."""
    with_objects = [category for category in categories if category.id in used]
    if len(with_objects) > 1:
        ids = " and ".join(str(category.id) for category in with_objects)
        raise ValueError(
            f"{path}: the categories {ids} are all named {categories[0].name!r} and have "
            "annotations; expected one, or classes without this name"
        )
    # Super-categories come first: with none annotated, as in a small split, the last is the class.
    return (with_objects or categories)[-1]


def _keypoint_names(categories: Sequence[CocoCategory], path: Path) -> tuple[str, ...]:
    try:
        return common_keypoints([(category.name, category.keypoints) for category in categories])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
