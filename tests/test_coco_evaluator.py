"""COCOEvaluator: its faster backend on many images, masks and keypoints, bad arguments."""

import gc
import weakref

import numpy as np
import pytest
import torch
from coco_oracle import (
    DETECTION_STATS,
    detection,
    evaluator_of,
    plain_evaluator,
    random_case,
    truth,
    write_json,
)

from detmix.evaluation import COCOEvaluator, encode_masks, score_predictions
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
    "wrong", [{"labels": torch.tensor([[90]])}, {"labels": torch.tensor([90.0])},
              {"scores": torch.tensor(0.5)}, {"labels": ...}],
)  # fmt: skip
def test_category_id_labels_that_cannot_be_read(wrong):
    found = detection([[0, 0, 9, 9]], [0.5], labels=[90]) | wrong
    found = {key: value for key, value in found.items() if value is not ...}
    options = {"category_ids": [90], "prediction_labels": "category_id"}
    with pytest.raises(ValueError, match=rf"predictions\[0\] \(image_id 1\): .*{min(wrong)}"):
        plain_evaluator([found], [truth([[0, 0, 9, 9]])], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "classes is empty"),
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
        files = write_json(tmp_path / "p.json", entries), write_json(tmp_path / "gt.json", truth)
        return score_predictions(*files, backend=backend).as_dict()

    assert score(2**62, 1) == score(1, 2**62) == score(1, 1, backend="pycocotools")
