"""The albumentations adapter: fields follow their boxes, and seeds decide everything.

Masks, keypoints and tv_tensors are in test_augment_masks_keypoints.py; that samples depend on seed,
epoch and index alone, whoever loads them, is in contract/test_randomness.py.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from detmix.data import AlbumentationsTransform, AugmentedDataset, detection_transforms

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as alb

BOXES = [[0, 0, 10, 10], [30, 20, 60, 40], [5, 5, 25, 35]]
# The crop to x >= 20 loses the first box and cuts the third down to a quarter.
CROP = [alb.Crop(20, 0, 60, 40)]


def make_image(height=40, width=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def make_target(boxes=BOXES, **fields):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "image_id": 7, **fields}


def assert_boxes(boxes, expected):
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.as_tensor(expected).float(), rtol=0, atol=1e-4)


def test_every_field_follows_its_box():
    fields = {
        "box_weights": torch.tensor([0.25, 0.5, 0.75]),
        "difficult": torch.tensor([True, False, True]),
        "iscrowd": torch.tensor([0, 1, 0]),
        "area": torch.tensor([100.0, 600.0, 600.0]),
        "embedding": torch.arange(6).reshape(3, 2),
        "text": ["a", "b", "c"],
        "orig_size": torch.tensor([40, 60, 3]),  # of length N, but of the image
        "note": "kept",
    }
    image, result = AlbumentationsTransform(CROP)(make_image(), make_target(**fields))
    assert torch.equal(image, make_image()[:, :, 20:])
    assert image.is_contiguous()
    assert_boxes(result["boxes"], [[10, 20, 40, 40], [0, 5, 5, 35]])
    assert result["labels"].tolist() == [2, 3]
    assert result["box_weights"].tolist() == [0.5, 0.75]
    assert result["difficult"].tolist() == [False, True]
    assert result["iscrowd"].tolist() == [1, 0]
    assert result["embedding"].tolist() == [[2, 3], [4, 5]]
    assert result["text"] == ["b", "c"]
    torch.testing.assert_close(result["area"], torch.tensor([600.0, 150.0]), rtol=0, atol=1e-2)
    assert result["orig_size"].tolist() == [40, 60, 3]
    assert (result["note"], result["image_id"]) == ("kept", 7)
    as_list = AlbumentationsTransform(CROP)(make_image(), make_target(labels=[5, 6, 7]))
    assert as_list[1]["labels"] == [6, 7]


@pytest.mark.parametrize("limit", [{"min_visibility": 0.3}, {"min_area": 200}])
def test_boxes_of_which_too_little_is_seen_are_dropped(limit):
    result = AlbumentationsTransform(CROP, **limit)(make_image(), make_target())[1]
    assert result["labels"].tolist() == [2]


def test_boxes_are_clipped_and_never_empty():
    boxes = [[-5, -5, 10, 10], [50, 30, 99, 99], [70, 5, 90, 9], [5, 5, 5, 9]]
    result = AlbumentationsTransform([])(make_image(), make_target(boxes))[1]
    assert_boxes(result["boxes"], [[0, 0, 10, 10], [50, 30, 60, 40]])
    assert result["labels"].tolist() == [1, 2]


def test_the_area_changes_as_the_box_does():
    target = make_target(area=torch.tensor([100.0, 600, 600]))
    half = detection_transforms(30, train=False)(make_image(), target)[1]
    torch.testing.assert_close(half["area"], target["area"] / 4)
    target = {"boxes": torch.tensor([[10.0, 10, 30, 30]]), "area": torch.tensor([301])}
    crop = AlbumentationsTransform([alb.Crop(15, 0, 60, 40)])(make_image(), target)[1]
    assert crop["area"].tolist() == [226]  # three quarters of 301 are 225.75
    assert crop["area"].dtype == torch.int64


@pytest.mark.parametrize("train", [True, False])
def test_images_without_boxes(train):
    transform = detection_transforms(32, train=train, flip=1, photometric=1, crop=1)
    target = make_target([], difficult=torch.zeros(0, dtype=torch.bool))
    for seed in range(5):
        image, result = transform(make_image(), target, seed=seed)
        assert image.shape[0] == 3
        assert result["boxes"].shape == (0, 4)
        assert result["labels"].shape == result["difficult"].shape == (0,)
    # A pipeline that has seen no boxes must still carry them afterwards.
    assert len(transform(make_image(), make_target())[1]["labels"]) == 3
    # as torchvision wraps an image without objects
    result = transform(make_image(), {"image_id": 3})[1]
    assert (result["boxes"].shape, result["labels"].shape) == ((0, 4), (0,))


def test_training_boxes_still_surround_their_pixels():
    """Objects are painted red, green and blue; after crop, shrink and flip each is in its box."""
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    target = make_target([[10, 20, 40, 60], [50, 10, 70, 30], [80, 40, 110, 70]])
    for channel, (x1, y1, x2, y2) in enumerate(target["boxes"].int().tolist()):
        image[channel, y1:y2, x1:x2] = 255
    transform = detection_transforms(60, train=True, photometric=0, crop=1)
    for seed in range(30):
        new_image, result = transform(image, target, seed=seed)
        assert max(new_image.shape) <= 60
        assert result["labels"].tolist() == [1, 2, 3]  # the crop is safe for every box
        for label, box in zip(result["labels"].tolist(), result["boxes"].tolist(), strict=True):
            rows, columns = np.nonzero(new_image[label - 1].numpy() > 127)
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(seen, box, atol=1.0)


def test_the_seed_or_else_torch_decides_everything():
    transform = detection_transforms(train=True, photometric=1)

    def outcome(**seed):
        image, target = transform(make_image(), make_target(), **seed)
        return image.numpy().tobytes(), target["boxes"].numpy().tobytes()

    first = [outcome(seed=seed) for seed in range(30)]
    assert len(set(first)) > 15
    torch.manual_seed(3)
    unseeded = [outcome(), outcome()]
    assert unseeded[0] != unseeded[1]
    torch.manual_seed(3)
    assert [outcome(), outcome()] == unseeded
    transform = detection_transforms(train=True, photometric=1)
    assert [outcome(seed=seed) for seed in range(30)] == first


def test_transforms_draw_independently():
    """Flip and inversion must not be decided by the same draw."""
    transform = AlbumentationsTransform([alb.HorizontalFlip(p=0.5), alb.InvertImg(p=0.5)])
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :, 0] = 200
    counts = torch.zeros(2, 2)
    for seed in range(800):
        corners = transform(image, make_target([]), seed=seed)[0][0, 0]
        is_inverted = int(corners[1] == 255)
        is_flipped = int(corners[0] == (255 if is_inverted else 0))
        counts[is_flipped, is_inverted] += 1
    assert (counts - 200).abs().max() < 60  # five standard deviations of a quarter of 800


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"boxes": torch.full((3, 4), torch.nan)}, "'boxes'.*nan"),
        ({"boxes": torch.zeros(3, 5)}, r"'boxes'.*\(3, 5\)"),
        ({"labels": torch.tensor([1, 2])}, r"'labels' .*\(2,\)"),
        ({"labels": [2, 0, 1]}, r"'labels'\[1\].*0"),
        ({"box_weights": torch.tensor([1.0, -0.5, 1.0])}, "'box_weights'.*-0.5"),
    ],
)
def test_broken_targets_are_named(change, named):
    with pytest.raises(ValueError, match=f"image_id 7.*{named}"):
        AlbumentationsTransform([])(make_image(), {**make_target(), **change})


def test_broken_images_and_arguments_are_named():
    for image in (make_image().float(), make_image()[0], make_image()[:2]):
        with pytest.raises(ValueError, match="image_id 7: image must be a"):
            AlbumentationsTransform([])(image, make_target())
    with pytest.raises(ValueError, match=r"min_visibility.*1\.5"):
        AlbumentationsTransform([], min_visibility=1.5)
    with pytest.raises(ValueError, match=r"crop.*2"):
        detection_transforms(train=True, crop=2)
    with pytest.raises(ValueError, match="keypoint_flip"):
        detection_transforms(train=True, keypoint_flip=[0, 0, 1])


@pytest.mark.skipif(not hasattr(BoundingBoxFormat, "CXCYWHR"), reason="no rotated boxes")
def test_rotated_boxes_are_refused():
    boxes = BoundingBoxes([[9.0, 9, 4, 4, 30]], format="CXCYWHR", canvas_size=(40, 60))
    with pytest.raises(ValueError, match=r"image_id 7: 'boxes'.*CXCYWHR"):
        AlbumentationsTransform([])(make_image(), {"boxes": boxes, "image_id": 7})


def test_augmented_dataset_passes_epochs_down_and_checks_the_index():
    inner = AugmentedDataset([(make_image(), make_target())] * 6, detection_transforms(train=True))
    outer = AugmentedDataset(inner, AlbumentationsTransform([]))
    first = outer[0][0]
    outer.set_epoch(1)
    assert torch.equal(inner[0][0], outer[0][0])
    assert not torch.equal(first, outer[0][0])
    assert torch.equal(outer[-1][0], outer[5][0])
    with pytest.raises(IndexError, match="index 6 is out of range for 6"):
        outer[6]
