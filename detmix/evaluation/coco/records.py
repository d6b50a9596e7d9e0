"""From batches to COCO's entries: what its evaluation needs of each image, checked once.

Shape legend: N objects or detections of all images of a batch, K keypoints each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from detmix.evaluation.coco.backend import complete
from detmix.evaluation.coco.masks import Rle, encode_masks
from detmix.evaluation.records import Columns, Record, Records, as_array, open_batch

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class CocoImage:
    """One image, its objects and its detections as COCO's files have them."""

    entry: dict[str, Any]
    annotations: Entries
    results: Entries


@dataclass
class CocoReader:
    """Reads batches; ``by_id``: predictions have category ids, also others, in place of labels."""

    category_ids: tuple[int, ...]
    iou_types: tuple[str, ...]
    by_id: bool
    num_keypoints: int | None  # once it is known

    def read(self, predictions: Sequence[Record], targets: Sequence[Record]) -> list[CocoImage]:
        """Check a batch and return its images; one with an error changes nothing."""
        found, there = open_batch(predictions, targets)
        for index, image_id in enumerate(there.image_ids):
            if image_id is None or isinstance(image_id, bool):
                raise there.error(index, f"image_id is {image_id!r}, expected an int or a str")
        num_classes, known = len(self.category_ids), self.num_keypoints
        detections = found.read(None if self.by_id else num_classes)
        objects = there.read(num_classes)
        # Other than VOC's evaluation, this one is saved in a format that has no such boxes.
        found.check_boxes(detections["boxes"])
        points = _num_keypoints(known, there, found) if "keypoints" in self.iou_types else None
        annotations = iter(self._annotations(there, objects, points))
        fields = self._fields(found, detections, points, by_id=self.by_id)
        results = _rows(fields | {"score": detections["scores"].tolist()})
        images = []
        for index, image_id in enumerate(there.image_ids):
            own = list(islice(annotations, there.counts[index]))
            entries = list(islice(results, found.counts[index]))
            entry = {"id": image_id, **_about(there, index, own + entries)}
            entries = [each for each in entries if each["category_id"] in self.category_ids]
            images.append(CocoImage(entry, own, entries))
        self.num_keypoints = points
        return images

    def _annotations(self, there: Records, objects: Columns, points: int | None) -> Entries:
        fields = self._fields(there, objects, points)
        areas = there.column("area")
        there.check_rows(np.isfinite(areas) & (areas >= 0), "area", areas, "0 or more")
        is_given = np.array(["area" in target for target in there.records], dtype=bool)
        fields["area"] = np.where(is_given[objects["images"]], areas, np.nan).tolist()
        fields["iscrowd"] = objects["iscrowd"].astype(int).tolist()
        entries = list(_rows(fields))
        for entry, is_difficult in zip(entries, objects["difficult"].tolist(), strict=True):
            if is_difficult:
                entry["difficult"] = 1
            complete(entry)
        return entries

    def _fields(
        self, records: Records, columns: Columns, points: int | None, *, by_id: bool = False
    ) -> dict[str, list[Any]]:
        """What objects and detections share: image, category, box, and masks and keypoints."""
        labels, boxes = columns["labels"].tolist(), columns["boxes"].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]  # in float64 the difference of two float32 keeps all digits
        fields = {
            "image_id": [records.image_ids[index] for index in columns["images"].tolist()],
            "category_id": labels if by_id else [self.category_ids[label - 1] for label in labels],
            "bbox": boxes.tolist(),
        }
        if "segm" in self.iou_types:
            fields["segmentation"] = _masks(records)
        if "keypoints" in self.iou_types:
            keypoints = records.column("keypoints", points or 1)
            records.check_rows(np.isfinite(keypoints), "keypoints", keypoints, "finite numbers")
            fields["keypoints"] = [each.ravel().tolist() for each in keypoints]
        return fields


def _rows(fields: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*fields.values(), strict=True):
        yield dict(zip(fields, values, strict=True))


def _num_keypoints(known: int | None, *sides: Records) -> int | None:
    """K, if not known that of the first record with boxes; all of these need keypoints."""
    shapes = [as_array(points).shape for side in sides for _, points in side.needed("keypoints")]
    return known or (int(max(1, *shapes[0][1:2])) if shapes else None)


def _masks(records: Records) -> list[Rle]:
    """The masks of all records, encoded."""
    encoded = []
    for index, value in records.needed("masks"):
        try:
            masks = encode_masks(value)
        except ValueError as error:
            raise records.error(index, str(error)) from error
        if len(masks) != (num := records.counts[index]):
            raise records.error(index, f"{len(masks)} masks for {num} boxes, expected one for each")
        encoded += masks
    return encoded


def _about(there: Records, index: int, entries: Entries) -> dict[str, Any]:
    """The image's size, its masks' or else ``orig_size``, and its file's name, where known."""
    target = there.records[index]
    sizes = sorted({tuple(e["segmentation"]["size"]) for e in entries if "segmentation" in e})
    if len(sizes) > 1:
        found = " and ".join(f"{height} x {width}" for height, width in sizes)
        raise there.error(index, f"its masks and its prediction's are of {found} pixels")
    if not sizes and "orig_size" in target:
        size = as_array(target["orig_size"]).reshape(-1)
        if size.shape != (2,) or size.dtype.kind not in "iu":
            raise there.error(index, f"orig_size is {size.tolist()}, expected height and width")
        sizes = [tuple(size.tolist())]
    about = dict(zip(("height", "width"), sizes[0], strict=True)) if sizes else {}
    name = target.get("file_name")
    if name is not None and not isinstance(name, str):
        raise there.error(index, f"file_name is {name!r}, expected a str")
    return about if name is None else about | {"file_name": name}
