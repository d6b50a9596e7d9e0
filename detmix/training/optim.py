"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from detmix.training.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer of a model's trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    groups = [{"params": parameters, "initial_lr": config.lr}]
    # One kernel for all parameters instead of several for each.
    fused = all(p.device.type == "cuda" for p in parameters)
    if config.name == "sgd":
        return SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Go on from an optimizer's saved state, with the settings of the present one."""
    present, saved = optimizer.param_groups, state["param_groups"]
    if [_kind(group) for group in saved] != [_kind(group) for group in present]:
        raise ValueError("the optimizer is of another kind")
    # Before loading: torch places the state as the settings say, "fused" among them.
    groups = [
        {**theirs, **own, "params": theirs["params"], "lr": theirs["lr"]}
        for theirs, own in zip(saved, present, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def _kind(group: dict[str, Any]) -> set[str]:
    """Return what tells optimizers apart; other settings come and go with torch's versions."""
    return {"momentum", "betas"} & group.keys()


def learning_rate_factor(
    step: int, config: ScheduleConfig, *, steps_per_epoch: int, num_epochs: int
) -> float:
    """Return what the learning rate is multiplied by at a step."""
    # A function of the step alone has no state to save, and nothing to get out of order on
    # resuming.
    warmup = 1.0
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        warmup = config.warmup_start + (1.0 - config.warmup_start) * share
    if config.name == "cosine":
        progress = step / max(1, steps_per_epoch * num_epochs)
        return warmup * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if config.name == "multistep":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= milestone for milestone in config.milestones)
        return warmup * float(config.gamma**passed)
    return warmup


def scale_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set each group's learning rate to ``factor`` times its ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
