"""Optimizers and the learning rate, against torch's own schedulers."""

from __future__ import annotations

import math

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
    scale_learning_rate,
)

STEPS_PER_EPOCH, EPOCHS = 7, 5


def torch_factors(schedule):
    """Return what torch's schedulers multiply a rate of 1 by, step by step."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = STEPS_PER_EPOCH * EPOCHS
    decay = {
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=steps),
        "multistep": lambda: MultiStepLR(
            optimizer, [m * STEPS_PER_EPOCH for m in schedule.milestones], schedule.gamma
        ),
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
    }
    warmup = LinearLR(optimizer, schedule.warmup_start, total_iters=schedule.warmup_steps)
    chained = ChainedScheduler([warmup, decay[schedule.name]()], optimizer=optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        chained.step()
    return factors


class TestLearningRate:
    @pytest.mark.parametrize("name", ["cosine", "multistep", "constant"])
    @pytest.mark.parametrize(("warmup", "start"), [(1, 1.0), (5, 0.001), (12, 0.25)])
    def test_is_torchs(self, name, warmup, start):
        schedule = ScheduleConfig(name, warmup, start, milestones=(2, 4), gamma=0.3)
        factors = [
            learning_rate_factor(step, schedule, steps_per_epoch=STEPS_PER_EPOCH, num_epochs=EPOCHS)
            for step in range(STEPS_PER_EPOCH * EPOCHS)
        ]
        assert factors == pytest.approx(torch_factors(schedule), rel=1e-9)

    def test_without_warmup_begins_at_the_full_rate(self):
        schedule = ScheduleConfig(warmup_steps=0)
        assert learning_rate_factor(0, schedule, steps_per_epoch=3, num_epochs=2) == 1.0

    def test_cosine_ends_at_zero_and_stays(self):
        schedule = ScheduleConfig(warmup_steps=0)
        for step in (6, 7, 100):
            factor = learning_rate_factor(step, schedule, steps_per_epoch=3, num_epochs=2)
            assert factor == pytest.approx(0.0, abs=1e-15)

    def test_multistep_changes_at_epochs(self):
        schedule = ScheduleConfig("multistep", 0, milestones=(1, 3), gamma=0.1)
        factors = [
            learning_rate_factor(step, schedule, steps_per_epoch=2, num_epochs=4)
            for step in range(8)
        ]
        assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])

    def test_set_in_all_groups(self):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "initial_lr": lr} for lr in (1.0, 0.5)]
        optimizer = SGD(groups, lr=1.0)
        for factor in (0.0, 0.25):
            scale_learning_rate(optimizer, factor)
            assert [group["lr"] for group in optimizer.param_groups] == [factor, factor / 2]


class TestBuildOptimizer:
    def test_sgd_steps_as_torchs(self):
        config = OptimConfig("sgd", lr=0.1, momentum=0.8, weight_decay=0.01)
        self.assert_same_steps(config, lambda p: SGD(p, 0.1, 0.8, weight_decay=0.01))

    def test_adamw_steps_as_torchs(self):
        config = OptimConfig("adamw", lr=0.1, momentum=0.8, weight_decay=0.01)
        self.assert_same_steps(config, lambda p: AdamW(p, 0.1, weight_decay=0.01))

    def assert_same_steps(self, config, oracle):
        models = [nn.Linear(3, 2), nn.Linear(3, 2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [build_optimizer(models[0], config), oracle(models[1].parameters())]
        assert type(optimizers[0]) is type(optimizers[1])
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

    def test_nothing_trainable(self):
        model = nn.Linear(3, 2).requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameters"):
            build_optimizer(model, OptimConfig())


class TestLoadOptimizer:
    @staticmethod
    def trained(config, size=3):
        model = nn.Linear(size, 2)
        optimizer = build_optimizer(model, config)
        model(torch.ones(1, size)).sum().backward()
        optimizer.step()
        return optimizer

    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_takes_the_state_and_keeps_the_settings(self, name):
        saved = self.trained(OptimConfig(name, weight_decay=0.5, momentum=0.5)).state_dict()
        optimizer = self.trained(OptimConfig(name, weight_decay=0.25, momentum=0.75))
        load_optimizer(optimizer, saved)
        for key, state in saved["state"].items():
            for part, value in state.items():
                assert torch.equal(optimizer.state_dict()["state"][key][part], value)
        (group,) = optimizer.param_groups
        assert group["weight_decay"] == 0.25
        assert group.get("momentum", 0.75) == 0.75

    @pytest.mark.parametrize(("mine", "other"), [("sgd", "adamw"), ("adamw", "sgd")])
    def test_another_kind(self, mine, other):
        saved = self.trained(OptimConfig(other)).state_dict()
        with pytest.raises(ValueError, match="of another kind"):
            load_optimizer(self.trained(OptimConfig(mine)), saved)

    def test_settings_of_another_version_of_torch(self):
        """AdamW's groups have gained keys over time."""
        saved = self.trained(OptimConfig("adamw")).state_dict()
        saved["param_groups"][0].pop("foreach")
        saved["param_groups"][0]["of_the_future"] = 1
        optimizer = self.trained(OptimConfig("adamw", lr=0.125))
        load_optimizer(optimizer, saved)
        assert optimizer.param_groups[0]["initial_lr"] == 0.125

    def test_other_parameters(self):
        model = nn.Linear(3, 2, bias=False)
        saved = self.trained(OptimConfig()).state_dict()
        with pytest.raises(ValueError, match="parameter group"):
            load_optimizer(build_optimizer(model, OptimConfig()), saved)


def test_settings_that_cannot_be():
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"OptimConfig\nlr\n"):
            OptimConfig(lr=value)
    for value in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"ScheduleConfig\ngamma\n"):
            ScheduleConfig(gamma=value)
