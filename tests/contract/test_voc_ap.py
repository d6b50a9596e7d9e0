"""VOC average precision against the devkit's own statements, and cases done by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from voc_oracle import (
    INTERPOLATIONS,
    check_against_the_devkit,
    evaluate,
    image,
    random_case,
    random_cases,
)

from detmix.evaluation import OperatingPoint, VOCEvaluator, analyze_errors, average_precision

CLASSES = ("cat", "dog", "cow")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------------------ against the devkit


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_cases, st.sampled_from([0.3, 0.5, 0.75]))
def test_equals_the_devkit(case, threshold):
    """Difficult objects, duplicates, equal overlaps and equal scores among them."""
    check_against_the_devkit(evaluate(*case, 5, threshold), *case, threshold)


def test_equals_the_devkit_on_a_large_set():
    case = random_case(7, 300, 6, levels=50)
    mean_ap = check_against_the_devkit(evaluate(*case, 6, batch_size=64), *case)
    assert 0.1 < mean_ap < 0.95  # a case that says something


# ------------------------------------------------------------------------------- worked by hand

UNIT, FAR, AWAY = [0, 0, 10, 10], [50, 50, 60, 60], [100, 0, 110, 10]
HALF, QUARTER = [0, 0, 10, 5], [0, 0, 5, 5]  # overlaps of exactly 1/2 and 1/4 with UNIT
FOUR = [UNIT, FAR, [20, 20, 30, 30], [70, 70, 90, 90]]
POINT = [5, 5, 5, 5]

# Boxes found, best first; objects; rows of the difficult ones; threshold; AP all-point, 11-point.
BY_HAND = {
    "found, false, found": ([UNIT, AWAY, FAR], FOUR, (), 0.5, 0.25 + 0.25 * 2 / 3, 5 / 11),
    "nothing found": ([], [UNIT], (), 0.5, 0, 0),
    "at the threshold": ([HALF], [UNIT], (), 0.5, 0, 0),
    "above the threshold": ([HALF], [UNIT], (), 0.49, 1, 1),
    # Both overlap the first object most; the second object would do at 0.5 as well.
    "found twice": ([UNIT, [0, 0, 10, 9]], [UNIT, [0, 0, 10, 7]], (), 0.5, 0.5, 6 / 11),
    "difficult": ([UNIT, UNIT, FAR], [UNIT, FAR], (0,), 0.5, 1, 1),
    "first of equal overlaps": ([UNIT], [UNIT, UNIT], (1,), 0.5, 1, 1),
    "first of equal overlaps, difficult": ([UNIT], [UNIT, UNIT], (0,), 0.5, 0, 0),
    "without area": ([POINT], [POINT], (), 0.5, 0, 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    boxes, objects, difficult, threshold, *expected = BY_HAND[case]
    is_difficult = torch.tensor([row in difficult for row in range(len(objects))])
    found, target = image(boxes, [0.9, 0.8, 0.7][: len(boxes)]), image(objects)
    evaluator = evaluate([found], [target | {"difficult": is_difficult}], ["cat"], threshold)
    for interpolation, ap in zip(INTERPOLATIONS, expected, strict=True):
        result = evaluator.compute(interpolation)
        assert result.ap["cat"] == pytest.approx(ap)
        assert result.num_objects == {"cat": len(objects) - len(difficult)}
        assert result.num_detections == {"cat": len(boxes)}


def test_precision_recall_curve_by_hand():
    """Detections of difficult objects are no points of it."""
    difficult = torch.tensor([0, 0, 1, 0, 0])
    found = image([UNIT, AWAY, [20, 20, 30, 30], FAR], [0.9, 0.8, 0.75, 0.7])
    target = image([*FOUR, [200, 0, 210, 10]], difficult=difficult)
    curve = evaluate([found], [target], ["cat"]).compute().curves["cat"]
    np.testing.assert_allclose(curve.recall, [0.25, 0.25, 0.5])
    np.testing.assert_allclose(curve.precision, [1, 0.5, 2 / 3])
    np.testing.assert_allclose(curve.scores, [0.9, 0.8, 0.7])
    assert average_precision(curve.recall, curve.precision, "11point") == pytest.approx(5 / 11)
    with pytest.raises(ValueError, match="101point"):
        average_precision(curve.recall, curve.precision, "101point")


def test_crowds_count_neither_way():
    """COCO's: any number of detections that lie in one with more than half of their own area."""
    crowd, alone = [20, 2, 60, 62], [2, 2, 12, 12]
    inside = [[22, 5, 32, 20], [30, 30, 58, 60], [15, 4, 30, 20]]  # two thirds of the last one
    outside = [10, 40, 28, 60]  # four ninths of it in the crowd
    found = image([*inside, alone, outside], [0.9, 0.7, 0.5, 0.3, 0.1])
    target = image([alone, crowd], iscrowd=torch.tensor([0, 1]))
    evaluator = evaluate([found], [target], ["cat"])
    result, totals = evaluator.compute(), analyze_errors(evaluator.matching()).totals("all")
    assert result.mean_ap == 1
    assert result.num_objects == {"cat": 1}
    assert (totals["ignored"], totals["correct"], totals["background"]) == (3, 1, 1)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_nothing_at_all(interpolation):
    evaluator = VOCEvaluator(CLASSES, interpolation=interpolation)
    assert math.isnan(evaluator.compute().mean_ap)
    evaluator.update([image([], [])], [image([])])
    result = evaluator.compute()
    assert result.num_images == 1
    assert all(math.isnan(value) for value in result.ap.values())
    assert average_precision(np.zeros(0), np.zeros(0), interpolation) == 0


