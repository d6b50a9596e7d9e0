"""Weighted losses of RoI heads against torchvision's own and a loop over proposals.

With a detector that has both masks and keypoints.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from builders import assert_identical, step
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from detmix import weight_losses

SIZE = 96
CLASSES = 5
KEYPOINTS = 3
BOXES = [
    [[5.0, 5.0, 40.0, 50.0], [30.0, 40.0, 85.0, 92.0]],
    [],
    [[1.0, 1.0, 30.0, 33.0], [50.0, 2.0, 88.0, 60.0], [3.0, 50.0, 60.0, 85.0]],
]
WEIGHTS = [[0.25, 0.9], [], [0.6, 0.05, 1.0]]
BACKGROUND_WEIGHT = 0.3


def build() -> MaskRCNN:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    backbone.out_channels = 8
    model = MaskRCNN(
        backbone,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        rpn_post_nms_top_n_train=40,
        box_batch_size_per_image=12,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
        box_predictor=FastRCNNPredictor(1024, CLASSES),
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        mask_head=MaskRCNNHeads(8, [8], 1),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES),
    )
    model.roi_heads.keypoint_roi_pool = MultiScaleRoIAlign(["0"], 14, 2)
    model.roi_heads.keypoint_head = KeypointRCNNHeads(8, [8])
    model.roi_heads.keypoint_predictor = KeypointRCNNPredictor(8, KEYPOINTS)
    return model.train()


def batch(weights=None) -> tuple[list[torch.Tensor], list[dict]]:
    """Images of the detector's own size, with ellipses for masks and keypoints on the boxes.

    Of each object one keypoint lies on the box's right and lower edge, which torchvision counts
    as inside, and every second object hides its last keypoint.
    """
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in BOXES]
    targets = []
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for index, image_boxes in enumerate(BOXES):
        masks, keypoints = [], []
        for row, (x1, y1, x2, y2) in enumerate(image_boxes):
            across = (columns + 0.5 - (x1 + x2) / 2) / (x2 - x1)
            down = (rows + 0.5 - (y1 + y2) / 2) / (y2 - y1)
            masks.append((across**2 + down**2 < 0.25).to(torch.uint8))
            keypoints.append(
                [[x1 + 3, y1 + 4, 1], [x2, y2, 2], [(x1 + x2) / 2, y1 + 9, float(row % 2 == 0)]]
            )
        target = {
            "boxes": torch.tensor(image_boxes).reshape(-1, 4),
            "labels": torch.arange(len(image_boxes)) % 4 + 1,
            "masks": torch.stack(masks) if masks else torch.zeros(0, SIZE, SIZE).byte(),
            "keypoints": torch.tensor(keypoints).float().reshape(-1, KEYPOINTS, 3),
        }
        if weights is not None:
            target["box_weights"] = torch.tensor(weights[index])
        targets.append(target)
    return images, targets


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("visible", [True, False])
def test_weights_one_equal_torchvision_bit_for_bit(visible, half_precision):
    model, (images, targets) = build(), batch()
    if not visible:
        for target in targets:
            target["keypoints"][..., 2] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        plain = step(copy.deepcopy(model), (images, targets))
        zero = {key for key, loss in plain[0].items() if loss == 0}
        assert (len(plain[0]), zero) == (6, set() if visible else {"loss_keypoint"})
        assert_identical(step(weight_losses(model), (images, targets)), plain)


def objects_of(proposals, targets):
    """The target of each proposal, its object of greatest overlap or None, and the proposal."""
    for boxes, target in zip(proposals, targets, strict=True):
        for box in boxes:
            overlap = box_iou(box[None], target["boxes"])[0].tolist()
            best = max(overlap, default=0)
            yield target, overlap.index(best) if best >= 0.5 else None, box


def loop_box_losses(heads, outputs, objects, normalizer):
    """Proposal by proposal, with background among them."""
    logits, deltas = outputs
    classifier = boxes = divisor = 0.0
    for row, (target, chosen, box) in enumerate(objects):
        weight = BACKGROUND_WEIGHT if chosen is None else target["box_weights"][chosen].item()
        label = 0 if chosen is None else int(target["labels"][chosen])
        divisor += weight if normalizer == "weights" else 1
        classifier -= weight * logits[row].double().log_softmax(0)[label].item()
        if chosen is not None:
            goal = heads.box_coder.encode_single(target["boxes"][chosen][None], box[None])[0]
            found = deltas[row, 4 * label : 4 * label + 4]
            boxes += weight * F.smooth_l1_loss(found, goal, beta=1 / 9, reduction="sum").item()
    return {"loss_classifier": classifier / divisor, "loss_box_reg": boxes / divisor}


def loop_mask_loss(heads, logits, objects, normalizer):
    """Proposal by proposal."""
    total = divisor = 0.0
    for row, (target, chosen, box) in enumerate(objects):
        mask = target["masks"][chosen].float()[None, None]
        goal = roi_align(mask, [box[None]], logits.shape[-1])[0, 0]
        plane = logits[row, int(target["labels"][chosen])]
        weight = target["box_weights"][chosen].item()
        total += weight * F.binary_cross_entropy_with_logits(plane, goal, reduction="sum").item()
        divisor += plane.numel() * (weight if normalizer == "weights" else 1)
    return {"loss_mask": total / divisor}


def loop_keypoint_loss(heads, logits, objects, normalizer):
    """Keypoint by keypoint."""
    total = divisor = 0.0
    size = logits.shape[-1]
    for row, (target, chosen, box) in enumerate(objects):
        x1, y1, x2, y2 = box.tolist()
        for point, (x, y, visible) in enumerate(target["keypoints"][chosen].tolist()):
            column = size - 1 if x == x2 else math.floor((x - x1) / (x2 - x1) * size)
            line = size - 1 if y == y2 else math.floor((y - y1) / (y2 - y1) * size)
            if not (visible and 0 <= column < size and 0 <= line < size):
                continue
            log_probs = logits[row, point].double().flatten().log_softmax(0)
            weight = target["box_weights"][chosen].item()
            total -= weight * log_probs[line * size + column].item()
            divisor += weight if normalizer == "weights" else 1
    return {"loss_keypoint": total / divisor}


LOOPS = {"box": loop_box_losses, "mask": loop_mask_loss, "keypoint": loop_keypoint_loss}


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("kind", LOOPS)
def test_losses_equal_a_loop_over_proposals(kind, normalizer):
    model = weight_losses(build(), BACKGROUND_WEIGHT, normalizer)
    heads, caught = model.roi_heads, {}
    getattr(heads, f"{kind}_roi_pool").register_forward_hook(
        lambda _, args, __: caught.update(proposals=args[1])
    )
    getattr(heads, f"{kind}_predictor").register_forward_hook(
        lambda _, __, outputs: caught.update(outputs=outputs)
    )
    images, targets = batch(WEIGHTS)
    with torch.no_grad():
        torch.manual_seed(7)
        losses = model(images, targets)
        objects = list(objects_of(caught["proposals"], targets))
        expected = LOOPS[kind](heads, caught["outputs"], objects, normalizer)
    found = [chosen for _, chosen, _ in objects if chosen is not None]
    assert len(found) >= 5  # each object at the least
    assert (len(found) < len(objects)) == (kind == "box")
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-5)


def test_each_anchor_has_the_weight_of_its_object():
    """What its score changes of the objectness loss, relative to torchvision's."""
    images, targets = batch(WEIGHTS)
    grads, anchors = [], []
    for model in (build(), weight_losses(build(), BACKGROUND_WEIGHT)):
        scores = []
        model.rpn.head.register_forward_hook(lambda _, __, out, kept=scores: kept.extend(out[0]))
        model.rpn.anchor_generator.register_forward_hook(lambda _, __, out: anchors.extend(out))
        torch.manual_seed(7)
        loss = model(images, targets)["loss_objectness"]
        grads.append(torch.autograd.grad(loss, scores)[0].permute(0, 2, 3, 1).flatten(1))
    ratios = (grads[1] / grads[0]).tolist()
    seen = set()
    for target, image_anchors, image_ratios in zip(targets, anchors[:3], ratios, strict=True):
        for anchor, ratio in zip(image_anchors, image_ratios, strict=True):
            if math.isnan(ratio):  # not among the samples
                continue
            overlap = box_iou(anchor[None], target["boxes"])[0].tolist()
            best = max(overlap, default=0)
            own = target["box_weights"][overlap.index(best)].item() if best >= 0.3 else None
            assert ratio == pytest.approx(own or BACKGROUND_WEIGHT, rel=1e-5)
            seen.add(own)
    assert len(seen) == 6
