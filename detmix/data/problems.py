"""What is wrong with the images of a data set: raised at once, or gathered."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Report", "raise_problem"]

Report = Callable[[str, str, int], None]
"""Takes a kind of problem, a message that names file and value, and the image's id."""


def raise_problem(kind: str, message: str, image: int) -> None:
    """Raise every problem as ValueError."""
    raise ValueError(message)
