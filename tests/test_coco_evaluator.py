"""COCOEvaluator against pycocotools called by hand, a loop of its own and cases done on paper."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from coco_oracle import (
    DETECTION_STATS,
    add_keypoints,
    add_masks,
    as_entries,
    by_hand,
    decode,
    only,
    random_case,
)

from detmix.evaluation import COCOEvaluator, COCOResult, VOCEvaluator, encode_masks
from detmix.evaluation.coco_ap import score_entries
from detmix.evaluation.coco_masks import mask_areas

CLASSES = ("cat", "dog", "cow")
CATEGORY_IDS = (90, 7, 31)  # neither contiguous nor in order
SHAPE_KEYS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
BACKENDS = (
    "pycocotools",
    pytest.param("faster-coco-eval", marks=pytest.mark.filterwarnings("error")),
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    return request.param


def evaluator_of(predictions, targets, batch_size=7, classes=CLASSES, **options):
    evaluator = COCOEvaluator(classes, **{"category_ids": CATEGORY_IDS, **options})
    for first in range(0, len(targets), batch_size):
        batch = slice(first, first + batch_size)
        evaluator.update(predictions[batch], targets[batch])
    return evaluator


def made_case(iou_type, seed=0, num_images=30):
    limit = 60.0 if iou_type == "segm" else 300.0
    predictions, targets = random_case(seed, num_images, limit=limit, levels=12)
    if iou_type == "segm":
        add_masks(predictions, targets)
    if iou_type == "keypoints":
        add_keypoints(predictions, targets)
    return predictions, targets


def detection(boxes, scores, labels=None, **more):
    labels = [1] * len(scores) if labels is None else labels
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
        **more,
    }


def truth(boxes, image_id=1, labels=None, **more):
    labels = [1] * len(boxes) if labels is None else labels
    return {
        "image_id": image_id,
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        **more,
    }


def plain_evaluator(predictions, targets, **options):
    evaluator = COCOEvaluator(["cat"], **options)
    evaluator.update(predictions, targets)
    return evaluator


# ------------------------------------------------------------------------------ against pycocotools


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_same_numbers_as_pycocotools_by_hand(iou_type, backend):
    predictions, targets = made_case(iou_type)
    result = evaluator_of(predictions, targets, iou_types=[iou_type], backend=backend).compute()
    ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
    stats, by_class = by_hand(ground_truth, only(results, SHAPE_KEYS[iou_type]), iou_type)
    exact = backend == "pycocotools"
    tolerance = {"rtol": 0, "atol": 0 if exact else 1e-12}
    for name, value in stats.items():
        np.testing.assert_allclose(getattr(result, name), value, err_msg=name, **tolerance)
    for name, category in zip(CLASSES, CATEGORY_IDS, strict=True):
        got = result.ap_by_class[name], result.ap50_by_class[name]
        np.testing.assert_allclose(got, by_class[category], err_msg=name, **tolerance)
    assert 0.05 < result.ap < 0.95
    assert math.isnan(result.ap_by_class["cow"])  # no objects


@pytest.mark.parametrize("grid", [None, 8.0])
def test_faster_backend_agrees_on_several_hundred_images(grid):
    pytest.importorskip("faster_coco_eval")
    predictions, targets = random_case(3, 300, most=260, grid=grid, levels=40)
    assert max(len(p["scores"]) for p in predictions) > 200  # more than the 100 that count
    for target in targets[::3]:
        target["difficult"] = np.arange(len(target["labels"])) % 2 == 0
    slow, fast = (
        evaluator_of(predictions, targets, backend=name).compute()
        for name in ("pycocotools", "faster-coco-eval")
    )
    for name in ("ap_by_class", "ap50_by_class"):
        assert getattr(slow, name) == pytest.approx(getattr(fast, name), abs=1e-9, nan_ok=True)
    for name in (*DETECTION_STATS, "ar", "ar50", "ar75"):
        assert getattr(slow, name) == pytest.approx(getattr(fast, name), abs=1e-9), name
    assert slow.num_objects == fast.num_objects


def test_batches_and_their_order_do_not_matter():
    predictions, targets = made_case("bbox", seed=1)
    expected = evaluator_of(predictions, targets).compute().as_dict()
    assert evaluator_of(predictions, targets, batch_size=1).compute().as_dict() == expected
    assert evaluator_of(predictions[::-1], targets[::-1]).compute().as_dict() == expected


def test_tensors_and_arrays_of_any_float_dtype():
    predictions, targets = made_case("bbox", seed=2, num_images=8)
    expected = evaluator_of(predictions, targets).compute().as_dict()
    tensors = [{k: torch.tensor(v) for k, v in p.items()} for p in predictions]
    truths = [{k: torch.tensor(v) for k, v in t.items()} for t in targets]
    assert evaluator_of(tensors, truths).compute().as_dict() == expected
    for prediction in tensors:
        prediction["boxes"] = prediction["boxes"].double().requires_grad_()
    assert evaluator_of(tensors, truths).compute().as_dict() == expected


# ---------------------------------------------------------------------- a definition of its own


def loop_ap50(predictions, targets, label):
    """AP at IoU 0.5 of one class: greedy matching to the best free object, 101 recalls."""
    found = []
    num_objects = 0
    for prediction, target in zip(predictions, targets, strict=True):
        gt = target["boxes"][target["labels"] == label].astype(float)
        taken = [False] * len(gt)
        num_objects += len(gt)
        mine = prediction["labels"] == label
        boxes, scores = prediction["boxes"][mine].astype(float), prediction["scores"][mine]
        for d in np.argsort(-scores, kind="stable")[:100]:
            best, match = 0.5, None
            for j, box in enumerate(gt):
                w = min(box[2], boxes[d][2]) - max(box[0], boxes[d][0])
                h = min(box[3], boxes[d][3]) - max(box[1], boxes[d][1])
                shared = max(w, 0) * max(h, 0)
                sizes = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, boxes[d])]
                overlap = shared / (sum(sizes) - shared)
                if not taken[j] and overlap >= best:
                    best, match = overlap, j
            if match is not None:
                taken[match] = True
            found.append((-scores[d], match is not None))
    hits = np.cumsum([hit for _, hit in sorted(found, key=lambda pair: pair[0])])
    precision = hits / np.arange(1, len(hits) + 1)
    recall = hits / num_objects
    return np.mean([max(precision[recall >= r], default=0.0) for r in np.linspace(0, 1, 101)])


def test_ap50_by_a_loop_of_its_own():
    predictions, targets = random_case(5, 25, num_classes=3, limit=200.0)
    for target in targets:
        target.pop("iscrowd", None)
    result = evaluator_of(predictions, targets).compute()
    for label, name in ((1, "cat"), (2, "dog")):
        expected = loop_ap50(predictions, targets, label)
        assert result.ap50_by_class[name] == pytest.approx(expected, abs=1e-12)
        assert 0.05 < expected < 0.95
    # 101 recalls against the area itself: close, where no detection overlaps two objects well
    voc = VOCEvaluator(CLASSES)
    voc.update(predictions, targets)
    assert result.ap50 == pytest.approx(voc.compute().mean_ap, abs=0.03)


# ------------------------------------------------------------------------------------- on paper


def test_one_object_found_six_thresholds_long(backend):
    # IoU 0.78 reaches 0.5, 0.55, ..., 0.75: six of ten; a better scored miss halves the precision
    found = detection([[0, 0, 10, 7.8], [50, 50, 60, 60]], [0.5, 0.9])
    result = plain_evaluator([found], [truth([[0, 0, 10, 10]])], backend=backend).compute()
    assert result.ap == pytest.approx(0.3)
    assert result.ap50 == result.ap75 == pytest.approx(0.5)
    assert result.ap_small == pytest.approx(0.3)
    assert math.isnan(result.ap_medium)
    assert math.isnan(result.ap_large)
    assert result.ar1 == 0.0  # the miss comes first
    assert result.ar10 == result.ar100 == result.ar == pytest.approx(0.6)
    assert result.mean_ap == result.ap
    assert (result.num_objects, result.num_detections) == ({"cat": 1}, {"cat": 2})


def test_duplicates_are_false_positives_and_of_equal_scores_the_first_counts(backend):
    box, beside = [0, 0, 10, 10], [0, 0, 10, 7.8]  # reaches six of the ten thresholds
    target = truth([box, [50, 0, 60, 10]])
    once, twice = (
        plain_evaluator([detection(boxes, scores)], [target], backend=backend).compute()
        for boxes, scores in (([box], [0.9]), ([box, box, [50, 0, 60, 10]], [0.9, 0.9, 0.1]))
    )
    assert once.ap == pytest.approx(51 / 101)  # half of the objects
    assert twice.ap == pytest.approx((51 + 50 * 2 / 3) / 101)  # the third finds the other half
    target = truth([box])
    better, worse = (
        plain_evaluator([detection(boxes, [0.5, 0.5])], [target], backend=backend).compute()
        for boxes in ([box, beside], [beside, box])
    )
    assert better.ap == pytest.approx(1.0)
    assert worse.ap == pytest.approx(0.6 + 0.4 * 0.5)


def test_area_is_the_annotations_not_the_boxs(backend):
    box = [[0, 0, 20, 20]]  # small by its box
    target = truth(box, area=torch.tensor([5000.0]))
    result = plain_evaluator([detection(box, [0.9])], [target], backend=backend).compute()
    assert result.ap_medium == pytest.approx(1.0)
    assert math.isnan(result.ap_small)


def test_crowd_takes_any_number_of_detections(backend):
    target = truth([[0, 0, 100, 100], [200, 0, 220, 20]], iscrowd=torch.tensor([1, 0]))
    inside = [[5.0 * i, 0, 5 * i + 30, 30] for i in range(8)]  # small parts of the crowd
    found = detection([*inside, [200, 0, 220, 20]], [0.9] * 8 + [0.1])
    result = plain_evaluator([found], [target], backend=backend).compute()
    assert result.ap == pytest.approx(1.0)
    assert result.num_objects == {"cat": 1}


def test_difficult_object_counts_neither_way(backend):
    boxes = [[0, 0, 20, 20], [40, 0, 60, 20], [80, 0, 100, 20]]
    target = truth(boxes, difficult=torch.tensor([True, False, True]))
    # the first is found, the second is not found quite, the third is missed; a miss elsewhere
    found = detection([boxes[0], [40, 0, 60, 15.6], [0, 50, 20, 70]], [0.9, 0.5, 0.7])
    result = plain_evaluator([found], [target], backend=backend).compute()
    without = plain_evaluator(
        [detection([[40, 0, 60, 15.6], [0, 50, 20, 70]], [0.5, 0.7])],
        [truth([boxes[1]])],
        backend=backend,
    ).compute()
    for name in ("ap", "ap50", "ap75", "ap_small", "ar1", "ar10", "ar100", "ar_small"):
        expected = getattr(without, name)
        assert getattr(result, name) == pytest.approx(expected), name
    assert result.ap == pytest.approx(0.3)
    assert result.num_objects == {"cat": 1}


def test_difficult_is_no_crowd(backend):
    # A detection of a small part of it is a false positive: its IoU is the plain one.
    target = truth([[0, 0, 100, 100], [200, 0, 220, 20]], difficult=torch.tensor([1, 0]))
    found = detection([[10, 10, 30, 30], [200, 0, 220, 20]], [0.9, 0.5])
    result = plain_evaluator([found], [target], backend=backend).compute()
    assert result.ap50 == pytest.approx(0.5)


def test_difficult_object_takes_no_keypoints_far_from_its_own(backend):
    points = torch.rand(17, 3, generator=torch.Generator().manual_seed(0)) * 40
    points[:, 2] = 2
    box = [0.0, 0, 40, 40]
    shift = torch.tensor([500.0, 0, 0])
    target = truth(
        [box, [1000, 0, 1040, 40]],
        keypoints=torch.stack([points, points + 2 * shift]),
        difficult=torch.tensor([1, 0]),
    )
    there, far, other = (
        {"boxes": [[x, 0, x + 40, 40]], "keypoints": (points + x / 500 * shift)[None]}
        for x in (0.0, 500.0, 1000.0)
    )

    def average(*found):
        boxes = [box for one in found for box in one["boxes"]]
        keypoints = torch.cat([one["keypoints"] for one in found])
        prediction = detection(boxes, [0.9, 0.8, 0.7][: len(found)], keypoints=keypoints)
        options = {"iou_types": ["keypoints"], "backend": backend}
        return plain_evaluator([prediction], [target], **options).compute().ap

    assert average(there, other) == pytest.approx(1.0)  # counts neither way
    assert average(far, other) == pytest.approx(0.5)  # a false positive above a true one


def test_only_the_best_hundred_detections_count(backend):
    misses = [[0.0, 100, 10, 110]] * 100
    found = detection([*misses, [0, 0, 10, 10]], [0.9] * 100 + [0.1])
    result = plain_evaluator([found], [truth([[0, 0, 10, 10]])], backend=backend).compute()
    assert result.ap == 0.0


# ------------------------------------------------------------------------------- masks, keypoints


class TestMasks:
    def test_encode_is_pycocotools_encode(self):
        rng = np.random.default_rng(0)
        masks = rng.random((4, 13, 17)) < 0.5
        encoded = encode_masks(masks)
        decoded = decode(encoded).transpose(2, 0, 1)
        np.testing.assert_array_equal(decoded, masks)
        assert json.loads(json.dumps(encoded)) == encoded

    def test_all_forms_are_the_same_masks(self):
        rng = np.random.default_rng(1)
        probabilities = rng.random((3, 1, 9, 7)).astype(np.float32)
        probabilities[0, 0, 0] = 0.5  # not above it
        inside = probabilities[:, 0] > 0.5
        expected = encode_masks(inside)
        forms = [
            probabilities,
            torch.tensor(probabilities).requires_grad_(),
            torch.tensor(probabilities).double(),
            torch.tensor(inside).to(torch.uint8) * 255,
            inside.astype(np.int64)[:, None],
            expected,
            [{**rle, "counts": rle["counts"].encode()} for rle in expected],
            [{"size": [9, 7], "counts": uncompressed(mask)} for mask in inside],
        ]
        for form in forms:
            assert encode_masks(form) == expected
        assert encode_masks(torch.zeros(0, 1, 5, 5)) == encode_masks([]) == []

    def test_more_than_255_in_an_image(self):
        """Their number does not fit pycocotools' 8 bits."""
        rng = np.random.default_rng(2)
        masks = rng.random((300, 6, 5)) < 0.5
        boxes = np.tile(np.array([[0, 0, 5, 6]], np.float32), (300, 1))
        found = {"boxes": boxes, "labels": np.ones(300, int), "scores": rng.random(300)}
        target = {"boxes": boxes, "labels": found["labels"], "masks": masks, "image_id": 1}
        evaluator = plain_evaluator([found | {"masks": masks}], [target], iou_types=["segm"])
        assert evaluator.compute().num_objects == {"cat": 300}
        np.testing.assert_array_equal(mask_areas(encode_masks(masks)), masks.sum(axis=(1, 2)))

    def test_errors_name_the_value(self):
        with pytest.raises(ValueError, match=r"shape \(5, 5\), expected \(N, H, W\)"):
            encode_masks(torch.zeros(5, 5))
        with pytest.raises(ValueError, match=r"masks\[1\] is {'size': \[1, 1\]}, expected a dict"):
            encode_masks([{"size": [1, 1], "counts": "01"}, {"size": [1, 1]}])
        good = {"size": [60, 80], "counts": [4800]}
        for counts in ("R1oooo", "0PPPP", "", "11", "hello world", "é", b"\xff", ["a", 3], [1]):
            with pytest.raises(ValueError, match=r"masks\[1\] is {'size'.*the RLE's counts"):
                encode_masks([good, {"size": [60, 80], "counts": counts}])
        with pytest.raises(ValueError, match=r"masks\[0\] is .* the RLE's size must be height"):
            encode_masks([{**good, "size": ["60", 80]}])

    def test_encoded_early_gives_the_same_result(self):
        predictions, targets = made_case("segm", num_images=10)
        expected = evaluator_of(predictions, targets, iou_types=["segm"]).compute().as_dict()
        for record in (*predictions, *targets):
            record["masks"] = encode_masks(record["masks"])
        early = evaluator_of(predictions, targets, iou_types=["segm"])
        assert early.compute().as_dict() == expected

    def test_dense_masks_are_not_held(self):
        import gc
        import weakref

        masks = torch.ones(1, 1, 50, 50)
        kept = weakref.ref(masks)
        found = detection([[0, 0, 50, 50]], [0.9], masks=masks)
        target = truth([[0, 0, 50, 50]], masks=torch.ones(1, 50, 50, dtype=torch.uint8))
        evaluator = plain_evaluator([found], [target], iou_types=["segm"])
        del masks, found, target
        gc.collect()
        assert kept() is None
        assert evaluator.compute().ap == pytest.approx(1.0)

    def test_one_size_in_an_image(self):
        found = detection([[0, 0, 5, 5]], [0.9], masks=torch.ones(1, 1, 8, 8))
        target = truth([[0, 0, 5, 5]], masks=torch.ones(1, 9, 9))
        with pytest.raises(ValueError, match=r"targets\[0\].*masks of 8 x 8 and 9 x 9 pixels"):
            plain_evaluator([found], [target], iou_types=["segm"])


