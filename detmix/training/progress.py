"""How far a training has come, its losses between two lines of the log, its evaluations."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pydantic
import torch
from pydantic import NonNegativeInt
from torch import Tensor
from tqdm import tqdm

Result = TypeVar("Result")


@pydantic.dataclasses.dataclass
class Position:
    """How far a training has come."""

    epoch: NonNegativeInt = 0
    batch: NonNegativeInt = 0  # steps of this epoch
    step: NonNegativeInt = 0
    evaluation_due: bool = False
    best: float | None = None
    since_best: NonNegativeInt = 0  # evaluations


@dataclass(frozen=True)
class Evaluation(Generic[Result]):
    """What an evaluation came to."""

    result: Result
    score: float | None
    metrics: Mapping[str, float | None]
    summary: str


def progress_bar(total: int, start: int, *, shown: bool) -> Any:
    """Return tqdm's bar of a training, seldom refreshed where it goes into a file."""
    return tqdm(
        total=total,
        initial=start,
        desc="training",
        unit="step",
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )


class LossMeter:
    """Sums up losses on their device, and counts images."""

    # The sums can be saved: a run resumed between two lines of the log writes the same.

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._start = time.perf_counter()

    def start_clock(self) -> None:
        """Measure the speed from here, as after an evaluation."""
        self._images, self._start = 0, time.perf_counter()

    def reset(self) -> None:
        """Forget the losses so far, as after a line of the log."""
        self._sums, self._steps = {}, 0
        self.start_clock()

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
