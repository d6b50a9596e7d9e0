"""Weighted losses of RetinaNet against torchvision's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import assert_identical, step
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou, generalized_box_iou

from detmix import weight_losses
from detmix.losses.terms import foreground_normalizer, weighted_sum

LOSSES = {"classification", "bbox_regression"}


def build(loss_type: str = "l1") -> RetinaNet:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    backbone.out_channels = 8
    anchors = AnchorGenerator(((16, 24, 32, 48),), ((0.5, 1.0, 2.0),))
    model = RetinaNet(backbone, 5, anchor_generator=anchors, min_size=64, max_size=64).train()
    model.head.regression_head._loss_type = loss_type
    return model


def batch() -> tuple[list[torch.Tensor], list[dict]]:
    """Two images with objects around one without any."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((64, 56), (48, 64), (64, 64))]
    boxes = [
        torch.tensor([[4.0, 5.0, 30.0, 38.0], [16.0, 20.0, 55.0, 60.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 24.0, 26.0], [36.0, 2.0, 62.0, 45.0], [3.0, 34.0, 42.0, 60.0]]),
    ]
    targets = [{"boxes": b, "labels": torch.arange(len(b)) % 4 + 1} for b in boxes]
    return images, targets


def uneven() -> tuple[list[torch.Tensor], list[dict]]:
    images, targets = batch()
    for target, weights in zip(targets, ([0.3, 0.9], [], [0.2, 0.0, 1.0]), strict=True):
        target["box_weights"] = torch.tensor(weights)
    return images, targets


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize(
    ("loss_type", "repeats"),
    [("l1", 1), ("smooth_l1", 1), ("giou", 1), ("diou", 1), ("ciou", 1), ("l1", 3), ("l1", 7)],
)
def test_all_weights_one_equals_torchvision_bit_for_bit(loss_type, repeats, half_precision):
    """Of larger batches too: the order of a sum may change with its length."""
    images, targets = (part * repeats for part in batch())
    images = [image * (i + 1) / len(images) for i, image in enumerate(images)]
    model = build(loss_type)
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        plain = step(copy.deepcopy(model), (images, targets))
        assert plain[0].keys() == LOSSES
        assert all(plain[0].values())
        assert_identical(step(weight_losses(model), (images, targets)), plain)


def loop_over_anchors(model, targets, outputs, anchors, *, background_weight, normalizer):
    """Both losses anchor by anchor, by the formulas of the papers."""
    totals = dict.fromkeys(LOSSES, 0.0)
    left_out = 0
    for i, target in enumerate(targets):
        quality = box_iou(target["boxes"], anchors[i])
        matched = (
            model.proposal_matcher(quality).tolist()
            if len(target["boxes"])
            else [-1] * len(anchors[i])
        )
        left_out += matched.count(-2)
        focal = box = weight_sum = 0.0
        for a, match in enumerate(matched):
            if match == -2:
                continue
            w = float(target["box_weights"][match]) if match >= 0 else background_weight
            p = outputs["cls_logits"][i, a].double().sigmoid().tolist()
            for k, score in enumerate(p):
                if match >= 0 and k == int(target["labels"][match]):
                    focal -= w * 0.25 * (1 - score) ** 2 * math.log(score)
                else:
                    focal -= w * 0.75 * score**2 * math.log(1 - score)
            if match >= 0:
                weight_sum += w
                box += w * box_loss(
                    model, outputs["bbox_regression"][i, a], anchors[i][a], target["boxes"][match]
                )
        count = sum(match >= 0 for match in matched)
        divisor = max(1, count if normalizer == "samples" else weight_sum) * len(targets)
        totals["classification"] += focal / divisor
        totals["bbox_regression"] += box / divisor
    assert left_out  # anchors between the thresholds take part in this test
    return totals


def box_loss(model, deltas, anchor, box) -> float:
    ax, ay, aw, ah = centre(anchor)
    dx, dy, dw, dh = deltas.tolist()
    if model.head.regression_head._loss_type == "l1":
        x, y, w, h = centre(box)
        goal = ((x - ax) / aw, (y - ay) / ah, math.log(w / aw), math.log(h / ah))
        return sum(abs(d - g) for d, g in zip((dx, dy, dw, dh), goal, strict=True))
    x, y, w, h = ax + dx * aw, ay + dy * ah, aw * math.exp(dw), ah * math.exp(dh)
    predicted = torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2]])
    return 1 - float(generalized_box_iou(predicted, box[None]))


def centre(box) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("loss_type", ["l1", "giou"])
def test_weighted_losses_equal_a_loop_over_anchors(loss_type, normalizer):
    settings = {"background_weight": 0.6, "normalizer": normalizer}
    model = weight_losses(build(loss_type), **settings)
    seen = {}
    compute_loss = model.head.compute_loss

    def spy(targets, head_outputs, anchors, matched_idxs):
        seen["arguments"] = targets, head_outputs, anchors
        return compute_loss(targets, head_outputs, anchors, matched_idxs)

    model.head.compute_loss = spy
    with torch.no_grad():
        # scores spread around 0.5, so that each anchor matters
        model.head.classification_head.cls_logits.weight.mul_(30)
        model.head.classification_head.cls_logits.bias.zero_()
        losses = model(*uneven())
        expected = loop_over_anchors(model, *seen["arguments"], **settings)
    for key in LOSSES:
        assert float(losses[key]) == pytest.approx(expected[key], rel=1e-4)


def test_unknown_loss_type_is_named():
    model = weight_losses(build())
    model.head.regression_head._loss_type = "l3"
    with pytest.raises(ValueError, match=r"'l1', 'smooth_l1'.*got 'l3'"):
        model(*batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weighted_sum_with_ones_is_the_plain_sum_bit_for_bit(dtype):
    losses = torch.rand(3, 50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for weights in (torch.ones(3), torch.ones(3, 50), torch.ones(3, 50, 7)):
        total = weighted_sum(losses, weights)
        assert total.dtype == dtype
        assert torch.equal(total, losses.sum())


def test_weighted_sum_of_hand_worked_losses():
    losses = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert weighted_sum(losses, torch.tensor([0.5, 1.0])) == 8.5
    assert weighted_sum(losses[:0], torch.zeros(0)) == 0


def test_foreground_normalizer_is_never_below_one():
    weights = torch.tensor([0.5, 0.25, 1.0])
    assert foreground_normalizer(3, weights, "samples") == 3
    assert foreground_normalizer(torch.tensor(3), weights, "weights") == 1.75
    assert foreground_normalizer(2, weights[:2], "weights") == 1
    for normalizer in ("samples", "weights"):
        assert foreground_normalizer(0, weights[:0], normalizer) == 1
