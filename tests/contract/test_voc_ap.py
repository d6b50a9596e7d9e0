"""VOC average precision against a loop written from the devkit's rule, and cases done by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from voc_oracle import evaluate, image, loop_ap, random_case, single

from detmix.evaluation import VOCEvaluator, analyze_errors, average_precision

CLASSES = ("cat", "dog", "cow")
INTERPOLATIONS = ("all-point", "11point")


# ------------------------------------------------------------------------------ against the devkit


def check_against_the_loop(evaluator, *case):
    for interpolation in INTERPOLATIONS:
        result, expected = evaluator.compute(interpolation), loop_ap(*case, interpolation)
        np.testing.assert_allclose(list(result.ap.values()), expected, rtol=0, atol=1e-9)
        mean = math.nan if np.isnan(expected).all() else np.nanmean(expected)
        assert result.mean_ap == pytest.approx(mean, abs=1e-9, nan_ok=True)
    return expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(0, 12),
    num_classes=st.integers(1, 5),
    grid=st.sampled_from([None, 5, 20]),
    score_levels=st.sampled_from([None, 2, 10]),
    threshold=st.sampled_from([0.3, 0.5, 0.75]),
)
def test_equals_the_devkit(seed, num_images, num_classes, grid, score_levels, threshold):
    """Difficult objects, duplicates, equal overlaps (grid) and equal scores (levels) among them."""
    predictions, targets = random_case(seed, num_images, num_classes, grid, score_levels)
    evaluator = evaluate(predictions, targets, num_classes, threshold)
    check_against_the_loop(evaluator, predictions, targets, num_classes, threshold)


def test_equals_the_devkit_on_a_large_set():
    predictions, targets = random_case(7, 800, 6, score_levels=50)
    evaluator = evaluate(predictions, targets, 6, batch_size=64)
    expected = check_against_the_loop(evaluator, predictions, targets, 6, 0.5)
    assert 0.1 < np.nanmean(expected) < 0.95  # a case that says something


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
    prediction = image(boxes, [0.9, 0.8, 0.7][: len(boxes)])
    for interpolation, ap in zip(INTERPOLATIONS, expected, strict=True):
        options = {"iou_threshold": threshold, "interpolation": interpolation}
        result = single(prediction, image(objects, difficult=is_difficult), **options)
        assert result.ap["cat"] == pytest.approx(ap)
        assert result.num_objects == {"cat": len(objects) - len(difficult)}
        assert result.num_detections == {"cat": len(boxes)}


def test_precision_recall_curve_by_hand():
    """Detections of difficult objects are no points of it."""
    difficult = torch.tensor([0, 0, 1, 0, 0])
    found = image([UNIT, AWAY, [20, 20, 30, 30], FAR], [0.9, 0.8, 0.75, 0.7])
    target = image([*FOUR, [200, 0, 210, 10]], difficult=difficult)
    curve = single(found, target).curves["cat"]
    np.testing.assert_allclose(curve.recall, [0.25, 0.25, 0.5])
    np.testing.assert_allclose(curve.precision, [1, 0.5, 2 / 3])
    np.testing.assert_allclose(curve.scores, [0.9, 0.8, 0.7])
    for interpolation, ap in zip(INTERPOLATIONS, BY_HAND["found, false, found"][-2:], strict=True):
        assert average_precision(curve.recall, curve.precision, interpolation) == pytest.approx(ap)


def test_crowds_count_neither_way():
    """COCO's: any number of detections that lie in one with more than half of their own area."""
    crowd, alone = [20, 2, 60, 62], [2, 2, 12, 12]
    inside = [[22, 5, 32, 20], [30, 30, 58, 60], [15, 4, 30, 20]]  # two thirds of the last one
    outside = [10, 40, 28, 60]  # four ninths of it in the crowd
    evaluator = VOCEvaluator(["cat"])
    found = image([*inside, alone, outside], [0.9, 0.7, 0.5, 0.3, 0.1])
    evaluator.update([found], [image([alone, crowd], iscrowd=torch.tensor([0, 1]))])
    result, totals = evaluator.compute(), analyze_errors(evaluator.matching()).totals("all")
    assert result.mean_ap == 1
    assert result.num_objects == {"cat": 1}
    assert (totals["ignored"], totals["correct"], totals["background"]) == (3, 1, 1)


def test_equal_scores_keep_their_order():
    first = single(image([UNIT, FAR], [0.5, 0.5]), image([UNIT]))
    second = single(image([FAR, UNIT], [0.5, 0.5]), image([UNIT]))
    assert (first.ap["cat"], second.ap["cat"]) == (1, 0.5)


