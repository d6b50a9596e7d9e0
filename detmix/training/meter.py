"""Means of losses and the speed between two lines of a log."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossMeter"]


class LossMeter:
    """Sums up losses on their device, and counts images.

    The sums can be saved, so that a run resumed between two lines of the log writes the same.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._start = time.perf_counter()

    def start(self, *, afresh: bool) -> None:
        """Start the clock, and forget the losses so far if asked to."""
        if afresh:
            self._sums, self._steps = {}, 0
        self._images, self._start = 0, time.perf_counter()

    def update(self, losses: dict[str, Tensor], num_images: int) -> None:
        """Add the scalar losses of a step over ``num_images`` images."""
        for name, loss in losses.items():
            self._sums[name] = self._sums[name] + loss if name in self._sums else loss
        self._steps += 1
        self._images += num_images

    def means(self) -> dict[str, float]:
        """Return the mean of each loss over the steps."""
        return {name: float(total) / self._steps for name, total in self._sums.items()}

    def images_per_second(self) -> float:
        """Return the images per second since the clock was started."""
        return self._images / (time.perf_counter() - self._start)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses summed up so far; the speed is not saved."""
        return {"sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned, with sums on ``device``."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._steps = state["steps"]
