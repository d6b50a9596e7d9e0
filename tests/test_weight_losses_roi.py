"""Weighted mask and keypoint losses against torchvision's own and a loop over proposals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import (
    KeypointRCNNHeads,
    KeypointRCNNPredictor,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from detmix import weight_losses
from detmix.detectors.roi_losses import weighted_keypoint_loss, weighted_mask_loss

SIZE = 96
CLASSES = 5
KEYPOINTS = 3
BOX_LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
SMALL = {
    "min_size": SIZE,
    "max_size": SIZE,
    "box_batch_size_per_image": 12,
    "rpn_post_nms_top_n_train": 40,
}


def small_parts() -> tuple[nn.Module, dict]:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )
    backbone.out_channels = 8
    settings = SMALL | {
        "rpn_anchor_generator": AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 7, 2),
        "box_detections_per_img": 10,
        "box_score_thresh": 0.0,
    }
    return backbone, settings


def plain_mask() -> MaskRCNN:
    backbone, settings = small_parts()
    return MaskRCNN(
        backbone,
        mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        mask_head=MaskRCNNHeads(8, [8], 1),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES),
        box_predictor=FastRCNNPredictor(1024, CLASSES),
        **settings,
    )


def plain_keypoint() -> KeypointRCNN:
    backbone, settings = small_parts()
    return KeypointRCNN(
        backbone,
        keypoint_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        keypoint_head=KeypointRCNNHeads(8, [8]),
        keypoint_predictor=KeypointRCNNPredictor(8, KEYPOINTS),
        num_classes=CLASSES,
        **settings,
    )


def plain_both() -> MaskRCNN:
    model, donor = plain_mask(), plain_keypoint().roi_heads
    for part in ("keypoint_roi_pool", "keypoint_head", "keypoint_predictor"):
        setattr(model.roi_heads, part, getattr(donor, part))
    return model


PLAIN = SMALL | {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
BUILDERS = {
    "mask": plain_mask,
    "keypoint": plain_keypoint,
    "both": plain_both,
    "maskrcnn_resnet50_fpn": lambda: detection.maskrcnn_resnet50_fpn(**PLAIN),
    "maskrcnn_resnet50_fpn_v2": lambda: detection.maskrcnn_resnet50_fpn_v2(**PLAIN),
    "keypointrcnn_resnet50_fpn": lambda: detection.keypointrcnn_resnet50_fpn(
        **PLAIN, num_keypoints=KEYPOINTS
    ),
}
LOSSES = {
    "mask": {"loss_mask"},
    "keypoint": {"loss_keypoint"},
    "both": {"loss_mask", "loss_keypoint"},
}


def build(name: str = "both", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[name]().train()


BOXES = [
    [[5.0, 5.0, 40.0, 50.0], [30.0, 40.0, 85.0, 92.0]],
    [],
    [[1.0, 1.0, 30.0, 33.0], [50.0, 2.0, 88.0, 60.0], [3.0, 50.0, 60.0, 85.0]],
]
WEIGHTS = [[0.25, 0.9], [], [0.6, 0.05, 1.0]]


def batch(weights=None, boxes=BOXES) -> tuple[list[torch.Tensor], list[dict]]:
    """Images of the detector's own size, with ellipses for masks and keypoints on the boxes.

    Of each object one keypoint lies on the box's right and lower edge, which torchvision counts
    as inside, and every second object hides its last keypoint.
    """
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in boxes]
    if isinstance(weights, float):
        weights = [[weights] * len(image_boxes) for image_boxes in boxes]
    targets = []
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for index, image_boxes in enumerate(boxes):
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


@pytest.mark.parametrize("explicit", [True, False], ids=["ones", "absent"])
@pytest.mark.parametrize("name", LOSSES)
def test_all_weights_one_equals_torchvision_bit_for_bit(name, explicit):
    model = build(name)
    plain = step(copy.deepcopy(model), *batch())
    weighted = step(weight_losses(model), *batch(1.0 if explicit else None))
    assert plain[0].keys() == BOX_LOSSES | LOSSES[name]
    assert all(loss > 0 for loss in plain[0].values())
    assert_identical(weighted, plain)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in LOSSES])
def test_torchvisions_own_models_stay_equal_bit_for_bit(name):
    model = build(name)
    boxes = [BOXES[2], []]
    plain = step(copy.deepcopy(model), *batch(boxes=boxes))
    assert_identical(step(weight_losses(model), *batch(1.0, boxes)), plain)


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_autocast_equals_torchvision_bit_for_bit(name):
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(copy.deepcopy(model), *batch())
        weighted = step(weight_losses(model), *batch(1.0))
    assert_identical(weighted, plain)


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("name", LOSSES)
def test_batch_without_any_object_equals_torchvision_bit_for_bit(name, normalizer):
    images, targets = batch(boxes=[[], []])
    model = build(name)
    plain = step(copy.deepcopy(model), images, targets)
    weighted = step(weight_losses(model, normalizer=normalizer), images, targets)
    assert all(weighted[0][key] == 0 for key in LOSSES[name])
    # every parameter of the branches has a gradient, as distributed training expects
    assert weighted[1].keys() == plain[1].keys() == dict(model.named_parameters()).keys()
    for mine, its in zip(weighted[:2], plain[:2], strict=True):
        for key in its:
            torch.testing.assert_close(mine[key], its[key], rtol=1e-6, atol=0)
    if normalizer == "samples":
        assert_identical(weighted, plain)


def test_no_visible_keypoint_equals_torchvision_bit_for_bit():
    images, targets = batch()
    for target in targets:
        target["keypoints"][..., 2] = 0
    model = build("keypoint")
    plain = step(copy.deepcopy(model), images, targets)
    assert plain[0]["loss_keypoint"] == 0
    assert_identical(step(weight_losses(model), images, targets), plain)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def objects_of(proposals, targets):
    """The image and the object of each proposal, by greatest overlap."""
    found = []
    for index, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
        for box in boxes:
            overlap = box_iou(box[None], target["boxes"])[0]
            assert overlap.max() >= 0.5
            found.append((index, int(overlap.argmax()), box))
    return found


def loop_mask_loss(logits, proposals, targets, weights, normalizer):
    """Proposal by proposal and pixel by pixel with Python's own numbers."""
    total = divisor = 0.0
    for row, (index, obj, box) in enumerate(objects_of(proposals, targets)):
        mask = targets[index]["masks"][obj].float()[None, None]
        goal = roi_align(mask, [box[None]], logits.shape[-1])[0, 0].flatten().tolist()
        plane = logits[row, int(targets[index]["labels"][obj])].flatten().tolist()
        weight = weights[index][obj]
        total += weight * sum(softplus(x) - x * t for x, t in zip(plane, goal, strict=True))
        divisor += len(plane) * (weight if normalizer == "weights" else 1)
    return total / divisor


