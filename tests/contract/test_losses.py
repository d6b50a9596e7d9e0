"""What `weight_losses` guarantees and refuses; the oracle is the same detector without weights.

Equal to torchvision's and linear in the weights: over every detector that torchvision builds. The
backbone has no part in it: its features are known, and their gradients are all that it gets.
Everything else: over the smallest detector of each family, and in tests/test_loss_formulas.py.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from builders import (
    FAMILIES,
    NAMES,
    WEIGHTS,
    assert_identical,
    batch,
    build,
    losses_of,
    small,
    step,
    twin,
    with_known_features,
)
from mixing_oracle import DEVICES, on
from torch import nn, tensor

from detmix import unweight_losses, weight_losses


@pytest.fixture(scope="module", params=NAMES)
def plain(request):
    """A detector as torchvision builds it, in training. Tests change copies only."""
    return with_known_features(build(request.param))


@pytest.fixture(params=FAMILIES)
def family(request):
    return small(request.param)


def weighted(model, *settings):
    return weight_losses(twin(model), *settings)


def assert_close(ours, theirs, noise=0.0):
    """Compare dicts of tensors, each by the size of the difference."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).norm() <= 1e-5 * value.norm() + noise, key


def test_weights_one_equal_torchvision_bit_for_bit(plain):
    """Losses, gradients (of every parameter, as distributed training needs it), random state."""
    expected = step(twin(plain), batch("half"))
    assert all(0 < loss < torch.inf for loss in expected[0].values())
    assert expected[1].keys() == dict(plain.named_parameters()).keys()
    assert_identical(step(weighted(plain), batch("half", 1.0)), expected)


def test_losses_and_gradients_are_linear_in_the_weights(plain):
    """So the weights have no part in the choice of samples, nor of an SSD's negatives."""
    whole = step(twin(plain), batch())
    model = weighted(plain, 0.35)
    first = step(model, batch("objects", WEIGHTS))
    tenths = [[0.3 * weight for weight in row] for row in WEIGHTS]
    scaled = losses_of(weight_losses(model, 0.3 * 0.35), batch("objects", tenths))
    rest = [[1 - weight for weight in row] for row in WEIGHTS]
    second = step(weight_losses(model, 0.65), batch("objects", rest))
    assert all(0 < first[0][key] < loss for key, loss in whole[0].items())
    assert_close(scaled, {key: 0.3 * loss for key, loss in first[0].items()})
    for part, noise in enumerate((0.0, 1e-6)):  # a gradient may be a sum that cancels
        total = {key: value + second[part][key] for key, value in first[part].items()}
        assert_close(total, whole[part], noise=noise)


def test_gradients_reach_the_weights(family):
    """Each object's is what it alone contributes; a mean does not change when all weights do."""
    model, numbers = weighted(family, 0.0), [2, 3]
    weights = [tensor(row).requires_grad_() for row in WEIGHTS]

    def total(rows):
        images, targets = batch()
        data = images, [t | {"box_weights": r} for t, r in zip(targets, rows, strict=True)]
        return sum(losses_of(model, data).values())

    found = torch.cat(torch.autograd.grad(total(weights), weights))
    alone = torch.stack([total(row.split(numbers)) for row in torch.eye(5)])
    assert (alone > 0).all()
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)
    weight_losses(model, 0.0, "weights")
    found = torch.cat(torch.autograd.grad(total(weights), weights))
    assert found.norm() > 1e-2
    assert abs(found @ torch.cat(weights)) < 1e-4 * found.norm()


def test_without_objects_only_the_background_weight_counts(family):
    """And boxes and labels suffice, as wrap_dataset_for_transforms_v2 leaves it."""
    whole, (images, targets) = step(twin(family), batch("none")), batch("none")
    assert_identical(step(weighted(family), batch("none")), whole)
    targets = [{key: target[key] for key in ("boxes", "labels")} for target in targets]
    for weight, normalizer in ((0.3, "samples"), (1.0, "weights"), (0.0, "weights")):  # 0 / 0
        losses = losses_of(weighted(family, weight, normalizer), (images, targets))
        assert_close(losses, {key: weight * loss for key, loss in whole[0].items()})
    assert targets[0].keys() == {"boxes", "labels"}


def test_state_and_hooks_stay(family):
    plain, calls = copy.deepcopy(family), []
    for name, module in plain.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model, kinds = twin(plain), {name: type(part) for name, part in plain.named_modules()}
    assert weight_losses(model, 0.5) is model
    assert [name for name, _ in model.named_modules()] == list(kinds)
    assert all(isinstance(model.get_submodule(name), kind) for name, kind in kinds.items())
    assert_identical(model.state_dict(), plain.state_dict())
    losses_of(plain, batch())
    expected = calls.copy()
    losses_of(model, batch())
    assert calls == expected * 2
    model = weight_losses(copy.deepcopy(family).to("meta"))
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


