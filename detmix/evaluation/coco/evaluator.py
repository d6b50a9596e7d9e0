"""Average precision as COCO defines it, gathered batch by batch.

Shape legend: D detections and G ground-truth objects of one image, C classes without the
background, K keypoints of an object.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from detmix.data.coco.file import paused_collection
from detmix.data.detection import check_classes
from detmix.evaluation.coco.backend import Backend, check_backend, complete, score_entries
from detmix.evaluation.coco.masks import Rle, encode_masks
from detmix.evaluation.records import Columns, Record, Records, as_array, check_choice, open_batch
from detmix.evaluation.results import COCOResult, IouType
from detmix.files import write_text

PredictionLabels: TypeAlias = Literal["contiguous", "category_id"]
Entries: TypeAlias = list[dict[str, Any]]
Fields: TypeAlias = dict[str, list[Any]]  # of N entries, by their names


class COCOEvaluator:
    """COCO's average precision of boxes, masks and keypoints, as pycocotools computes it.

    Within an image and class the 100 detections of highest score are matched, each to the object it
    overlaps most among those still free, at ten IoU thresholds; the mean of the ten areas under the
    precision/recall curve is the AP (https://cocodataset.org/#detection-eval).

    A crowd (``iscrowd``) takes any number of detections, which then count neither way. A
    ``difficult`` object of Pascal VOC is not lost either, nor does it count: the first detection
    that matches it is left out. Further ones are false positives, where VOC's own rule leaves all
    of them out.

    Args:
        classes: the C class names without the background; label k stands for ``classes[k - 1]``.
        category_ids: COCO's category ids of the labels, for what is saved; 1..C where absent.
        iou_types: what to evaluate, out of ``"bbox"``, ``"segm"`` (masks) and ``"keypoints"``.
        backend: ``"pycocotools"``, or ``"faster-coco-eval"``, an optional package whose numbers are
            the same to rounding (1e-15) in a quarter of the time; ``"auto"`` for that one where it
            is installed.
        prediction_labels: ``"category_id"`` where a detector's labels are COCO's category ids, as
            of torchvision's own (91 outputs for 80 classes): detections of other categories are
            left out. Targets have labels 1..C all the same.
        keypoint_sigmas: K falloffs (https://cocodataset.org/#keypoints-eval); without them COCO's
            own for 17 keypoints, and for another K the mean of these, which is nobody's standard.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        category_ids: Sequence[int] | None = None,
        iou_types: Sequence[IouType] = ("bbox",),
        backend: Backend = "auto",
        keypoint_sigmas: Sequence[float] | None = None,
        prediction_labels: PredictionLabels = "contiguous",
    ) -> None:
        self.classes = check_classes(classes)
        num = len(self.classes)
        ids = tuple(range(1, num + 1) if category_ids is None else category_ids)
        if not len(ids) == len(set(ids)) == num or not all(type(number) is int for number in ids):
            raise ValueError(f"category_ids is {list(ids)}, expected {num} different ints")
        self.category_ids = ids
        if isinstance(iou_types, str) or len(iou_types) == 0:
            raise ValueError(f"iou_types is {iou_types!r}, expected a list of at least one")
        for iou_type in iou_types:
            check_choice("iou_type", iou_type, IouType)
        self.iou_types: tuple[IouType, ...] = tuple(dict.fromkeys(iou_types))
        check_backend(backend)
        check_choice("prediction_labels", prediction_labels, PredictionLabels)
        if prediction_labels == "category_id" and category_ids is None:
            raise ValueError("prediction_labels is 'category_id', expected category_ids as well")
        self.backend: Backend = backend
        self.keypoint_sigmas = None if keypoint_sigmas is None else tuple(keypoint_sigmas)
        self._by_id = prediction_labels == "category_id"
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        # As COCO's files have them.
        self._images: dict[int | str, dict[str, Any]] = {}
        self._objects: Entries = []
        self._detections: Entries = []
        self._results: dict[str, COCOResult] = {}
        # K, once it is known.
        self._num_keypoints = None if self.keypoint_sigmas is None else len(self.keypoint_sigmas)

    def update(self, predictions: Sequence[Record], targets: Sequence[Record]) -> None:
        """Add the images of a batch: tensors on any device, or NumPy arrays.

        Args:
            predictions: as of `VOCEvaluator.update`, but that labels are category ids if
                ``prediction_labels`` says so; for ``"segm"`` with ``masks`` as `encode_masks` takes
                or returns them, for ``"keypoints"`` with ``keypoints (D, K, 3)``.
            targets: as there, but that every image needs its ``image_id``; with ``masks`` and
                ``keypoints (G, K, 3)`` alike. Optional are also ``area (G,)`` (the masks' where
                they are evaluated, else the boxes', if absent), ``orig_size`` (height, width) and
                ``file_name`` (str).

        Raises:
            ValueError: naming the image and the value, as of `VOCEvaluator.update`, and for a
                negative area, a prediction with ``x2 < x1``, an image with masks of several sizes.
        """
        found, there = open_batch(predictions, targets)
        for index, image_id in enumerate(there.image_ids):
            if image_id is None or isinstance(image_id, bool):
                raise there.error(index, f"image_id is {image_id!r}, expected an int or a str")
        known_ids, points = {*self.category_ids}, self._num_keypoints
        detections = found.read(None if self._by_id else len(known_ids))
        objects = there.read(len(known_ids))
        # Other than VOC's evaluation, this one is saved in a format that has no such boxes.
        found.check_boxes(detections["boxes"])
        if "keypoints" in self.iou_types:
            points = _num_keypoints(points, there, found)
        annotations = iter(self._annotations(there, objects, points))
        fields = self._fields(found, detections, points)
        results = _rows(fields | {"score": detections["scores"].tolist()})
        images = []
        for index, image_id in enumerate(there.image_ids):
            own = list(islice(annotations, there.counts[index]))
            entries = list(islice(results, found.counts[index]))
            entry = {"id": image_id, **_about(there, index, own + entries)}
            entries = [each for each in entries if each["category_id"] in known_ids]
            images.append((entry, own, entries))
        for entry, own, entries in images:
            if entry["id"] not in self._images:
                self._images[entry["id"]] = entry
                self._objects += own
                self._detections += entries
        self._results, self._num_keypoints = {}, points

    def compute(self, iou_type: IouType | None = None) -> COCOResult:
        """Evaluate all images so far by one of the constructor's IoU types, its first by default.

        Asking again before the next `update` is free.
        """
        chosen = self.iou_types[0] if iou_type is None else iou_type
        check_choice("iou_type", chosen, self.iou_types)
        if chosen not in self._results:
            with paused_collection():
                options = chosen, self.backend, self.keypoint_sigmas
                result = score_entries(self._ground_truth(), self._detections, *options)
                self._results[chosen] = result
        return self._results[chosen]

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``predictions.json`` and ``ground_truth.json``; return their paths.

        They are in COCO's formats of results and instances; a difficult object's area lies beyond
        all area ranges. `score_predictions` scores the two to exactly the same numbers with the
        same backend.
        """
        contents = {"predictions": self._detections, "ground_truth": self._ground_truth()}
        paths = Path(folder) / "predictions.json", Path(folder) / "ground_truth.json"
        for path in paths:
            write_text(path, json.dumps(contents[path.stem], allow_nan=False) + "\n")
        return paths

    def _ground_truth(self) -> dict[str, Any]:
        """All objects as an instances JSON has them, with ids from 1."""
        pairs = zip(self.category_ids, self.classes, strict=True)
        return {
            "info": {},
            "images": list(self._images.values()),
            "categories": [{"id": number, "name": name} for number, name in pairs],
            "annotations": [{"id": row} | entry for row, entry in enumerate(self._objects, 1)],
        }

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

    def _fields(self, records: Records, columns: Columns, points: int | None) -> Fields:
        """What objects and detections share: image, category, box, and masks and keypoints."""
        labels, boxes = columns["labels"].tolist(), columns["boxes"].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]  # in float64 the difference of two float32 keeps all digits
        are_ids = self._by_id and "scores" in columns
        fields = {
            "image_id": [records.image_ids[index] for index in columns["images"].tolist()],
            "category_id": labels if are_ids else [self.category_ids[k - 1] for k in labels],
            "bbox": boxes.tolist(),
        }
        if "segm" in self.iou_types:
            fields["segmentation"] = _masks(records)
        if "keypoints" in self.iou_types:
            keypoints = records.column("keypoints", points or 1)
            records.check_rows(np.isfinite(keypoints), "keypoints", keypoints, "finite numbers")
            fields["keypoints"] = [each.ravel().tolist() for each in keypoints]
        return fields


def _rows(fields: Fields) -> Iterator[dict[str, Any]]:
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
