"""From batches to COCO's entries: what its evaluation needs of each image, checked once.

Shape legend: N objects or detections of one image, K keypoints each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.coco.backend import IGNORED_AREA
from detmix.evaluation.coco.masks import Rle, encode_masks, mask_areas
from detmix.evaluation.records import Columns, ImageId, Record, as_array, read_batch


@dataclass(frozen=True)
class CocoImage:
    """One image, its objects and its detections as COCO's files have them."""

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    results: list[dict[str, Any]]


@dataclass(frozen=True)
class CocoReader:
    """Reads batches; ``by_id``: predictions have category ids, also others, in place of labels."""

    category_ids: tuple[int, ...]
    iou_types: tuple[str, ...]
    by_id: bool

    def read(
        self, predictions: Sequence[Record], targets: Sequence[Record], points: int | None
    ) -> tuple[list[CocoImage], int | None]:
        """Check a batch; return its images, and the number of keypoints once it is known."""
        batch = read_batch(predictions, targets, len(self.category_ids), any_label=self.by_id)
        image_ids = _checked_ids(batch.image_ids)
        crowds = np.split(batch.is_crowd, np.cumsum(batch.objects.counts))[:-1]
        images = []
        for target, prediction, is_crowd in zip(
            _items("targets", image_ids, targets, batch.objects),
            _items("predictions", image_ids, predictions, batch.detections),
            crowds,
            strict=True,
        ):
            annotations = self._annotations(target, is_crowd, points)
            points = points or _num_keypoints(annotations)
            results = self._results(prediction, points)
            points = points or _num_keypoints(results)
            if self.by_id:
                results = [each for each in results if each["category_id"] in self.category_ids]
            entry = {"id": target.image_id, **_about(target, [*annotations, *results])}
            images.append(CocoImage(entry, annotations, results))
        return images, points

    def _annotations(
        self, item: "_Item", is_crowd: NDArray[np.bool_], points: int | None
    ) -> list[dict[str, Any]]:
        # A difficult object gets an area beyond all of COCO's ranges and no labelled keypoints, so
        # that as a box or a mask it counts neither way in any program.
        entries = self._entries(item, self._categories(item.labels), points)
        areas = np.where(item.extra, IGNORED_AREA, _areas(item, entries)).tolist()
        flags = zip(entries, areas, is_crowd.tolist(), item.extra.tolist(), strict=True)
        for entry, area, crowd, difficult in flags:
            entry |= {"area": area, "iscrowd": int(crowd)}
            if difficult:
                entry["difficult"] = 1
            if "keypoints" in entry:
                visible = sum(v > 0 for v in entry["keypoints"][2::3])
                entry["num_keypoints"] = 0 if difficult else visible
        return entries

    def _results(self, item: "_Item", points: int | None) -> list[dict[str, Any]]:
        # Other than VOC's evaluation, this one is saved in a format that has no such boxes.
        ordered = item.boxes[:, :2] <= item.boxes[:, 2:]
        item.check_rows(ordered, "boxes", item.boxes, "x1 <= x2, y1 <= y2")
        categories = item.labels if self.by_id else self._categories(item.labels)
        entries = self._entries(item, categories, points)
        for entry, score in zip(entries, item.extra.tolist(), strict=True):
            entry["score"] = score
        return entries

    def _categories(self, labels: Sequence[int]) -> list[int]:
        return [self.category_ids[label - 1] for label in labels]

    def _entries(
        self, item: "_Item", categories: list[int], points: int | None
    ) -> list[dict[str, Any]]:
        """What objects and detections share: image, category, box, and masks and keypoints."""
        boxes = item.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]  # in float64 the difference of two float32 keeps all digits
        columns = {
            "image_id": [item.image_id] * len(boxes),
            "category_id": categories,
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
    """One image's target or prediction; ``extra`` is what `Columns` calls so."""

    where: str
    image_id: int
    record: Record
    boxes: NDArray[Any]
    labels: list[int]
    extra: NDArray[Any]

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.where} (image_id {self.image_id}): {message}")

    def check_key(self, key: str, iou_type: str) -> None:
        if key not in self.record:
            keys = sorted(map(str, self.record))
            raise self.error(f"has no {key!r}, only {keys}; {iou_type!r} needs them")

    def check_rows(
        self, good: NDArray[np.bool_], key: str, values: NDArray[Any], expected: str
    ) -> None:
        """Raise unless all of ``good (N, …)`` holds."""
        if not good.all():
            row = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
            raise self.error(f"{key}[{row}] is {values[row].tolist()}, expected {expected}")


def _items(
    name: str, image_ids: Sequence[int], records: Sequence[Record], columns: Columns
) -> Iterator[_Item]:
    ends = np.cumsum(columns.counts)
    parts = (np.split(rows, ends)[:-1] for rows in (columns.boxes, columns.labels, columns.extra))
    for index, (boxes, labels, extra) in enumerate(zip(*parts, strict=True)):
        where = f"{name}[{index}]"
        yield _Item(where, image_ids[index], records[index], boxes, labels.tolist(), extra)


def _num_keypoints(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """K, where there is an entry that has keypoints."""
    return len(entries[0].get("keypoints", ())) // 3 or None if entries else None


def _checked_ids(image_ids: Sequence[ImageId]) -> list[int]:
    ids = []
    for index, image_id in enumerate(image_ids):
        if isinstance(image_id, bool) or not isinstance(image_id, int):
            got = "has no image_id" if image_id is None else f"image_id is {image_id!r}"
            raise ValueError(f"targets[{index}]: {got}, expected an int")
        ids.append(image_id)
    return ids


def _areas(item: _Item, entries: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The target's ``area (N,)``; where it has none the masks', or else the boxes'."""
    if "area" in item.record:
        areas = as_array(item.record["area"])
        num = len(item.boxes)
        if areas.shape != (num,) or (num and areas.dtype.kind not in "fiu"):
            got = f"{areas.dtype} of shape {areas.shape}"
            raise item.error(f"area is {got}, expected a number for each of {num} boxes")
        item.check_rows(np.isfinite(areas) & (areas >= 0), "area", areas, "0 or more")
        return areas.astype(np.float64)
    if entries and "segmentation" in entries[0]:
        return mask_areas([entry["segmentation"] for entry in entries])
    return np.array([entry["bbox"][2] * entry["bbox"][3] for entry in entries])


def _masks(item: _Item) -> list[Rle]:
    if not len(item.boxes):
        return []
    item.check_key("masks", "segm")
    try:
        masks = encode_masks(item.record["masks"])
    except ValueError as error:
        raise item.error(str(error)) from error
    if len(masks) != len(item.boxes):
        raise item.error(f"{len(masks)} masks for {len(item.boxes)} boxes, expected one for each")
    return masks


def _keypoints(item: _Item, points: int | None) -> list[list[float]]:
    num = len(item.boxes)
    if not num:
        return []
    item.check_key("keypoints", "keypoints")
    keypoints = as_array(item.record["keypoints"])
    shape = keypoints.shape
    if len(shape) != 3 or shape[::2] != (num, 3) or shape[1] != (points or max(shape[1], 1)):
        expected = f"({num}, {points or 'K'}, 3)"
        raise item.error(f"keypoints have shape {shape}, expected {expected}")
    item.check_rows(np.isfinite(keypoints), "keypoints", keypoints, "finite numbers")
    flat: list[list[float]] = keypoints.reshape(num, -1).tolist()
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
