"""Optimizers and the learning rate, against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
)

from detmix.training import OptimConfig, ScheduleConfig
from detmix.training.optim import (
    build_optimizer,
    learning_rate_factor,
    load_optimizer,
)

STEPS_PER_EPOCH, EPOCHS = 7, 5
STEPS = STEPS_PER_EPOCH * EPOCHS


def torch_factors(schedule):
    """Return what torch's schedulers multiply a rate of 1 by, step by step."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    decay = {
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=STEPS),
        "multistep": lambda: MultiStepLR(
            optimizer, [m * STEPS_PER_EPOCH for m in schedule.milestones], schedule.gamma
        ),
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
    }
    start = schedule.warmup_start if schedule.warmup_steps else 1.0
    warmup = LinearLR(optimizer, start, total_iters=max(1, schedule.warmup_steps))
    chained = ChainedScheduler([warmup, decay[schedule.name]()], optimizer=optimizer)
    factors = []
    for _ in range(STEPS):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chained.step()
    return factors


def factors_of(schedule, steps):
    counts = {"steps_per_epoch": STEPS_PER_EPOCH, "num_epochs": EPOCHS}
    return [learning_rate_factor(step, schedule, **counts) for step in steps]


@pytest.mark.parametrize("name", ["cosine", "multistep", "constant"])
@pytest.mark.parametrize(("warmup", "start"), [(0, 0.5), (1, 1.0), (5, 0.001), (12, 0.25)])
def test_the_learning_rate_is_torchs(name, warmup, start):
    schedule = ScheduleConfig(name, warmup, start, milestones=(2, 4), gamma=0.3)
    assert factors_of(schedule, range(STEPS)) == pytest.approx(torch_factors(schedule), rel=1e-9)


def test_cosine_ends_at_zero_and_stays():
    schedule = ScheduleConfig(warmup_steps=0)
    assert factors_of(schedule, (STEPS, STEPS + 1, 100)) == pytest.approx([0.0] * 3, abs=1e-15)


class TestBuildOptimizer:
    @pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
    def test_steps_as_torchs(self, name):
        nesterov = name == "nesterov"
        kind = "adamw" if name == "adamw" else "sgd"
        config = OptimConfig(kind, lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=nesterov)
        oracle = {
            "sgd": lambda p: SGD(p, 0.1, 0.8, weight_decay=0.01, nesterov=nesterov),
            "adamw": lambda p: AdamW(p, 0.1, weight_decay=0.01),
        }[kind]
        models = [nn.Linear(3, 2), nn.Linear(3, 2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [build_optimizer(models[0], config), oracle(models[1].parameters())]
        for step in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(torch.full((1, 3), step + 1.0)).square().sum().backward()
                optimizer.step()
        assert torch.equal(models[0].weight, models[1].weight)

    def test_takes_only_what_is_trainable(self):
        model = nn.Linear(3, 2)
        model.bias.requires_grad_(False)
        (group,) = build_optimizer(model, OptimConfig()).param_groups
        assert [id(p) for p in group["params"]] == [id(model.weight)]
        with pytest.raises(ValueError, match="no trainable parameters"):
            build_optimizer(model.requires_grad_(False), OptimConfig())


def trained(config, bias=True):
    model = nn.Linear(3, 2, bias)
    optimizer = build_optimizer(model, config)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


class TestLoadOptimizer:
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_takes_the_state_and_keeps_the_settings(self, name):
        """AdamW's groups have gained keys over time."""
        saved = trained(OptimConfig(name, weight_decay=0.5, momentum=0.5)).state_dict()
        saved["param_groups"][0].pop("foreach")
        saved["param_groups"][0]["of_the_future"] = 1
        optimizer = trained(OptimConfig(name, lr=0.125, weight_decay=0.25, momentum=0.75))
        load_optimizer(optimizer, saved)
        for key, state in saved["state"].items():
            for part, value in state.items():
                assert torch.equal(optimizer.state_dict()["state"][key][part], value)
        (group,) = optimizer.param_groups
        assert (group["initial_lr"], group["weight_decay"]) == (0.125, 0.25)
        assert group.get("momentum", 0.75) == 0.75

    @pytest.mark.parametrize(
        ("mine", "other", "bias", "named"),
        [
            ("sgd", "adamw", True, "kind"),
            ("adamw", "sgd", True, "kind"),
            ("sgd", "sgd", False, "parameter group"),
        ],
    )
    def test_another_optimizer(self, mine, other, bias, named):
        saved = trained(OptimConfig(other)).state_dict()
        with pytest.raises(ValueError, match=named):
            load_optimizer(trained(OptimConfig(mine), bias), saved)
