"""Weighted losses of SSD300 and SSDlite320 against torchvision's own and a loop over anchors."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from detmix import weight_losses
from detmix.detectors.ssd import hard_negatives

SIZE = 64
CLASSES = 5


class Levels(nn.Module):
    """Three feature maps with few channels."""

    out_channels = (8, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x):
        maps = [torch.relu(self.stem(x))]
        for down in self.downs:
            maps.append(torch.relu(down(maps[-1])))
        return OrderedDict((str(i), level) for i, level in enumerate(maps))


def plain_ssd() -> SSD:
    generator = DefaultBoxGenerator([[2], [2], [2]], scales=[0.2, 0.4, 0.6, 0.8])
    return SSD(Levels(), generator, (SIZE, SIZE), CLASSES)


PLAIN = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
BUILDERS = {
    "SSD": plain_ssd,
    "ssd300_vgg16": lambda: detection.ssd300_vgg16(**PLAIN),
    "ssdlite320_mobilenet_v3_large": lambda: detection.ssdlite320_mobilenet_v3_large(**PLAIN),
}


def build(name: str = "SSD", seed: int = 0) -> SSD:
    torch.manual_seed(seed)
    return BUILDERS[name]().train()


def batch(weights=None) -> tuple[list[torch.Tensor], list[dict]]:
    """An image without objects between two with some; the weights are a number or lists."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(3)]
    boxes = [
        torch.tensor([[4.0, 4.0, 30.0, 34.0], [14.0, 20.0, 50.0, 60.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 20.0, 23.0], [34.0, 2.0, 60.0, 40.0], [3.0, 34.0, 40.0, 58.0]]),
    ]
    targets = [{"boxes": b, "labels": torch.arange(len(b)) % 4 + 1} for b in boxes]
    if isinstance(weights, float):
        weights = [[weights] * len(b) for b in boxes]
    if weights is not None:
        for target, box_weights in zip(targets, weights, strict=True):
            target["box_weights"] = torch.tensor(box_weights)
    return images, targets


def step(model, images, targets, seed: int = 7):
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
                assert mine[key].dtype == its[key].dtype
                assert torch.equal(mine[key], its[key]), key
        else:
            assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("name", "explicit"),
    [("SSD", True), ("SSD", False), ("ssdlite320_mobilenet_v3_large", True)],
)
def test_all_weights_one_equals_torchvision_bit_for_bit(name, explicit):
    model = build(name)
    plain = step(copy.deepcopy(model), *batch())
    weighted = step(weight_losses(model), *batch(1.0 if explicit else None))
    assert plain[0].keys() == {"bbox_regression", "classification"}
    assert all(loss > 0 for loss in plain[0].values())
    assert any(grad.abs().sum() > 0 for grad in plain[1].values())
    assert_identical(weighted, plain)


def test_ssd300_equals_torchvision_bit_for_bit():
    model = build("ssd300_vgg16")
    images, targets = batch(1.0)
    plain = step(copy.deepcopy(model), images[:1], targets[:1])
    assert_identical(step(weight_losses(model), images[:1], targets[:1]), plain)


@pytest.mark.parametrize("name", ["SSD", "ssdlite320_mobilenet_v3_large"])
def test_bf16_autocast_equals_torchvision_bit_for_bit(name):
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(copy.deepcopy(model), *batch())
        weighted = step(weight_losses(model), *batch(1.0))
    assert_identical(weighted, plain)


def test_batch_without_any_object_equals_torchvision_bit_for_bit():
    images, targets = batch()
    for target in targets:
        target["boxes"], target["labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for normalizer in ("samples", "weights"):
        model = build()
        plain = step(copy.deepcopy(model), images, targets)
        assert_identical(step(weight_losses(model, normalizer=normalizer), images, targets), plain)


WEIGHTS = [[0.25, 0.9], [], [0.6, 0.05, 1.0]]


def matching(boxes, anchors):
    """The object of each anchor, or None: IoU at least 0.5, and the best anchor of each object."""
    if len(boxes) == 0:
        return [None] * len(anchors)
    overlap = box_iou(boxes, anchors)
    matched = []
    for column in overlap.T:
        best = int(column.argmax())
        matched.append(best if column[best] >= 0.5 else None)
    for i, row in enumerate(overlap):
        matched[int(row.argmax())] = i
    return matched


def encode(box, anchor):
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box, anchor
    width, height = a2 - a1, b2 - b1
    return [
        10 * ((x1 + x2) / 2 - (a1 + a2) / 2) / width,
        10 * ((y1 + y2) / 2 - (b1 + b2) / 2) / height,
        5 * math.log((x2 - x1) / width),
        5 * math.log((y2 - y1) / height),
    ]


def smooth_l1(difference):
    size = abs(difference)
    return 0.5 * size**2 if size < 1 else size - 0.5


def loop_losses(outputs, anchors, targets, weights, background_weight, normalizer):
    """Both losses anchor by anchor with Python's own numbers."""
    box_sum = class_sum = weight_sum = 0.0
    num_matched = 0
    for i, target in enumerate(targets):
        log_probs = outputs["cls_logits"][i].double().log_softmax(1).tolist()
        deltas = outputs["bbox_regression"][i].tolist()
        negatives = []
        positives = 0
        for a, obj in enumerate(matching(target["boxes"], anchors[i])):
            if obj is None:
                negatives.append(-log_probs[a][0])
                continue
            positives += 1
            weight = weights[i][obj]
            weight_sum += weight
            class_sum += weight * -log_probs[a][int(target["labels"][obj])]
            goals = encode(target["boxes"][obj].tolist(), anchors[i][a].tolist())
            box_sum += weight * sum(
                smooth_l1(delta - goal) for delta, goal in zip(deltas[a], goals, strict=True)
            )
        hardest = sorted(negatives, reverse=True)[: 3 * positives]
        class_sum += background_weight * sum(hardest)
        num_matched += positives
    divisor = max(1.0, num_matched if normalizer == "samples" else weight_sum)
    return {"bbox_regression": box_sum / divisor, "classification": class_sum / divisor}


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("background_weight", [0.0, 0.3, 1.0])
def test_losses_equal_a_loop_over_anchors(background_weight, normalizer):
    model = weight_losses(build(), background_weight=background_weight, normalizer=normalizer)
    caught = {}
    model.head.register_forward_hook(lambda *args: caught.update(outputs=args[2]))
    model.anchor_generator.register_forward_hook(lambda *args: caught.update(anchors=args[2]))
    images, targets = batch(WEIGHTS)
    losses = step(model, images, targets)[0]
    outputs = {key: value.detach() for key, value in caught["outputs"].items()}
    expected = loop_losses(
        outputs, caught["anchors"], targets, WEIGHTS, background_weight, normalizer
    )
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-5), key