def test_classes_without_objects_or_detections():
    evaluator = VOCEvaluator(CLASSES)
    target = image([UNIT, FAR], labels=[1, 3], difficult=torch.tensor([0, 1]))
    evaluator.update([image([UNIT, FAR], [0.9, 0.8], [2, 3])], [target])
    result = evaluator.compute()
    assert result.ap["cat"] == 0  # an object, no detection
    assert math.isnan(result.ap["dog"])  # a detection, no object
    assert math.isnan(result.ap["cow"])  # only a difficult object
    assert result.mean_ap == 0
    assert result.num_objects == {"cat": 1, "dog": 0, "cow": 0}


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_nothing_at_all(interpolation):
    evaluator = VOCEvaluator(CLASSES, interpolation=interpolation)
    assert math.isnan(evaluator.compute().mean_ap)
    evaluator.update([], [])
    evaluator.update([image([], [])], [image([])])
    result = evaluator.compute()
    assert result.num_images == 1
    assert all(math.isnan(value) for value in result.ap.values())
    assert average_precision(np.zeros(0), np.zeros(0), interpolation) == 0


# -------------------------------------------------------------------------------- gathering state


def test_batches_and_order_change_nothing():
    predictions, targets = random_case(3, 20, 3)
    whole = evaluate(predictions, targets, 3, batch_size=20)
    expected = whole.compute().as_dict()
    assert evaluate(predictions[::-1], targets[::-1], 3).compute().as_dict() == expected
    evaluator = VOCEvaluator(["c0", "c1", "c2"])
    for i in range(20):
        evaluator.update(predictions[i : i + 1], targets[i : i + 1])
        evaluator.compute()  # in between
    assert evaluator.compute().as_dict() == expected
    evaluator.reset()
    assert evaluator.compute().num_images == 0
    evaluator.update(predictions, targets)
    assert evaluator.compute().as_dict() == expected


def test_repeated_image_ids_are_dropped():
    """As where processes share images out: the last ones get some twice."""
    predictions, targets = random_case(5, 11, 3)
    plain = evaluate(predictions, targets, 3).compute()
    ids = [0, "000005", torch.tensor(7), torch.tensor([8]), np.int64(9), np.array([10])]
    for index, target in enumerate(targets):
        target["image_id"] = ids[index] if index < len(ids) else 100 + index
    repeats = [0, 1, 2, 3, 10]
    evaluator = VOCEvaluator(["c0", "c1", "c2"])
    evaluator.update(predictions, targets)
    evaluator.update([predictions[i] for i in repeats], [targets[i] for i in repeats])
    evaluator.update([predictions[2]], [targets[2] | {"image_id": 7}])  # as int this time
    assert evaluator.compute().as_dict() == plain.as_dict()
    twice = VOCEvaluator(["c0", "c1", "c2"])
    twice.update([*predictions, predictions[0]], [*targets, targets[0]])  # within one batch
    assert twice.compute().as_dict() == plain.as_dict()


def test_images_without_id_always_count():
    evaluator = VOCEvaluator(["cat"])
    for _ in range(3):
        evaluator.update([image([UNIT], [0.5])], [image([UNIT])])
    result = evaluator.compute()
    assert (result.num_images, result.num_objects["cat"]) == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_types_and_numpy(dtype):
    prediction = image([UNIT, FAR], [0.75, 0.5])
    cast = prediction | {key: prediction[key].to(dtype) for key in ("boxes", "scores")}
    target = image([UNIT, QUARTER], difficult=torch.tensor([0, 0], dtype=torch.uint8))
    arrays = {key: value.numpy() for key, value in prediction.items()}
    expected = single(arrays, {key: value.numpy() for key, value in target.items()})
    assert single(cast, target).as_dict() == expected.as_dict()
    assert expected.ap["cat"] == 0.5


def test_one_batch_of_many_kinds():
    """Arrays, tensors and their subclasses, of several precisions, with and without a field."""
    predictions, targets = random_case(2, 12, 3)
    expected = evaluate(predictions, targets, 3, batch_size=12).compute().as_dict()
    for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        for record in (prediction, target):
            if index % 3:
                record |= {key: torch.from_numpy(value) for key, value in record.items()}
        if index % 3 == 1:
            prediction["scores"] = prediction["scores"].double()
            target["boxes"] = tv_tensors.BoundingBoxes(
                target["boxes"], format="XYXY", canvas_size=(99, 99)
            )
    assert evaluate(predictions, targets, 3, batch_size=12).compute().as_dict() == expected


BAD = {
    "predictions": [
        ("scores", None),
        ("scores", torch.rand(1)),
        ("scores", torch.tensor([0.5, math.nan])),
        ("labels", torch.tensor([1, 4])),
        ("labels", torch.tensor([0, 1])),
        ("labels", torch.tensor([1.0, 2.0])),
        ("boxes", torch.zeros(2, 5)),
        ("boxes", torch.full((2, 4), math.nan)),
    ],
    "targets": [
        ("labels", None),
        ("labels", torch.tensor([1, -1])),
        ("boxes", torch.tensor([[0, 0, 1, math.inf]] * 2)),
        ("boxes", torch.tensor([[0.0, 0, 1, 1], [9, 9, 5, 20]])),
        ("difficult", torch.tensor([1])),
        ("difficult", torch.tensor([0.5, 0.0])),
    ],
}


