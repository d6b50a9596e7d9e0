"""Options of configurations that are plain values, as checkpoints and ``config.yaml`` have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["changed_options", "flat_options"]

# Options that say where a run lies and not what it does.
_PLACES = ("run_dir", "resume")
# A mapping with whatever keys somebody gives it: compared as a whole.
_FREE = "detector.options"


def flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted name, without those that say where a run lies.

    Args:
        config: A configuration, or a section of one.
        prefix: Put before the names.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_options(value, f"{prefix}{key}.")
        elif key not in _PLACES:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_options(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return the options that two configurations set differently.

    Args:
        before: A configuration.
        now: Another one, perhaps of another version.
        prefix: Put before the names.

    Returns:
        The two values by dotted name, for options that both have; where a run lies is none.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in before.keys() & now.keys() - set(_PLACES):
        values = before[name], now[name]
        is_section = f"{prefix}{name}" != _FREE
        if is_section and all(isinstance(value, Mapping) for value in values):
            changed |= changed_options(*values, prefix=f"{prefix}{name}.")
        elif values[0] != values[1]:
            changed[f"{prefix}{name}"] = values
    return dict(sorted(changed.items()))
