"""Weighted losses of an SSD against torchvision's own and a loop over anchors."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from builders import assert_identical, step
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from detmix import weight_losses
from detmix.losses.ssd import hard_negatives

SIZE = 64
CLASSES = 5
WEIGHTS = [[0.25, 0.9], [], [0.6, 0.05, 1.0]]


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


def build() -> SSD:
    torch.manual_seed(0)
    generator = DefaultBoxGenerator([[2], [2], [2]], scales=[0.2, 0.4, 0.6, 0.8])
    return SSD(Levels(), generator, (SIZE, SIZE), CLASSES).train()


def batch(weights=None) -> tuple[list[torch.Tensor], list[dict]]:
    """An image without objects between two with some."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(3)]
    boxes = [
        torch.tensor([[4.0, 4.0, 30.0, 34.0], [14.0, 20.0, 50.0, 60.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 20.0, 23.0], [34.0, 2.0, 60.0, 40.0], [3.0, 34.0, 40.0, 58.0]]),
    ]
    targets = [{"boxes": b, "labels": torch.arange(len(b)) % 4 + 1} for b in boxes]
    if weights is not None:
        for target, box_weights in zip(targets, weights, strict=True):
            target["box_weights"] = torch.tensor(box_weights)
    return images, targets


def test_all_weights_one_equals_torchvision_bit_for_bit():
    model = build()
    plain = step(copy.deepcopy(model), batch())
    assert plain[0].keys() == {"bbox_regression", "classification"}
    assert all(loss > 0 for loss in plain[0].values())
    assert_identical(step(weight_losses(model), batch()), plain)


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
    losses = step(model, (images, targets))[0]
    outputs = {key: value.detach() for key, value in caught["outputs"].items()}
    expected = loop_losses(
        outputs, caught["anchors"], targets, WEIGHTS, background_weight, normalizer
    )
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-5), key


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
