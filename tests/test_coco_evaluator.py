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


def test_faster_backend_agrees_on_several_hundred_images():
    pytest.importorskip("faster_coco_eval")
    predictions, targets = random_case(3, 300, most=260, grid=8.0, levels=40)
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


# ------------------------------------------------------------------------------- masks, keypoints


class TestMasks:
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

    def test_dense_masks_are_not_held(self):
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


class TestKeypoints:
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


def test_category_id_labels_that_cannot_be_read():
    options = {"category_ids": [90], "prediction_labels": "category_id"}
    box = [[0, 0, 9, 9]]
    for wrong, message in (
        ({"labels": torch.tensor([[90]])}, r"labels have shape \(1, 1\)"),
        ({"labels": torch.tensor([90.0])}, "labels are float32"),
        ({"scores": torch.tensor(0.5)}, r"scores have shape \(\)"),
    ):
        found = detection(box, [0.5], labels=[90]) | wrong
        with pytest.raises(ValueError, match=rf"predictions\[0\] \(image_id 1\): {message}"):
            plain_evaluator([found], [truth(box)], **options)
    with pytest.raises(ValueError, match=r"predictions\[0\] .*has no 'labels', only"):
        plain_evaluator([{"boxes": box}], [truth(box)], **options)
    evaluator = plain_evaluator([detection([], [])], [truth(box)], **options)
    assert evaluator.compute().ap == 0.0


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
