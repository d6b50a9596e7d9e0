"""Weighted losses of RetinaNet, FCOS and SSD against torchvision's and a loop over anchors."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from builders import assert_identical, step
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from detmix import weight_losses

SIZE = 64
CLASSES = 5
WEIGHTS = ([0.3, 0.9], [], [0.2, 0.0, 1.0])


class Backbone(nn.Sequential):
    """Two convolutions; features wide enough for the group norm of FCOS."""

    def __init__(self):
        first = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        super().__init__(first, nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1))
        self.out_channels = 32


def retinanet(loss_type="l1"):
    anchors = AnchorGenerator(((16, 24, 32, 48),), ((0.5, 1.0, 2.0),))
    model = RetinaNet(Backbone(), CLASSES, anchor_generator=anchors, min_size=SIZE, max_size=SIZE)
    model.head.regression_head._loss_type = loss_type
    return spread(model)


def fcos():
    """On one level without scale ranges."""
    anchors = AnchorGenerator(((8,),), ((1.0,),))
    model = FCOS(Backbone(), CLASSES, anchor_generator=anchors, min_size=SIZE, max_size=SIZE)
    nn.init.ones_(model.head.regression_head.bbox_reg.bias)  # boxes of some size
    return spread(model)


def spread(model):
    """Let scores and boxes differ, and scores be around 0.5, so that each anchor matters."""
    for parameter in model.head.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    return model


def ssd():
    backbone = Backbone()
    backbone.out_channels = [32]
    anchors = DefaultBoxGenerator([[2]], scales=[0.4, 0.8])
    return SSD(backbone, anchors, (SIZE, SIZE), CLASSES)


def focal(logits, label):
    """Of one anchor's classes, each on its own; label 0 is background, which is none of them."""
    goal = F.one_hot(torch.tensor(label), CLASSES) * (label > 0)
    return sigmoid_focal_loss(logits, goal.double(), reduction="sum").item()


def cross_entropy(logits, label):
    return F.cross_entropy(logits, torch.tensor(label)).item()


def l1(model, deltas, anchor, box, loss=F.l1_loss):
    coder = model.box_coder if isinstance(model, SSD) else model.head.regression_head.box_coder
    return loss(deltas, coder.encode_single(box[None], anchor[None])[0], reduction="sum").item()


def smooth_l1(*args):
    return l1(*args, loss=F.smooth_l1_loss)


def giou(model, deltas, anchor, box):
    coder = model.head.regression_head.box_coder
    return (
        1 - generalized_box_iou(coder.decode_single(deltas[None], anchor[None]), box[None]).item()
    )


def giou_of_distances(model, deltas, anchor, box):
    """FCOS predicts distances from the anchor's centre in units of its size."""
    centre, distances = (anchor[:2] + anchor[2:]) / 2, deltas * (anchor[2] - anchor[0])
    predicted = torch.cat([centre - distances[:2], centre + distances[2:]])
    return 1 - generalized_box_iou(predicted[None], box[None]).item()


def centerness_loss(logit, anchor, box):
    x, y = ((anchor[:2] + anchor[2:]) / 2).tolist()
    x0, y0, x1, y1 = box.tolist()
    across, down = sorted((x - x0, x1 - x)), sorted((y - y0, y1 - y))
    goal = math.sqrt(across[0] / across[1] * down[0] / down[1])
    p = logit.sigmoid().item()
    return -(goal * math.log(p) + (1 - goal) * math.log(1 - p))


# How to build each, and the losses of one anchor's class and box.
FAMILIES = {
    "retinanet l1": (retinanet, focal, l1),
    "retinanet giou": (lambda: retinanet("giou"), focal, giou),
    "fcos": (fcos, focal, giou_of_distances),
    "ssd": (ssd, cross_entropy, smooth_l1),
}
MORE = {f"retinanet {t}": lambda t=t: retinanet(t) for t in ("smooth_l1", "diou", "ciou")}


def build(make):
    torch.manual_seed(0)
    return make().train()


