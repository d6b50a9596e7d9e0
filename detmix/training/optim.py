"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from detmix.training.config import OptimConfig, ScheduleConfig

__all__ = ["build_optimizer", "learning_rate_factor", "load_optimizer", "set_learning_rate"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer of a model's trainable parameters.

    Args:
        model: The model, on its device already.
        config: The optimizer's settings.

    Raises:
        ValueError: If nothing of the model is trainable.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    # One kernel for all parameters instead of several for each.
    fused = all(p.device.type == "cuda" for p in parameters)
    if config.name == "sgd":
        return SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Go on from an optimizer's saved state, with the settings of the present one.

    Args:
        optimizer: The optimizer.
        state: The ``state_dict`` of one of the same kind and for the same parameters.

    Raises:
        ValueError: If it is of another kind or for other parameters.
    """
    # The rate is none: it is a function of the step.
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    kinds = [group.keys() for group in optimizer.param_groups]
    if [group.keys() for group in state["param_groups"]] != kinds:
        raise ValueError("the optimizer is of another kind")
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def learning_rate_factor(
    step: int, config: ScheduleConfig, *, steps_per_epoch: int, num_epochs: int
) -> float:
    """Return what the learning rate is multiplied by at a step.

    A function of the step alone has no state to save, and nothing to get out of order when a
    run is resumed.

    Args:
        step: Optimizer steps taken before this one.
        config: The schedule.
        steps_per_epoch: Steps of an epoch.
        num_epochs: Epochs of the training.

    Returns:
        A factor in [0, 1]: linear warm-up times decay.
    """
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


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
