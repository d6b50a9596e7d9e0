"""Means of losses and the speed between two lines of a log."""

from __future__ import annotations

import time

from torch import Tensor

__all__ = ["LossMeter"]


class LossMeter:
    """Sums up losses on their device, and counts images."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._start = time.perf_counter()

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
        """Return the images per second since the meter was made."""
        return self._images / (time.perf_counter() - self._start)
