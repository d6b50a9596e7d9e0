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
    """The objects of several images end to end.

    Attributes:
        counts: ``(images,)`` int64, how many rows each image has.
        boxes: ``(rows, 4)`` float32 or float64.
        labels: ``(rows,)`` int32.
        extra: ``(rows,)`` scores of detections (float), ``difficult`` of objects (bool).
    """

    counts: NDArray[np.int64]
    boxes: NDArray[Any]
    labels: NDArray[np.int32]
    extra: NDArray[Any]

    def select(self, keep: NDArray[np.bool_]) -> "Columns":
        """The rows of the images where ``keep (images,)`` holds."""
        rows = np.repeat(keep, self.counts)
        return Columns(self.counts[keep], self.boxes[rows], self.labels[rows], self.extra[rows])


@dataclass(frozen=True)
class Batch:
    """A checked batch: the images' ids (None where absent), detections and objects."""

    image_ids: list[ImageId]
    detections: Columns
    objects: Columns


def read_batch(predictions: Sequence[Record], targets: Sequence[Record], num_classes: int) -> Batch:
    """Check a batch of predictions and targets and join it into flat arrays.

    Args:
        predictions: for each image ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``.
        targets: for each image ``boxes (G, 4)``, ``labels (G,)`` and maybe ``difficult (G,)`` and
            ``image_id``.
        num_classes: C; labels are 1..C.

    Returns:
        The batch in NumPy arrays on the CPU.

    Raises:
        ValueError: naming list, index and image id, the value got and what was expected.
    """
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
    return Batch(
        image_ids,
        RecordReader("predictions", image_ids, num_classes).detections(predictions),
        RecordReader("targets", image_ids, num_classes).objects(targets),
    )


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
        if isinstance(value, torch.Tensor | np.ndarray) and np.prod(value.shape) == 1:
            value = value.reshape(-1)[0].item()
        if isinstance(value, np.integer):
            value = int(value)
        if value is not None and not isinstance(value, int | str):
            raise self.error(index, f"image_id is {value!r}, expected one int or str")
        return value

    def detections(self, predictions: Sequence[Record]) -> Columns:
        """Join the images' detections; ``extra`` are the scores."""
        boxes, labels, scores = [], [], []
        for index, record in enumerate(predictions):
            self._check_keys(index, record, ("boxes", "labels", "scores"))
            boxes.append(self._boxes(index, record["boxes"]))
            num = len(boxes[-1])
            labels.append(self.vector(index, "labels", record["labels"], num, "iu"))
            scores.append(self.vector(index, "scores", record["scores"], num, "fiu"))
        columns = self._join(boxes, labels, _concatenate(scores, np.float32))
        self._check_rows(columns, np.isfinite(columns.extra), "scores", columns.extra, "finite")
        return columns

    def objects(self, targets: Sequence[Record]) -> Columns:
        """Join the images' objects; ``extra`` is ``difficult``, False where it is absent."""
        boxes, labels, difficult = [], [], []
        for index, record in enumerate(targets):
            self._check_keys(index, record, ("boxes", "labels"))
            boxes.append(self._boxes(index, record["boxes"]))
            num = len(boxes[-1])
            labels.append(self.vector(index, "labels", record["labels"], num, "iu"))
            if "difficult" in record:
                flags = self.vector(index, "difficult", record["difficult"], num, "biu")
                difficult.append(flags.astype(bool))
            else:
                difficult.append(np.zeros(num, dtype=bool))
        columns = self._join(boxes, labels, _concatenate(difficult, np.bool_))
        ordered = np.asarray((columns.boxes[:, :2] <= columns.boxes[:, 2:]).all(axis=1))
        self._check_rows(columns, ordered, "boxes", columns.boxes, "x1 <= x2 and y1 <= y2")
        return columns

    def _join(
        self, boxes: list[NDArray[Any]], labels: list[NDArray[Any]], extra: NDArray[Any]
    ) -> Columns:
        """Put the images end to end and check the values that all rows share."""
        counts = np.fromiter((len(rows) for rows in boxes), dtype=np.int64, count=len(boxes))
        joined = _concatenate(boxes, np.float32, columns=4)
        label = _concatenate(labels, np.int64)
        columns = Columns(counts, joined, label.astype(np.int32), extra)
        known = (label >= 1) & (label <= self.num_classes)
        self._check_rows(columns, known, "labels", label, f"1..{self.num_classes}")
        finite = np.asarray(np.isfinite(joined).all(axis=1))
        self._check_rows(columns, finite, "boxes", joined, "finite coordinates")
        return columns

    def _check_keys(self, index: int, record: Record, keys: tuple[str, ...]) -> None:
        if not isinstance(record, Mapping):
            raise self.error(index, f"is a {type(record).__name__}, expected a dict")
        for key in keys:
            if key not in record:
                raise self.error(
                    index,
                    f"has no {key!r}, only {sorted(map(str, record))}; expected {', '.join(keys)}",
                )

    def _boxes(self, index: int, value: Any) -> NDArray[Any]:
        boxes = as_array(value)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise self.error(index, f"boxes have shape {boxes.shape}, expected (N, 4)")
        if boxes.dtype.kind not in "fiu":
            raise self.error(index, f"boxes are {boxes.dtype}, expected numbers")
        return boxes

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
        self, columns: Columns, good: NDArray[np.bool_], key: str, values: Any, expected: str
    ) -> None:
        if good.all():
            return
        row = int(np.argmin(good))
        index = int(np.searchsorted(np.cumsum(columns.counts), row, side="right"))
        within = row - int(columns.counts[:index].sum())
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


def _concatenate(
    parts: list[NDArray[Any]], dtype: type[np.generic], columns: int | None = None
) -> NDArray[Any]:
    """Join arrays; at least of the precision of ``dtype``, and of that dtype where all are empty.

    Always a copy: the caller's buffers may be reused for the next batch.
    """
    filled = [part for part in parts if len(part)]
    if not filled:
        return np.zeros((0,) if columns is None else (0, columns), dtype=dtype)
    joined = np.concatenate(filled)
    return joined.astype(np.result_type(joined.dtype, dtype), copy=False)
