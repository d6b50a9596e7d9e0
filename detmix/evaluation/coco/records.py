"""Reading and checking what COCO's evaluation needs of a batch, image by image.

Shape legend: N objects or detections of one image, K keypoints each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detmix.evaluation.coco.masks import Rle, encode_masks, mask_areas
from detmix.evaluation.records import Columns, ImageId, Record, RecordReader, as_array, read_batch


@dataclass(frozen=True, kw_only=True)
class Instances:
    """What objects and detections share."""

    boxes: NDArray[Any]
    labels: NDArray[np.int32]
    masks: list[Rle] | None
    keypoints: NDArray[Any] | None


@dataclass(frozen=True, kw_only=True)
class Objects(Instances):
    """Ground truth."""

    iscrowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Detections(Instances):
    """What a detector found."""

    scores: NDArray[Any]


@dataclass(frozen=True)
class CocoImage:
    """One image."""

    image_id: int
    size: tuple[int, int] | None
    file_name: str | None
    objects: Objects
    detections: Detections


@dataclass(frozen=True)
class CocoReader:
    """Reads batches."""

    num_classes: int
    iou_types: tuple[str, ...]

    def read(
        self, predictions: Sequence[Record], targets: Sequence[Record], points: int | None
    ) -> list[CocoImage]:
        """Check a batch and take out what is evaluated, with masks encoded."""
        batch = read_batch(predictions, targets, self.num_classes)
        image_ids = _checked_ids(batch.image_ids)
        of_objects = RecordReader("targets", batch.image_ids, self.num_classes)
        of_detections = RecordReader("predictions", batch.image_ids, self.num_classes)
        images = []
        rows = zip(_split(batch.objects), _split(batch.detections), strict=True)
        for index, (there, found) in enumerate(rows):
            target = _Item(of_objects, index, targets[index], len(there.labels))
            objects = self._objects(target, there, points)
            points = points or num_keypoints([objects])
            prediction = _Item(of_detections, index, predictions[index], len(found.labels))
            detections = self._detections(prediction, found, points)
            points = points or num_keypoints([detections])
            size = _size(target, objects, detections)
            images.append(
                CocoImage(image_ids[index], size, _file_name(target), objects, detections)
            )
        return images

    def _objects(self, item: "_Item", rows: Columns, points: int | None) -> Objects:
        masks, keypoints = self._extras(item, points)
        iscrowd = np.zeros(item.num, dtype=bool)
        if "iscrowd" in item.record:
            iscrowd = item.vector("iscrowd", "biu").astype(bool)
        return Objects(
            boxes=rows.boxes,
            labels=rows.labels,
            masks=masks,
            keypoints=keypoints,
            iscrowd=iscrowd,
            difficult=rows.extra,
            area=_areas(item, rows.boxes, masks),
        )

    def _detections(self, item: "_Item", rows: Columns, points: int | None) -> Detections:
        # Other than VOC's evaluation, this one is saved in a format that has no such boxes.
        ordered = (rows.boxes[:, :2] <= rows.boxes[:, 2:]).all(axis=1)
        if not ordered.all():
            row = int(np.argmin(ordered))
            box = rows.boxes[row].tolist()
            raise item.error(f"boxes[{row}] is {box}, expected x1 <= x2 and y1 <= y2")
        masks, keypoints = self._extras(item, points)
        return Detections(
            boxes=rows.boxes,
            labels=rows.labels,
            masks=masks,
            keypoints=keypoints,
            scores=rows.extra,
        )

    def _extras(
        self, item: "_Item", points: int | None
    ) -> tuple[list[Rle] | None, NDArray[Any] | None]:
        """Masks and keypoints, those of the two that are evaluated."""
        return (
            _masks(item) if "segm" in self.iou_types else None,
            _keypoints(item, points) if "keypoints" in self.iou_types else None,
        )


@dataclass(frozen=True)
class _Item:
    """One image's target or prediction, with ``num`` boxes."""

    reader: RecordReader
    index: int
    record: Record
    num: int

    def vector(self, key: str, kinds: str) -> NDArray[Any]:
        return self.reader.vector(self.index, key, self.record[key], self.num, kinds)

    def error(self, message: str) -> ValueError:
        return self.reader.error(self.index, message)

    def check_key(self, key: str, iou_type: str) -> None:
        if key not in self.record:
            keys = sorted(map(str, self.record))
            raise self.error(f"has no {key!r}, only {keys}; {iou_type!r} needs them")


def contiguous_labels(
    predictions: Any, category_ids: Sequence[int], iou_types: Sequence[str]
) -> Any:
    """Predictions with labels 1..C in place of category ids, without those of other categories."""
    if isinstance(predictions, Mapping) or not isinstance(predictions, Sequence):
        return predictions
    label_of = {number: label for label, number in enumerate(category_ids, start=1)}
    extras = {"segm": "masks", "keypoints": "keypoints"}
    keys = ("boxes", "scores", *(extras[name] for name in iou_types if name in extras))
    return [_relabelled(prediction, label_of, keys) for prediction in predictions]


