"""VOCEvaluator: best F1, results as JSON, bad arguments; the rest is in the contract."""

import json
import math

import numpy as np
import pytest
import torch
from voc_oracle import evaluate, image, random_case, single

from detmix.evaluation import OperatingPoint, VOCEvaluator

CLASSES = ("cat", "dog", "cow")
UNIT, FAR = [0, 0, 10, 10], [50, 50, 60, 60]


def test_later_changes_of_the_input_do_not_matter():
    prediction, target = image([UNIT], [0.5]), image([UNIT])
    evaluator = VOCEvaluator(["cat"])
    evaluator.update([prediction], [target])
    prediction["boxes"].zero_()
    target["boxes"].zero_()
    assert evaluator.compute().mean_ap == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_gpu():
    prediction = {key: value.cuda() for key, value in image([UNIT], [0.5]).items()}
    target = {key: value.cuda() for key, value in image([UNIT]).items()}
    assert single(prediction, target | {"image_id": torch.tensor(3).cuda()}).mean_ap == 1


# ---------------------------------------------------------------------------------------- result


def test_result_as_json():
    evaluator = VOCEvaluator(("cat", "dog", "cow"))
    evaluator.update([image([UNIT], [0.5])], [image([UNIT, FAR, FAR], labels=[1, 1, 3])])
    result = evaluator.compute()
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert plain["ap"] == {"cat": 0.5, "dog": None, "cow": 0}
    assert plain["best_f1"] == {
        "cat": {"score": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3},
        "dog": {"score": None, "precision": None, "recall": None, "f1": None},
        "cow": {"score": None, "precision": 0, "recall": 0, "f1": 0},
    }
    assert plain["mean_ap"] == 0.25


# ------------------------------------------------------------------------------------- best F1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("score_levels", [None, 4])
def test_best_f1_is_the_best_of_what_thresholds_leave(seed, score_levels):
    """Leave out detections below each score there is, evaluate the rest and take its last point."""
    predictions, targets = random_case(seed, 20, 3, grid=5, score_levels=score_levels)
    best = {}
    for score in np.unique(np.concatenate([p["scores"] for p in predictions]))[::-1]:
        left = [{k: v[p["scores"] >= score] for k, v in p.items()} for p in predictions]
        result = evaluate(left, targets, 3).compute()
        for name in result.classes:
            curve = result.curves[name]
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_fall_and_equal_ones_keep_their_order(dtype):
    rng = np.random.default_rng(0)
    scores = np.concatenate(
        [rng.normal(size=500).round(1), [0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38]]
    )
    scores = rng.permutation(scores).astype(dtype)
    boxes = np.tile(np.array([UNIT], np.float32), (len(scores), 1))
    evaluator = VOCEvaluator(["cat"])
    labels = np.ones(len(scores), int)
    evaluator.update([{"boxes": boxes, "labels": labels, "scores": scores}], [image([UNIT])])
    expected = sorted(range(len(scores)), key=lambda row: -scores[row])
    assert evaluator.matching().by_class[0].tolist() == expected


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "classes"),
        ({"classes": ["a", "b", "a"]}, "a more than once"),
        ({"classes": "cat"}, "'cat'"),
        ({"iou_threshold": 1.0}, "iou_threshold is 1.0"),
        ({"interpolation": "101point"}, "'101point'"),
    ],
)
def test_bad_constructor_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        VOCEvaluator(**({"classes": CLASSES} | options))


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [image([UNIT])], "0 predictions and 1 targets"),
        (image([UNIT], [0.5]), [image([UNIT])], "3 predictions and 1 targets"),
        ([None], [image([UNIT])], r"predictions\[0\]: is a NoneType"),
        ([image([], [])], [image([], image_id=0.5)], "image_id is 0.5"),
    ],
)
def test_bad_lists(predictions, targets, message):
    with pytest.raises(ValueError, match=message):
        VOCEvaluator(CLASSES).update(predictions, targets)
