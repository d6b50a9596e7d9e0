"""Average precision as COCO defines it, gathered batch by batch.

Shape legend: D detections and G ground-truth objects of one image, C classes without the
background, K keypoints of an object.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from detmix.data.coco.file import paused_collection
from detmix.data.detection import check_classes
from detmix.evaluation.coco.backend import Backend, check_backend, score_entries
from detmix.evaluation.coco.records import CocoImage, CocoReader
from detmix.evaluation.records import Record, check_choice
from detmix.evaluation.results import COCOResult, IouType
from detmix.files import write_text

PredictionLabels: TypeAlias = Literal["contiguous", "category_id"]


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
        self._images: dict[int | str, CocoImage] = {}
        self._results: dict[str, COCOResult] = {}
        num = None if self.keypoint_sigmas is None else len(self.keypoint_sigmas)
        self._reader = CocoReader(self.category_ids, self.iou_types, self._by_id, num)

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
        for image in self._reader.read(predictions, targets):
            self._images.setdefault(image.entry["id"], image)
        self._results = {}

    def compute(self, iou_type: IouType | None = None) -> COCOResult:
        """Evaluate all images so far by one of the constructor's IoU types, its first by default.

        Asking again before the next `update` is free.
        """
        chosen = self.iou_types[0] if iou_type is None else iou_type
        check_choice("iou_type", chosen, self.iou_types)
        if chosen not in self._results:
            with paused_collection():
                self._results[chosen] = score_entries(
                    self._ground_truth(),
                    self._found(),
                    iou_type=chosen,
                    backend=self.backend,
                    keypoint_sigmas=self.keypoint_sigmas,
                )
        return self._results[chosen]

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``predictions.json`` and ``ground_truth.json``; return their paths.

        They are in COCO's formats of results and instances; a difficult object's area lies beyond
        all area ranges. `score_predictions` scores the two to exactly the same numbers with the
        same backend.
        """
        contents = {"predictions": self._found(), "ground_truth": self._ground_truth()}
        paths = Path(folder) / "predictions.json", Path(folder) / "ground_truth.json"
        for path in paths:
            write_text(path, json.dumps(contents[path.stem], allow_nan=False) + "\n")
        return paths

    def _found(self) -> list[dict[str, Any]]:
        """All detections in COCO's results format."""
        return [entry for image in self._images.values() for entry in image.results]

    def _ground_truth(self) -> dict[str, Any]:
        """All objects as an instances JSON has them, with ids from 1."""
        objects = [entry for image in self._images.values() for entry in image.annotations]
        pairs = zip(self.category_ids, self.classes, strict=True)
        return {
            "info": {},
            "images": [image.entry for image in self._images.values()],
            "categories": [{"id": number, "name": name} for number, name in pairs],
            "annotations": [{"id": number} | entry for number, entry in enumerate(objects, 1)],
        }