def loop_keypoint_loss(logits, proposals, targets, weights, normalizer):
    """Keypoint by keypoint with Python's own numbers."""
    total = divisor = 0.0
    size = logits.shape[-1]
    for row, (index, obj, box) in enumerate(objects_of(proposals, targets)):
        x1, y1, x2, y2 = box.tolist()
        for point, (x, y, visible) in enumerate(targets[index]["keypoints"][obj].tolist()):
            column = size - 1 if x == x2 else math.floor((x - x1) / (x2 - x1) * size)
            line = size - 1 if y == y2 else math.floor((y - y1) / (y2 - y1) * size)
            if not (visible and 0 <= column < size and 0 <= line < size):
                continue
            log_probs = logits[row, point].double().flatten().log_softmax(0)
            weight = weights[index][obj]
            total -= weight * log_probs[line * size + column].item()
            divisor += weight if normalizer == "weights" else 1
    return total / divisor


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
@pytest.mark.parametrize("name", ["mask", "keypoint", "both"])
def test_losses_equal_a_loop_over_proposals(name, normalizer):
    model = weight_losses(build(name), normalizer=normalizer, background_weight=0.3)
    loops = {"mask": loop_mask_loss, "keypoint": loop_keypoint_loss}
    caught = {}
    kinds = [kind for kind in loops if name in (kind, "both")]
    for kind in kinds:
        pool = getattr(model.roi_heads, f"{kind}_roi_pool")
        predictor = getattr(model.roi_heads, f"{kind}_predictor")
        pool.register_forward_hook(
            lambda _, args, __, kind=kind: caught.update({f"{kind}_proposals": args[1]})
        )
        predictor.register_forward_hook(
            lambda _, __, out, kind=kind: caught.update({f"{kind}_logits": out.detach()})
        )
    images, targets = batch(WEIGHTS)
    losses = step(model, images, targets)[0]
    for kind in kinds:
        proposals = caught[f"{kind}_proposals"]
        assert sum(map(len, proposals)) >= 5  # each object at the least
        expected = loops[kind](caught[f"{kind}_logits"], proposals, targets, WEIGHTS, normalizer)
        assert losses[f"loss_{kind}"].item() == pytest.approx(expected, rel=1e-5)


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
    weight_losses(model, background_weight=0.3, normalizer="weights")
    losses, _, _ = step(model, *batch(0.3))
    for key in plain:
        torch.testing.assert_close(losses[key], plain[key], rtol=1e-5, atol=1e-7)


