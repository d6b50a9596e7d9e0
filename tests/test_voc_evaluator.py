"""VOCEvaluator: best F1, how results print, bad arguments, memory and speed."""

import json
import math
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from voc_oracle import evaluate, image, loop_ap, random_boxes, random_case, single

from detmix.evaluation import OperatingPoint, PrecisionRecallCurve, VOCEvaluator, VOCResult
from detmix.evaluation.voc.ap import best_overlaps, paired_iou

CLASSES = ("cat", "dog", "cow")
UNIT, FAR = [0, 0, 10, 10], [50, 50, 60, 60]


def test_chunks_of_detections_change_nothing():
    rng = np.random.default_rng(0)
    det, gt = random_boxes(rng, 300, 10), random_boxes(rng, 60, 10)
    det_groups, gt_groups = rng.integers(0, 15, 300), rng.integers(0, 12, 60)
    whole = best_overlaps(det, det_groups, gt, gt_groups)
    for chunk_size in (1, 7, 100):
        parts = best_overlaps(det, det_groups, gt, gt_groups, chunk_size=chunk_size)
        np.testing.assert_array_equal(parts[0], whole[0])
        np.testing.assert_array_equal(parts[1], whole[1])


def test_iou_equals_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 50, (2, 40, 2)), rng.uniform(1, 60, (2, 40, 2))
    ours = paired_iou(*np.concatenate([corner, corner + size], axis=2))
    theirs = mask.iou(*np.concatenate([corner, size], axis=2), [0] * 40)
    np.testing.assert_allclose(ours, np.diag(theirs), rtol=0, atol=1e-12)
    assert (ours > 0).sum() > 10


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


def test_result_prints_as_an_aligned_table():
    evaluator = VOCEvaluator(("cat", "potted plant", "cow"), iou_threshold=0.6)
    target = image([UNIT, FAR], labels=[1, 3])
    evaluator.update([image([UNIT, FAR, [0, 0, 3, 3]], [0.9, 0.2, 0.1])], [target])
    *lines, note = str(evaluator.compute("11point")).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert max(len(line) for line in (*lines, note)) <= 84
    titles = ["class", "AP", "precision", "recall", "score", "objects", "detections"]
    assert lines[0].split() == titles
    assert lines[2].split() == ["cat", "1.0000", "1.000", "1.000", "0.900", "1", "3"]
    assert lines[3].split() == ["potted", "plant", "n/a", "n/a", "n/a", "n/a", "0", "0"]
    assert lines[4].split() == ["cow", "0.0000", "0.000", "0.000", "n/a", "1", "0"]
    assert "mean (11point, IoU > 0.6)" in lines[-1]
    assert lines[-1].split()[-3:] == ["0.5000", "2", "3"]
    assert "F1" in note


def test_result_as_json():
    evaluator = VOCEvaluator(("cat", "dog", "cow"))
    evaluator.update([image([UNIT], [0.5])], [image([UNIT, FAR, FAR], labels=[1, 1, 3])])
    result = evaluator.compute()
    assert isinstance(result, VOCResult)
    plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert plain["ap"] == {"cat": 0.5, "dog": None, "cow": 0}
    assert plain["best_f1"] == {
        "cat": {"score": 0.5, "precision": 1, "recall": 0.5, "f1": 2 / 3},
        "dog": {"score": None, "precision": None, "recall": None, "f1": None},
        "cow": {"score": None, "precision": 0, "recall": 0, "f1": 0},
    }
    assert plain["mean_ap"] == 0.25
    assert plain["num_detections"] == {"cat": 1, "dog": 0, "cow": 0}
    assert "curves" not in plain
    assert isinstance(result.curves["dog"], PrecisionRecallCurve)


def test_curves_of_a_result_cannot_be_changed():
    result = single(image([UNIT], [0.9]), image([UNIT]))
    with pytest.raises(ValueError, match="read-only"):
        result.curves["cat"].recall[0] = 0.0


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


def test_best_f1_of_equals_is_that_of_the_highest_score():
    # F1 is 2/5 after one of one, and 4/10 after two of six, of four objects.
    far = [[100 + 20 * k, 0, 110 + 20 * k, 10] for k in range(4)]
    boxes, gt = [UNIT, *far, FAR], [UNIT, FAR, [20, 20, 30, 30], [70, 70, 90, 90]]
    curve = single(image(boxes, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), image(gt)).curves["cat"]
    assert curve.best_f1() == OperatingPoint(float(np.float32(0.9)), 1, 0.25, 0.4)


def test_best_f1_does_not_part_equal_scores():
    point = single(image([UNIT, FAR], [0.5, 0.5]), image([UNIT])).curves["cat"].best_f1()
    assert point == OperatingPoint(0.5, 0.5, 1, 2 / 3)


