"""Every weighted loss from torchvision's own of one object or sample at a time, weighted by hand.

Which sample belongs to which object is found anew; what the network put out is taken as it is.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from builders import CLASSES, FASTEST, WEIGHTS, assert_identical, batch, small, twin
from torch import nn
from torchvision.models.detection.roi_heads import (
    fastrcnn_loss,
    keypointrcnn_loss,
    keypoints_to_heatmap,
    maskrcnn_loss,
)
from torchvision.ops import box_iou

from detmix import weight_losses

BACKGROUND_WEIGHT = 0.55
ONE_STAGE = ("retinanet", "fcos", FASTEST[1])
with_each_normalizer = pytest.mark.parametrize("normalizer", ["samples", "weights"])


def spread(model):
    """Let scores and boxes differ, and scores be around 0.5, so that each anchor matters."""
    torch.manual_seed(0)
    for name, parameter in model.head.named_parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
        elif "cls_logits" in name or "bbox_reg." in name:
            nn.init.constant_(parameter, 0.0 if "cls_logits" in name else 0.5)
    return model


def sums_of_image(owner, normalizer, target, outputs, anchors, matched):
    """The sums over one image's anchors, and what they are to be divided by."""

    def sums(chosen, ratio):
        owner.neg_to_pos_ratio = ratio  # of an SSD
        part = {key: value[chosen][None] for key, value in outputs.items()}
        losses = owner.compute_loss([target], part, [anchors[chosen]], [matched[chosen]])
        count = int((matched[chosen] >= 0).sum())
        return count, {key: loss.item() * max(1, count) for key, loss in losses.items()}

    _, whole = sums(slice(None), 3)
    total = Counter({key: BACKGROUND_WEIGHT * loss for key, loss in whole.items()})
    for row, weight in enumerate(target["box_weights"].tolist()):
        count, losses = sums(matched == row, 0)
        assert count > 0
        total["divisor"] += count * (weight if normalizer == "weights" else 1)
        for key, loss in losses.items():
            total[key] += (weight - BACKGROUND_WEIGHT) * loss
    return total


@with_each_normalizer
@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage(name, normalizer):
    plain = spread(deepcopy(small(name)))
    model, seen = weight_losses(twin(plain), BACKGROUND_WEIGHT, normalizer), []
    own, other = (part if "ssd" in name else part.head for part in (model, plain))
    compute_loss = own.compute_loss
    own.compute_loss = lambda *arguments: seen.extend(arguments) or compute_loss(*arguments)
    with torch.no_grad():
        losses = model(*batch("objects", WEIGHTS))
        targets, outputs, anchors, matched = seen
        outputs = [{key: value[i] for key, value in outputs.items()} for i in range(2)]
        parts = zip(targets, outputs, anchors, matched, strict=True)
        images = [sums_of_image(other, normalizer, *part) for part in parts]
    if "retinanet" not in name:  # one divisor for the batch
        images = [images[0] + images[1]]
    assert losses.keys() == images[0].keys() - {"divisor"}
    for key, loss in losses.items():
        means = [sums[key] / max(1, sums["divisor"]) for sums in images]
        assert loss.item() == pytest.approx(sum(means) / len(means), rel=1e-4), key


def test_too_few_negatives_of_an_ssd_equal_torchvision_bit_for_bit():
    """More than a quarter of the anchors match: torchvision then counts positives twice."""
    model = twin(small(FASTEST[1]))
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


def box_losses(heads, outputs, row, target, chosen, box):
    """Of one proposal, and what it counts."""
    label = torch.zeros(1, dtype=torch.int64) if chosen is None else target["labels"][[chosen]]
    goals = heads.box_coder.encode([target["boxes"][[chosen or 0]]], [box[None]])
    losses = fastrcnn_loss(outputs[0][[row]], outputs[1][[row]], [label], goals)
    return dict(zip(("loss_classifier", "loss_box_reg"), losses, strict=True)), 1


def mask_loss(heads, logits, row, target, chosen, box):
    where = [target["masks"]], [target["labels"]], [torch.tensor([chosen])]
    return {"loss_mask": maskrcnn_loss(logits[[row]], [box[None]], *where)}, 1


def keypoint_loss(heads, logits, row, target, chosen, box):
    """A proposal counts as often as keypoints of its object are visible and within it."""
    points = target["keypoints"][[chosen]]
    loss = keypointrcnn_loss(logits[[row]], [box[None]], [points], [torch.tensor([0])])
    valid = keypoints_to_heatmap(points, box[None], logits.shape[-1])[1]
    return {"loss_keypoint": loss}, int(valid.sum())


