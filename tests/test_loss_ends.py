"""Weighted losses beyond one batch in float32: larger ones, half precision, weights near 0."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import FAMILIES, assert_identical, batch, losses_of, small, step, twin

from detmix import mixup, weight_losses

TINY = (1e-6, 1e-30)
# Their samples all belong to objects; divided by the sum of the weights they are means, which do
# not fall with the weights.
OF_OBJECTS = {"loss_mask", "loss_keypoint"}


@pytest.fixture(params=FAMILIES)
def model(request):
    """A small detector of each family."""
    return twin(small(request.param))


def assert_finite(losses, grads):
    assert all(bool(torch.isfinite(value).all()) for value in (*losses.values(), *grads.values()))


def assert_close(ours, theirs, rtol, scale=None):
    """Compare tensors with a tolerance relative to the largest entry of all: many sums cancel."""
    largest = max(float(value.abs().max()) for value in (scale or theirs).values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=rtol * largest)


@pytest.mark.parametrize("normalizer", ["samples", "weights"])
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
        if not means:  # linear in weights as small as these
            assert_close(grads, limit_grads, 2e-3, scale=heavier_grads)


def test_a_mean_of_small_weights(model):
    """No background: an R-CNN's losses are weighted means, the others' fade out with the weights.

    A mean whose weights add up to less than float32's epsilon fades out too: 0 / 0 has no limit.
    """
    weight_losses(model, background_weight=0.0, normalizer="weights")
    factor = 1 if hasattr(model, "roi_heads") else 10
    light, grads, _ = step(model, batch("objects", 1e-6))
    other, other_grads, _ = step(model, batch("objects", 1e-5))
    for name, loss in light.items():
        assert loss > 0
        assert float(other[name]) == pytest.approx(factor * float(loss), rel=1e-4)
    assert_close({name: factor * grad for name, grad in grads.items()}, other_grads, 1e-4)
    for kind, weight in (("objects", 1e-20), ("objects", 0.0), ("half", 0.0), ("none", 0.0)):
        losses, grads, _ = step(model, batch(kind, weight))
        assert_finite(losses, grads)
        assert all(0 <= value.abs().max() < 1e-9 for value in (*losses.values(), *grads.values()))


@pytest.mark.parametrize("half_precision", [False, True])
def test_a_larger_batch_equals_torchvision_bit_for_bit(model, half_precision):
    """The order of a sum may change with its length, and its dtype with autocast."""
    (images, targets), (_, others) = batch(), batch("half")
    data = images * 3, [*targets, *others, *targets]
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        expected = step(twin(model), data)
        assert_identical(step(weight_losses(model), data), expected)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param(
            "cuda",
            torch.float16,
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ],
)
@pytest.mark.parametrize(("background_weight", "normalizer"), [(0.0, "weights"), (1.0, "samples")])
def test_half_precision(model, background_weight, normalizer, device, dtype):
    """Next to nothing is next to nothing there too, and what is left is the background."""
    weight_losses(model, background_weight, normalizer)
    exact, network = losses_of(model, batch("objects", 0.0)), copy.deepcopy(model).to(device)
    for weight in TINY:
        images, targets = batch("objects", weight)
        targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
        with torch.autocast(device, dtype):
            losses, grads, _ = step(network, ([image.to(device) for image in images], targets))
        assert_finite(losses, grads)
        for name, loss in losses.items():
            assert loss >= 0
            if background_weight == 0:
                assert weight > 1e-30 or loss < 1e-12
            elif name not in OF_OBJECTS and device == "cpu":  # another device samples others
                assert float(loss) == pytest.approx(exact[name].item(), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_pair_mixed_at_a_ratio_of_0_or_1_has_torchvision_s_losses_of_one_image(lam):
    """What is left is the one image's objects, at full weight."""
    (image_a, image_b), (target_a, target_b) = batch()
    image, target = mixup(image_a, target_a, image_b, target_b, lam)
    network, alone = twin(small(FAMILIES[0])), (target_b, target_a)[int(lam)]
    expected = losses_of(network, ([image] * 2, [alone] * 2))
    assert_identical(losses_of(weight_losses(network), ([image] * 2, [target] * 2)), expected)