def test_losses_and_gradients_are_linear_in_the_weights():
    model = build()
    other = [[0.7, 0.1], [], [0.2, 0.35, 0.4]]
    mean = [
        [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        for first, second in zip(WEIGHTS, other, strict=True)
    ]
    first = step(weight_losses(model, background_weight=0.2), *batch(WEIGHTS))
    second = step(weight_losses(model, background_weight=1.0), *batch(other))
    between = step(weight_losses(model, background_weight=0.6), *batch(mean))
    for a, b, result in zip(first[:2], second[:2], between[:2], strict=True):
        for key in result:
            torch.testing.assert_close(result[key], (a[key] + b[key]) / 2, rtol=1e-4, atol=1e-6)


def test_equal_weights_cancel_with_the_weight_normalizer():
    model = build()
    plain, _, _ = step(copy.deepcopy(model), *batch())
    losses, _, _ = step(
        weight_losses(model, background_weight=0.5, normalizer="weights"), *batch(0.5)
    )
    for key in plain:
        torch.testing.assert_close(losses[key], plain[key], rtol=1e-5, atol=1e-7)


def test_no_weight_at_all_gives_zero_not_nan():
    model = weight_losses(build(), background_weight=0.0, normalizer="weights")
    losses, grads, _ = step(model, *batch(0.0))
    assert all(loss == 0 for loss in losses.values())
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_hard_negatives_are_those_of_highest_loss():
    losses = torch.tensor([[9.0, 0.1, 0.7, 0.3, 0.5, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    foreground = torch.tensor([[True] + [False] * 5, [False] * 6])
    assert hard_negatives(losses, foreground, 3.0).tolist() == [
        [False, False, True, True, True, False],
        [False] * 6,
    ]


def test_too_few_negatives_equal_torchvision_bit_for_bit():
    """More than a quarter of the anchors match: torchvision then counts positives twice."""
    model = build()
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "bbox_regression": torch.randn(1, 8, 4, generator=generator),
        "cls_logits": torch.randn(1, 8, CLASSES, generator=generator),
    }
    corner = torch.rand(8, 2, generator=generator) * 20
    anchors = [torch.cat([corner, corner + 10], dim=1)]
    target = {"boxes": anchors[0][:2].clone(), "labels": torch.tensor([1, 3])}
    matched = [torch.tensor([0, 1, -1, 0, 1, -1, 0, -1])]
    plain = model.compute_loss([target], outputs, anchors, matched)
    losses = weight_losses(model).compute_loss([target], outputs, anchors, matched)
    assert_identical([losses], [plain])
    cross_entropy = F.cross_entropy(
        outputs["cls_logits"][0], torch.tensor([1, 3, 0, 1, 3, 0, 1, 0]), reduction="sum"
    )
    assert losses["classification"] * 5 > cross_entropy


@pytest.mark.parametrize("name", ["SSD", "ssdlite320_mobilenet_v3_large"])
def test_everything_but_training_losses_is_unchanged(name):
    model = build(name)
    before = copy.deepcopy(model)
    weight_losses(model, background_weight=0.5)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    images, _ = batch()
    with torch.no_grad():
        ours, theirs = model.eval()(images), before.eval()(images)
    assert sum(len(its["boxes"]) for its in theirs) > 0
    assert_identical(ours, theirs)
    assert type(before) is SSD


def test_copies_and_round_trips():
    model = weight_losses(build(), background_weight=0.4)
    expected = step(model, *batch(WEIGHTS))
    assert_identical(step(copy.deepcopy(model), *batch(WEIGHTS)), expected)
    assert_identical(step(pickle.loads(pickle.dumps(model)), *batch(WEIGHTS)), expected)
    fresh = weight_losses(build(seed=9), background_weight=0.4)
    fresh.load_state_dict(model.state_dict())
    assert_identical(step(fresh, *batch(WEIGHTS)), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"target 0 must have shape \(2,\).*\(3,\)"),
        (torch.tensor([1.0, -0.5]), "target 0.*-0.5 for box 1"),
        (torch.tensor([float("nan"), 1.0]), "target 0.*nan for box 0"),
    ],
)
def test_bad_weights_are_named(weights, message):
    images, targets = batch()
    targets[0]["box_weights"] = weights
    with pytest.raises(ValueError, match=message):
        weight_losses(build())(images, targets)


@pytest.mark.parametrize("label", [0, CLASSES, -1])
def test_bad_labels_are_named(label):
    images, targets = batch()
    targets[2]["labels"] = torch.tensor([1, label, 2])
    with pytest.raises(ValueError, match=rf"target 2 must be in 1\.\.4.*got {label} for box 1"):
        weight_losses(build())(images, targets)
