"""Every detector that torchvision builds takes weights by one call."""

from __future__ import annotations

import copy

import pytest
from torchvision.models import detection, get_model, list_models

from detmix import weight_losses

BUILDERS = list_models(module=detection)


def test_there_are_twelve():
    assert len(BUILDERS) >= 12


@pytest.mark.parametrize("name", BUILDERS)
def test_one_call(name):
    model = get_model(name, weights=None, weights_backbone=None)
    before = copy.deepcopy(model)
    assert weight_losses(model, background_weight=0.5) is model
    weighted = {n: m for n, m in model.named_modules() if type(m).__name__.startswith("Weighted")}
    assert weighted
    assert all(module.loss_weighting.background_weight == 0.5 for module in weighted.values())
    # Nothing else is touched: parts, parameters and their names.
    others = {n: type(m) for n, m in before.named_modules() if n not in weighted}
    assert {n: type(m) for n, m in model.named_modules() if n not in weighted} == others
    for part, module in weighted.items():
        assert isinstance(module, type(before.get_submodule(part)))
    assert list(model.state_dict()) == list(before.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in before.named_parameters()]
    weight_losses(model)
    assert all(module.loss_weighting.background_weight == 1.0 for module in weighted.values())
    assert not any(hasattr(module, "loss_weighting") for module in before.modules())
