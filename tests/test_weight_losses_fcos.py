"""Weighted losses of FCOS against torchvision's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import assert_identical, step
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import generalized_box_iou

from detmix import weight_losses
from detmix.losses.fcos import centerness_targets

LOSSES = {"classification", "bbox_regression", "bbox_ctrness"}


def build() -> FCOS:
    """One level without scale ranges, features wide enough for the head's group norm."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1)
    )
    backbone.out_channels = 32
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    return FCOS(backbone, 5, anchor_generator=anchors, min_size=64, max_size=64).train()


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
@pytest.mark.parametrize("repeats", [1, 3, 7])
def test_all_weights_one_equals_torchvision_bit_for_bit(repeats, half_precision):
    """Of larger batches too: the order of a sum may change with its length."""
    images, targets = (part * repeats for part in batch())
    images = [image * (i + 1) / len(images) for i, image in enumerate(images)]
    model = build()
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        plain = step(copy.deepcopy(model), (images, targets))
        assert plain[0].keys() == LOSSES
        assert all(plain[0].values())
        assert_identical(step(weight_losses(model), (images, targets)), plain)


def loop_over_anchors(targets, outputs, anchors, matched, *, background_weight, normalizer):
    """All losses anchor by anchor, by the formulas of the papers."""
    totals = dict.fromkeys(LOSSES, 0.0)
    count = weight_sum = 0.0
    for i, target in enumerate(targets):
        for a, match in enumerate(matched[i].tolist()):
            w = float(target["box_weights"][match]) if match >= 0 else background_weight
            for k, score in enumerate(outputs["cls_logits"][i, a].double().sigmoid().tolist()):
                if match >= 0 and k == int(target["labels"][match]):
                    totals["classification"] -= w * 0.25 * (1 - score) ** 2 * math.log(score)
                else:
                    totals["classification"] -= w * 0.75 * score**2 * math.log(1 - score)
            if match < 0:
                continue
            count, weight_sum = count + 1, weight_sum + w
            size = float(anchors[i][a][2] - anchors[i][a][0])
            x, y = ((anchors[i][a][:2] + anchors[i][a][2:]) / 2).tolist()
            x0, y0, x1, y1 = target["boxes"][match].tolist()
            left, top, right, bottom = (d * size for d in outputs["bbox_regression"][i, a].tolist())
            predicted = torch.tensor([[x - left, y - top, x + right, y + bottom]])
            giou = float(generalized_box_iou(predicted, target["boxes"][match][None]))
            totals["bbox_regression"] += w * (1 - giou)
            across, down = sorted((x - x0, x1 - x)), sorted((y - y0, y1 - y))
            goal = math.sqrt(across[0] / across[1] * down[0] / down[1])
            p = float(outputs["bbox_ctrness"][i, a, 0].sigmoid())
            totals["bbox_ctrness"] -= w * (goal * math.log(p) + (1 - goal) * math.log(1 - p))
    divisor = max(1, count if normalizer == "samples" else weight_sum)
    return {name: total / divisor for name, total in totals.items()}


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
def test_weighted_losses_equal_a_loop_over_anchors(normalizer):
    settings = {"background_weight": 0.6, "normalizer": normalizer}
    model = weight_losses(build(), **settings)
    seen = {}
    compute_loss = model.head.compute_loss

    def spy(*arguments):
        seen["arguments"] = arguments
        return compute_loss(*arguments)

    model.head.compute_loss = spy
    with torch.no_grad():
        # scores spread around 0.5, so that each anchor matters, and boxes of some size
        model.head.classification_head.cls_logits.weight.mul_(10)
        model.head.classification_head.cls_logits.bias.zero_()
        model.head.regression_head.bbox_reg.bias.fill_(1.0)
        losses = model(*uneven())
        expected = loop_over_anchors(*seen["arguments"], **settings)
    matches = [{*m.tolist()} for m in seen["arguments"][3]]
    assert len(matches[0] | matches[2]) > 2  # background and several objects take part
    for key in LOSSES:
        assert float(losses[key]) == pytest.approx(expected[key], rel=1e-4)


def test_centerness_targets_of_hand_worked_points():
    distances = torch.tensor([[2.0, 3, 2, 3], [1, 1, 4, 1], [1, 2, 4, 8]])
    assert centerness_targets(distances).tolist() == pytest.approx([1.0, 0.5, 0.25])