def uncompressed(mask):
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    ends = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], ends]))
    return lengths.tolist()


class TestKeypoints:
    def test_any_number_with_sigmas(self):
        predictions, targets = random_case(0, 20)
        add_keypoints(predictions, targets, num=5)
        sigmas = [0.02, 0.05, 0.1, 0.03, 0.08]
        ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
        results = only(results, "keypoints")
        for given, used in ((sigmas, sigmas), (None, [np.mean(coco_sigmas())] * 5)):
            evaluator = evaluator_of(
                predictions, targets, iou_types=["keypoints"], keypoint_sigmas=given
            )
            stats, _ = by_hand(ground_truth, results, "keypoints", used)
            result = evaluator.compute().as_dict()
            assert {name: result[name] for name in stats} == pytest.approx(stats, abs=1e-12)
            assert result["ap_small"] is result["ar1"] is None

    def test_one_number_throughout(self):
        evaluator = COCOEvaluator(["cat"], iou_types=["keypoints"])
        four, five = torch.ones(1, 4, 3), torch.ones(1, 5, 3)
        box = [[0, 0, 9, 9]]
        with pytest.raises(
            ValueError, match=r"predictions\[0\].*\(1, 5, 3\), expected \(1, 4, 3\)"
        ):
            evaluator.update([detection(box, [0.5], keypoints=five)], [truth(box, keypoints=four)])
        evaluator.update([detection([], [])], [truth(box, keypoints=five)])
        with pytest.raises(ValueError, match=r"targets\[0\].*\(1, 4, 3\), expected \(1, 5, 3\)"):
            evaluator.update([detection([], [])], [truth(box, 2, keypoints=four)])