def test_other_models_are_left_alone(family):
    """They do not so much as look at weights: nothing of torchvision's is replaced."""
    other = twin(family)
    expected = losses_of(other, batch())
    losses = losses_of(weighted(family, 0.0), batch("objects", WEIGHTS))
    assert all(loss < expected[key] for key, loss in losses.items())
    assert_identical(losses_of(other, batch("objects", WEIGHTS)), expected)


def test_called_again_or_on_a_copy_it_changes_the_settings_of_that_model_only(family):
    """Absent weights are ones, so that the default settings give torchvision's losses."""
    data, file = batch("objects", WEIGHTS), io.BytesIO()
    model = weighted(family, 0.5, "weights")
    expected = losses_of(model, data)
    torch.save(model, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert_identical(losses_of(saved, data), expected)
    assert_identical(losses_of(weight_losses(saved), batch()), losses_of(twin(family), batch()))
    assert_identical(losses_of(model, data), expected)
    assert_identical(losses_of(weight_losses(saved, 0.5, "weights"), data), expected)


# Their samples all belong to objects; divided by the sum of the weights they are means, which do
# not fall with the weights.
OF_OBJECTS = {"loss_mask", "loss_keypoint"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("background_weight", "normalizer"), [(1.0, "samples"), (1.0, "weights"), (0.0, "weights")]
)
def test_small_weights_leave_the_background(family, background_weight, normalizer, half, device):
    """All objects of the batch weigh nearly nothing: losses are those at 0."""
    model = weighted(family, background_weight, normalizer)
    limit, network = losses_of(model, batch("objects", 0.0)), copy.deepcopy(model).to(device)
    assert (sum(limit.values()) > 0) == (background_weight > 0)
    for weight in (1e-6, 1e-30):
        samples = [on(device, sample) for sample in zip(*batch("objects", weight), strict=True)]
        dtype = torch.bfloat16 if device == "cpu" else torch.float16
        with torch.autocast(device, dtype, enabled=half):
            losses, grads, _ = step(network, zip(*samples, strict=True))
        assert all(bool(torch.isfinite(part).all()) for part in (*losses.values(), *grads.values()))
        for name in losses.keys() - (OF_OBJECTS if normalizer == "weights" else set()):
            assert losses[name] >= 0
            if background_weight == 0:
                assert weight > 1e-30 or losses[name] < 1e-12
            elif device == "cpu":  # another device samples others
                error = 0.05 if half else 1e-4
                assert float(losses[name]) == pytest.approx(limit[name].item(), error, abs=1e-3)


def test_a_mean_of_small_weights(family):
    """No background: those of an R-CNN are weighted means, others fade out with the weights."""
    model = weighted(family, 0.0, "weights")
    light, other = (losses_of(model, batch("objects", weight)) for weight in (1e-6, 1e-5))
    for name, loss in light.items():
        assert loss > 0
        factor = 1 if hasattr(family, "roi_heads") else 10
        assert other[name].item() == pytest.approx(factor * loss.item(), rel=1e-4)


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_a_larger_batch_equals_torchvision_bit_for_bit(family, learned, half_precision):
    """The order of a sum may change with its length, and its dtype with autocast."""
    (images, targets), (_, (empty, other)) = batch(), batch("half")
    bare = {key: empty[key] for key in ("boxes", "labels")}  # torchvision cannot do with these
    with torch.autocast("cpu", torch.bfloat16, enabled=half_precision):
        expected = step(twin(family), (images * 3, [*targets, empty, other, *targets]))
        listed = targets[0] | {"box_weights": [1.0, 1.0]}
        last = targets[1] | {"box_weights": torch.ones(3, requires_grad=learned)}
        data = images * 3, [*targets, bare, other, listed, last]
        assert_identical(step(weighted(family), data), expected)


FASTER = FAMILIES[0]


@pytest.mark.parametrize(("name", "value"), [("background_weight", -1.5), ("normalizer", "mean")])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"(?=.*{name})(?=.*{value})"):
        weight_losses(twin(small(FASTER)), **{name: value})


@pytest.mark.parametrize("change", [weight_losses, unweight_losses])
@pytest.mark.parametrize(
    ("name", "part"),
    [(FASTER, "rpn"), (FASTER, "roi_heads"), ("retinanet", "head.regression_head"), ("none", "")],
)
def test_unknown_models_and_parts_are_named_and_left_alone(name, part, change):
    model = twin(small(name)) if part else nn.Linear(1, 1)
    known = model.get_submodule(part)
    known.__class__ = type("Own", (type(known),), {})
    types = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="Own"):
        change(model)
    assert [type(module) for module in model.modules()] == types
