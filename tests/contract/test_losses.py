"""What `weight_losses` guarantees, over every detector that torchvision builds.

The oracle is the same detector without weights. Where the backbone has no part in a guarantee,
its features are known beforehand and only the heads run.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from builders import (
    FASTEST,
    NAMES,
    WEIGHTS,
    assert_identical,
    batch,
    build,
    losses_of,
    step,
    twin,
    with_known_features,
)
from torch import nn
from torchvision.models.detection import fcos, retinanet, roi_heads, rpn, ssd

from detmix import weight_losses

HAVE_BACKGROUND = ("loss_objectness", "loss_classifier", "classification")
# Torchvision divides these by all samples, every other loss by those of objects.
OVER_ALL_SAMPLES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")


@pytest.fixture(scope="module", params=NAMES)
def plain(request):
    """A detector as torchvision builds it, in training. Tests change copies only.

    But SSD300's first layers, which would take most of the time, are frozen.
    """
    model = build(request.param)
    if request.param == "ssd300_vgg16":
        model.backbone.features.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def headed(plain):
    """The same with known features, for tests of heads and losses."""
    return with_known_features(plain)


@pytest.fixture(scope="module")
def plain_step(headed):
    """Losses and gradients that torchvision gets from the batch with all objects."""
    return step(twin(headed), batch())[:2]


def weighted(model, *settings):
    return weight_losses(twin(model), *settings)


def times(factor):
    return [[factor * weight for weight in row] for row in WEIGHTS]


def clear(model):
    for value in model.state_dict().values():
        value.zero_()


def types_of(model):
    return {name: type(module) for name, module in model.named_modules()}


def torchvision_spaces():
    """What torchvision's modules hold and what their classes define."""
    spaces = [fcos, retinanet, roi_heads, rpn, ssd]
    spaces += [kind for space in spaces for kind in vars(space).values() if isinstance(kind, type)]
    return [dict(vars(space)) for space in spaces]


