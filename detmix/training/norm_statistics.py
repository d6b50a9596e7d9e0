"""What of a model changes in training beside its parameters: batch norm's statistics, an average.

The statistics are copied before a step, so that a forward pass that turns out to be bad can be
undone, and are shared between processes before an evaluation.
"""

from __future__ import annotations

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


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
