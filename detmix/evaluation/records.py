"""Reading and checking what detectors give and data sets hold, batch by batch.

Shape legend: D detections and G ground-truth objects of one image, or of the whole batch once its
images are joined.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

ImageId: TypeAlias = int | str | None
Record: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The objects of several images end to end."""

    counts: NDArray[np.int64]
    boxes: NDArray[Any]
    labels: NDArray[np.int32]
    extra: NDArray[Any]

    def select(self, keep: NDArray[np.bool_]) -> "Columns":
        """The rows of the images where ``keep (images,)`` holds."""
        rows = np.repeat(keep, self.counts)
        return Columns(self.counts[keep], self.boxes[rows], self.labels[rows], self.extra[rows])

    def where(self, keep: NDArray[np.bool_]) -> "Columns":
        """Those rows of all images where ``keep (rows,)`` holds."""
        images = np.repeat(np.arange(len(self.counts)), self.counts)
        counts = np.bincount(images[keep], minlength=len(self.counts))
        return Columns(counts, self.boxes[keep], self.labels[keep], self.extra[keep])


@dataclass(frozen=True)
class Batch:
    """A checked batch: the images' ids (None where absent), detections and objects."""

    image_ids: list[ImageId]
    detections: Columns
    objects: Columns
    is_crowd: NDArray[np.bool_]


def read_batch(predictions: Sequence[Record], targets: Sequence[Record], num_classes: int) -> Batch:
    """Check a batch of predictions and targets and join it into flat arrays."""
    for name, records in (("predictions", predictions), ("targets", targets)):
        if isinstance(records, Mapping) or not isinstance(records, Sequence):
            raise ValueError(
                f"{name} is a {type(records).__name__}, expected a list with a dict for each image"
            )
    if len(predictions) != len(targets):
        raise ValueError(
            f"got {len(predictions)} predictions and {len(targets)} targets, expected as many of "
            "one as of the other"
        )
    reader = RecordReader("targets", [None] * len(targets), num_classes)
    image_ids = [reader.image_id(index, target) for index, target in enumerate(targets)]
    detections = RecordReader("predictions", image_ids, num_classes).detections(predictions)
    reader = RecordReader("targets", image_ids, num_classes)
    objects = reader.objects(targets)
    is_crowd = reader.flags("iscrowd", targets, objects.counts.tolist())
    return Batch(image_ids, detections, objects, is_crowd)