LOOPS = {"box": box_losses, "mask": mask_loss, "keypoint": keypoint_loss}


def objects_of(proposals, targets):
    """The target of each proposal, its object of greatest overlap or None, and the proposal."""
    for boxes, target in zip(proposals, targets, strict=True):
        for box in boxes:
            best, row = box_iou(box[None], target["boxes"])[0].max(0)
            yield target, int(row) if best >= 0.5 else None, box


@with_each_normalizer
@pytest.mark.parametrize("branch", ["mask", "keypoint"])
def test_roi_heads(branch, normalizer):
    model = weight_losses(twin(small(f"{branch}rcnn")), BACKGROUND_WEIGHT, normalizer)
    heads, caught = model.roi_heads, {}
    heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction = 12, 0.5
    heads.register_forward_pre_hook(lambda _, args: caught.update(targets=args[3]))
    for kind in ("box", branch):
        pool, predictor = getattr(heads, f"{kind}_roi_pool"), getattr(heads, f"{kind}_predictor")
        pool.register_forward_hook(lambda _, args, __, k=kind: caught.update({k: args[1]}))
        predictor.register_forward_hook(lambda _, __, out, k=kind: caught.update({k + "s": out}))
    with torch.no_grad():
        torch.manual_seed(7)
        losses = model(*batch("objects", WEIGHTS))
        for kind in ("box", branch):
            objects = list(objects_of(caught[kind], caught["targets"]))
            found = [chosen for _, chosen, _ in objects if chosen is not None]
            assert len(found) >= 5  # each object at the least
            assert (len(found) < len(objects)) == (kind == "box")
            totals, divisor = Counter(), 0
            for row, (target, chosen, box) in enumerate(objects):
                weight = BACKGROUND_WEIGHT if chosen is None else target["box_weights"][chosen]
                parts, count = LOOPS[kind](heads, caught[kind + "s"], row, target, chosen, box)
                divisor += float(weight) * count if normalizer == "weights" else count
                totals.update({key: float(weight * loss) * count for key, loss in parts.items()})
            for key, total in totals.items():
                assert losses[key].item() == pytest.approx(total / divisor, rel=1e-5), key


@with_each_normalizer
def test_rpn(normalizer):
    plain, caught, seen = twin(small("fasterrcnn")).rpn, {}, []
    model = weight_losses(twin(small("fasterrcnn")), BACKGROUND_WEIGHT, normalizer)
    rpn, sampler, compute_loss = model.rpn, model.rpn.fg_bg_sampler, model.rpn.compute_loss
    rpn.compute_loss = lambda *arguments: seen.extend(arguments) or compute_loss(*arguments)
    rpn.fg_bg_sampler = lambda labels: caught.setdefault("sampled", sampler(labels))
    plain.fg_bg_sampler = lambda labels: ([labels[0] == 1], [labels[0] == 0])
    rpn.anchor_generator.register_forward_hook(lambda _, __, out: caught.update(anchors=out))
    model.roi_heads.register_forward_pre_hook(lambda _, args: caught.update(targets=args[3]))
    totals, divisor, weights = Counter(), 0, []
    with torch.no_grad():
        losses = model(*batch("objects", WEIGHTS))
        for target, anchors in zip(caught["targets"], caught["anchors"], strict=True):
            overlaps = box_iou(target["boxes"], anchors)
            best, rows = overlaps.max(0)
            is_best = (overlaps == overlaps.max(1, keepdim=True).values).any(0)
            own = target["box_weights"][rows]
            weights.append(torch.where((best >= 0.7) | is_best, own, BACKGROUND_WEIGHT))
        objectness, deltas, labels, goals = seen
        sampled, weights = sum(map(torch.cat, caught["sampled"])).bool(), torch.cat(weights)
        assert len(weights[sampled].unique()) == 6
        for weight in weights[sampled].unique():  # of one object each
            chosen = sampled & (weights == weight)
            group = [torch.where(chosen, torch.cat(labels), -1.0)]
            count = int(chosen.sum())
            divisor += float(weight) * count if normalizer == "weights" else count
            parts = plain.compute_loss(objectness, deltas, group, goals)
            for key, loss in zip(("loss_objectness", "loss_rpn_box_reg"), parts, strict=True):
                totals[key] += float(weight * loss) * count
    for key, total in totals.items():
        assert losses[key].item() == pytest.approx(total / divisor, rel=1e-5), key