def test_no_weight_at_all_gives_zero_not_nan():
    model = weight_losses(build(), background_weight=0.0, normalizer="weights")
    losses, grads, _ = step(model, *batch(0.0))
    assert all(loss == 0 for loss in losses.values())
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("name", LOSSES)
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
    assert type(before.roi_heads) is RoIHeads


def test_copies_and_round_trips():
    model = weight_losses(build(), background_weight=0.4)
    expected = step(model, *batch(WEIGHTS))
    assert_identical(step(copy.deepcopy(model), *batch(WEIGHTS)), expected)
    assert_identical(step(pickle.loads(pickle.dumps(model)), *batch(WEIGHTS)), expected)
    fresh = weight_losses(build(seed=9), background_weight=0.4)
    fresh.load_state_dict(model.state_dict())
    assert_identical(step(fresh, *batch(WEIGHTS)), expected)


@pytest.mark.parametrize(
    ("name", "key", "value", "error", "message"),
    [
        ("mask", "masks", None, ValueError, "target 2 must have 'masks'"),
        ("keypoint", "keypoints", None, ValueError, "target 2 must have 'keypoints'"),
        ("mask", "masks", torch.ones(2, SIZE, SIZE), ValueError, r"'masks' of target 2.*\(3, H, W"),
        ("keypoint", "keypoints", torch.ones(2, 3, 3), ValueError, r"of target 2.*\(3, J, 3\)"),
        ("keypoint", "keypoints", torch.ones(3, 3, 2), ValueError, r"of target 2.*\(3, 3, 2\)"),
        ("keypoint", "keypoints", torch.ones(3, 4, 3), ValueError, "target 2.*have 3 key.*got 4"),
        ("keypoint", "keypoints", torch.ones(3, 3, 3).double(), TypeError, "target 2.*float64"),
        ("mask", "box_weights", torch.ones(4), ValueError, r"target 2 .*\(3,\).*\(4,\)"),
        ("keypoint", "box_weights", torch.tensor([1, -0.5, 1]), ValueError, "-0.5 for box 1"),
        ("mask", "labels", torch.tensor([1, 5, 2]), ValueError, "target 2.*got 5 for box 1"),
        ("keypoint", "labels", torch.tensor([1, 0, 2]), ValueError, "target 2.*got 0 for box 1"),
    ],
)
def test_bad_targets_are_named(name, key, value, error, message):
    images, targets = batch(1.0)
    if value is None:
        del targets[2][key]
    else:
        targets[2][key] = value
    with pytest.raises(error, match=message):
        weight_losses(build(name))(images, targets)


def test_an_image_without_objects_need_not_know_the_number_of_keypoints():
    images, targets = batch(WEIGHTS)
    model = weight_losses(build("keypoint"))
    expected = step(model, images, targets)
    targets[1]["keypoints"] = torch.zeros(0, 0, 3)
    assert_identical(step(model, images, targets), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_objects_needs_neither_masks_nor_keypoints(name):
    """As wrap_dataset_for_transforms_v2 leaves an image of COCO without annotations."""
    images, targets = batch(WEIGHTS)
    assert len(targets[1]["boxes"]) == 0
    model = weight_losses(build(name))
    expected = step(model, images, targets)
    targets[1] = {key: targets[1][key] for key in ("boxes", "labels")}
    assert_identical(step(model, images, targets), expected)
    assert targets[1].keys() == {"boxes", "labels"}


def test_gradcheck_of_the_pure_losses():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    goals = torch.rand(3, 2, 2, dtype=torch.float64, generator=generator)
    heatmaps = torch.randn(5, 9, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    labels, cells = torch.tensor([1, 3, 2]), torch.tensor([0, 8, 4, 4, 2])
    check = torch.autograd.gradcheck
    assert check(lambda x: weighted_mask_loss(x, labels, goals, weights[:3]), (masks,))
    assert check(lambda x: weighted_keypoint_loss(x, cells, weights), (heatmaps,))