# -------------------------------------------------------------------------------- gathering state


def test_batches_order_and_later_changes_of_the_input_change_nothing():
    predictions, targets = random_case(3, 20, 3)
    expected = evaluate(predictions, targets, 3, batch_size=20).compute().as_dict()
    assert evaluate(predictions[::-1], targets[::-1], 3).compute().as_dict() == expected
    evaluator = evaluate([], [], 3)
    for i in range(20):
        evaluator.update(predictions[i : i + 1], targets[i : i + 1])
        evaluator.compute()  # in between
    assert evaluator.compute().as_dict() == expected
    evaluator.reset()
    assert evaluator.compute().num_images == 0
    evaluator.update(predictions, targets)
    for record in (*predictions, *targets):
        record["boxes"][:] = 0
    assert evaluator.compute().as_dict() == expected


def test_repeated_image_ids_are_dropped_and_images_without_always_count():
    """As where processes share images out: the last ones get some twice."""
    predictions, targets = random_case(5, 11, 3)
    plain = evaluate(predictions, targets, 3).compute()
    ids = [0, "000005", torch.tensor(7), torch.tensor([8]), np.int64(9), np.array([10])]
    for index, target in enumerate(targets):
        target["image_id"] = ids[index] if index < len(ids) else 100 + index
    evaluator = evaluate(predictions, targets, 3)
    repeats = [0, 1, 2, 3, 10]
    evaluator.update([predictions[i] for i in repeats], [targets[i] for i in repeats])
    evaluator.update([predictions[2]], [targets[2] | {"image_id": 7}])  # as int this time
    assert evaluator.compute().as_dict() == plain.as_dict()
    twice = [*predictions, predictions[0]], [*targets, targets[0]]  # within one batch
    assert evaluate(*twice, 3, batch_size=12).compute().as_dict() == plain.as_dict()
    del targets[0]["image_id"]
    assert evaluate(predictions[:1] * 3, targets[:1] * 3, 3).compute().num_images == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_batch_of_many_kinds(dtype):
    """Arrays, tensors and their subclasses, of several precisions, on a GPU where there is one."""
    predictions, targets = random_case(2, 12, 3, grid=5, levels=4)  # all precisions hold them
    expected = evaluate(predictions, targets, 3).compute().as_dict()
    for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        for record in (prediction, target):
            if index % 3:
                record |= {k: torch.from_numpy(v).to(DEVICE) for k, v in record.items()}
        if index % 3 == 1:
            target["image_id"] = torch.tensor([index], device=DEVICE)
            prediction |= {key: prediction[key].to(dtype) for key in ("boxes", "scores")}
            target["boxes"] = tv_tensors.BoundingBoxes(
                target["boxes"], format="XYXY", canvas_size=(99, 99)
            )
        if index % 3 == 2 and "difficult" in target:
            target["difficult"] = target["difficult"].to(torch.uint8)
    assert evaluate(predictions, targets, 3, batch_size=12).compute().as_dict() == expected