@dataclass(frozen=True)
class RecordReader:
    """Reads one of the two lists; knows enough to say where something is wrong."""

    name: str
    image_ids: list[ImageId]
    num_classes: int

    def image_id(self, index: int, target: Record) -> ImageId:
        """The id as int or str; None where there is none."""
        self._check_keys(index, target, ())
        value = target.get("image_id")
        if value is None or isinstance(value, int | str):
            return value
        if isinstance(value, torch.Tensor | np.ndarray) and np.prod(value.shape) == 1:
            value = value.reshape(-1)[0].item()
        if isinstance(value, np.integer):
            value = int(value)
        if not isinstance(value, int | str):
            raise self.error(index, f"image_id is {value!r}, expected one int or str")
        return value

    def detections(self, predictions: Sequence[Record]) -> Columns:
        """Join the images' detections; ``extra`` are the scores."""
        for index, record in enumerate(predictions):
            self._check_keys(index, record, ("boxes", "labels", "scores"))
        counts, boxes = self._boxes(predictions)
        labels = self._column("labels", [p["labels"] for p in predictions], counts, "iu", np.int64)
        scores = self._column(
            "scores", [p["scores"] for p in predictions], counts, "fiu", np.float32
        )
        columns = self._checked(counts, boxes, labels, scores)
        self._check_rows(counts, np.isfinite(scores), "scores", scores, "finite")
        return columns

    def objects(self, targets: Sequence[Record]) -> Columns:
        """Join the images' objects; ``extra`` is ``difficult``, False where it is absent."""
        for index, record in enumerate(targets):
            self._check_keys(index, record, ("boxes", "labels"))
        counts, boxes = self._boxes(targets)
        labels = self._column("labels", [t["labels"] for t in targets], counts, "iu", np.int64)
        columns = self._checked(counts, boxes, labels, self.flags("difficult", targets, counts))
        ordered = boxes[:, :2] <= boxes[:, 2:]
        self._check_rows(counts, ordered, "boxes", boxes, "x1 <= x2 and y1 <= y2")
        return columns

    def flags(self, key: str, targets: Sequence[Record], counts: list[int]) -> NDArray[np.bool_]:
        """A flag ``(rows,)`` for each object, False where it is absent."""
        if not any(key in target for target in targets):
            return np.zeros(sum(counts), dtype=bool)
        flags = [
            target[key] if key in target else np.zeros(num, dtype=bool)
            for target, num in zip(targets, counts, strict=True)
        ]
        return self._column(key, flags, counts, "biu", np.bool_).astype(bool)

    def _checked(
        self, counts: list[int], boxes: NDArray[Any], labels: NDArray[Any], extra: NDArray[Any]
    ) -> Columns:
        """The joined columns, once the values that all have are right."""
        known = (labels >= 1) & (labels <= self.num_classes)
        self._check_rows(counts, known, "labels", labels, f"1..{self.num_classes}")
        self._check_rows(counts, np.isfinite(boxes), "boxes", boxes, "finite coordinates")
        return Columns(np.array(counts, dtype=np.int64), boxes, labels.astype(np.int32), extra)

    def _check_keys(self, index: int, record: Record, keys: tuple[str, ...]) -> None:
        if not isinstance(record, Mapping):
            raise self.error(index, f"is a {type(record).__name__}, expected a dict")
        for key in keys:
            if key not in record:
                raise self.error(
                    index,
                    f"has no {key!r}, only {sorted(map(str, record))}; expected {', '.join(keys)}",
                )

    def _boxes(self, records: Sequence[Record]) -> tuple[list[int], NDArray[Any]]:
        """How many boxes each image has, and all boxes."""
        values = [record["boxes"] for record in records]
        counts, joined = _join_tensors(values, ndim=2)
        if joined is not None and joined.shape[1] == 4 and joined.dtype.kind in "fiu":
            return counts, _at_least(joined, np.float32)
        arrays = [as_array(value) for value in values]
        for index, boxes in enumerate(arrays):
            if boxes.ndim != 2 or boxes.shape[1] != 4:
                raise self.error(index, f"boxes have shape {boxes.shape}, expected (N, 4)")
            if boxes.dtype.kind not in "fiu":
                raise self.error(index, f"boxes are {boxes.dtype}, expected numbers")
        return [len(boxes) for boxes in arrays], _concatenate(arrays, np.float32, columns=4)

    def _column(
        self, key: str, values: list[Any], counts: list[int], kinds: str, dtype: type[np.generic]
    ) -> NDArray[Any]:
        """A field of all images end to end, at least of the precision of ``dtype``."""
        lengths, joined = _join_tensors(values, ndim=1)
        if joined is not None and lengths == counts and joined.dtype.kind in kinds:
            return _at_least(joined, dtype)
        vectors = [
            self.vector(index, key, value, num, kinds)
            for index, (value, num) in enumerate(zip(values, counts, strict=True))
        ]
        return _concatenate(vectors, dtype)

    def vector(self, index: int, key: str, value: Any, length: int, kinds: str) -> NDArray[Any]:
        """A field with one value for each box, of one of the NumPy dtype kinds ``kinds``."""
        vector = as_array(value)
        if vector.shape != (length,):
            raise self.error(
                index, f"{key} have shape {vector.shape}, expected ({length},): one for each box"
            )
        if length and vector.dtype.kind not in kinds:
            expected = "numbers" if "f" in kinds else "integers"
            raise self.error(index, f"{key} are {vector.dtype}, expected {expected}")
        return vector

    def _check_rows(
        self, counts: list[int], good: NDArray[np.bool_], key: str, values: Any, expected: str
    ) -> None:
        """Raise unless all of ``good``, ``(rows,)`` or ``(rows, coordinates)``, holds."""
        if good.all():
            return
        row = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
        index = int(np.searchsorted(np.cumsum(counts), row, side="right"))
        within = row - sum(counts[:index])
        got = values[row].tolist()
        raise self.error(index, f"{key}[{within}] is {got}, expected {expected}")

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


def _join_tensors(values: list[Any], ndim: int) -> tuple[list[int], NDArray[Any] | None]:
    """Tensors' lengths, and the tensors end to end, brought to the CPU in one go."""
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return [], None
    shapes = [value.shape for value in values]
    kinds = {
        (value.dtype, value.device, shape[1:]) for value, shape in zip(values, shapes, strict=True)
    }
    if len(kinds) > 1 or any(len(shape) != ndim for shape in shapes):
        return [], None
    return [shape[0] for shape in shapes], as_array(torch.cat(values))


def _concatenate(
    parts: list[NDArray[Any]], dtype: type[np.generic], columns: int | None = None
) -> NDArray[Any]:
    """Join arrays, at least of the precision of ``dtype``; of that dtype where all are empty."""
    # Always a copy: the caller's buffers may be reused for the next batch.
    filled = [part for part in parts if len(part)]
    if not filled:
        return np.zeros((0,) if columns is None else (0, columns), dtype=dtype)
    return _at_least(np.concatenate(filled), dtype)


def _at_least(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The array in its own precision or that of ``dtype``, whichever is higher."""
    return array.astype(np.result_type(array.dtype, dtype), copy=False)
