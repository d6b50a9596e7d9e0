"""How far a training has come, and what an evaluation of it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Evaluation", "Position", "Result"]

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