def batch(repeats=1, weights=None):
    """Images of several sizes with objects around one without any."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((64, 56), (48, 64), (64, 64))]
    boxes = [
        torch.tensor([[4.0, 5.0, 30.0, 38.0], [16.0, 20.0, 55.0, 60.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 24.0, 26.0], [36.0, 2.0, 62.0, 45.0], [3.0, 34.0, 42.0, 60.0]]),
    ]
    targets = [{"boxes": b, "labels": torch.arange(len(b)) % 4 + 1} for b in boxes]
    for target, box_weights in zip(targets, weights or (), strict=weights is not None):
        target["box_weights"] = torch.tensor(box_weights)
    images = [image * (i + 1) / repeats for i in range(repeats) for image in images]
    return images, targets * repeats


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize(
    ("make", "repeats"),
    [
        *((make, 1) for make in MORE.values()),
        *((make, repeats) for make in (retinanet, fcos, ssd) for repeats in (1, 3, 7)),
    ],
)
def test_weights_one_equal_torchvision_bit_for_bit(make, repeats, half_precision):
    """Of larger batches too: the order of a sum may change with its length."""
    model, data = build(make), batch(repeats)
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        plain = step(copy.deepcopy(model), data)
        assert all(plain[0].values())
        assert_identical(step(weight_losses(model), data), plain)


def loop_over_anchors(
    family, model, targets, outputs, anchors, matched, *, background_weight, normalizer
):
    """All losses anchor by anchor, by the formulas of the papers."""
    _, class_loss, box_loss = FAMILIES[family]
    images = []
    for i, target in enumerate(targets):
        sums, background = Counter(), []
        for a, match in enumerate(matched[i].tolist()):
            found = {key: value[i, a].double() for key, value in outputs.items()}
            if match == -1:
                background.append(class_loss(found["cls_logits"], 0))
            if match < 0:  # RetinaNet leaves out what matches neither way
                continue
            anchor, box = anchors[i][a].double(), target["boxes"][match].double()
            weight = target["box_weights"][match].item()
            label = int(target["labels"][match])
            losses = {
                "count": 1 if normalizer == "samples" else weight,
                "classification": weight * class_loss(found["cls_logits"], label),
                "bbox_regression": weight * box_loss(model, found["bbox_regression"], anchor, box),
            }
            if family == "fcos":
                losses["bbox_ctrness"] = weight * centerness_loss(
                    found["bbox_ctrness"][0], anchor, box
                )
            sums.update(losses)
        if family == "ssd":  # the three hardest for each match
            positives = int((matched[i] >= 0).sum())
            background = sorted(background, reverse=True)[: 3 * positives]
        sums["classification"] += background_weight * sum(background)
        images.append(sums)
    if "retinanet" not in family:
        images = [sum(images, Counter())]
    names = images[0].keys() - {"count"}
    return {n: sum(s[n] / max(1, s["count"]) for s in images) / len(images) for n in names}


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_a_loop_over_anchors(family, normalizer):
    settings = {"background_weight": 0.6, "normalizer": normalizer}
    model = weight_losses(build(FAMILIES[family][0]), **settings)
    owner = model if family == "ssd" else model.head
    compute_loss, seen = owner.compute_loss, []

    def spy(*arguments):
        seen.extend(arguments)
        return compute_loss(*arguments)

    owner.compute_loss = spy
    with torch.no_grad():
        losses = model(*batch(weights=WEIGHTS))
        expected = loop_over_anchors(family, model, *seen, **settings)
    matches = torch.cat(seen[3]).unique().tolist()
    assert matches == [*([-2] if "retinanet" in family else []), -1, 0, 1, 2]
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4), key


def test_too_few_negatives_of_an_ssd_equal_torchvision_bit_for_bit():
    """More than a quarter of the anchors match: torchvision then counts positives twice."""
    model = build(ssd)
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
    assert_identical(losses, plain)
    labels = torch.tensor([1, 3, 0, 1, 3, 0, 1, 0])
    once = F.cross_entropy(outputs["cls_logits"][0], labels, reduction="sum")
    assert losses["classification"] * 5 > once
