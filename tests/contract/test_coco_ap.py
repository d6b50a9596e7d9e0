"""COCO's average precision against pycocotools called by hand, and cases done on paper."""

import math

import numpy as np
import pytest
import torch
from coco_oracle import (
    CATEGORY_IDS,
    CLASSES,
    IOU_TYPES,
    add_keypoints,
    as_entries,
    check_by_hand,
    evaluator_of,
    full_case,
    plain_evaluator,
    random_case,
    truth,
)
from pycocotools.cocoeval import Params
from voc_oracle import image

BACKENDS = (
    "pycocotools",
    pytest.param("faster-coco-eval", marks=pytest.mark.filterwarnings("error")),
)
NAN = math.nan


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    return request.param


# ------------------------------------------------------------------------------ against pycocotools


def test_same_numbers_as_pycocotools(backend, capsys):
    """Crowds, areas of their own and equal scores among the objects; a class has no objects."""
    predictions, targets = full_case()
    options = {"iou_types": ("segm", "bbox", "keypoints"), "backend": backend}
    evaluator = evaluator_of(predictions, targets, **options)
    assert evaluator.iou_types == options["iou_types"]
    assert evaluator.compute() is evaluator.compute("segm")
    assert capsys.readouterr() == ("", "")
    files = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
    for iou_type in IOU_TYPES:
        result = evaluator.compute(iou_type)
        check_by_hand(result, *files, iou_type, atol=0 if backend == "pycocotools" else 1e-12)
        assert 0.05 < result.ap < 0.95
        assert math.isnan(result.ap_by_class["cow"])


def test_any_number_of_keypoints_with_sigmas():
    predictions, targets = random_case(0, 20)
    add_keypoints(predictions, targets, num=5)
    sigmas = [0.02, 0.05, 0.1, 0.03, 0.08]
    files = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
    mean = np.mean(Params("keypoints").kpt_oks_sigmas)
    for given, used in ((sigmas, sigmas), (None, [mean] * 5)):
        options = {"iou_types": ["keypoints"], "keypoint_sigmas": given}
        result = evaluator_of(predictions, targets, **options).compute()
        check_by_hand(result, *files, "keypoints", used, atol=1e-12)
        assert math.isnan(result.ap_small + result.ar1)


# ------------------------------------------------------------------------------------- on paper

BOX, BESIDE, FAR = [0, 0, 10, 10], [0, 0, 10, 7.8], [50, 50, 60, 60]
# IoU 0.78 reaches 0.5, 0.55, ..., 0.75: six of the ten thresholds.
SIX = {"ap": 0.3, "ap50": 0.5, "ap75": 0.5, "ap_small": 0.3, "ap_medium": NAN, "ap_large": NAN}
SIX |= {"ar1": 0.0, "ar10": 0.6, "ar100": 0.6, "ar": 0.6, "ar_small": 0.6}
THREE = [[0, 0, 20, 20], [40, 0, 60, 20], [80, 0, 100, 20]]
LARGE = [[0, 0, 100, 100], [200, 0, 220, 20]]

# Boxes found with their scores, objects, which of those are difficult, numbers.
ON_PAPER = {
    "six thresholds behind a miss": ([BESIDE, FAR], [0.5, 0.9], [BOX], [0], SIX),
    # The first is found, the second is not found quite, the third is missed; a miss elsewhere.
    "difficult objects count neither way": (
        [THREE[0], [40, 0, 60, 15.6], [0, 50, 20, 70]], [0.9, 0.5, 0.7], THREE, [1, 0, 1], SIX,
    ),
    # A small part of it is a false positive: its IoU is the plain one.
    "a difficult object is no crowd": (
        [[10, 10, 30, 30], LARGE[1]], [0.9, 0.5], LARGE, [1, 0], {"ap50": 0.5},
    ),
    "the best hundred count": ([FAR] * 100 + [BOX], [0.9] * 100 + [0.1], [BOX], [0], {"ap": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", ON_PAPER)
def test_on_paper(case, backend):
    boxes, scores, objects, difficult, expected = ON_PAPER[case]
    target = truth(objects, difficult=torch.tensor(difficult))
    result = plain_evaluator([image(boxes, scores)], [target], backend=backend).compute()
    got = {name: getattr(result, name) for name in expected}
    assert got == pytest.approx(expected, nan_ok=True)
    assert result.num_objects == {"cat": len(objects) - sum(difficult)}
    assert result.mean_ap == result.ap


def test_difficult_object_takes_no_keypoints_far_from_its_own(backend):
    points = torch.rand(17, 3, generator=torch.Generator().manual_seed(0)) * 40
    points[:, 2] = 2

    def at(*places):
        keypoints = torch.stack([points + torch.tensor([x, 0, 0]) for x in places])
        return {"boxes": [[x, 0, x + 40, 40] for x in places], "keypoints": keypoints}

    target = truth(**at(0, 1000), difficult=torch.tensor([1, 0]))
    # On the difficult one a detection counts neither way, elsewhere it is a false positive.
    for first, expected in ((0, 1.0), (500, 0.5)):
        found = image(scores=[0.9, 0.8], **at(first, 1000))
        options = {"iou_types": ["keypoints"], "backend": backend}
        assert plain_evaluator([found], [target], **options).compute().ap == pytest.approx(expected)


# ------------------------------------------------------------------------------------- empty sides


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_nothing(backend, iou_type):
    shapes = {"masks": torch.ones(1, 1, 20, 20), "keypoints": torch.full((1, 17, 3), 2.0)}
    found, there = image([BOX], [0.5], **shapes), truth([BOX], **shapes)
    for predictions, targets, ap in (
        ([], [], NAN),
        ([image([], [])], [there], 0.0),
        ([found, image([], [])], [truth([]), truth([], 2)], NAN),
    ):
        options = {"iou_types": [iou_type], "backend": backend}
        result = evaluator_of(predictions, targets, **options).compute()
        assert [result.ap, result.ap_by_class["cat"]] == pytest.approx([ap] * 2, nan_ok=True)
        assert math.isnan(result.ap_by_class["dog"])
        assert result.num_images == len(targets)
        assert result.num_detections == {"cat": len(predictions) // 2, "dog": 0, "cow": 0}
