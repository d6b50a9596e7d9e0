"""Checks that the typed configurations share; their errors name the field as it is configured."""

from __future__ import annotations

from typing import Any

__all__ = ["check_at_least", "check_in_range"]


def check_at_least(config: Any, section: str, **minimums: int) -> None:
    """Raise `ValueError` if a field named in ``minimums`` is smaller than its value there."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value < minimum:
            full = f"{section}.{name}" if section else name
            raise ValueError(f"{full} must be at least {minimum}, got {value}")


def check_in_range(config: Any, section: str, **ranges: tuple[float, float]) -> None:
    """Raise `ValueError` if a field named in ``ranges`` is not within its range there."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:  # false of NaN too
            full = f"{section}.{name}" if section else name
            raise ValueError(f"{full} must be in [{low}, {high}], got {value}")
