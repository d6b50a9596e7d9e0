"""Weighted losses of Faster R-CNN against torchvision's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detmix import weight_losses
from detmix.detectors.losses import (
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
    weighted_smooth_l1,
)
from detmix.detectors.weighting import sample_weights

SMALL = {"weights": None, "weights_backbone": None, "num_classes": 5} | dict.fromkeys(
    ("min_size", "max_size"), 96
)
LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def plain_backbone() -> FasterRCNN:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    backbone.out_channels = 8
    return FasterRCNN(
        backbone,
        num_classes=5,
        min_size=96,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 7, 2),
    )


BUILDERS = {
    "fasterrcnn_resnet50_fpn": lambda: detection.fasterrcnn_resnet50_fpn(**SMALL),
    "fasterrcnn_resnet50_fpn_v2": lambda: detection.fasterrcnn_resnet50_fpn_v2(**SMALL),
    "fasterrcnn_mobilenet_v3_large_fpn": lambda: detection.fasterrcnn_mobilenet_v3_large_fpn(
        **SMALL
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**SMALL)
    ),
    "FasterRCNN": plain_backbone,
}


def build(name: str = "FasterRCNN", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name]().train()


def batch(weights: float | None = None) -> tuple[list[torch.Tensor], list[dict]]:
    """Two images with objects around one without any."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((96, 80), (64, 96), (90, 90))]
    boxes = [
        torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 30.0, 75.0, 90.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 30.0, 33.0], [50.0, 2.0, 88.0, 60.0], [3.0, 50.0, 60.0, 85.0]]),
    ]
    targets = [
        {"boxes": b, "labels": torch.arange(len(b)) % 4 + 1, "image_id": i}
        for i, b in enumerate(boxes)
    ]
    if weights is not None:
        for target in targets:
            target["box_weights"] = torch.full((len(target["boxes"]),), weights)
    return images, targets