def coco_sigmas():
    from pycocotools.cocoeval import Params

    return Params("keypoints").kpt_oks_sigmas


def test_several_types_of_one_evaluator():
    predictions, targets = made_case("segm", num_images=12)
    add_keypoints(predictions, targets)
    iou_types = ("segm", "bbox", "keypoints")
    options = {"iou_types": iou_types, "backend": "pycocotools"}
    evaluator = evaluator_of(predictions, targets, **options)
    assert evaluator.iou_types == iou_types
    assert evaluator.compute() is evaluator.compute("segm")
    for iou_type in evaluator.iou_types:
        ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
        stats, _ = by_hand(ground_truth, only(results, SHAPE_KEYS[iou_type]), iou_type)
        got = evaluator.compute(iou_type)
        assert got.iou_type == iou_type
        assert all(
            np.array_equal(getattr(got, name), stats[name], equal_nan=True) for name in stats
        )


# ------------------------------------------------------------------------------------- empty sides


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
class TestNothing:
    def test_no_images(self, backend, iou_type):
        result = COCOEvaluator(CLASSES, iou_types=[iou_type], backend=backend).compute()
        assert math.isnan(result.ap)
        assert result.num_images == 0
        assert result.as_dict()["ap_by_class"] == dict.fromkeys(CLASSES)

    def test_no_detections_at_all(self, backend, iou_type):
        target = truth(
            [[0, 0, 20, 20]],
            masks=torch.ones(1, 20, 20, dtype=torch.uint8),
            keypoints=torch.full((1, 17, 3), 2.0),
        )
        evaluator = COCOEvaluator(CLASSES, iou_types=[iou_type], backend=backend)
        evaluator.update([detection([], [])], [target])
        result = evaluator.compute()
        assert result.ap == result.ap50_by_class["cat"] == result.ar == 0.0
        assert math.isnan(result.ap_by_class["dog"])

    def test_no_objects_at_all(self, backend, iou_type):
        found = detection(
            [[0, 0, 20, 20]],
            [0.5],
            masks=torch.ones(1, 1, 20, 20),
            keypoints=torch.full((1, 17, 3), 2.0),
        )
        evaluator = COCOEvaluator(CLASSES, iou_types=[iou_type], backend=backend)
        evaluator.update([found, detection([], [])], [truth([]), truth([], 2)])
        result = evaluator.compute()
        assert math.isnan(result.ap)
        assert result.num_images == 2
        assert result.num_detections == {"cat": 1, "dog": 0, "cow": 0}

    def test_images_without_anything_change_nothing(self, backend, iou_type):
        predictions, targets = made_case(iou_type, num_images=8)
        options = {"iou_types": [iou_type], "backend": backend}
        expected = evaluator_of(predictions, targets, **options).compute()
        evaluator = evaluator_of(predictions, targets, **options)
        evaluator.update([detection([], [])] * 2, [truth([], 10_001), truth([], 10_002)])
        result = evaluator.compute().as_dict()
        assert result == expected.as_dict() | {"num_images": 10}


