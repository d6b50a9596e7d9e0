"""Every weighted loss against its paper's formula, in float64, from what the network put out."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from builders import CLASSES, FASTEST, WEIGHTS, assert_identical, batch, small, step, twin
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou, roi_align, sigmoid_focal_loss

from detmix import weight_losses

BACKGROUND_WEIGHT = 0.6
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


def l1(coder, deltas, anchors, boxes):
    return (deltas - coder.encode_single(boxes, anchors)).abs().sum(1)


def smooth_l1(coder, deltas, anchors, boxes):
    return F.smooth_l1_loss(deltas, coder.encode_single(boxes, anchors), reduction="none").sum(1)


def giou_of_distances(coder, deltas, anchors, boxes):
    """FCOS predicts distances from the anchor's centre in units of its size."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    distances = deltas * (anchors[:, 2:] - anchors[:, :2])[:, [0, 1, 0, 1]]
    predicted = torch.cat([centre - distances[:, :2], centre + distances[:, 2:]], 1)
    return 1 - generalized_box_iou(predicted, boxes).diag()


BOX_LOSS = dict(zip(ONE_STAGE, (l1, giou_of_distances, smooth_l1), strict=True))


def centerness_loss(logits, anchors, boxes):
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    near, far = torch.stack([centre - boxes[:, :2], boxes[:, 2:] - centre]).sort(0).values
    return F.binary_cross_entropy_with_logits(logits, (near / far).prod(1).sqrt(), reduction="none")


def sums_of_image(name, normalizer, coder, target, outputs, anchors, matched):
    """The sums over one image's anchors, and what they are to be divided by."""
    is_object = matched >= 0
    own = matched[is_object]
    weights, boxes = target["box_weights"][own].double(), target["boxes"][own].double()
    labels = torch.zeros_like(matched)
    labels[is_object] = target["labels"][own]
    logits = outputs["cls_logits"]
    if "ssd" in name:
        losses = F.cross_entropy(logits, labels, reduction="none")
    else:  # each class on its own; background is none of them
        goals = F.one_hot(labels, CLASSES).double() * is_object[:, None]
        losses = sigmoid_focal_loss(logits, goals).sum(1)
    background = losses[matched == -1]  # RetinaNet leaves out what matches neither way
    if "ssd" in name:  # the three hardest for each match
        background = background.sort(descending=True).values[: 3 * len(own)]
    where = outputs["bbox_regression"][is_object], anchors[is_object].double(), boxes
    sums = {
        "divisor": weights.sum() if normalizer == "weights" else torch.tensor(len(own)),
        "classification": (weights * losses[is_object]).sum()
        + BACKGROUND_WEIGHT * background.sum(),
        "bbox_regression": (weights * BOX_LOSS[name](coder, *where)).sum(),
    }
    if "fcos" in name:
        central = centerness_loss(outputs["bbox_ctrness"][is_object, 0], *where[1:])
        sums["bbox_ctrness"] = (weights * central).sum()
    return sums


@with_each_normalizer
@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage(name, normalizer):
    model = spread(deepcopy(small(name)))
    weight_losses(model, BACKGROUND_WEIGHT, normalizer)
    owner = model if "ssd" in name else model.head
    coder = getattr(owner, "box_coder", None) or owner.regression_head.box_coder
    compute_loss, seen = owner.compute_loss, []
    owner.compute_loss = lambda *arguments: [seen.extend(arguments), compute_loss(*arguments)][1]
    with torch.no_grad():
        losses = model(*batch("objects", WEIGHTS))
        targets, outputs, anchors, matched = seen
        outputs = [{key: value[i].double() for key, value in outputs.items()} for i in range(2)]
        parts = zip(targets, outputs, anchors, matched, strict=True)
        images = [sums_of_image(name, normalizer, coder, *part) for part in parts]
    if "retinanet" not in name:  # one divisor for the batch
        images = [{key: images[0][key] + images[1][key] for key in images[0]}]
    assert losses.keys() == images[0].keys() - {"divisor"}
    for key, loss in losses.items():
        means = [sums[key].item() / max(1, sums["divisor"].item()) for sums in images]
        assert loss.item() == pytest.approx(sum(means) / len(means), rel=1e-4), key


def test_keypoints_of_which_none_is_visible_equal_torchvision_s_bit_for_bit():
    plain, (images, targets) = small("keypointrcnn"), batch()
    for target in targets:
        target["keypoints"][..., 2] = 0
    expected = step(twin(plain), (images, targets))
    assert expected[0]["loss_keypoint"] == 0
    assert_identical(step(weight_losses(twin(plain)), (images, targets)), expected)


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


