"""What a run goes on from: its newest whole checkpoint, if that fits what it is to do now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detmix.training.checkpoint import LAST, PREVIOUS, check_classes, check_content, read_whole

__all__ = ["PLACES", "Newest", "changed_options", "check_fits", "load_newest", "tell"]

_log = logging.getLogger(__name__)
PLACES = ("run_dir", "resume")
"""Options that say where a run lies and not what it does."""
# A mapping with whatever keys somebody gives it: compared as a whole.
_FREE = "detector.options"
# A run does not go on with other values of these: where it is in an epoch, or its best score so
# far, would mean something else.
_FIXED = ("seed", "data.format", "data.test", "data.test_limit", "data.val")
# What else must stay the same, so that a place in an epoch is the same.
_SIZES = {"steps_per_epoch": "steps in an epoch", "num_images": "images"}


class Newest(NamedTuple):
    """The checkpoint that a run goes on from.

    Attributes:
        path: Its file.
        state: What it holds.
        problem: Why the last checkpoint was passed over for the one before it; None if it was
            not.
    """

    path: Path
    state: dict[str, Any]
    problem: str | None


def load_newest(run_dir: Path) -> Newest | None:
    """Load the newest checkpoint of a run that is whole.

    Args:
        run_dir: The run's folder, with the files `LAST` and `PREVIOUS`, or without.

    Returns:
        The last checkpoint; the one before it if the last is broken, or missing because the run
        was killed while it gave them their names; None of a run without checkpoints.

    Raises:
        ValueError: If none is whole; as `load_checkpoint` for one that is not of this detmix.
    """
    problems = []
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        try:
            state = read_whole(path)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            continue
        return Newest(path, check_content(path, state), problems[0] if problems else None)
    if not any((run_dir / name).exists() for name in (LAST, PREVIOUS)):
        return None
    raise ValueError(f"{run_dir} cannot be resumed: {'; '.join(problems)}")


def changed_options(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return the options that two configurations, as plain values, set differently.

    Args:
        before: A configuration.
        now: Another one.
        prefix: Put before the names.

    Returns:
        The two values by dotted name, for options that both have; the run's folder is none.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for name in before.keys() & now.keys() - set(PLACES):
        values = before[name], now[name]
        is_section = f"{prefix}{name}" != _FREE
        if is_section and all(isinstance(value, Mapping) for value in values):
            changed |= changed_options(*values, prefix=f"{prefix}{name}.")
        elif values[0] != values[1]:
            changed[f"{prefix}{name}"] = values
    return dict(sorted(changed.items()))


def check_fits(newest: Newest, present: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a run cannot go on from a checkpoint as it is configured now.

    Args:
        newest: The checkpoint.
        present: ``config``, ``classes``, ``steps_per_epoch``, ``num_images`` and ``images`` of the
            run.
    """
    path, state, _ = newest
    check_classes(path, state["classes"], present["classes"])
    for key, what in _SIZES.items():
        before, now = state.get(key, present[key]), present[key]
        if before != now:
            raise ValueError(
                f"{path} is of a training with {before} {what}, this one has {now}: the training "
                "images, the batch size and the number of processes must stay the same"
            )
    if state.get("images", present["images"]) != present["images"]:
        raise ValueError(
            f"{path} is of a training on as many, but other images, or the same in another order"
        )
    for name, (before, now) in changed_options(state["config"], present["config"]).items():
        if name in _FIXED:
            raise ValueError(f"{path} is of a training with {name}={before}, this one has {now}")


def tell(newest: Newest, config: Mapping[str, Any]) -> None:
    """Log where a run goes on, and which of its options have changed since.

    Args:
        newest: The checkpoint.
        config: The run's configuration now, as plain values.
    """
    path, state, problem = newest
    if problem is not None:
        _log.warning("%s; the checkpoint before it is used", problem)
    position = state["position"]
    _log.info("going on from %s, step %d of epoch %d", path, position["batch"], position["epoch"])
    for name, (before, now) in changed_options(state["config"], config).items():
        _log.warning("%s has changed: it was %s, it is now %s", name, before, now)
