"""How far a training has come, and what an evaluation of it came to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tqdm import tqdm

__all__ = ["Evaluation", "Position", "Result", "progress_bar"]

Result = TypeVar("Result")


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: The epoch under way, from 0.
        batch: Batches of it that are done.
        step: Optimizer steps taken.
        evaluation_due: Whether the epochs done so far are still to be evaluated.
        best: The highest score so far, None before the first evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluation_due: bool = False
    best: float | None = None

    def __post_init__(self) -> None:
        for name in ("epoch", "batch", "step"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if not isinstance(self.best, float | int | None):
            raise ValueError(f"best must be a number or None, got {self.best!r}")


@dataclass(frozen=True)
class Evaluation(Generic[Result]):
    """What an evaluation came to.

    Attributes:
        result: The whole result.
        score: What the best checkpoint is chosen by, higher being better; None where undefined.
        metrics: Numbers for the log by name; None where undefined.
        summary: A line for a person.
    """

    result: Result
    score: float | None
    metrics: Mapping[str, float | None]
    summary: str


def progress_bar(total: int, start: int, *, shown: bool) -> Any:
    """Return tqdm's bar of a training, seldom refreshed where it goes into a file.

    Args:
        total: Steps of the whole training.
        start: Steps that are done already.
        shown: Whether to show it.
    """
    return tqdm(
        total=total,
        initial=start,
        desc="training",
        unit="step",
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
