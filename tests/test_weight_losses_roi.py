"""Weighted mask and keypoint losses against torchvision's own and a loop over proposals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import assert_identical, step
from torch import nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import (
    KeypointRCNNHeads,
    KeypointRCNNPredictor,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from detmix import weight_losses
from detmix.losses.roi_branches import weighted_keypoint_loss, weighted_mask_loss

SIZE = 96
CLASSES = 5
KEYPOINTS = 3
SMALL = {
    "min_size": SIZE,
    "max_size": SIZE,
    "box_batch_size_per_image": 12,
    "rpn_post_nms_top_n_train": 40,
}


def small_parts() -> tuple[nn.Module, dict]:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    backbone.out_channels = 8
    settings = SMALL | {
        "rpn_anchor_generator": AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 7, 2),
        "box_detections_per_img": 10,
        "box_score_thresh": 0.0,
    }
    return backbone, settings


def plain_mask() -> MaskRCNN:
    backbone, settings = small_parts()
    return MaskRCNN(
        backbone,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        mask_head=MaskRCNNHeads(8, [8], 1),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES),
        box_predictor=FastRCNNPredictor(1024, CLASSES),
        **settings,
    )


def plain_keypoint() -> KeypointRCNN:
    backbone, settings = small_parts()
    return KeypointRCNN(
        backbone,
        keypoint_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        keypoint_head=KeypointRCNNHeads(8, [8]),
        keypoint_predictor=KeypointRCNNPredictor(8, KEYPOINTS),
        num_classes=CLASSES,
        **settings,
    )


def plain_both() -> MaskRCNN:
    model, donor = plain_mask(), plain_keypoint().roi_heads
    for part in ("keypoint_roi_pool", "keypoint_head", "keypoint_predictor"):
        setattr(model.roi_heads, part, getattr(donor, part))
    return model


BUILDERS = {"mask": plain_mask, "keypoint": plain_keypoint, "both": plain_both}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]().train()


BOXES = [
    [[5.0, 5.0, 40.0, 50.0], [30.0, 40.0, 85.0, 92.0]],
    [],
    [[1.0, 1.0, 30.0, 33.0], [50.0, 2.0, 88.0, 60.0], [3.0, 50.0, 60.0, 85.0]],
]
WEIGHTS = [[0.25, 0.9], [], [0.6, 0.05, 1.0]]


def batch(weights=None) -> tuple[list[torch.Tensor], list[dict]]:
    """Images of the detector's own size, with ellipses for masks and keypoints on the boxes.

    Of each object one keypoint lies on the box's right and lower edge, which torchvision counts
    as inside, and every second object hides its last keypoint.
    """
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in BOXES]
    targets = []
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for index, image_boxes in enumerate(BOXES):
        masks, keypoints = [], []
        for row, (x1, y1, x2, y2) in enumerate(image_boxes):
            across = (columns + 0.5 - (x1 + x2) / 2) / (x2 - x1)
            down = (rows + 0.5 - (y1 + y2) / 2) / (y2 - y1)
            masks.append((across**2 + down**2 < 0.25).to(torch.uint8))
            keypoints.append(
                [[x1 + 3, y1 + 4, 1], [x2, y2, 2], [(x1 + x2) / 2, y1 + 9, float(row % 2 == 0)]]
            )
        target = {
            "boxes": torch.tensor(image_boxes).reshape(-1, 4),
            "labels": torch.arange(len(image_boxes)) % 4 + 1,
            "masks": torch.stack(masks) if masks else torch.zeros(0, SIZE, SIZE).byte(),
            "keypoints": torch.tensor(keypoints).float().reshape(-1, KEYPOINTS, 3),
        }
        if weights is not None:
            target["box_weights"] = torch.tensor(weights[index])
        targets.append(target)
    return images, targets


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_all_weights_one_equals_torchvision_bit_for_bit(name, half_precision):
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        plain = step(copy.deepcopy(model), batch())
        assert len(plain[0]) == (6 if name == "both" else 5)
        assert all(loss > 0 for loss in plain[0].values())
        assert_identical(step(weight_losses(model), batch()), plain)


def test_no_visible_keypoint_equals_torchvision_bit_for_bit():
    images, targets = batch()
    for target in targets:
        target["keypoints"][..., 2] = 0
    model = build("keypoint")
    plain = step(copy.deepcopy(model), (images, targets))
    assert plain[0]["loss_keypoint"] == 0
    assert_identical(step(weight_losses(model), (images, targets)), plain)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def objects_of(proposals, targets):
    """The image and the object of each proposal, by greatest overlap."""
    found = []
    for index, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
        for box in boxes:
            overlap = box_iou(box[None], target["boxes"])[0]
            assert overlap.max() >= 0.5
            found.append((index, int(overlap.argmax()), box))
    return found


def loop_mask_loss(logits, proposals, targets, weights, normalizer):
    """Proposal by proposal and pixel by pixel with Python's own numbers."""
    total = divisor = 0.0
    for row, (index, obj, box) in enumerate(objects_of(proposals, targets)):
        mask = targets[index]["masks"][obj].float()[None, None]
        goal = roi_align(mask, [box[None]], logits.shape[-1])[0, 0].flatten().tolist()
        plane = logits[row, int(targets[index]["labels"][obj])].flatten().tolist()
        weight = weights[index][obj]
        total += weight * sum(softplus(x) - x * t for x, t in zip(plane, goal, strict=True))
        divisor += len(plane) * (weight if normalizer == "weights" else 1)
    return total / divisor