@pytest.mark.parametrize(("scores", "score"), [([], math.nan), ([0.75, 0.5], 0.75)])
def test_best_f1_where_nothing_is_found(scores, score):
    point = single(image([FAR] * len(scores), scores), image([UNIT])).curves["cat"].best_f1()
    expected = {"score": score, "precision": 0, "recall": 0, "f1": 0}
    assert vars(point) == pytest.approx(expected, nan_ok=True)


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
        ({"classes": []}, "classes is empty"),
        ({"classes": ["a", "b", "a"]}, "a more than once"),
        ({"classes": "cat"}, "'cat', expected a list"),
        ({"iou_threshold": 0.0}, "iou_threshold is 0.0"),
        ({"iou_threshold": 1.0}, "iou_threshold is 1.0"),
        ({"iou_threshold": math.nan}, "iou_threshold is nan"),
        ({"interpolation": "101point"}, "'101point', expected one of 11point, all-point"),
    ],
)
def test_bad_constructor_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        VOCEvaluator(**({"classes": CLASSES} | options))


def test_unknown_interpolation_in_compute():
    with pytest.raises(ValueError, match="'area'"):
        VOCEvaluator(CLASSES).compute("area")


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [image([UNIT])], "0 predictions and 1 targets"),
        (image([UNIT], [0.5]), [image([UNIT])], "predictions is a dict, expected a list"),
        ([None], [image([UNIT])], r"predictions\[0\]: is a NoneType, expected a dict"),
        ([image([], [])], [7], r"targets\[0\]: is a int, expected a dict"),
        ([image([], [])], [image([], image_id=torch.arange(2))], r"targets\[0\]: image_id is"),
        ([image([], [])], [image([], image_id=0.5)], r"image_id is 0.5, expected one int or str"),
    ],
)
def test_bad_lists(predictions, targets, message):
    with pytest.raises(ValueError, match=message):
        VOCEvaluator(CLASSES).update(predictions, targets)


# --------------------------------------------------------------------------------------- imports


def test_import_is_light():
    heavy = ["matplotlib", "pycocotools", "faster_coco_eval", "accelerate", "albumentations"]
    heavy += ["jsonargparse"]
    code = (
        f"import sys, detmix.evaluation; print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------ speed


def detector_like_case(num_images=4952, num_detections=100, num_classes=20):
    """A few objects in each image; half the detections near an object and of its class."""
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for index in range(num_images):
        num_gt = int(rng.integers(1, 7))
        low, size = rng.uniform(0, 350, (num_gt, 2)), rng.uniform(20, 150, (num_gt, 2))
        gt = np.concatenate([low, low + size], axis=1)
        gt_labels = rng.integers(1, num_classes + 1, num_gt)
        owner = rng.integers(0, num_gt, num_detections)
        boxes = gt[owner] + rng.normal(0, 12, (num_detections, 4))
        labels = np.where(
            rng.random(num_detections) < 0.5,
            gt_labels[owner],
            rng.integers(1, num_classes + 1, num_detections),
        )
        predictions.append(
            {
                "boxes": torch.from_numpy(boxes.astype(np.float32)),
                "labels": torch.from_numpy(labels),
                "scores": torch.from_numpy(rng.random(num_detections).astype(np.float32)),
            }
        )
        targets.append(
            {
                "boxes": torch.from_numpy(gt.astype(np.float32)),
                "labels": torch.from_numpy(gt_labels),
                "difficult": torch.from_numpy(rng.random(num_gt) < 0.1),
                "image_id": index,
            }
        )
    return predictions, targets


def peak_bytes(num_images):
    """The most that an evaluation holds at a time beyond its input."""
    predictions, targets = detector_like_case(num_images)
    tracemalloc.start()
    evaluator = evaluate(predictions, targets, 20, batch_size=16)
    evaluator.compute("11point")
    evaluator.compute("all-point")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_linear():
    peaks = [peak_bytes(num) for num in (1000, 2000)]
    assert peaks[1] / peaks[0] == pytest.approx(2, abs=0.1)
    assert peaks[1] < 150 * 2000 * 100  # bytes for each detection


@pytest.mark.slow
def test_at_least_twenty_times_faster_than_the_loop(capsys):
    """From tensors to the AP of all classes by both rules; the loop starts from NumPy, for one."""
    predictions, targets = detector_like_case()
    as_numpy = [
        [{k: v.numpy() for k, v in r.items() if torch.is_tensor(v)} for r in records]
        for records in (predictions, targets)
    ]
    ours, loop = [], []
    for repeat in range(9):
        start = time.process_time()
        evaluator = evaluate(predictions, targets, 20, batch_size=16)
        evaluator.compute("11point")
        result = evaluator.compute("all-point")
        ours.append(time.process_time() - start)
        if repeat % 3 == 0:
            start = time.process_time()
            expected = loop_ap(*as_numpy, 20, 0.5, "all-point")
            loop.append(time.process_time() - start)
    np.testing.assert_allclose(list(result.ap.values()), expected, rtol=0, atol=1e-9)
    ratio = np.median(loop) / np.median(ours)
    with capsys.disabled():
        print(
            f"\n4,952 images x 100 detections: VOCEvaluator {np.median(ours):.2f} s "
            f"({min(ours):.2f} to {max(ours):.2f}), loop {np.median(loop):.2f} s "
            f"({min(loop):.2f} to {max(loop):.2f}), ratio {ratio:.1f}"
        )
    assert ratio >= 20
