"""Weighted losses of FCOS against torchvision's own."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import generalized_box_iou

from detmix import weight_losses
from detmix.detectors.fcos import centerness_targets

SMALL = {"weights": None, "weights_backbone": None, "num_classes": 5} | dict.fromkeys(
    ("min_size", "max_size"), 64
)
LOSSES = {"classification", "bbox_regression", "bbox_ctrness"}


def plain_backbone() -> FCOS:
    """One level without scale ranges, features wide enough for the head's group norm."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1)
    )
    backbone.out_channels = 32
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    return FCOS(backbone, num_classes=5, anchor_generator=anchors, min_size=64, max_size=64)


BUILDERS = {
    "FCOS": plain_backbone,
    "fcos_resnet50_fpn": lambda: detection.fcos_resnet50_fpn(**SMALL),
}


def build(name: str = "FCOS", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name]().train()


def batch(weights: float | None = None) -> tuple[list[torch.Tensor], list[dict]]:
    """Two images with objects around one without any."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((64, 56), (48, 64), (64, 64))]
    boxes = [
        torch.tensor([[4.0, 5.0, 30.0, 38.0], [16.0, 20.0, 55.0, 60.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 24.0, 26.0], [36.0, 2.0, 62.0, 45.0], [3.0, 34.0, 42.0, 60.0]]),
    ]
    targets = [
        {"boxes": b, "labels": torch.arange(len(b)) % 4 + 1, "image_id": i}
        for i, b in enumerate(boxes)
    ]
    if weights is not None:
        for target in targets:
            target["box_weights"] = torch.full((len(target["boxes"]),), weights)
    return images, targets


def uneven() -> tuple[list[torch.Tensor], list[dict]]:
    images, targets = batch()
    for target, weights in zip(targets, ([0.3, 0.9], [], [0.2, 0.0, 1.0]), strict=True):
        target["box_weights"] = torch.tensor(weights)
    return images, targets


def without_objects() -> tuple[list[torch.Tensor], list[dict]]:
    images, targets = batch()
    for target in targets:
        target["boxes"], target["labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return images, targets


def step(model: nn.Module, images, targets, precision: str = "float32"):
    """Losses, gradients and the random state afterwards of one training step."""
    torch.manual_seed(7)
    model.zero_grad()
    half = precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
        losses = model(images, targets)
    sum(losses.values()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if half:  # torch leaves parts of it uninitialised: a bf16 convolution of 1x1 pixels on a CPU
        grads.pop("backbone.fpn.extra_blocks.p7.weight", None)
    return {k: v.detach() for k, v in losses.items()}, grads, torch.get_rng_state()


def assert_identical(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        if isinstance(its, dict):
            assert mine.keys() == its.keys()
            for key in its:
                assert mine[key].dtype == its[key].dtype
                assert torch.equal(mine[key], its[key]), key
        else:
            assert torch.equal(mine, its)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_all_weights_one_equals_torchvision_bit_for_bit(name, precision):
    model = build(name)
    plain = step(copy.deepcopy(model), *batch(), precision)
    weight_losses(model)
    assert plain[0].keys() == LOSSES
    assert all(plain[0].values())
    assert_identical(step(model, *batch(1.0), precision), plain)
    assert_identical(step(model, *batch(), precision), plain)


@pytest.mark.parametrize("repeats", [3, 7])
def test_larger_batches_equal_torchvision_bit_for_bit(repeats):
    model = build()
    images, targets = (part * repeats for part in batch())
    images = [image * (i + 1) / len(images) for i, image in enumerate(images)]
    plain = step(copy.deepcopy(model), images, targets)
    assert_identical(step(weight_losses(model), images, targets), plain)


@pytest.mark.parametrize("settings", [{}, {"normalizer": "weights"}], ids=str)
@pytest.mark.parametrize("name", ["FCOS", "fcos_resnet50_fpn"])
def test_batch_without_any_object_equals_torchvision_bit_for_bit(name, settings):
    model = build(name)
    plain = step(copy.deepcopy(model), *without_objects())
    assert_identical(step(weight_losses(model, **settings), *without_objects()), plain)


def test_weight_normalizer_with_all_weights_one_equals_torchvision_bit_for_bit():
    model = build()
    plain = step(copy.deepcopy(model), *batch())
    assert_identical(step(weight_losses(model, normalizer="weights"), *batch(1.0)), plain)


def test_weight_normalizer_undoes_a_weight_common_to_everything():
    model = build()
    plain = step(copy.deepcopy(model), *batch())[0]
    losses = step(weight_losses(model, background_weight=0.7, normalizer="weights"), *batch(0.7))[0]
    for key in LOSSES:
        torch.testing.assert_close(losses[key], plain[key], rtol=1e-5, atol=1e-7)


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
@pytest.mark.parametrize("name", BUILDERS)
def test_weighted_losses_equal_a_loop_over_anchors(name, normalizer):
    settings = {"background_weight": 0.6, "normalizer": normalizer}
    model = weight_losses(build(name), **settings)
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


def test_losses_and_gradients_are_linear_in_the_weights():
    model = build()
    results = {}
    mixes = {"a": (uneven(), 0.2), "b": (batch(1.0), 1.0), "mean": (uneven(), 0.6)}
    for target in mixes["mean"][0][1]:
        target["box_weights"] = (target["box_weights"] + 1) / 2
    for name, (data, background_weight) in mixes.items():
        results[name] = step(weight_losses(model, background_weight=background_weight), *data)
    for a, b, mean in zip(results["a"][:2], results["b"][:2], results["mean"][:2], strict=True):
        for key in a:
            torch.testing.assert_close(mean[key], (a[key] + b[key]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
def test_no_weight_at_all_gives_zero_not_nan(normalizer):
    model = weight_losses(build(), background_weight=0.0, normalizer=normalizer)
    losses, grads, _ = step(model, *batch(0.0))
    assert all(loss == 0 for loss in losses.values())
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_objects_of_no_weight_do_not_blow_up_the_background():
    model = weight_losses(build(), normalizer="weights")
    losses = step(model, *batch(0.0))[0]
    assert losses["bbox_regression"] == losses["bbox_ctrness"] == 0
    background = step(weight_losses(model), *without_objects())[0]["classification"]
    assert 0 < losses["classification"] <= background


@pytest.mark.parametrize("name", ["FCOS", "fcos_resnet50_fpn"])
def test_everything_but_training_losses_is_unchanged(name):
    model = build(name)
    model.score_thresh = 0.0
    before = copy.deepcopy(model)
    weight_losses(model, background_weight=0.5)
    assert list(model.state_dict()) == list(before.state_dict())
    images, _ = batch()
    with torch.no_grad():
        ours, theirs = model.eval()(images), before.eval()(images)
    assert all(len(its["boxes"]) for its in theirs)
    assert_identical(ours, theirs)
    assert type(before.head) is FCOSHead


def test_copies_and_state_dicts_round_trip():
    model = weight_losses(build(), background_weight=0.4)
    expected = step(model, *uneven())
    assert_identical(step(copy.deepcopy(model), *uneven()), expected)
    fresh = weight_losses(build(seed=9), background_weight=0.4)
    fresh.load_state_dict(model.state_dict())
    assert_identical(step(fresh, *uneven()), expected)


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


@pytest.mark.parametrize("label", [0, 5, -1])
def test_bad_labels_are_named(label):
    images, targets = batch()
    targets[2]["labels"] = torch.tensor([1, label, 2])
    with pytest.raises(ValueError, match=rf"target 2 must be in 1\.\.4.*got {label} for box 1"):
        weight_losses(build())(images, targets)


def test_centerness_targets_of_hand_worked_points():
    distances = torch.tensor([[2.0, 3, 2, 3], [1, 1, 4, 1], [1, 2, 4, 8]])
    assert centerness_targets(distances).tolist() == pytest.approx([1.0, 0.5, 0.25])
