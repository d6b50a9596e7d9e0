"""Weighted losses of RetinaNet against torchvision's own."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, generalized_box_iou

from detmix import weight_losses
from detmix.detectors.losses import foreground_normalizer, weighted_sum

SMALL = {"weights": None, "weights_backbone": None, "num_classes": 5} | dict.fromkeys(
    ("min_size", "max_size"), 64
)
LOSSES = {"classification", "bbox_regression"}


def plain_backbone() -> RetinaNet:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    backbone.out_channels = 8
    anchors = AnchorGenerator(((16, 24, 32, 48),), ((0.5, 1.0, 2.0),))
    return RetinaNet(backbone, num_classes=5, anchor_generator=anchors, min_size=64, max_size=64)


def with_loss(loss_type: str) -> RetinaNet:
    model = plain_backbone()
    model.head.regression_head._loss_type = loss_type
    return model


BUILDERS = {
    "RetinaNet": plain_backbone,
    "retinanet_resnet50_fpn": lambda: detection.retinanet_resnet50_fpn(**SMALL),
    "retinanet_resnet50_fpn_v2": lambda: detection.retinanet_resnet50_fpn_v2(**SMALL),
    "smooth_l1": lambda: with_loss("smooth_l1"),
    "giou": lambda: with_loss("giou"),
    "diou": lambda: with_loss("diou"),
    "ciou": lambda: with_loss("ciou"),
}


def build(name: str = "RetinaNet", seed: int = 0) -> nn.Module:
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
@pytest.mark.parametrize("name", ["RetinaNet", "retinanet_resnet50_fpn_v2"])
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
    # images with objects: one without has no foreground weight to divide by
    plain, weighted = (([i[0], i[2]], [t[0], t[2]]) for i, t in (batch(), batch(0.7)))
    plain = step(copy.deepcopy(model), *plain)[0]
    losses = step(weight_losses(model, background_weight=0.7, normalizer="weights"), *weighted)[0]
    for key in LOSSES:
        torch.testing.assert_close(losses[key], plain[key], rtol=1e-5, atol=1e-7)


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
@pytest.mark.parametrize("name", ["RetinaNet", "giou"])
def test_weighted_losses_equal_a_loop_over_anchors(name, normalizer):
    settings = {"background_weight": 0.6, "normalizer": normalizer}
    model = weight_losses(build(name), **settings)
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
    assert losses["bbox_regression"] == 0
    background = step(weight_losses(model), *without_objects())[0]["classification"]
    assert 0 < losses["classification"] <= background


@pytest.mark.parametrize("name", ["RetinaNet", "retinanet_resnet50_fpn_v2"])
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
    assert type(before.head) is RetinaNetHead


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
