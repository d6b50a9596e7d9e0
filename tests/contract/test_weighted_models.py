"""A model with weighted losses is torchvision's own in all but its losses, and becomes it again."""

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
)
from torch import nn

from detmix import unweight_losses, weight_losses

# TorchScript is deprecated; a scripted detector says that it returns losses and detections.
pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES, TARGETS = batch("objects", WEIGHTS)


@pytest.fixture(
    params=[*FAMILIES, "v2", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)]
)
def plain(request):
    """A detector as `build_detector` or torchvision builds it, in training."""
    if request.param in NAMES:
        return build(request.param)
    model = copy.deepcopy(small("retinanet" if request.param == "v2" else request.param))
    if request.param == "v2":
        model.head.regression_head._loss_type = "giou"
    return model


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def test_it_scripts_to_the_same_detections_and_is_weighted_still(plain):
    """In training a scripted one raises, where torchvision's own would return its losses."""
    model, other = (weight_losses(twin(plain), 0.5) for _ in range(2))
    with torch.no_grad(), torch.jit.optimized_execution(False):
        expected = plain.eval()(IMAGES)
        assert all(len(detections["boxes"]) > 0 for detections in expected)
        scripted = torch.jit.script(model.eval())
        for module in (scripted, saved_and_loaded(scripted)):
            assert_identical(module(IMAGES), ({}, expected))
            with pytest.raises(torch.jit.Error):
                module.train()(IMAGES, TARGETS)
    data = IMAGES, TARGETS
    assert_identical(losses_of(model.train(), data), losses_of(other, data))


class Flat(nn.Module):
    """A detector of one image whose detections are a tuple: what can be traced."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, image):
        return tuple(self.model([image])[0].values())


def test_it_traces_to_the_same_detections(plain):
    with torch.no_grad():
        expected = Flat(plain)(IMAGES[0])
        traced = torch.jit.trace(Flat(weight_losses(twin(plain))), IMAGES[:1], check_trace=False)
        assert_identical(traced(IMAGES[0]), expected)


@pytest.mark.parametrize("training", [True, False])
def test_unweighted_it_is_torchvisions_own_again(plain, training):
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    model = weight_losses(unweight_losses(twin(plain)), 0.5, "weights").train(training)
    assert unweight_losses(model) is model
    assert unweight_losses(weight_losses(weight_losses(model))) is model
    plain.train(training)
    for (name, part), (own_name, own) in zip(
        model.named_modules(), plain.named_modules(), strict=True
    ):
        assert (name, type(part), vars(part).keys()) == (own_name, type(own), vars(own).keys())
        assert part.training == training
    assert_identical(model.state_dict(), plain.state_dict())
    expected = step(plain.train(), (IMAGES, TARGETS))
    assert_identical(step(model.train(), (IMAGES, TARGETS)), expected)
    assert len(calls) == 2
