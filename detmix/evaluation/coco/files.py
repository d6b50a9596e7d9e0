"""Scoring saved predictions, which anybody may have written, against an annotation file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detmix.data.coco.categories import unique_names
from detmix.data.coco.file import (
    CocoFile,
    is_finite,
    load_json,
    look_up,
    paused_collection,
    read_box,
    read_coco,
    read_flag,
    read_keypoints,
)
from detmix.data.coco.masks import read_segmentation, shorten
from detmix.evaluation.coco.backend import Backend, check_backend, complete, score_entries
from detmix.evaluation.records import check_choice
from detmix.evaluation.results import COCOResult, IouType


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
    are pycocotools', but for what it gets wrong: an annotation with id 0, and the area of masks and
    keypoints whose entries have a ``bbox`` too, which ``loadRes`` takes from the box.

    Args:
        predictions: a file in COCO's results format: a list of ``{"image_id", "category_id",
            "score"}`` with ``"bbox"`` ``[x, y, width, height]``, ``"segmentation"`` (run lengths or
            polygons) or ``"keypoints"``, as ``iou_type`` needs them.
        annotations: an instances JSON as `CocoDetection` reads it, but that images need no file
            names, and objects no ids. Objects without keypoints are as those without a labelled
            one. Ids of images, numbers or strings, are the same in both files: ``"1"`` is not
            ``1``. Of LVIS's files a warning tells that COCO's rule is not theirs.
        iou_type: ``"bbox"``, ``"segm"`` or ``"keypoints"``.
        backend: this and ``keypoint_sigmas`` are as `COCOEvaluator` has them.
        keypoint_sigmas: K numbers.

    Returns:
        The numbers; classes in the order of the file's categories, with their ids behind names
        that several share.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file, the entry and the value, for what cannot be scored.
    """
    check_choice("iou_type", iou_type, IouType)
    check_backend(backend)
    path = Path(predictions)
    with paused_collection():
        file = read_coco(annotations, masks=iou_type == "segm", named=False)
        for problem in file.problems.values():
            raise problem.error
        what = "predictions in COCO's results format"
        found = load_json(path, what, masks=iou_type == "segm")
        if not isinstance(found, list):
            raise ValueError(f"{path}: expected a list of predictions, got {shorten(found)}")
        num_keypoints = _num_keypoints(file, found) if iou_type == "keypoints" else 0
        truth = _ground_truth(file, iou_type, num_keypoints)
        results = _results(path, found, file, iou_type, num_keypoints)
        return score_entries(truth, results, iou_type, backend, keypoint_sigmas)


def _num_keypoints(file: CocoFile, found: list[Any]) -> int:
    """How many an entry has: as many as the first that has any, or else as categories name."""
    lists = [item.get("keypoints") for item in file.items]
    named = max(len(category.keypoints) for category in file.categories)
    if lists and not named and not any(lists):
        raise ValueError(f"{file.path}: no annotation has 'keypoints', and no category names any")
    lists += [item.get("keypoints") for item in found if isinstance(item, dict)]
    first = next((value for value in lists if value and isinstance(value, list)), [])
    return len(first) // 3 or named


def _ground_truth(file: CocoFile, iou_type: IouType, num_keypoints: int) -> dict[str, Any]:
    """What a file says, as entries with all that the backends need."""
    annotations = []
    for row, item in enumerate(file.items):
        entry = {key: item[key] for key in ("image_id", "category_id", "bbox")}
        entry |= {"id": row + 1, "area": float(file.area[row]), "iscrowd": int(file.iscrowd[row])}
        try:
            entry["difficult"] = read_flag(item, "difficult")
            entry |= _shape(item, file.size(file.image_index[row]), iou_type, num_keypoints)
            if iou_type == "keypoints":
                visible = entry["num_keypoints"] = item.get("num_keypoints")
                if visible is not None and (not is_finite(visible) or visible < 0 or visible % 1):
                    raise ValueError(f"num_keypoints must be a number of points, got {visible!r}")
        except ValueError as error:
            raise ValueError(f"{file.where(row)}: {error}") from None
        complete(entry)
        annotations.append(entry)
    images = zip(file.image_ids, file.sizes.tolist(), strict=True)
    categories = unique_names(file.categories).items()
    return {
        "images": [{"id": image_id, "height": h, "width": w} for image_id, (h, w) in images],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": annotations,
    }


def _results(
    path: Path, found: list[Any], file: CocoFile, iou_type: IouType, num_keypoints: int
) -> list[dict[str, Any]]:
    """Predictions as the backends need them."""
    images = {image_id: index for index, image_id in enumerate(file.image_ids)}
    categories = {category.id: index for index, category in enumerate(file.categories)}
    results = []
    for number, item in enumerate(found):
        try:
            if not isinstance(item, dict):
                raise ValueError(f"must be an object, got {shorten(item)}")
            index = look_up(item, "image_id", images)
            look_up(item, "category_id", categories)
            if not is_finite(item.get("score")):
                raise ValueError(f"score must be a finite number, got {item.get('score')!r}")
            entry = {key: item[key] for key in ("image_id", "category_id", "score")}
            if iou_type == "bbox":
                entry["bbox"] = list(read_box(item.get("bbox")))
                if min(entry["bbox"][2:]) < 0:
                    raise ValueError(f"bbox must have sides of 0 or more, got {item['bbox']}")
            elif iou_type == "keypoints" and item.get("keypoints") is None:
                raise ValueError("has no 'keypoints'")
            results.append(entry | _shape(item, file.size(index), iou_type, num_keypoints))
        except ValueError as error:
            raise ValueError(f"{path}, predictions[{number}]: {error}") from None
    return results


def _shape(
    item: dict[str, Any], size: tuple[int, int], iou_type: IouType, num_keypoints: int
) -> dict[str, Any]:
    """The mask or the keypoints of an object or a prediction, where these are evaluated."""
    if iou_type == "segm":
        return {"segmentation": read_segmentation(item, size)}
    if iou_type == "keypoints":
        keypoints = read_keypoints(item.get("keypoints"), num_keypoints)
        return {"keypoints": keypoints.ravel().tolist()}
    return {}