def test_boxes_without_area():
    found = detection([[5, 5, 5, 5], [0, 0, 10, 10]], [0.9, 0.8])
    result = plain_evaluator([found], [truth([[0, 0, 10, 10], [3, 3, 3, 9]])]).compute()
    # one of two objects behind a miss: precision 0.5 for the 51 recalls up to 0.5
    assert result.ap50 == pytest.approx(0.5 * 51 / 101)


# -------------------------------------------------------------------------------------- protocol


class TestUpdate:
    def test_repeated_images_are_dropped(self):
        predictions, targets = made_case("bbox", num_images=10)
        expected = evaluator_of(predictions, targets).compute().as_dict()
        evaluator = evaluator_of(predictions, targets)
        evaluator.update(predictions[:3], targets[:3])
        evaluator.update([*predictions[3:5], predictions[3]], [*targets[3:5], targets[3]])
        assert evaluator.compute().as_dict() == expected

    def test_reset_forgets(self):
        evaluator = evaluator_of(*made_case("bbox", num_images=5))
        evaluator.reset()
        assert evaluator.compute().num_images == 0
        evaluator.update([detection([[0, 0, 9, 9]], [0.5])], [truth([[0, 0, 9, 9]])])
        assert evaluator.compute().ap == pytest.approx(1.0)

    def test_computing_is_kept_until_the_next_update(self):
        evaluator = plain_evaluator([detection([[0, 0, 9, 9]], [0.5])], [truth([[0, 0, 9, 9]])])
        first = evaluator.compute()
        assert evaluator.compute() is first
        evaluator.update([detection([], [])], [truth([[0, 0, 9, 9]], 2)])
        assert evaluator.compute().ap == pytest.approx(51 / 101)

    @pytest.mark.parametrize(
        ("prediction", "target", "message"),
        [
            ({}, {"image_id": None}, r"targets\[1\]: has no image_id, expected an int"),
            ({}, {"image_id": "a"}, r"targets\[1\]: image_id is 'a', expected an int"),
            ({"labels": [9]}, {}, r"predictions\[1\] \(image_id 2\): labels\[0\] is 9, expected 1"),
            (
                {"boxes": [[5.0, 0, 4, 9]]},
                {},
                r"predictions\[1\] .*boxes\[0\] is \[5.0, 0.0, 4.0, 9.0\], expected x1 <= x2",
            ),
            ({}, {"area": [-1.0]}, r"targets\[1\] .*area\[0\] is -1.0, expected 0 or more"),
            ({}, {"area": [math.nan]}, r"targets\[1\] .*area\[0\] is nan"),
            ({}, {"iscrowd": [0, 1]}, r"targets\[1\] .*iscrowd have shape \(2,\), expected \(1,\)"),
            ({}, {"file_name": 3}, r"targets\[1\] .*file_name is 3, expected a str"),
            ({}, {"masks": None}, r"targets\[1\] .*has no 'masks', only .*'segm' needs them"),
            (
                {"masks": torch.ones(2, 1, 9, 9)},
                {},
                r"predictions\[1\] .*2 masks for 1 boxes, expected one for each",
            ),
            ({"keypoints": None}, {}, r"predictions\[1\] .*has no 'keypoints', only"),
            (
                {},
                {"keypoints": torch.ones(1, 17, 2)},
                r"targets\[1\] .*shape \(1, 17, 2\), expected \(1, 17, 3\)",
            ),
            (
                {},
                {"keypoints": torch.full((1, 17, 3), math.inf)},
                r"targets\[1\] .*keypoints\[0\] is \[\[inf.*expected finite",
            ),
        ],
    )
    def test_errors_name_the_place_and_leave_all_as_it_was(self, prediction, target, message):
        box = [[0, 0, 9, 9]]
        found = {"masks": torch.ones(1, 1, 9, 9), "keypoints": torch.ones(1, 17, 3)}
        there = {"masks": torch.ones(1, 9, 9), "keypoints": torch.ones(1, 17, 3)}
        iou_types = ("bbox", "segm", "keypoints")
        evaluator = plain_evaluator(
            [detection(box, [0.5], **found)], [truth(box, **there)], iou_types=iou_types
        )
        before = evaluator.compute().as_dict()
        bad_prediction = {**detection(box, [0.5], **found), **prediction}
        bad_target = {**truth(box, 2, **there), **target}
        bad_prediction, bad_target = (
            {k: v for k, v in record.items() if v is not None}
            for record in (bad_prediction, bad_target)
        )
        with pytest.raises(ValueError, match=message):
            evaluator.update(
                [detection(box, [0.5], **found), bad_prediction],
                [truth(box, 5, **there), bad_target],
            )
        assert evaluator.compute().as_dict() == before
        evaluator.update([detection(box, [0.5], **found)], [truth(box, 5, **there)])
        assert evaluator.compute().num_images == 2


