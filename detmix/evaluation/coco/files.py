"""COCO's files: detections in its results format, ground truth as an instances JSON, their score.

Shape legend: N objects or detections of one image, K keypoints each.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detmix.evaluation.coco.backend import (
    IGNORED_AREA,
    Backend,
    check_choices,
    paused_collection,
    score_entries,
)
from detmix.evaluation.coco.ground_truth import check_ground_truth, check_predictions
from detmix.evaluation.coco.records import CocoImage, Instances
from detmix.evaluation.coco.result import COCOResult, IouType
from detmix.files import read_file, write_text

_ANNOTATIONS = "expected annotations in COCO's format, as JSON"
_PREDICTIONS = "expected predictions in COCO's results format, as JSON"


def score_predictions(
    predictions: str | Path,
    annotations: str | Path,
    *,
    iou_type: IouType = "bbox",
    backend: Backend = "auto",
    keypoint_sigmas: Sequence[float] | None = None,
) -> COCOResult:
    """Score saved predictions, whoever wrote them, without a model.

    What `COCOEvaluator.save` has written scores exactly as `COCOEvaluator.compute` did. The numbers
    are those of pycocotools' ``loadRes``, ``evaluate``, ``accumulate`` and ``summarize``, but for
    what it gets wrong: an annotation with id 0, and the area of masks and keypoints whose entries
    have a ``bbox`` too, which ``loadRes`` takes from the box (it matters to the values by area).

    Args:
        predictions: a file in COCO's results format: a list of ``{"image_id", "category_id",
            "score"}`` with ``"bbox"`` ``[x, y, width, height]``, compressed ``"segmentation"``
            or ``"keypoints"``, as ``iou_type`` needs them. Images without any have no entry.
        annotations: an instances JSON, of the oddities that `CocoDetection` reads too: null is as
            good as an absent key, sides of images may be whole floats, polygons of two points count
            for nothing, boxes may have negative sides (nothing overlaps them), and objects without
            keypoints are as those without a labelled one.
        iou_type: ``"bbox"``, ``"segm"`` or ``"keypoints"``.
        backend: as `COCOEvaluator` has it.
        keypoint_sigmas: as `COCOEvaluator` has it.

    Returns:
        The numbers; classes in the order of the file's categories.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file, the entry, the value and what was expected: something that is
            not JSON or not a list, a missing key, an unknown image or category, a box with NaN, a
            prediction's with a negative side, run lengths that are broken or do not fill the
            image; an unknown IoU type or backend.
        ImportError: a backend that is not installed.
    """
    check_choices(iou_type, backend)
    predictions, annotations = Path(predictions), Path(annotations)
    with paused_collection():
        ground_truth = check_ground_truth(annotations, _load(annotations, _ANNOTATIONS), iou_type)
        found = _load(predictions, _PREDICTIONS)
        results = check_predictions(predictions, found, ground_truth, iou_type)
        return score_entries(
            ground_truth,
            results,
            iou_type=iou_type,
            backend=backend,
            keypoint_sigmas=keypoint_sigmas,
        )


def save_predictions(
    path: str | Path, images: Sequence[CocoImage], category_ids: Sequence[int]
) -> Path:
    """Write all images' detections in COCO's results format."""
    return _save(Path(path), prediction_entries(images, category_ids))


def save_ground_truth(
    path: str | Path,
    images: Sequence[CocoImage],
    classes: Sequence[str],
    category_ids: Sequence[int],
) -> Path:
    """Write all images' ground truth as a COCO instances JSON, as `save_predictions` writes."""
    return _save(Path(path), ground_truth_entries(images, classes, category_ids))


def prediction_entries(
    images: Sequence[CocoImage], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """All images' detections in COCO's results format."""
    entries = []
    for image in images:
        found = image.detections
        shapes = _shapes(image.image_id, found, category_ids)
        for entry, score in zip(shapes, found.scores.tolist(), strict=True):
            entries.append(entry | {"score": score})
    return entries


def ground_truth_entries(
    images: Sequence[CocoImage], classes: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """All images' ground truth as a COCO instances JSON holds it, with ids from 1."""
    # A difficult object gets an area beyond all of COCO's ranges and no labelled keypoints, so that
    # as a box or a mask it counts neither way in any program.
    annotations: list[dict[str, Any]] = []
    for image in images:
        there = image.objects
        areas = np.where(there.difficult, IGNORED_AREA, there.area).tolist()
        rows = zip(
            _shapes(image.image_id, there, category_ids),
            areas,
            there.iscrowd.tolist(),
            there.difficult.tolist(),
            strict=True,
        )
        for entry, area, iscrowd, difficult in rows:
            entry |= {"id": len(annotations) + 1, "area": area, "iscrowd": int(iscrowd)}
            if difficult:
                entry["difficult"] = 1
            if "keypoints" in entry:
                visible = sum(v > 0 for v in entry["keypoints"][2::3])
                entry["num_keypoints"] = 0 if difficult else visible
            annotations.append(entry)
    categories = [
        {"id": number, "name": name} for number, name in zip(category_ids, classes, strict=True)
    ]
    return {
        "info": {},
        "images": [_image_entry(image) for image in images],
        "categories": categories,
        "annotations": annotations,
    }


def _image_entry(image: CocoImage) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": image.image_id}
    if image.size is not None:
        entry |= {"height": image.size[0], "width": image.size[1]}
    if image.file_name is not None:
        entry["file_name"] = image.file_name
    return entry


def _shapes(
    image_id: int, instances: Instances, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """What the entries of objects and detections share: image, category, box, mask, keypoints."""
    boxes = instances.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]  # in float64 the difference of two float32 keeps all their digits
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box}
        for label, box in zip(instances.labels.tolist(), boxes.tolist(), strict=True)
    ]
    if instances.masks is not None:
        for entry, mask in zip(entries, instances.masks, strict=True):
            entry["segmentation"] = mask
    if instances.keypoints is not None:
        flat = instances.keypoints.reshape(len(entries), -1).tolist() if entries else []
        for entry, keypoints in zip(entries, flat, strict=True):
            entry["keypoints"] = keypoints
    return entries


def _save(path: Path, value: Any) -> Path:
    write_text(path, json.dumps(value, allow_nan=False) + "\n")
    return path


def _load(path: Path, expected: str) -> Any:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, {expected}")
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise ValueError(f"{path}: not JSON: {error}; {expected}") from error