def loop_keypoint_loss(logits, proposals, targets, weights, normalizer):
    """Keypoint by keypoint with Python's own numbers."""
    total = divisor = 0.0
    size = logits.shape[-1]
    for row, (index, obj, box) in enumerate(objects_of(proposals, targets)):
        x1, y1, x2, y2 = box.tolist()
        for point, (x, y, visible) in enumerate(targets[index]["keypoints"][obj].tolist()):
            column = size - 1 if x == x2 else math.floor((x - x1) / (x2 - x1) * size)
            line = size - 1 if y == y2 else math.floor((y - y1) / (y2 - y1) * size)
            if not (visible and 0 <= column < size and 0 <= line < size):
                continue
            log_probs = logits[row, point].double().flatten().log_softmax(0)
            weight = weights[index][obj]
            total -= weight * log_probs[line * size + column].item()
            divisor += weight if normalizer == "weights" else 1
    return total / divisor


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("name", BUILDERS)
def test_losses_equal_a_loop_over_proposals(name, normalizer):
    model = weight_losses(build(name), normalizer=normalizer, background_weight=0.3)
    loops = {"mask": loop_mask_loss, "keypoint": loop_keypoint_loss}
    caught = {}
    kinds = [kind for kind in loops if name in (kind, "both")]
    for kind in kinds:
        pool = getattr(model.roi_heads, f"{kind}_roi_pool")
        predictor = getattr(model.roi_heads, f"{kind}_predictor")
        pool.register_forward_hook(
            lambda _, args, __, kind=kind: caught.update({f"{kind}_proposals": args[1]})
        )
        predictor.register_forward_hook(
            lambda _, __, out, kind=kind: caught.update({f"{kind}_logits": out.detach()})
        )
    images, targets = batch(WEIGHTS)
    losses = step(model, (images, targets))[0]
    for kind in kinds:
        proposals = caught[f"{kind}_proposals"]
        assert sum(map(len, proposals)) >= 5  # each object at the least
        expected = loops[kind](caught[f"{kind}_logits"], proposals, targets, WEIGHTS, normalizer)
        assert losses[f"loss_{kind}"].item() == pytest.approx(expected, rel=1e-5)


def test_an_image_without_objects_need_not_know_the_number_of_keypoints():
    images, targets = batch(WEIGHTS)
    model = weight_losses(build("keypoint"))
    expected = step(model, (images, targets))
    targets[1]["keypoints"] = torch.zeros(0, 0, 3)
    assert_identical(step(model, (images, targets)), expected)


def test_gradcheck_of_the_pure_losses():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    goals = torch.rand(3, 2, 2, dtype=torch.float64, generator=generator)
    heatmaps = torch.randn(5, 9, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    labels, cells = torch.tensor([1, 3, 2]), torch.tensor([0, 8, 4, 4, 2])
    check = torch.autograd.gradcheck
    assert check(lambda x: weighted_mask_loss(x, labels, goals, weights[:3]), (masks,))
    assert check(lambda x: weighted_keypoint_loss(x, cells, weights), (heatmaps,))