class TestCategoryIdLabels:
    @pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
    def test_same_numbers_as_with_contiguous_labels(self, iou_type):
        predictions, targets = made_case(iou_type)
        options = {"iou_types": [iou_type]}
        expected = evaluator_of(predictions, targets, **options).compute().as_dict()
        strangers, _ = made_case(iou_type, seed=7)
        named = []
        for prediction, stranger in zip(predictions, strangers, strict=True):
            ids = np.array([0, *CATEGORY_IDS])[prediction["labels"]]
            unknown = np.resize([1, 91, 0], len(stranger["labels"]))  # nobody asked for these
            # They stand between the others, whose order stays.
            places = np.random.default_rng(0).permutation(len(ids) + len(unknown))
            places[: len(ids)].sort()
            order = np.argsort(places)
            both = {key: np.concatenate([prediction[key], stranger[key]]) for key in prediction}
            both["labels"] = np.concatenate([ids, unknown])
            named.append({key: torch.tensor(value[order]) for key, value in both.items()})
        options["prediction_labels"] = "category_id"
        assert evaluator_of(named, targets, **options).compute().as_dict() == expected
        for prediction in named:
            prediction["labels"] = prediction["labels"].numpy()
            if iou_type == "segm":
                prediction["masks"] = encode_masks(prediction["masks"])
        assert evaluator_of(named, targets, **options).compute().as_dict() == expected
        labels = [label for prediction in named for label in prediction["labels"].tolist()]
        assert {0, 1, 91} < set(labels)  # left as they were

    def test_what_cannot_be_read_is_said(self):
        options = {"category_ids": [90], "prediction_labels": "category_id"}
        box = [[0, 0, 9, 9]]
        for wrong, message in (
            ({"labels": torch.tensor([[90]])}, r"labels have shape \(1, 1\)"),
            ({"labels": torch.tensor([90.0])}, "labels are float32, expected integers"),
            ({"labels": torch.tensor([90, 1])}, r"labels have shape \(2,\), expected \(1,\)"),
            ({"scores": torch.tensor(0.5)}, r"scores have shape \(\)"),
        ):
            found = detection(box, [0.5], labels=[90]) | wrong
            with pytest.raises(ValueError, match=rf"predictions\[0\] \(image_id 1\): {message}"):
                plain_evaluator([found], [truth(box)], **options)
        with pytest.raises(ValueError, match=r"predictions\[0\] .*has no 'labels', only"):
            plain_evaluator([{"boxes": box}], [truth(box)], **options)
        with pytest.raises(ValueError, match="predictions is a dict, expected a list"):
            plain_evaluator({}, [truth(box)], **options)
        evaluator = plain_evaluator([detection([], [])], [truth(box)], **options)
        assert evaluator.compute().ap == 0.0


