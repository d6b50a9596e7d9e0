"""Optimizers and the learning rate, against torch's own schedulers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, MultiStepLR

from detmix.training import OptimConfig, ScheduleConfig
from detmix.training.optim import build_optimizer, learning_rate_factor, load_optimizer

STEPS_PER_EPOCH, EPOCHS = 7, 5
STEPS = STEPS_PER_EPOCH * EPOCHS


def torch_factors(schedule):
    """Return what torch's schedulers multiply a rate of 1 by, step by step."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = [milestone * STEPS_PER_EPOCH for milestone in schedule.milestones]
    start = schedule.warmup_start if schedule.warmup_steps else 1.0
    schedulers = [LinearLR(optimizer, start, total_iters=max(1, schedule.warmup_steps))]
    if schedule.name == "cosine":
        schedulers.append(CosineAnnealingLR(optimizer, T_max=STEPS))
    if schedule.name == "multistep":
        schedulers.append(MultiStepLR(optimizer, steps, schedule.gamma))
    chained = ChainedScheduler(schedulers, optimizer=optimizer)
    factors = []
    for _ in range(STEPS):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chained.step()
    return factors


@pytest.mark.parametrize("name", ["cosine", "multistep", "constant"])
@pytest.mark.parametrize(("warmup", "start"), [(0, 0.5), (5, 0.001), (12, 0.25)])
def test_the_learning_rate_is_torchs(name, warmup, start):
    schedule = ScheduleConfig(name, warmup, start, milestones=(2, 4), gamma=0.3)
    counts = {"steps_per_epoch": STEPS_PER_EPOCH, "num_epochs": EPOCHS}
    found = [learning_rate_factor(step, schedule, **counts) for step in range(STEPS)]
    assert found == pytest.approx(torch_factors(schedule), rel=1e-9)


ORACLES = {
    "sgd": lambda p: SGD(p, 0.1, 0.8, weight_decay=0.01, fused=True),
    "nesterov": lambda p: SGD(p, 0.1, 0.8, weight_decay=0.01, nesterov=True, fused=True),
    "adamw": lambda p: AdamW(p, 0.1, weight_decay=0.01, fused=True),
}


def build(name, model, **changes):
    settings = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "nesterov": name == "nesterov"}
    kind = "adamw" if name == "adamw" else "sgd"
    return build_optimizer(model, OptimConfig(kind, **(settings | changes)))


def train(model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((1, 3), step + 1.0)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ORACLES)
def test_optimizers_are_torchs_and_go_on_from_a_state_with_their_own_settings(name):
    """Groups gain and lose keys from version to version of torch."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    other, optimizer = copy.deepcopy(model), build(name, model)
    train(model, optimizer)
    train(other, ORACLES[name]([other.weight]))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)

    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].pop("foreach")
    saved["param_groups"][0]["of_the_future"] = 1
    resumed = build(name, other, lr=0.125, weight_decay=0.25, momentum=0.75)
    load_optimizer(resumed, saved)
    torch.testing.assert_close(resumed.state_dict()["state"], saved["state"], rtol=0, atol=0)
    (group,) = resumed.param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.125, 0.25)
    assert group.get("momentum", 0.75) == 0.75
    with pytest.raises(ValueError, match="no trainable parameters"):
        build(name, model.requires_grad_(False))