def _relabelled(prediction: Any, label_of: Mapping[int, int], keys: tuple[str, ...]) -> Any:
    if not isinstance(prediction, Mapping) or "labels" not in prediction:
        return prediction
    ids = as_array(prediction["labels"])
    columns = {key: prediction[key] for key in keys if key in prediction}
    of_one_length = all(tuple(np.shape(column)[:1]) == ids.shape for column in columns.values())
    if ids.dtype.kind not in "iu" or not of_one_length:
        return prediction
    labels = np.array([label_of.get(number, 0) for number in ids.tolist()], dtype=np.int64)
    rows = np.flatnonzero(labels)
    return {key: _rows(column, rows) for key, column in columns.items()} | {"labels": labels[rows]}


def _rows(column: Any, rows: NDArray[np.int64]) -> Any:
    if isinstance(column, torch.Tensor):
        return column[torch.from_numpy(rows).to(column.device)]
    return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]


def num_keypoints(instances: Iterable[Instances]) -> int | None:
    """K of the first that have any keypoints."""
    for some in instances:
        if some.keypoints is not None and len(some.keypoints):
            return int(some.keypoints.shape[1])
    return None


def _checked_ids(image_ids: Sequence[ImageId]) -> list[int]:
    ids = []
    for index, image_id in enumerate(image_ids):
        if isinstance(image_id, bool) or not isinstance(image_id, int):
            got = "has no image_id" if image_id is None else f"image_id is {image_id!r}"
            raise ValueError(f"targets[{index}]: {got}, expected an int")
        ids.append(image_id)
    return ids


def _split(columns: Columns) -> list[Columns]:
    """The rows of each image."""
    ends = np.cumsum(columns.counts)
    return [
        Columns(
            columns.counts[index : index + 1],
            columns.boxes[end - num : end],
            columns.labels[end - num : end],
            columns.extra[end - num : end],
        )
        for index, (num, end) in enumerate(zip(columns.counts, ends, strict=True))
    ]


def _areas(item: _Item, boxes: NDArray[Any], masks: list[Rle] | None) -> NDArray[np.float64]:
    """The target's ``area (N,)``; where it has none the masks', or else the boxes'."""
    if "area" in item.record:
        areas = item.vector("area", "fiu").astype(np.float64)
        good = np.isfinite(areas) & (areas >= 0)
        if not good.all():
            row = int(np.argmin(good))
            raise item.error(f"area[{row}] is {areas[row]}, expected 0 or more")
        return areas
    if masks is not None:
        return mask_areas(masks)
    width, height = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).T
    return np.asarray(width * height, dtype=np.float64)


def _masks(item: _Item) -> list[Rle]:
    if item.num == 0:
        return []
    item.check_key("masks", "segm")
    try:
        masks = encode_masks(item.record["masks"])
    except ValueError as error:
        raise item.error(str(error)) from error
    if len(masks) != item.num:
        raise item.error(f"{len(masks)} masks for {item.num} boxes, expected one for each")
    return masks


def _keypoints(item: _Item, points: int | None) -> NDArray[Any]:
    if item.num == 0:
        return np.zeros((0, points or 0, 3))
    item.check_key("keypoints", "keypoints")
    keypoints = np.array(as_array(item.record["keypoints"]))  # a copy: buffers are used again
    shape = keypoints.shape
    if len(shape) != 3 or shape[::2] != (item.num, 3) or shape[1] != (points or max(shape[1], 1)):
        expected = f"({item.num}, {points or 'K'}, 3)"
        raise item.error(f"keypoints have shape {shape}, expected {expected}")
    good = np.isfinite(keypoints).all(axis=(1, 2))
    if not good.all():
        row = int(np.argmin(good))
        raise item.error(f"keypoints[{row}] is {keypoints[row].tolist()}, expected finite numbers")
    return keypoints


def _size(target: _Item, objects: Objects, detections: Detections) -> tuple[int, int] | None:
    """The masks' height and width, which must be one; ``orig_size`` where there are none."""
    masks = (objects.masks or []) + (detections.masks or [])
    sizes = sorted({(int(height), int(width)) for height, width in (m["size"] for m in masks)})
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sizes)
        raise target.error(f"has, with its prediction, masks of {found} pixels, expected one size")
    return sizes[0] if sizes else _orig_size(target)


def _orig_size(target: _Item) -> tuple[int, int] | None:
    if "orig_size" not in target.record:
        return None
    size = as_array(target.record["orig_size"]).reshape(-1)
    if size.shape != (2,) or size.dtype.kind not in "iu":
        raise target.error(f"orig_size is {size.tolist()}, expected height and width")
    return int(size[0]), int(size[1])


def _file_name(target: _Item) -> str | None:
    name = target.record.get("file_name")
    if name is not None and not isinstance(name, str):
        raise target.error(f"file_name is {name!r}, expected a str")
    return name