def step(model: nn.Module, images, targets, seed: int = 7):
    """Losses, gradients and the random state afterwards of one training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    losses = model(images, targets)
    sum(losses.values()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, grads, torch.get_rng_state()


def assert_identical(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        if isinstance(its, dict):
            assert mine.keys() == its.keys()
            for key in its:
                assert torch.equal(mine[key], its[key]), key
        else:
            assert torch.equal(mine, its)


@pytest.mark.parametrize("explicit", [True, False], ids=["ones", "absent"])
@pytest.mark.parametrize("name", BUILDERS)
def test_all_weights_one_equals_torchvision_bit_for_bit(name, explicit):
    model = build(name)
    plain = step(copy.deepcopy(model), *batch())
    weighted = step(weight_losses(model), *batch(1.0 if explicit else None))
    assert plain[0].keys() == LOSSES
    assert_identical(weighted, plain)


def test_batch_without_any_object_equals_torchvision_bit_for_bit():
    images, targets = batch()
    for target in targets:
        target["boxes"], target["labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    model = build()
    plain = step(copy.deepcopy(model), images, targets)
    assert_identical(step(weight_losses(model), images, targets), plain)


@pytest.mark.parametrize("name", ["FasterRCNN", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_bf16_autocast_equals_torchvision(name):
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(copy.deepcopy(model), *batch())
        weighted = step(weight_losses(model), *batch(1.0))
    assert_identical(weighted[:1], plain[:1])


def test_weight_normalizer_equals_torchvision_for_equal_weights():
    model = build()
    plain, _, _ = step(copy.deepcopy(model), *batch())
    weight_losses(model, background_weight=0.3, normalizer="weights")
    losses, _, _ = step(model, *batch(0.3))
    for key in LOSSES:
        torch.testing.assert_close(losses[key], plain[key], rtol=1e-5, atol=1e-7)


def test_no_weight_at_all_gives_zero_not_nan():
    model = weight_losses(build(), background_weight=0.0, normalizer="weights")
    losses, grads, _ = step(model, *batch(0.0))
    assert all(loss == 0 for loss in losses.values())
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_losses_are_linear_in_the_weights():
    model = build()
    generator = torch.Generator().manual_seed(1)
    first, second = ([torch.rand(n, generator=generator) for n in (2, 0, 3)] for _ in "ab")
    mixes = {
        "a": first,
        "b": second,
        "mean": [(a + b) / 2 for a, b in zip(first, second, strict=True)],
    }
    backgrounds = {"a": 0.2, "b": 1.0, "mean": 0.6}
    losses = {}
    for name, weights in mixes.items():
        images, targets = batch()
        for target, box_weights in zip(targets, weights, strict=True):
            target["box_weights"] = box_weights
        weight_losses(model, background_weight=backgrounds[name])
        losses[name] = step(model, images, targets)[0]
    for key in LOSSES:
        expected = (losses["a"][key] + losses["b"][key]) / 2
        torch.testing.assert_close(losses["mean"][key], expected, rtol=1e-5, atol=1e-7)


def test_an_object_of_weight_zero_has_no_box_loss_but_still_hides_its_background():
    model = weight_losses(build())
    losses = step(model, *batch(0.0))[0]
    assert losses["loss_box_reg"] == 0
    assert losses["loss_rpn_box_reg"] == 0
    assert 0 < losses["loss_objectness"] < step(model, *batch(1.0))[0]["loss_objectness"]


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
    labels, matched, weights = model.rpn.match_anchors([anchors], [target])
    assert labels[0].tolist() == [1, 1, -1, 0]
    assert weights[0].tolist() == pytest.approx([0.9, 0.1, 0.5, 0.5])
    theirs = super(type(model.rpn), model.rpn).assign_targets_to_anchors([anchors], [target])
    assert torch.equal(labels[0], theirs[0][0])
    assert torch.equal(matched[0], theirs[1][0])


def test_sample_weights_mask_background_that_points_at_object_zero():
    weights = sample_weights(
        torch.tensor([0.2]), torch.tensor([0, 0, -2]), torch.tensor([True, False, False]), 1.0
    )
    assert weights.tolist() == pytest.approx([0.2, 1.0, 1.0])


@pytest.mark.parametrize("name", ["FasterRCNN", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_everything_but_training_losses_is_unchanged(name):
    model = build(name)
    before = copy.deepcopy(model)
    calls = []
    model.rpn.register_forward_hook(lambda *_: calls.append("rpn"))
    assert weight_losses(model) is model
    assert list(model.state_dict()) == list(before.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    images, _ = batch()
    with torch.no_grad():
        ours, theirs = model.eval()(images), before.eval()(images)
        for mine, its in zip(ours, theirs, strict=True):
            assert_identical([mine], [its])
    assert calls == ["rpn"]
    assert "loss_objectness" not in repr(model)
    # the other model of the process is still torchvision's
    assert type(before.rpn) is detection.rpn.RegionProposalNetwork


def test_copies_and_round_trips():
    model = weight_losses(build(), background_weight=0.4)
    expected = step(model, *batch(0.5))
    assert_identical(step(copy.deepcopy(model), *batch(0.5)), expected)
    assert_identical(step(pickle.loads(pickle.dumps(model)), *batch(0.5)), expected)
    fresh = weight_losses(build(seed=9), background_weight=0.4)
    fresh.load_state_dict(model.state_dict())
    assert_identical(step(fresh, *batch(0.5)), expected)


def test_calling_it_again_changes_the_settings_only():
    model = weight_losses(weight_losses(build(), background_weight=0.1))
    assert_identical(step(model, *batch(0.5)), step(weight_losses(build()), *batch(0.5)))


class OwnRoIHeads(detection.roi_heads.RoIHeads):
    pass


class OwnClassificationHead(detection.retinanet.RetinaNetClassificationHead):
    pass


def test_unknown_models_are_refused_by_name_and_left_alone():
    with pytest.raises(TypeError, match="Linear"):
        weight_losses(nn.Linear(1, 1))
    retinanet = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    retinanet.head.classification_head.__class__ = OwnClassificationHead
    with pytest.raises(TypeError, match="RetinaNet: its OwnClassificationHead is not"):
        weight_losses(retinanet)
    assert type(retinanet.head) is detection.retinanet.RetinaNetHead
    model = build()
    model.roi_heads.__class__ = OwnRoIHeads
    with pytest.raises(TypeError, match="OwnRoIHeads"):
        weight_losses(model)
    assert type(model.rpn) is detection.rpn.RegionProposalNetwork


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"target 0 must have shape \(2,\).*\(3,\)"),
        (torch.tensor([1.0, -0.5]), "target 0.*-0.5 for box 1"),
        (torch.tensor([float("nan"), 1.0]), "target 0.*nan for box 0"),
    ],
)
def test_bad_weights_are_named(weights, message):
    images, targets = batch(1.0)
    targets[0]["box_weights"] = weights
    with pytest.raises(ValueError, match=message):
        weight_losses(build())(images, targets)


def test_weights_may_be_a_list():
    images, targets = batch(0.5)
    expected = step(weight_losses(build()), images, targets)
    for target in targets:
        target["box_weights"] = target["box_weights"].tolist()
    assert_identical(step(weight_losses(build()), images, targets), expected)


def test_bad_boxes_are_named():
    images, targets = batch()
    targets[2]["boxes"][1, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"'boxes' of target 2 must be finite, got \[.*nan\] for box 1"
    ):
        weight_losses(build())(images, targets)


@pytest.mark.parametrize("label", [0, 5, -1])
def test_bad_labels_are_named(label):
    images, targets = batch()
    targets[2]["labels"] = torch.tensor([1, label, 2])
    with pytest.raises(ValueError, match=rf"target 2 must be in 1\.\.4.*got {label} for box 1"):
        weight_losses(build())(images, targets)


@pytest.mark.parametrize("settings", [{"background_weight": -1.0}, {"normalizer": "mean"}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        weight_losses(build(), **settings)


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
