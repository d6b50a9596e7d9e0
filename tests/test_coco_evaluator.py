"""COCOEvaluator: its faster backend on many images, many masks, bad settings, time, memory."""

import gc
import time
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from coco_oracle import (
    CLASSES,
    DETECTION_STATS,
    detection,
    evaluator_of,
    plain_evaluator,
    random_case,
    truth,
    write_json,
)
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from detmix.data import VOC_CLASSES
from detmix.evaluation import COCOEvaluator, VOCEvaluator, encode_masks, score_predictions
from detmix.evaluation.coco.masks import mask_areas


def test_faster_backend_agrees_on_many_images():
    pytest.importorskip("faster_coco_eval")
    predictions, targets = random_case(3, 120, most=260, grid=8.0, levels=40)
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


def test_more_masks_in_an_image_than_pycocotools_counts():
    """Their number does not fit its 8 bits."""
    rng = np.random.default_rng(2)
    masks = rng.random((300, 6, 5)) < 0.5
    shared = {"boxes": np.array([[0, 0, 5, 6]] * 300, np.float32), "labels": np.ones(300, int)}
    found, target = shared | {"scores": rng.random(300)}, shared | {"image_id": 1}
    records = [found | {"masks": masks}], [target | {"masks": masks}]
    assert plain_evaluator(*records, iou_types=["segm"]).compute().num_objects == {"cat": 300}
    np.testing.assert_array_equal(mask_areas(encode_masks(masks)), masks.sum(axis=(1, 2)))


def test_number_of_keypoints_of_an_image_without_objects():
    box = [[0, 0, 9, 9]]
    found, more = (detection(box, [0.5], keypoints=torch.ones(1, num, 3)) for num in (5, 6))
    evaluator = plain_evaluator([found], [truth([])], iou_types=["keypoints"])
    with pytest.raises(ValueError, match=r"predictions\[0\].*keypoints.*1, 6, 3.*1, 5, 3"):
        evaluator.update([more], [truth([], 2)])


@pytest.mark.parametrize("evaluator", [COCOEvaluator(CLASSES), VOCEvaluator(CLASSES)])
def test_table(evaluator):
    boxes, labels = [[0, 0, 9, 9], [9, 9, 30, 30], [30, 0, 50, 9]], [1, 2, 2]
    evaluator.update([detection(boxes, [0.5] * 3, labels)], [truth(boxes[:2], 1, labels[:2])])
    result = evaluator.compute()
    header, _, cat, dog, cow, _, mean = (line.split() for line in str(result).splitlines()[:7])
    assert header[-2:] == ["objects", "detections"]
    assert [cat[1], cat[-2], cat[-1]] == ["1.0000", "1", "1"]
    assert [dog[-2:], cow[1], cow[-2:]] == [["1", "2"], "n/a", ["0", "0"]]
    assert f"{result.mean_ap:.4f}" in mean
    assert mean[-2:] == ["2", "3"]


def test_dense_masks_are_not_held():
    masks = torch.ones(1, 1, 50, 50)
    kept = weakref.ref(masks)
    found = detection([[0, 0, 50, 50]], [0.9], masks=masks)
    target = truth([[0, 0, 50, 50]], masks=torch.ones(1, 50, 50, dtype=torch.uint8))
    evaluator = plain_evaluator([found], [target], iou_types=["segm"])
    del masks, found, target
    gc.collect()
    assert kept() is None
    assert evaluator.compute().ap == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, r"classes is \[\]"),
        ({"category_ids": [1]}, r"category_ids is \[1\]"),
        ({"category_ids": [1, 1]}, r"category_ids is \[1, 1\]"),
        ({"iou_types": "bbox"}, "iou_types is 'bbox'"),
        ({"iou_types": ["box"]}, "iou_type is 'box'"),
        ({"prediction_labels": "category_id"}, "category_ids"),
        ({"backend": "coco"}, "backend is 'coco'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        COCOEvaluator(**{"classes": ["cat", "dog"], **options})


def test_ids_of_64_bits(tmp_path):
    def score(first_image, first_category, backend="auto"):
        images = [{"id": first_image + index, "height": 9, "width": 9} for index in range(3)]
        categories = [{"id": first_category + index, "name": f"{index}"} for index in range(2)]
        pairs = zip(range(3), images, [*categories, categories[0]], strict=True)
        entries = [
            {"image_id": image["id"], "category_id": of["id"], "bbox": [x, 1, 5, 5], "score": 0.5}
            for x, image, of in pairs
        ]
        truth = {"images": images, "categories": categories, "annotations": entries[:2]}
        files = write_json(tmp_path / "p.json", entries), write_json(tmp_path / "gt.json", truth)
        return score_predictions(*files, backend=backend).as_dict()

    assert score(2**62, 1) == score(1, 2**62) == score(1, 1, backend="pycocotools")


# --------------------------------------------------------------------------------- time and memory


def test_memory_is_linear():
    peaks = []
    for num in (50, 200):
        evaluator = evaluator_of(*random_case(0, num, most=100))
        tracemalloc.start()
        evaluator.compute()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]


@pytest.mark.slow
def test_at_most_a_twentieth_of_inference():
    """In processor time, so that what else runs on the machine does not matter."""
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, score_thresh=0, detections_per_img=100
    ).eval()
    predictions, targets = random_case(0, 96, 20, most=230)  # 100 of an image, as the detector's
    COCOEvaluator(VOC_CLASSES).compute()  # whatever is imported late
    times = [time.process_time()]
    with torch.inference_mode():
        for _ in range(12):
            model(list(torch.rand(8, 3, 320, 320)))
    times.append(time.process_time())
    voc, coco = VOCEvaluator(VOC_CLASSES), COCOEvaluator(VOC_CLASSES)
    for first in range(0, 96, 8):
        for evaluator in (voc, coco):
            evaluator.update(predictions[first : first + 8], targets[first : first + 8])
    results = [voc.compute("all-point"), voc.compute("11point"), coco.compute()]
    times.append(time.process_time())
    assert all(sum(result.num_detections.values()) > 90 * 96 for result in results)
    inference, evaluation = np.diff(times)
    print(f"{1000 * inference / 96:.1f} ms an image, evaluation {evaluation / inference:.4f} of it")
    assert evaluation <= 0.05 * inference
