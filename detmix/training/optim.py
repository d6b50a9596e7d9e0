"""What a step changes: parameters, by the optimizer and its rate, their average, statistics.

Those of batch norm are copied before a step, so that a forward pass that turns out to be bad can be
undone, and are shared between processes before an evaluation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detmix.training.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer of a model's trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameters")
    groups = [{"params": parameters, "initial_lr": config.lr}]
    # Fused: one kernel for all parameters instead of several for each.
    shared: Any = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "sgd":
        return SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **shared)
    return AdamW(groups, **shared)


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


def is_finite(model: nn.Module) -> bool:
    """Tell whether all parameters are finite; this waits for their device."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Return an exponential moving average of a model and its buffers."""
    if decay is None:
        return None
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def copy_statistics(model: nn.Module) -> list[Tensor]:
    """Copy what a forward pass in training mode changes: the statistics of live batch norm."""
    return [buffer.clone() for buffer in _statistics(model)]


@torch.no_grad()
def restore_statistics(model: nn.Module, saved: list[Tensor]) -> None:
    """Put back what `copy_statistics` returned."""
    for buffer, before in zip(_statistics(model), saved, strict=True):
        buffer.copy_(before)


def share_statistics(model: nn.Module) -> None:
    """Give all processes the first one's statistics."""
    # After a step each has its own, of its own images; what they evaluate must be the model saved.
    for buffer in _statistics(model):
        broadcast(buffer)


def _statistics(model: nn.Module) -> list[Tensor]:
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
