"""What can be wrong with a data set: raised at once, or gathered."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Report", "raise_problem"]


class Report(Protocol):
    """Takes problems where they are found."""

    def __call__(self, kind: str, message: str, image: int | None = None) -> None:
        """Take a problem.

        Args:
            kind: What sort of problem, such as ``"unusable annotation"``.
            message: Names the file, the value and what was expected.
            image: COCO: the id of the image that it is about.
        """


def raise_problem(kind: str, message: str, image: int | None = None) -> None:
    """Raise every problem as ValueError."""
    raise ValueError(message)
