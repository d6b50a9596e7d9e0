"""From batches to COCO's entries: what its evaluation needs of each image, checked once.

Shape legend: N objects or detections of one image, K keypoints each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detmix.evaluation.coco.backend import IGNORED_AREA
from detmix.evaluation.coco.masks import Rle, encode_masks, mask_areas
from detmix.evaluation.records import Columns, ImageId, Record, RecordReader, as_array, read_batch


@dataclass(frozen=True)
class CocoImage:
    """One image, its objects and its detections as COCO's files have them."""

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class CocoReader:
    """Reads batches."""

    category_ids: tuple[int, ...]
    iou_types: tuple[str, ...]

    def read(
        self, predictions: Sequence[Record], targets: Sequence[Record], points: int | None
    ) -> tuple[list[CocoImage], int | None]:
        """Check a batch; return its images, and the number of keypoints once it is known."""
        num_classes = len(self.category_ids)
        batch = read_batch(predictions, targets, num_classes)
        image_ids = _checked_ids(batch.image_ids)
        of_objects = RecordReader("targets", batch.image_ids, num_classes)
        of_detections = RecordReader("predictions", batch.image_ids, num_classes)
        images = []
        rows = zip(_split(batch.objects), _split(batch.detections), strict=True)
        for index, (there, found) in enumerate(rows):
            target = _Item(of_objects, index, image_ids[index], targets[index], there)
            annotations = self._annotations(target, points)
            points = points or num_keypoints(annotations)
            prediction = _Item(of_detections, index, image_ids[index], predictions[index], found)
            results = self._results(prediction, points)
            points = points or num_keypoints(results)
            entry = {"id": image_ids[index], **_about(target, [*annotations, *results])}
            images.append(CocoImage(entry, annotations, results))
        return images, points

    def _annotations(self, item: "_Item", points: int | None) -> list[dict[str, Any]]:
        # A difficult object gets an area beyond all of COCO's ranges and no labelled keypoints, so
        # that as a box or a mask it counts neither way in any program.
        entries = self._entries(item, points)
        iscrowd = np.zeros(item.num, dtype=bool)
        if "iscrowd" in item.record:
            iscrowd = item.vector("iscrowd", "biu").astype(bool)
        difficult = item.rows.extra
        areas = np.where(difficult, IGNORED_AREA, _areas(item, entries)).tolist()
        for row, entry in enumerate(entries):
            entry |= {"area": areas[row], "iscrowd": int(iscrowd[row])}
            if difficult[row]:
                entry["difficult"] = 1
            if "keypoints" in entry:
                visible = sum(v > 0 for v in entry["keypoints"][2::3])
                entry["num_keypoints"] = 0 if difficult[row] else visible
        return entries

    def _results(self, item: "_Item", points: int | None) -> list[dict[str, Any]]:
        # Other than VOC's evaluation, this one is saved in a format that has no such boxes.
        boxes = item.rows.boxes
        ordered = (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)
        if not ordered.all():
            row = int(np.argmin(ordered))
            raise item.error(f"boxes[{row}] is {boxes[row].tolist()}, expected x1 <= x2, y1 <= y2")
        entries = self._entries(item, points)
        for entry, score in zip(entries, item.rows.extra.tolist(), strict=True):
            entry["score"] = score
        return entries

    def _entries(self, item: "_Item", points: int | None) -> list[dict[str, Any]]:
        """What objects and detections share: image, category, box, and masks and keypoints."""
        boxes = item.rows.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]  # in float64 the difference of two float32 keeps all digits
        columns = {
            "image_id": [item.image_id] * len(boxes),
            "category_id": [self.category_ids[label - 1] for label in item.rows.labels.tolist()],
            "bbox": boxes.tolist(),
        }
        if "segm" in self.iou_types:
            columns["segmentation"] = _masks(item)
        if "keypoints" in self.iou_types:
            columns["keypoints"] = _keypoints(item, points)
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]


@dataclass(frozen=True)
class _Item:
    """One image's target or prediction."""

    reader: RecordReader
    index: int
    image_id: int
    record: Record
    rows: Columns

    @property
    def num(self) -> int:
        return len(self.rows.labels)

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


def num_keypoints(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """K, where it can be told."""
    return len(entries[0].get("keypoints", ())) // 3 or None if entries else None


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


def _areas(item: _Item, entries: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The target's ``area (N,)``; where it has none the masks', or else the boxes'."""
    if "area" in item.record:
        areas = item.vector("area", "fiu").astype(np.float64)
        good = np.isfinite(areas) & (areas >= 0)
        if not good.all():
            row = int(np.argmin(good))
            raise item.error(f"area[{row}] is {areas[row]}, expected 0 or more")
        return areas
    if entries and "segmentation" in entries[0]:
        return mask_areas([entry["segmentation"] for entry in entries])
    return np.array([entry["bbox"][2] * entry["bbox"][3] for entry in entries])


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


def _keypoints(item: _Item, points: int | None) -> list[list[float]]:
    if item.num == 0:
        return []
    item.check_key("keypoints", "keypoints")
    keypoints = as_array(item.record["keypoints"])
    shape = keypoints.shape
    if len(shape) != 3 or shape[::2] != (item.num, 3) or shape[1] != (points or max(shape[1], 1)):
        expected = f"({item.num}, {points or 'K'}, 3)"
        raise item.error(f"keypoints have shape {shape}, expected {expected}")
    good = np.isfinite(keypoints).all(axis=(1, 2))
    if not good.all():
        row = int(np.argmin(good))
        raise item.error(f"keypoints[{row}] is {keypoints[row].tolist()}, expected finite numbers")
    flat: list[list[float]] = keypoints.reshape(item.num, -1).tolist()
    return flat


def _about(target: _Item, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The image's size, its masks' or else ``orig_size``, and its file's name, where known."""
    about: dict[str, Any] = {}
    sizes = sorted({tuple(e["segmentation"]["size"]) for e in entries if "segmentation" in e})
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sizes)
        raise target.error(f"has, with its prediction, masks of {found} pixels, expected one size")
    if not sizes and "orig_size" in target.record:
        size = as_array(target.record["orig_size"]).reshape(-1)
        if size.shape != (2,) or size.dtype.kind not in "iu":
            raise target.error(f"orig_size is {size.tolist()}, expected height and width")
        sizes = [tuple(size.tolist())]
    if sizes:
        about = dict(zip(("height", "width"), sizes[0], strict=True))
    name = target.record.get("file_name")
    if name is not None and not isinstance(name, str):
        raise target.error(f"file_name is {name!r}, expected a str")
    return about if name is None else about | {"file_name": name}