def assert_close(ours, theirs, noise=0.0):
    """Compare dicts of tensors, each by the size of the difference."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).norm() <= 1e-5 * value.norm() + noise, key


def test_there_are_twelve():
    assert len(NAMES) >= 12
    assert set(FASTEST) < set(NAMES)


def check_weights_one(model, kind):
    expected = step(twin(model), batch(kind))
    assert all(torch.isfinite(loss) for loss in expected[0].values())
    assert kind == "none" or all(loss > 0 for loss in expected[0].values())
    assert expected[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_identical(step(weighted(model), batch(kind, 1.0)), expected)


def test_weights_one_equal_torchvision_bit_for_bit(plain):
    """Losses, every gradient and the random state; one image of two has no objects."""
    check_weights_one(plain, "half")


def test_weights_one_for_a_batch_without_objects(headed):
    check_weights_one(headed, "none")


def test_losses_and_gradients_are_linear_in_the_weights(headed, plain_step):
    """Weights that add up to ones give what adds up to torchvision's.

    For an SSD that is so only if the weights have no part in the choice of negatives.
    """
    model = weighted(headed, 0.35)
    first = step(model, batch("objects", WEIGHTS))
    scaled = losses_of(weight_losses(model, 0.3 * 0.35), batch("objects", times(0.3)))
    rest = [[1 - weight for weight in row] for row in WEIGHTS]
    second = step(weight_losses(model, 0.65), batch("objects", rest))
    assert all(0 < first[0][key] < loss for key, loss in plain_step[0].items())
    assert_close(scaled, {key: 0.3 * loss for key, loss in first[0].items()})
    for part, noise in enumerate((0.0, 1e-6)):  # a gradient may be a sum that cancels
        total = {key: value + second[part][key] for key, value in first[part].items()}
        assert_close(total, plain_step[part], noise=noise)


def test_objects_and_background_add_up_to_torchvision(headed, plain_step):
    """One object of each image at a time, then the background alone."""
    model = weighted(headed, 0.0)
    totals = dict.fromkeys(plain_step[0], 0.0)
    for chosen in range(max(map(len, WEIGHTS))):
        weights = [[float(index == chosen) for index in range(len(row))] for row in WEIGHTS]
        losses = losses_of(model, batch("objects", weights))
        totals = {key: totals[key] + losses[key].item() for key in totals}
    weight_losses(model)
    for key, loss in losses_of(model, batch("objects", 0.0)).items():
        background = loss.item()
        assert totals[key] > 0
        assert (background > 0) == (key in HAVE_BACKGROUND)
        assert totals[key] + background == pytest.approx(plain_step[0][key].item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_weight_is_that_of_its_own_object(headed, weight):
    """Of objects of weight 0 neither label, mask and keypoints matter nor the exact place."""
    model = weighted(headed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # the pixels of one sample change another's
            module.eval()
    images, targets = batch("objects", [[weight, 1.0], [1.0, 1.0, weight]])
    losses = losses_of(model, (images, targets))
    for target, chosen in zip(targets, (0, 2), strict=True):
        target["boxes"][chosen] += 1 / 64
        target["labels"][chosen] += 1
        target["masks"][chosen] ^= 1
        target["keypoints"][chosen, :, :2] -= 2
    moved = losses_of(model, (images, targets))
    changed = {key for key, loss in losses.items() if moved[key] != loss}
    unmoved = {"loss_objectness"}
    if "bbox_ctrness" in losses:  # an untrained FCOS predicts points: GIoU 0 with any box
        unmoved.add("bbox_regression")
    assert changed == (losses.keys() - unmoved if weight else set())


def test_the_choice_of_samples_does_not_depend_on_the_weights(headed):
    """Sampled anchors, an SSD's mined ones too, are those whose scores have a gradient."""
    chosen = []
    for weights, background_weight in ((1.0, 1.0), (WEIGHTS, 0.1), (0.001, 7.0)):
        model = weighted(headed, background_weight)
        head, outputs = (model.rpn.head if hasattr(model, "rpn") else model.head), []
        head.register_forward_hook(lambda *args, kept=outputs: kept.append(args[2]))
        losses = losses_of(model, batch("objects", weights))
        loss = losses.get("loss_objectness", losses.get("classification"))
        scores = outputs[0]["cls_logits"] if isinstance(outputs[0], dict) else outputs[0][0]
        grads = torch.autograd.grad(loss, scores)
        chosen.append([grad != 0 for grad in grads])
    assert any(part.any() for part in chosen[0])
    assert_identical(chosen[1:], chosen[:1] * 2)


def test_the_normalizer_weights_divides_by_the_mean_weight(headed):
    """The mean of an object's and the background's weight in the shares that they have."""
    model = weighted(headed)

    def mean_weight(weight, background_weight):
        data = batch("objects", weight)
        sums = losses_of(weight_losses(model, background_weight, "samples"), data)
        means = losses_of(weight_losses(model, background_weight, "weights"), data)
        return {key: loss.item() / means[key].item() for key, loss in sums.items()}

    low, high = mean_weight(0.5, 2.0), mean_weight(2.0, 0.5)
    for key in low:
        if key in OVER_ALL_SAMPLES:
            assert 0.5 < low[key] < 2
            assert low[key] + high[key] == pytest.approx(2.5, rel=1e-5)
        else:
            assert (low[key], high[key]) == pytest.approx((0.5, 2), rel=1e-5)
    if "loss_objectness" in low:  # both losses of the same samples
        assert low["loss_objectness"] == pytest.approx(low["loss_rpn_box_reg"], rel=1e-5)
        assert low["loss_classifier"] == pytest.approx(low["loss_box_reg"], rel=1e-5)


