"""Scoring detections against ground truth, both as COCO's dicts, by pycocotools or its faster twin.

Shape legend of the backends' arrays: T IoU thresholds, R recalls, K categories in the order of
their ids, A area ranges, M limits on the number of detections.
"""

import contextlib
import importlib
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detmix.data.coco.file import Id, id_order
from detmix.evaluation.coco.masks import mask_area
from detmix.evaluation.records import check_choice
from detmix.evaluation.results import COCOResult, IouType

Backend = Literal["auto", "pycocotools", "faster-coco-eval"]
Entry = Mapping[str, Any]
Numbers = Mapping[Id, int]

_PARTS = {"images": "image_id", "categories": "category_id"}  # what has ids, and where they stand

# What holds the overlap of each type, in annotations and in results.
SHAPE_KEYS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}

# COCO's largest area range ends at 1e5². Both backends overwrite an annotation's ``ignore`` by its
# ``iscrowd``, but ignore objects outside all area ranges: an object of this area counts neither
# way. As a crowd it would not: that also changes its IoU, which is then divided by the detection's
# area alone.
IGNORED_AREA = 1e11
_MAX_AREA = 1e5**2


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend, ImportError for one that is not installed."""
    check_choice("backend", backend, Backend)
    if backend == "faster-coco-eval" and not importlib.util.find_spec("faster_coco_eval"):
        raise ImportError(
            "backend 'faster-coco-eval' is not installed; run pip install 'detmix[fast]', or "
            "choose 'pycocotools', whose numbers are the same to rounding"
        )


def complete(annotation: dict[str, Any]) -> None:
    """Add what an object leaves open; a difficult one counts neither way in any program."""
    is_difficult, num_keypoints = annotation.get("difficult"), annotation.get("num_keypoints")
    if is_difficult:
        annotation["area"] = IGNORED_AREA
    elif math.isnan(annotation["area"]) and "segmentation" in annotation:
        annotation["area"] = mask_area(annotation["segmentation"])
    elif math.isnan(annotation["area"]):
        annotation["area"] = math.prod(max(side, 0.0) for side in annotation["bbox"][2:])
    if "keypoints" in annotation and (is_difficult or num_keypoints is None):
        visible = sum(v > 0 for v in annotation["keypoints"][2::3])
        annotation["num_keypoints"] = 0 if is_difficult else visible


def score_entries(
    ground_truth: Entry,
    results: Sequence[Entry],
    iou_type: IouType,
    backend: Backend,
    keypoint_sigmas: Sequence[float] | None,
) -> COCOResult:
    """Score detections by COCO's rule."""
    # A detection's area is that of its box, mask or keypoints by the IoU type, also where it has a
    # box besides (pycocotools' ``loadRes`` would take the box's). Annotations must have ids from 1:
    # pycocotools takes a match with number 0 for none. The first detection that matches a difficult
    # object is left out, and so is the object.
    coco_type, evaluation_type = _load_backend(backend)
    numbers = {key: _numbers(ground_truth[part]) for part, key in _PARTS.items()}
    about = {
        part: [{**entry, "id": numbers[key][entry["id"]]} for entry in ground_truth[part]]
        for part, key in _PARTS.items()
    }
    keys = ["id", "bbox", "area", "iscrowd", SHAPE_KEYS[iou_type]]
    keys += ["num_keypoints"] if iou_type == "keypoints" else []
    annotations = [_kept(entry, numbers, *keys) for entry in ground_truth["annotations"]]
    for entry, given in zip(annotations, ground_truth["annotations"], strict=True):
        # The area is part of the keypoints' overlap: it must not be IGNORED_AREA.
        if iou_type == "keypoints" and given.get("difficult"):
            entry["area"] = math.prod(entry["bbox"][2:])
    results = [_kept(entry, numbers, "score", SHAPE_KEYS[iou_type]) for entry in results]
    # pycocotools prints its progress and has no switch for it.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _indexed(coco_type, about, annotations)
        # ``loadRes`` fails on an empty list.
        found = truth.loadRes(results) if results else _indexed(coco_type, about, [])
        evaluation = evaluation_type(truth, found, iou_type)
        # Said here because the faster one leaves out categories without annotated keypoints.
        evaluation.params.catIds = sorted(truth.cats)
        if iou_type == "keypoints":
            _set_sigmas(evaluation.params, truth, results, keypoint_sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    return _result(evaluation, truth, results, iou_type)


def _load_backend(backend: Backend) -> tuple[Any, Any]:
    """The classes that hold annotations and that evaluate."""
    if backend != "pycocotools" and importlib.util.find_spec("faster_coco_eval"):
        module = importlib.import_module("faster_coco_eval")
        return module.COCO, module.COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _numbers(entries: Sequence[Entry]) -> Numbers:
    """The place of each id among the sorted ones."""
    # What the backends get: the faster one knows no strings, and looks up ids as floats.
    ids = sorted((entry["id"] for entry in entries), key=id_order)
    return {value: number for number, value in enumerate(ids)}


def _kept(entry: Entry, numbers: Mapping[str, Numbers], *keys: str) -> dict[str, Any]:
    """Some fields of an entry, and its image and category by their numbers."""
    kept = {key: entry[key] for key in keys}
    return kept | {key: number_of[entry[key]] for key, number_of in numbers.items()}


def _indexed(coco_type: Any, about: Entry, annotations: list[Any]) -> Any:
    """A backend's own data set, with the images and categories of ``about``."""
    coco = coco_type()
    coco.dataset = {"info": {}, **about, "annotations": annotations}
    coco.createIndex()
    return coco


def _set_sigmas(
    params: Any, truth: Any, results: Sequence[Entry], sigmas: Sequence[float] | None
) -> None:
    """Give each keypoint its falloff, where COCO's own 17 do not fit."""
    entries = truth.dataset["annotations"] or results
    if not entries:
        return
    num = len(entries[0]["keypoints"]) // 3
    if sigmas is not None and len(sigmas) != num:
        raise ValueError(f"{len(sigmas)} keypoint_sigmas for {num} keypoints, expected one each")
    if sigmas is not None:
        params.kpt_oks_sigmas = np.asarray(sigmas, dtype=np.float64)
        if not all(math.isfinite(sigma) and sigma > 0 for sigma in sigmas):
            raise ValueError(f"keypoint_sigmas is {list(sigmas)}, expected finite numbers over 0")
    elif num != len(params.kpt_oks_sigmas):
        params.kpt_oks_sigmas = np.full(num, params.kpt_oks_sigmas.mean())


def _result(evaluation: Any, truth: Any, results: Sequence[Entry], iou_type: IouType) -> COCOResult:
    names = {entry["id"]: entry["name"] for entry in truth.dataset["categories"]}
    precision = np.asarray(evaluation.eval["precision"])  # (T, R, K, A, M)
    at_50 = evaluation.params.iouThrs == 0.5
    counted = Counter(
        entry["category_id"] for entry in truth.dataset["annotations"] if _counts(entry)
    )
    found = Counter(entry["category_id"] for entry in results)
    of_class = {name: precision[:, :, number, 0, -1] for number, name in names.items()}
    return COCOResult(
        iou_type=iou_type,
        **_summary(evaluation.params, precision, np.asarray(evaluation.eval["recall"])),
        ap_by_class={name: _mean(ap) for name, ap in of_class.items()},
        ap50_by_class={name: _mean(ap[at_50]) for name, ap in of_class.items()},
        classes=tuple(of_class),
        num_objects={name: counted[number] for number, name in names.items()},
        num_detections={name: found[number] for number, name in names.items()},
        num_images=len(truth.imgs),
    )


def _counts(annotation: Entry) -> bool:
    inside = 0 <= annotation["area"] <= _MAX_AREA
    return inside and not annotation["iscrowd"] and annotation.get("num_keypoints", 1) != 0


def _summary(
    params: Any, precision: NDArray[np.float64], recall: NDArray[np.float64]
) -> dict[str, float]:
    """COCO's summary numbers; the means are taken as pycocotools' ``summarize`` takes them."""
    summary = {}
    for name, values in (("ap", precision), ("ar", recall)):
        summary[name] = _mean(values[..., 0, -1])
        for end, iou in (("50", 0.5), ("75", 0.75)):
            summary[name + end] = _mean(values[params.iouThrs == iou][..., 0, -1])
        for area in ("small", "medium", "large"):
            summary[f"{name}_{area}"] = _mean(values[..., np.array(params.areaRngLbl) == area, -1])
    for most in (1, 10, 100):
        summary[f"ar{most}"] = _mean(recall[..., 0, np.array(params.maxDets) == most])
    return summary


def _mean(values: NDArray[np.float64]) -> float:
    """The mean without the -1 that stand for nothing; NaN where nothing is left."""
    valid = values[values > -1]
    return float(np.mean(valid)) if valid.size else math.nan
