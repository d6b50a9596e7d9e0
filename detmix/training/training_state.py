"""What a training changes as it goes, to and from plain values and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from detmix.training.meter import LossMeter
from detmix.training.optim import load_optimizer

__all__ = ["TrainingState"]


@dataclass(frozen=True)
class TrainingState:
    """What a training changes as it goes.

    Attributes:
        model: The model.
        ema: Its moving average, or None.
        optimizer: The optimizer.
        scaler: The scaler of fp16's losses, or None.
        meter: The losses since the last line of the log.
    """

    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: Any
    meter: LossMeter

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take on a state.

        Args:
            state: As `state_dict` returns it.
            device: Where the training runs.

        Raises:
            AttributeError, KeyError, RuntimeError, TypeError, ValueError: If it does not fit.
        """
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            average = state["model"] if state["ema"] is None else state["ema"]
            self.ema.module.load_state_dict(average)
            self.ema.n_averaged.fill_(state["ema_updates"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], device)
