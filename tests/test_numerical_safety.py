"""Weights and ratios at their ends, in every precision: losses and gradients finite, and right."""

from __future__ import annotations

import pytest
import torch
from builders import CLASSES, FASTEST, KEYPOINTS, batch, build, losses_of, step, with_known_features

from detmix import weight_losses
from detmix.detectors import BackboneConfig, DetectorConfig, build_detector
from detmix.mixing import mixup

FAMILIES = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", FASTEST[1])
NORMALIZERS = ("samples", "weights")
TINY = (1e-6, 1e-30)
# Their samples all belong to objects; divided by the sum of the weights they are means, which do
# not fall with the weights.
OF_OBJECTS = {"loss_mask", "loss_keypoint"}


def narrow(name):
    """Return a small detector of a family."""
    if name in FASTEST:
        return with_known_features(build(name))
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 96, "anchor_sizes": (16, 32, 64)}
    rcnn = {"head_dim": 32, "options": {"rpn_post_nms_top_n_train": 30}} if "rcnn" in name else {}
    keypoints = {"num_keypoints": KEYPOINTS} if "keypoint" in name else {}
    detector = build_detector(
        DetectorConfig(name=name, **sizes, **rcnn),
        BackboneConfig("resnet18", fpn_channels=32, levels=(1, 2), norm="group"),
        CLASSES,
        **keypoints,
    )
    return detector.train()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return narrow(request.param)


def assert_finite(losses, grads):
    assert all(bool(torch.isfinite(loss)) for loss in losses.values()), losses
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name


def largest_of(tensors):
    return max(float(tensor.abs().max()) for tensor in tensors.values())


def assert_close(ours, theirs, rtol, scale=None):
    """Compare tensors with a tolerance relative to the largest entry of all: many sums cancel."""
    largest = largest_of(theirs) if scale is None else scale
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_small_weights_leave_the_background(model, normalizer):
    """All objects of the batch weigh nearly nothing: losses and gradients are those at 0."""
    weight_losses(model, normalizer=normalizer)
    limit, limit_grads, _ = step(model, batch("objects", 0.0))
    _, heavier_grads, _ = step(model, batch("objects", 1e-3))
    assert sum(limit.values()) > 0
    means = OF_OBJECTS & limit.keys() if normalizer == "weights" else set()
    for weight in TINY:
        losses, grads, _ = step(model, batch("objects", weight))
        assert_finite(losses, grads)
        for name in losses.keys() - means:
            assert float(losses[name]) == pytest.approx(float(limit[name]), rel=1e-4, abs=1e-3)
        if not means:
            # Linear in weights as small as these.
            assert_close(grads, limit_grads, 2e-3, scale=largest_of(heavier_grads))


def test_a_mean_of_small_weights(model):
    """No background: an R-CNN's losses are weighted means, the others' fade out with the weights.

    A mean whose weights add up to less than float32's epsilon fades out too: 0 / 0 has no limit.
    """
    weight_losses(model, background_weight=0.0, normalizer="weights")
    factor = 1 if hasattr(model, "roi_heads") else 10
    small, grads, _ = step(model, batch("objects", 1e-6))
    other, other_grads, _ = step(model, batch("objects", 1e-5))
    assert all(loss > 0 for loss in small.values())
    for name, loss in small.items():
        assert float(other[name]) == pytest.approx(factor * float(loss), rel=1e-4)
    assert_close({name: factor * grad for name, grad in grads.items()}, other_grads, 1e-4)
    for weight in (1e-20, 0.0):
        losses, grads, _ = step(model, batch("objects", weight))
        assert_finite(losses, grads)
        assert all(0 <= loss < 1e-9 for loss in losses.values())
        assert all(grad.abs().max() < 1e-9 for grad in grads.values())


@pytest.mark.parametrize(("background_weight", "normalizer"), [(0.0, "weights"), (1.0, "samples")])
def test_bf16(model, background_weight, normalizer):
    """Next to nothing is next to nothing there too, and what is left is the background."""
    weight_losses(model, background_weight, normalizer)
    exact = losses_of(model, batch("objects", 0.0))
    for weight in TINY:
        with torch.autocast("cpu", torch.bfloat16):
            losses, grads, _ = step(model, batch("objects", weight))
        assert_finite(losses, grads)
        assert grads.keys() == dict(model.named_parameters()).keys()
        assert all(loss >= 0 for loss in losses.values())
        for name in losses.keys() - OF_OBJECTS if background_weight else ():
            expected = float(exact[name].detach())
            assert float(losses[name]) == pytest.approx(expected, rel=0.05, abs=1e-3)
        if background_weight == 0 and weight == 1e-30:
            assert all(loss < 1e-12 for loss in losses.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 is trained with on a GPU")
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("background_weight", [0.0, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_fp16(name, background_weight, normalizer):
    """With the loss scaled up, as it is in training, so that gradients do not vanish."""
    network = weight_losses(narrow(name), background_weight, normalizer).cuda()
    for weight in (0.0, *TINY, 0.3):
        images, targets = batch("objects", weight)
        images = [image.cuda() for image in images]
        targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
        network.zero_grad()
        with torch.autocast("cuda", torch.float16):
            losses = network(images, targets)
        scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
        scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        assert_finite(losses, grads)


@pytest.mark.parametrize("name", FASTEST)
@pytest.mark.parametrize(("lam", "normalizer"), [(1e-20, "weights"), (1 - 1e-7, "samples")])
def test_ratios_at_the_ends(name, lam, normalizer):
    """A pair mixed by next to nothing is the one image, at the other's objects of no weight."""
    network = weight_losses(build(name), normalizer=normalizer)
    (image_a, image_b), (target_a, target_b) = batch()
    image, target = mixup(image_a, target_a, image_b, target_b, lam)
    numbers = len(target_a["boxes"]), len(target_b["boxes"])
    assert len(target["boxes"]) == sum(numbers)
    losses, grads, _ = step(network, ([image] * 2, [target] * 2))
    assert_finite(losses, grads)
    limit, _ = mixup(image_a, target_a, image_b, target_b, float(round(lam)))
    weights = torch.tensor([float(round(lam))] * numbers[0] + [1.0 - round(lam)] * numbers[1])
    limits, limit_grads, _ = step(network, ([limit] * 2, [{**target, "box_weights": weights}] * 2))
    assert_close(losses, limits, 1e-4)
    assert_close(grads, limit_grads, 1e-2)


@pytest.mark.parametrize("name", FASTEST)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_ratios_of_exactly_0_and_1(name, lam):
    """What is left is the one image's objects, at full weight: torchvision's own losses."""
    (image_a, image_b), (target_a, target_b) = batch()
    image, target = mixup(image_a, target_a, image_b, target_b, lam)
    network, alone = build(name), (target_b, target_a)[int(lam)]
    expected = losses_of(network, ([image] * 2, [alone] * 2))
    losses = losses_of(weight_losses(network), ([image] * 2, [target] * 2))
    for key, loss in expected.items():
        assert torch.equal(losses[key], loss)