def test_orig_size_of_two_numbers():
    target = truth([[0, 0, 9, 9]], orig_size=torch.tensor([1, 2, 3]))
    with pytest.raises(
        ValueError, match=r"targets\[0\].*orig_size is \[1, 2, 3\], expected height"
    ):
        plain_evaluator([detection([], [])], [target])


class TestConstructor:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"classes": []}, "classes is empty"),
            ({"classes": ["cat", "cat"]}, "cat more than once"),
            ({"category_ids": [1]}, r"category_ids is \[1\], expected 2 different ints"),
            ({"category_ids": [1, 1]}, r"category_ids is \[1, 1\], expected 2 different ints"),
            ({"iou_types": []}, r"iou_types is \[\], expected a list"),
            ({"iou_types": "bbox"}, "iou_types is 'bbox', expected a list"),
            ({"iou_types": ["box"]}, "iou_type is 'box', expected one of bbox, segm, keypoints"),
            (
                {"prediction_labels": "ids"},
                "prediction_labels is 'ids', expected one of contiguous",
            ),
            ({"prediction_labels": "category_id"}, "'category_id', expected category_ids as well"),
            ({"backend": "coco"}, "backend is 'coco', expected one of auto, pycoco"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            COCOEvaluator(**{"classes": ["cat", "dog"], **options})

    def test_missing_backend_is_told_before_the_first_image(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        with pytest.raises(ImportError, match=r"pip install 'detmix\[fast\]'"):
            COCOEvaluator(["cat"], backend="faster-coco-eval")

    def test_type_it_was_not_made_for(self):
        with pytest.raises(ValueError, match="iou_type is 'segm', expected one of bbox"):
            COCOEvaluator(["cat"]).compute("segm")


def test_nothing_on_stdout(capsys, backend):
    evaluator_of(*made_case("bbox", num_images=4), backend=backend).compute()
    assert capsys.readouterr() == ("", "")


def test_importing_is_light():
    code = (
        "import sys, detmix.evaluation;"
        "print([m for m in ('pycocotools', 'faster_coco_eval', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------- result


class TestResult:
    def test_as_dict_is_json(self):
        result = evaluator_of(*made_case("bbox")).compute()
        plain = json.loads(json.dumps(result.as_dict(), allow_nan=False))
        assert plain == result.as_dict()
        assert plain["ap_by_class"]["cow"] is None
        assert plain["ap"] == result.ap
        assert plain["classes"] == list(CLASSES)

    def test_table(self):
        found = detection([[0, 0, 10, 7.8], [50, 50, 60, 60]], [0.5, 0.9])
        evaluator = COCOEvaluator(["cat", "dog"])
        evaluator.update([found], [truth([[0, 0, 10, 10]])])
        lines = str(evaluator.compute()).splitlines()
        assert lines[0].split() == ["class", "AP", "AP50", "objects", "detections"]
        assert lines[2].split() == ["cat", "0.3000", "0.5000", "1", "2"]
        assert lines[3].split() == ["dog", "n/a", "n/a", "0", "0"]
        mean = ["mean", "(bbox,", "IoU", "0.50:0.95)", "0.3000", "0.5000", "1", "2"]
        assert lines[5].split() == mean
        assert len({len(line) for line in lines[:6]}) == 1
        average_recall = ["AR", "0.6000", "1.0000", "1.0000", "0.6000", "n/a", "n/a"]
        assert lines[-2].split() == average_recall
        assert lines[-1] == "AR by detections: 0.0000 at 1, 0.6000 at 10, 0.6000 at 100"

    def test_is_read_only(self):
        result = COCOEvaluator(["cat"]).compute()
        assert isinstance(result, COCOResult)
        with pytest.raises(AttributeError):
            result.ap = 1.0


def test_ids_of_64_bits():
    def score(first_image, first_category, backend="auto"):
        images = [{"id": first_image + index, "height": 9, "width": 9} for index in range(3)]
        categories = [{"id": first_category + index, "name": f"{index}"} for index in range(2)]
        entries = [
            {
                "image_id": image["id"],
                "category_id": categories[index % 2]["id"],
                "bbox": [index, 1, 5, 5],
                "score": 0.5,
            }
            for index, image in enumerate(images)
        ]
        truth = {"images": images, "categories": categories, "annotations": entries[:2]}
        return score_entries(truth, entries, backend=backend).as_dict()

    assert score(2**62, 1) == score(1, 2**62) == score(1, 1, backend="pycocotools")


def test_the_faster_backend_is_chosen_where_it_is_installed(monkeypatch):
    from detmix.evaluation import coco_ap

    assert COCOEvaluator(CLASSES).backend == "auto"
    for found, module in ((None, "pycocotools"), (object(), "faster_coco_eval")):
        if found is not None:
            pytest.importorskip("faster_coco_eval")
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        assert {kind.__module__.split(".")[0] for kind in coco_ap._load_backend("auto")} == {module}
