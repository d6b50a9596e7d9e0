"""Weighted losses of Faster R-CNN sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detmix import weight_losses
from detmix.losses.object_weights import sample_weights
from detmix.losses.terms import (
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
    weighted_smooth_l1,
)


def build() -> FasterRCNN:
    backbone = nn.Conv2d(3, 8, 8, stride=8)
    backbone.out_channels = 8
    return FasterRCNN(
        backbone,
        num_classes=5,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 7, 2),
    )


def test_scalar_oracle_for_one_image():
    """Against explicit loops over torchvision's own per-sample losses."""
    model = weight_losses(build(), background_weight=0.7)
    heads = model.roi_heads
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    deltas, goals = torch.randn(6, 20, generator=generator), torch.randn(6, 4, generator=generator)
    labels = torch.tensor([0, 3, 0, 1, 4, 0])
    weights = torch.tensor([0.7, 0.25, 0.7, 0.75, 1.0, 0.7])
    losses = heads.weighted_losses(logits, deltas, labels, goals, weights)
    classifier = box = 0.0
    for i, label in enumerate(labels.tolist()):
        classifier += weights[i] * F.cross_entropy(logits[i], labels[i])
        if label:
            box += weights[i] * F.smooth_l1_loss(
                deltas[i, 4 * label : 4 * label + 4], goals[i], beta=1 / 9, reduction="sum"
            )
    torch.testing.assert_close(losses["loss_classifier"], classifier / 6)
    torch.testing.assert_close(losses["loss_box_reg"], box / 6)


def test_anchor_weights_follow_the_matches():
    model = weight_losses(build(), background_weight=0.5)
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    target = {"boxes": boxes, "box_weights": torch.tensor([0.1, 0.9])}
    # exactly object 1, exactly object 0, half of object 0 (neither), far from both
    anchors = torch.tensor(
        [[20.0, 20, 30, 30], [0.0, 0, 10, 10], [0.0, 0, 10, 5], [60.0, 60, 70, 70]]
    )
    labels, matched = model.rpn.assign_targets_to_anchors([anchors], [target])
    assert labels[0].tolist() == [1, 1, -1, 0]
    assert labels.weights[0].tolist() == pytest.approx([0.9, 0.1, 0.5, 0.5])
    theirs = super(type(model.rpn), model.rpn).assign_targets_to_anchors([anchors], [target])
    assert torch.equal(labels[0], theirs[0][0])
    assert torch.equal(matched[0], theirs[1][0])


def test_sample_weights_mask_background_that_points_at_object_zero():
    weights = sample_weights(
        torch.tensor([0.2]), torch.tensor([0, 0, -2]), torch.tensor([True, False, False]), 1.0
    )
    assert weights.tolist() == pytest.approx([0.2, 1.0, 1.0])


def test_gradcheck_of_the_pure_losses():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    weights = torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0, 2])
    binary = torch.tensor([0.0, 1, 1, 0, 0, 1], dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: weighted_cross_entropy(x, labels, w), (rand(6, 4), weights))
    # torch itself has no gradient for the weights of this one
    fixed = weights.detach()
    assert check(lambda x: weighted_binary_cross_entropy(x, binary, fixed), (rand(6),))
    assert check(
        lambda x, t, w: weighted_smooth_l1(x, t, w, beta=1 / 9, num_samples=9),
        (rand(6, 4), rand(6, 4), weights),
    )