def box_losses(heads, outputs, objects):
    """Proposal by proposal: its part of both sums, and its weight."""
    for row, (target, chosen, box) in enumerate(objects):
        label = 0 if chosen is None else int(target["labels"][chosen])
        weight = BACKGROUND_WEIGHT if chosen is None else target["box_weights"][chosen].item()
        losses = {"loss_classifier": -outputs[0][row].double().log_softmax(0)[label].item()}
        losses["loss_box_reg"] = 0.0
        if chosen is not None:
            goal = heads.box_coder.encode_single(target["boxes"][chosen][None], box[None])[0]
            found = outputs[1][row, 4 * label : 4 * label + 4]
            losses["loss_box_reg"] = F.smooth_l1_loss(found, goal, beta=1 / 9, reduction="sum")
        yield losses, weight


def mask_loss(heads, logits, objects):
    """Proposal by proposal, the mean of its pixels."""
    for row, (target, chosen, box) in enumerate(objects):
        mask = target["masks"][chosen].float()[None, None]
        goal = roi_align(mask, [box[None]], logits.shape[-1])[0, 0]
        plane = logits[row, int(target["labels"][chosen])]
        loss = F.binary_cross_entropy_with_logits(plane, goal)
        yield {"loss_mask": loss}, target["box_weights"][chosen].item()


def keypoint_loss(heads, logits, objects):
    """Keypoint by keypoint, of those that are visible and within the proposal."""
    size = logits.shape[-1]
    for row, (target, chosen, box) in enumerate(objects):
        low, high = box.unflatten(0, (2, 2))
        for point, (*place, visible) in enumerate(target["keypoints"][chosen]):
            place = torch.stack(place)  # in float32, as some are at the very edge of a cell
            cell = ((place - low) * (size / (high - low))).floor()
            column, line = torch.where(place == high, size - 1, cell).int().tolist()
            if visible and 0 <= column < size and 0 <= line < size:
                log_probs = logits[row, point].double().flatten().log_softmax(0)
                loss = -log_probs[line * size + column]
                yield {"loss_keypoint": loss}, target["box_weights"][chosen].item()


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
            rows = list(LOOPS[kind](heads, caught[kind + "s"], objects))
            divisor = sum(weight for _, weight in rows) if normalizer == "weights" else len(rows)
            for key in rows[0][0]:
                total = sum(weight * float(loss[key]) for loss, weight in rows)
                assert losses[key].item() == pytest.approx(total / divisor, rel=1e-5), key


@with_each_normalizer
def test_rpn(normalizer):
    model, caught = weight_losses(twin(small("fasterrcnn")), BACKGROUND_WEIGHT, normalizer), {}
    rpn, sampler = model.rpn, model.rpn.fg_bg_sampler
    rpn.fg_bg_sampler = lambda labels: caught.setdefault("sampled", sampler(labels))
    rpn.anchor_generator.register_forward_hook(lambda _, __, out: caught.update(anchors=out))
    rpn.head.register_forward_hook(lambda _, __, out: caught.update(scores=out[0], deltas=out[1]))
    model.roi_heads.register_forward_pre_hook(lambda _, args: caught.update(targets=args[3]))
    with torch.no_grad():
        losses = model(*batch("objects", WEIGHTS))
    # of each level, (image, anchor at a place, row, column) and four of them
    scores = [part.permute(0, 2, 3, 1).flatten(1) for part in caught["scores"]]
    deltas = [part.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2) for part in caught["deltas"]]
    scores, deltas = torch.cat(scores, 1), torch.cat([part.flatten(1, 3) for part in deltas], 1)
    score_sum = box_sum = divisor = 0.0
    images = zip(caught["targets"], caught["anchors"], *caught["sampled"], strict=True)
    for i, (target, anchors, positive, negative) in enumerate(images):
        overlaps = box_iou(target["boxes"], anchors)
        best, rows = overlaps.max(0)
        is_object = (best >= 0.7) | (overlaps == overlaps.max(1, keepdim=True).values).any(0)
        weights = torch.where(is_object, target["box_weights"][rows], BACKGROUND_WEIGHT).double()
        sampled = (positive + negative).bool()
        assert set(rows[sampled & is_object].tolist()) == set(range(len(target["boxes"])))
        found, goals = scores[i].double(), is_object.double()
        losses_of_scores = F.binary_cross_entropy_with_logits(found, goals, reduction="none")
        score_sum += (weights * losses_of_scores)[sampled].sum()
        goals = rpn.box_coder.encode_single(target["boxes"][rows], anchors)
        losses_of_boxes = F.smooth_l1_loss(deltas[i], goals, beta=1 / 9, reduction="none").sum(1)
        box_sum += (weights * losses_of_boxes)[sampled & is_object].sum()
        divisor += weights[sampled].sum() if normalizer == "weights" else sampled.sum()
    assert losses["loss_objectness"].item() == pytest.approx(float(score_sum / divisor), rel=1e-5)
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(float(box_sum / divisor), rel=1e-5)
