"""From batches to COCO's entries: what its evaluation needs of each image, checked once.

Shape legend: N objects or detections of all images of a batch, K keypoints each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detmix.evaluation.coco.backend import IGNORED_AREA
from detmix.evaluation.coco.masks import Rle, encode_masks, mask_areas
from detmix.evaluation.records import Columns, IntArray, Record, Records, as_array, read_batch

Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class CocoImage:
    """One image, its objects and its detections as COCO's files have them."""

    entry: dict[str, Any]
    annotations: Entries
    results: Entries


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
        there = Records("targets", targets, batch.image_ids)
        found = Records("predictions", predictions, batch.image_ids)
        for index, image_id in enumerate(batch.image_ids):
            if image_id is None or isinstance(image_id, bool):
                raise there.error(index, f"image_id is {image_id!r}, expected an int or a str")
        if "keypoints" in self.iou_types:
            points = _num_keypoints(points, there, found)
        annotations = self._annotations(there, batch.objects, batch.is_crowd.tolist(), points)
        results = self._results(found, batch.detections, points)
        images = []
        for index, (objects, detections) in enumerate(
            zip(_split(annotations, there.counts), _split(results, found.counts), strict=True)
        ):
            if self.by_id:
                detections = [e for e in detections if e["category_id"] in self.category_ids]
            entry = {"id": batch.image_ids[index], **_about(there, index, objects + detections)}
            images.append(CocoImage(entry, objects, detections))
        return images, points

    def _annotations(
        self, there: Records, objects: Columns, is_crowd: list[bool], points: int | None
    ) -> Entries:
        entries = self._entries(there, objects, self._categories(objects), points)
        areas = there.column("area")
        there.check_rows(np.isfinite(areas) & (areas >= 0), "area", areas, "0 or more")
        if "segm" in self.iou_types:
            own = mask_areas([entry["segmentation"] for entry in entries])
        else:
            own = np.array([entry["bbox"][2] * entry["bbox"][3] for entry in entries])
        is_given = np.array(["area" in target for target in there.records], dtype=bool)
        areas = np.where(is_given[objects.images], areas, own)
        # A difficult object gets an area beyond all of COCO's ranges and no labelled keypoints, so
        # that as a box or a mask it counts neither way in any program.
        areas = np.where(objects.extra, IGNORED_AREA, areas)
        flags = zip(entries, areas.tolist(), is_crowd, objects.extra.tolist(), strict=True)
        for entry, area, crowd, difficult in flags:
            entry |= {"area": area, "iscrowd": int(crowd)}
            if difficult:
                entry["difficult"] = 1
            if "keypoints" in entry:
                visible = sum(v > 0 for v in entry["keypoints"][2::3])
                entry["num_keypoints"] = 0 if difficult else visible
        return entries

    def _results(self, found: Records, detections: Columns, points: int | None) -> Entries:
        # Other than VOC's evaluation, this one is saved in a format that has no such boxes.
        found.check_boxes(detections.boxes)
        categories = detections.labels.tolist() if self.by_id else self._categories(detections)
        entries = self._entries(found, detections, categories, points)
        for entry, score in zip(entries, detections.extra.tolist(), strict=True):
            entry["score"] = score
        return entries

    def _categories(self, columns: Columns) -> list[int]:
        return [self.category_ids[label - 1] for label in columns.labels.tolist()]

    def _entries(
        self, records: Records, columns: Columns, categories: list[int], points: int | None
    ) -> Entries:
        """What objects and detections share: image, category, box, and masks and keypoints."""
        boxes = columns.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]  # in float64 the difference of two float32 keeps all digits
        fields = {
            "image_id": [records.image_ids[index] for index in columns.images.tolist()],
            "category_id": categories,
            "bbox": boxes.tolist(),
        }
        if "segm" in self.iou_types:
            fields["segmentation"] = _masks(records)
        if "keypoints" in self.iou_types:
            keypoints = records.column("keypoints", points or 1)
            records.check_rows(np.isfinite(keypoints), "keypoints", keypoints, "finite numbers")
            fields["keypoints"] = [each.ravel().tolist() for each in keypoints]
        return [
            dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)
        ]


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


def _split(entries: Entries, counts: IntArray) -> list[Entries]:
    """The entries of each image."""
    ends = np.cumsum(counts).tolist()
    return [entries[start:end] for start, end in zip([0, *ends], ends, strict=False)]


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
