"""Reading and checking what detectors give and data sets hold, batch by batch.

What comes out of here is trusted. Shape legend: N detections or objects of all images read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

ImageId: TypeAlias = int | str | None
Record: TypeAlias = Mapping[str, Any]
FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
Columns: TypeAlias = dict[str, NDArray[Any]]
"""Detections or objects of images, joined; ``images`` has the place of each row's among them."""

# Of each field the NumPy kinds it may be of, its least precision and the end of a row's shape.
_FIELDS: dict[str, tuple[str, type[np.generic], tuple[int, ...]]] = {
    "boxes": ("fiu", np.float32, (4,)),
    "labels": ("iu", np.int64, ()),
    "scores": ("fiu", np.float32, ()),
    "difficult": ("biu", np.bool_, ()),
    "iscrowd": ("biu", np.bool_, ()),
    "area": ("fiu", np.float32, ()),
    "keypoints": ("fiu", np.float32, (3,)),
}


def where(columns: Columns, keep: BoolArray) -> Columns:
    """Those rows where ``keep (N,)`` holds."""
    return {key: values[keep] for key, values in columns.items()}


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError unless the value of the setting ``name`` is one of a Literal's or a list."""
    known = get_args(choices) or choices
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def open_batch(
    predictions: Sequence[Record], targets: Sequence[Record]
) -> tuple["Records", "Records"]:
    """The two lists of a batch, whose errors tell the images' ids."""
    if len(predictions) != len(targets):
        raise ValueError(
            f"got {len(predictions)} predictions and {len(targets)} targets, expected as many of "
            "one as of the other"
        )
    image_ids: list[ImageId] = [None] * len(targets)
    there = Records("targets", targets, image_ids)
    for index in range(len(targets)):
        image_ids[index] = there.image_id(index)
    return Records("predictions", predictions, image_ids), there


@dataclass(frozen=True)
class Records:
    """One of a batch's two lists; knows enough to say where something is wrong."""

    name: str
    records: Sequence[Record]
    image_ids: list[ImageId]

    @cached_property
    def counts(self) -> IntArray:
        """How many boxes each record has."""
        shapes = [np.shape(record["boxes"]) for record in self.records]
        return np.array([(*shape, 0)[0] for shape in shapes], dtype=np.int64)

    def image_id(self, index: int) -> ImageId:
        """A target's id as int or str; None where there is none."""
        target = self.records[index]
        value: Any = target.get("image_id") if isinstance(target, Mapping) else None
        is_array = isinstance(value, torch.Tensor | np.ndarray | np.generic)
        if is_array and np.prod(value.shape) == 1:
            value = value.item()
        if value is not None and not isinstance(value, int | str):
            raise self.error(index, f"image_id is {value!r}, expected one int or str")
        return value

    def read(self, num_classes: int | None) -> Columns:
        """The images' detections or objects, joined; with labels in 1..C unless that is None."""
        keys = {"predictions": ("boxes", "labels", "scores")}.get(self.name, ("boxes", "labels"))
        for index, record in enumerate(self.records):
            if not isinstance(record, Mapping):
                raise self.error(index, f"is a {type(record).__name__}, expected a dict")
            self.require(index, *keys)
        optional = () if "scores" in keys else ("difficult", "iscrowd")
        columns = {key: self.column(key) for key in (*keys, *optional)}
        labels = columns["labels"]
        if num_classes is not None:
            known = (labels >= 1) & (labels <= num_classes)
            self.check_rows(known, "labels", labels, f"1..{num_classes}")
        for key, column in columns.items():
            self.check_rows(np.isfinite(column), key, column, "finite numbers")
        if optional:
            self.check_boxes(columns["boxes"])
        return {"images": np.repeat(np.arange(len(self.counts)), self.counts), **columns}

    def require(self, index: int, *keys: str) -> None:
        """Raise unless a record has all keys."""
        if missing := [key for key in keys if key not in self.records[index]]:
            got = f"has no {missing[0]!r}, only {sorted(map(str, self.records[index]))}"
            raise self.error(index, f"{got}; expected {', '.join(keys)}")

    def needed(self, key: str) -> Iterator[tuple[int, Any]]:
        """A field, with the record's index, of all records with boxes; these need it."""
        for index in np.flatnonzero(self.counts).tolist():
            self.require(index, key)
            yield index, self.records[index][key]

    def column(self, key: str, *inner: int) -> NDArray[Any]:
        """A copy ``(N, *inner, …)`` of a field of all images, zeros where it is absent."""
        kinds, least, row = _FIELDS[key]
        row = (*inner, *row)
        arrays = [np.zeros((0, *row), least)]
        for index, (record, num) in enumerate(zip(self.records, self.counts.tolist(), strict=True)):
            array = as_array(record.get(key, np.zeros((num, *row), least)))
            if array.shape != (num, *row):
                expected = f"expected {(num, *row)}: one for each box"
                raise self.error(index, f"{key} of shape {array.shape}, {expected}")
            if num and array.dtype.kind not in kinds:
                expected = "numbers" if "f" in kinds else "integers"
                raise self.error(index, f"{key} of {array.dtype}, expected {expected}")
            if num:  # an empty list says nothing of the precision
                arrays.append(array)
        joined = np.concatenate(arrays)
        return joined if "f" in kinds else joined.astype(least, copy=False)

    def check_rows(self, good: BoolArray, key: str, values: NDArray[Any], expected: str) -> None:
        """Raise unless all of ``good (N, …)`` holds."""
        if good.all():
            return
        row = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
        index = int(np.searchsorted(np.cumsum(self.counts), row, side="right"))
        within = row - self.counts[:index].sum()
        raise self.error(index, f"{key}[{within}] is {values[row].tolist()}, expected {expected}")

    def check_boxes(self, boxes: NDArray[Any]) -> None:
        """Raise unless no side of ``boxes (N, 4)`` is negative."""
        self.check_rows(boxes[:, :2] <= boxes[:, 2:], "boxes", boxes, "x1 <= x2 and y1 <= y2")

    def error(self, index: int, message: str) -> ValueError:
        """An error that says which record of which list, and which image, it is about."""
        image_id = self.image_ids[index]
        suffix = "" if image_id is None else f" (image_id {image_id!r})"
        return ValueError(f"{self.name}[{index}]{suffix}: {message}")


def as_array(value: Any) -> NDArray[Any]:
    """A tensor of any device or dtype, or anything NumPy takes, in its own precision."""
    if isinstance(value, torch.Tensor):
        value = value.float() if value.dtype == torch.bfloat16 else value
        value = value.numpy(force=True)  # detached and on the CPU
    return np.asarray(value)