GOOD = {
    "predictions": [image([UNIT], [0.5]), image([UNIT, FAR], [0.5, 0.4])],
    "targets": [image([UNIT], image_id=41), image([UNIT, FAR], image_id=42)],
}
BAD = [
    ("predictions", "scores", None),
    ("predictions", "scores", torch.rand(1)),
    ("predictions", "scores", torch.tensor([0.5, math.nan])),
    ("predictions", "labels", torch.tensor([1, 4])),
    ("predictions", "labels", torch.tensor([0, 1])),
    ("predictions", "labels", torch.tensor([1.0, 2.0])),
    ("predictions", "boxes", torch.zeros(2, 5)),
    ("targets", "labels", None),
    ("targets", "boxes", torch.tensor([[0, 0, 1, math.inf]] * 2)),
    ("targets", "boxes", torch.tensor([[0.0, 0, 1, 1], [9, 9, 5, 20]])),
    ("targets", "difficult", torch.tensor([1])),
    ("targets", "difficult", torch.tensor([0.5, 0.0])),
    ("targets", "image_id", 0.5),
]


@pytest.mark.parametrize(("side", "key", "value"), BAD)
def test_bad_input_is_named_and_nothing_of_it_is_kept(side, key, value):
    changed = {k: v for k, v in (GOOD[side][1] | {key: value}).items() if v is not None}
    evaluator = VOCEvaluator(CLASSES)
    with pytest.raises(ValueError, match=rf"{side}\[1\].*{key}") as caught:
        evaluator.update(**(GOOD | {side: [GOOD[side][0], changed]}))
    assert key == "image_id" or "42" in str(caught.value)
    evaluator.update(**GOOD)  # no id is remembered either
    assert evaluator.compute().num_images == 2


@pytest.mark.parametrize(
    ("predictions", "message"), [([], "0 predictions and 2 targets"), ([None] * 2, "NoneType")]
)
def test_bad_lists(predictions, message):
    with pytest.raises(ValueError, match=message):
        VOCEvaluator(CLASSES).update(predictions, GOOD["targets"])


BAD_SETTINGS = [
    ({"classes": []}, "classes"),
    ({"classes": ["a", "b", "a"]}, "classes.* a "),
    ({"classes": "cat"}, "'cat'"),
    ({"iou_threshold": 1.0}, "iou_threshold is 1.0"),
    ({"interpolation": "101point"}, "'101point'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SETTINGS)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        VOCEvaluator(**({"classes": CLASSES} | options))


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


@pytest.mark.parametrize(("seed", "levels"), [(0, None), (1, None), (2, 4), (3, 4)])
def test_best_f1_is_the_best_of_what_thresholds_leave(seed, levels):
    """Leave out detections below each score there is, evaluate the rest and take its last point."""
    predictions, targets = random_case(seed, 20, 3, grid=5, levels=levels)
    best = {}
    for score in np.unique(np.concatenate([p["scores"] for p in predictions]))[::-1]:
        left = [{k: v[p["scores"] >= score] for k, v in p.items()} for p in predictions]
        result = evaluate(left, targets, 3).compute()
        for name, curve in result.curves.items():
            if len(curve.recall) and result.num_objects[name]:
                p, r = curve.precision[-1], curve.recall[-1]
                f1 = 2 / (1 / p + 1 / r) if p and r else 0.0
                if name not in best or f1 > best[name].f1 + 1e-12:
                    best[name] = OperatingPoint(curve.scores[-1], p, r, f1)
    result = evaluate(predictions, targets, 3).compute()
    assert len(best) == 2  # the third has no objects
    for name, point in result.best_f1().items():
        expected = vars(best.get(name, OperatingPoint(*[math.nan] * 4)))
        assert vars(point) == pytest.approx(expected, abs=1e-12, nan_ok=True)