def test_without_objects_only_the_background_weight_counts(headed):
    plain_losses = losses_of(twin(headed), batch("none"))
    losses = losses_of(weighted(headed, 0.3), batch("none"))
    assert_close(losses, {key: 0.3 * loss for key, loss in plain_losses.items()})
    assert_close(losses_of(weighted(headed, 1.0, "weights"), batch("none")), plain_losses)


@pytest.mark.parametrize("kind", ["half", "none"])
def test_no_weight_at_all(headed, kind):
    """The sum of the weights must not divide then."""
    losses, grads, _ = step(weighted(headed, 0.0, "weights"), batch(kind, 0.0))
    assert not any(losses.values())
    assert grads.keys() == dict(headed.named_parameters()).keys()
    assert all(torch.isfinite(grad.sum()) for grad in grads.values())


def test_an_image_without_objects_needs_boxes_and_labels_only(headed):
    """As wrap_dataset_for_transforms_v2 leaves it. And weights may be a list."""
    images, targets = batch("half", WEIGHTS)
    expected = losses_of(weighted(headed), (images, targets))
    targets[0] = {key: targets[0][key] for key in ("boxes", "labels")}
    targets[1]["box_weights"] = WEIGHTS[1]
    assert_identical(losses_of(weighted(headed), (images, targets)), expected)
    assert targets[0].keys() == {"boxes", "labels"}


def test_state_and_evaluation_are_unchanged(plain, headed):
    model = twin(plain)
    assert weight_losses(model, 0.5) is model
    for listing in ("named_parameters", "named_buffers", "named_modules"):
        names = [name for name, _ in getattr(plain, listing)()]
        assert [name for name, _ in getattr(model, listing)()] == names
    assert all(isinstance(model.get_submodule(n), kind) for n, kind in types_of(plain).items())
    assert_identical(model.state_dict(), plain.state_dict())
    images, _ = batch()
    with torch.no_grad():
        expected = twin(headed).eval()(images)
        assert all(len(found["boxes"]) > 0 for found in expected)
        assert_identical(weighted(headed, 0.5).eval()(images), expected)


def test_hooks_frozen_parameters_and_device_stay(headed):
    model, calls = copy.deepcopy(headed), []
    frozen = [p.requires_grad_(False) for p in list(model.parameters())[::3]]
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses_of(model, batch())
    expected = calls.copy()
    assert "" in expected
    losses_of(weight_losses(model, 0.0), batch())
    assert calls == expected * 2
    assert not any(p.requires_grad for p in frozen)
    assert sum(not p.requires_grad for p in model.parameters()) == len(frozen)
    model = weight_losses(copy.deepcopy(headed).to("meta"))
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


def test_other_models_and_torchvision_are_left_alone(headed, plain_step):
    before, other = torchvision_spaces(), twin(headed)
    types = types_of(other)
    losses = losses_of(weighted(headed, 0.0), batch("objects", WEIGHTS))
    assert all(loss < plain_step[0][key] for key, loss in losses.items())
    assert types_of(other) == types
    assert_identical(losses_of(other, batch()), plain_step[0])
    assert torchvision_spaces() == before
    for space in before:  # nor replaced when detmix was imported
        assert not any("detmix" in str(getattr(v, "__module__", "")) for v in space.values())


def test_calling_it_again_changes_the_settings_only(headed, plain_step):
    """Absent weights are ones, so that the default settings give torchvision's losses."""
    data = batch("objects", WEIGHTS)
    model = weighted(headed, 0.5, "weights")
    losses = losses_of(model, data)
    assert_identical(losses_of(weight_losses(model), batch()), plain_step[0])
    assert_identical(losses_of(weight_losses(model, 0.5, "weights"), data), losses)


def test_a_saved_copy_is_the_same_and_independent(headed):
    data = batch("objects", WEIGHTS)
    model, file = weighted(headed, 0.4), io.BytesIO()
    expected = losses_of(model, data)
    torch.save(twin(model), file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert_identical(losses_of(other, data), expected)
    clear(weight_losses(other, 0.0))
    assert_identical(losses_of(model, data), expected)