@pytest.mark.parametrize("side", BAD)
def test_bad_input_is_named_and_nothing_of_it_is_kept(side):
    good = {
        "predictions": [image([UNIT], [0.5]), image([UNIT, FAR], [0.5, 0.4])],
        "targets": [image([UNIT], image_id=41), image([UNIT, FAR], image_id=42)],
    }
    evaluator = VOCEvaluator(CLASSES)
    for key, value in BAD[side]:
        changed = {k: v for k, v in (good[side][1] | {key: value}).items() if v is not None}
        with pytest.raises(ValueError, match=rf"{side}\[1\].*42.*{key}"):
            evaluator.update(**(good | {side: [good[side][0], changed]}))
    evaluator.update(**good)  # no id is remembered either
    assert evaluator.compute().num_images == 2


# ------------------------------------------------------------------------------- kinds of errors

SIMILAR = [("cat", "dog")]


def errors_of(boxes, labels, objects, **options):
    evaluator = VOCEvaluator(CLASSES)
    scores = np.linspace(0.9, 0.1, len(boxes))
    evaluator.update([image(boxes, scores, labels)], [image(objects)])
    return analyze_errors(evaluator.matching(), **options)


@pytest.mark.parametrize(
    ("label", "box", "options", "kind"),
    [
        (1, UNIT, {}, "correct"),
        (1, HALF, {}, "localization"),  # the threshold itself is no match
        (1, QUARTER, {"background_iou": 0.25}, "localization"),
        (1, QUARTER, {"background_iou": 0.26}, "background"),
        (2, QUARTER, {"background_iou": 0.25}, "other_class"),
        (2, QUARTER, {"similar": SIMILAR}, "similar_class"),
        (2, QUARTER, {"similar": [("dog", "cow")]}, "other_class"),
        (2, UNIT, {"similar": SIMILAR}, "similar_class"),
        (2, QUARTER, {"background_iou": 0.26}, "background"),
        (1, FAR, {}, "background"),
    ],
)
def test_kinds_at_their_limits(label, box, options, kind):
    totals = errors_of([box], [label], [UNIT], **({"similar": ()} | options)).totals("all")
    assert {name for name, count in totals.items() if count} == {kind}


@pytest.mark.parametrize(
    ("boxes", "labels", "kind"),
    [
        ([UNIT, UNIT, FAR], [1, 1, 1], "duplicate"),
        ([AWAY, UNIT, FAR], [1, 1, 1], "background"),
        ([[50, 50, 60, 53], UNIT], [1, 1], "localization"),
        ([[50, 50, 60, 53], UNIT, FAR], [1, 1, 1], "localization"),
        ([UNIT, FAR], [1, 3], "other_class"),
        ([UNIT, FAR], [1, 2], "similar_class"),
    ],
)
def test_a_detector_with_errors_of_one_kind_would_be_perfect_without(boxes, labels, kind):
    analysis = errors_of(boxes, labels, [UNIT, FAR], similar=SIMILAR)
    assert analysis.mean_ap < 0.9
    nothing = dict.fromkeys(analysis.ap_gain, 0.0)
    assert analysis.ap_gain == pytest.approx(nothing | {kind: 1 - analysis.mean_ap})


@pytest.mark.parametrize(("grid", "score_levels"), [(None, None), (5, 4)])
def test_kinds_add_up_to_the_detections(grid, score_levels):
    evaluator = evaluate(*random_case(3, 60, 4, grid, score_levels), 4)
    result = evaluator.compute("all-point")
    analysis = analyze_errors(evaluator.matching(), similar=[("c0", "c1")])
    for name, num in result.num_objects.items():
        curve, counts = result.curves[name], {k: v[name] for k, v in analysis.counts.items()}
        every, best, point = counts["all"], counts["best_f1"], result.best_f1()[name]
        assert sum(every.values()) == result.num_detections[name]
        assert sum(every.values()) - every["ignored"] == len(curve.scores)
        assert sum(counts["top_n"].values()) == min(num, len(curve.scores))
        if num:
            assert every["correct"] == pytest.approx(num * curve.recall[-1])
            shown = sum(best.values()) - best["ignored"]
            assert best["correct"] == pytest.approx(num * point.recall)
            assert best["correct"] == pytest.approx(shown * point.precision)
    totals = analysis.totals("all")
    assert np.bincount(analysis.kinds).tolist() == list(totals.values())
    assert min(totals.values()) > 0  # of every kind
    assert analysis.mean_ap == pytest.approx(result.mean_ap, abs=1e-12)
    assert min(analysis.ap_gain.values()) >= 0
    assert analysis.missed["all"].objects == sum(result.num_objects.values())
