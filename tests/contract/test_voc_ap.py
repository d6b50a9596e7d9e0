"""VOC average precision against the devkit's own statements, and cases done by hand."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from voc_oracle import INTERPOLATIONS, check_against_the_devkit, evaluate, image, random_cases

from detmix.evaluation import analyze_errors, average_precision

# ------------------------------------------------------------------------------ against the devkit


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_cases, st.sampled_from([0.3, 0.5, 0.75]))
def test_equals_the_devkit(case, threshold):
    """AP and best F1; difficult objects, duplicates, equal overlaps and scores among them."""
    check_against_the_devkit(evaluate(*case, 5, threshold), *case, threshold)


# ------------------------------------------------------------------------------- worked by hand

UNIT, FAR, AWAY = [0, 0, 10, 10], [50, 50, 60, 60], [100, 0, 110, 10]
HALF, POINT = [0, 0, 10, 5], [5, 5, 5, 5]  # the first overlaps exactly half with UNIT
FOUR = [UNIT, FAR, [20, 20, 30, 30], [70, 70, 90, 90]]

# Boxes found, best first; objects; threshold; AP all-point, 11-point.
BY_HAND = {
    "found, false, found": ([UNIT, AWAY, FAR], FOUR, 0.5, 0.25 + 0.25 * 2 / 3, 5 / 11),
    "at the threshold": ([HALF], [UNIT], 0.5, 0, 0),
    "above the threshold": ([HALF], [UNIT], 0.49, 1, 1),
    # Both overlap the first object most; the second object would do at 0.5 as well.
    "found twice": ([UNIT, [0, 0, 10, 9]], [UNIT, [0, 0, 10, 7]], 0.5, 0.5, 6 / 11),
    "without area": ([POINT], [POINT], 0.5, 0, 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    boxes, objects, threshold, *expected = BY_HAND[case]
    found = image(boxes, [0.9, 0.8, 0.7][: len(boxes)])
    evaluator = evaluate([found], [image(objects)], ["cat"], threshold)
    for interpolation, ap in zip(INTERPOLATIONS, expected, strict=True):
        result = evaluator.compute(interpolation)
        assert result.ap["cat"] == pytest.approx(ap)


def test_no_other_interpolation():
    with pytest.raises(ValueError, match="101point"):
        average_precision(np.zeros(0), np.zeros(0), "101point")


def test_crowds_count_neither_way():
    """COCO's: any number of detections that lie in one with more than half of their own area."""
    crowd, alone = [20, 2, 60, 62], [50, 4, 58, 20]  # found, though it lies in the crowd
    inside = [[22, 5, 32, 20], [30, 30, 58, 60], [15, 4, 30, 20]]  # two thirds of the last one
    outside = [10, 40, 28, 60]  # four ninths of it in the crowd
    found = image([*inside, alone, outside], [0.9, 0.7, 0.5, 0.3, 0.1])
    target = image([alone, crowd], iscrowd=torch.tensor([0, 1]))
    evaluator = evaluate([found], [target], ["cat"])
    result, totals = evaluator.compute(), analyze_errors(evaluator.matching()).totals("all")
    assert result.mean_ap == 1
    assert result.num_objects == {"cat": 1}
    assert (totals["ignored"], totals["correct"], totals["background"]) == (3, 1, 1)


# ----------------------------------------------------------------------------- best F1, as JSON


def test_result_as_json():
    """Classes with objects and detections, with neither, with objects, with a difficult one."""
    difficult = torch.tensor([0, 0, 0, 1])
    target = image([UNIT, FAR, FAR, FAR], labels=[1, 1, 3, 4], difficult=difficult)
    found = image([UNIT, FAR], [0.5, 0.5], [1, 4])
    result = evaluate([found], [target], ["cat", "dog", "cow", "hen"]).compute()
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert plain["ap"] == {"cat": 0.5, "dog": None, "cow": 0, "hen": None}
    assert plain["num_objects"] == {"cat": 2, "dog": 0, "cow": 1, "hen": 0}
    assert plain["num_detections"] == {"cat": 1, "dog": 0, "cow": 0, "hen": 1}
    nothing = dict.fromkeys(("score", "precision", "recall", "f1"))
    assert plain["best_f1"] == {
        "cat": {"score": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3},
        "dog": nothing,
        "cow": {"score": None, "precision": 0, "recall": 0, "f1": 0},
        "hen": nothing,
    }
    assert plain["mean_ap"] == 0.25
