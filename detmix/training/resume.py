"""What a run goes on from: its newest whole checkpoint, if that fits what it is to do now."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detmix.training.checkpoint import LAST, PREVIOUS, check_classes, check_content, read_whole
from detmix.training.options import changed_options
from detmix.training.progress import Position

__all__ = ["Newest", "check_fits", "describe", "digests_of", "load_newest", "tell"]

_log = logging.getLogger(__name__)
# A run does not go on with other values of these: where it is in an epoch, or its best score so
# far, would mean something else.
_FIXED = (
    "seed",
    "data.format",
    "data.test",
    "data.test_limit",
    "data.val",
)
# The sections by which kinds of training are told apart.
_KINDS = ("detector", "model")
# What else must stay the same, so that a place in an epoch is the same.
_SIZES = {
    "num_images": "images",
    "batch_size": "images in a batch of all processes",
    "steps_per_epoch": "steps in an epoch",
}


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


def load_newest(run_dir: Path, config: Mapping[str, Any]) -> Newest | None:
    """Load the newest checkpoint of a run that is whole.

    Args:
        run_dir: The run's folder, with the files `LAST` and `PREVIOUS`, or without.
        config: The run's configuration, as plain values.

    Returns:
        The last checkpoint; the one before it if the last is broken, or missing because the run
        was killed while it gave them their names; None of a run without checkpoints.

    Raises:
        ValueError: If none is whole; as `load_checkpoint` for one that is not of this detmix; if
            it is of another kind of training.
    """
    problems = []
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        try:
            state = read_whole(path)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            continue
        _check_kind(path, check_content(path, state)["config"], config)
        return Newest(path, state, problems[0] if problems else None)
    if not any((run_dir / name).exists() for name in (LAST, PREVIOUS)):
        return None
    raise ValueError(f"{run_dir} cannot be resumed: {'; '.join(problems)}")


def _check_kind(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in (name for name, value in now.items() if isinstance(value, dict)):
        # One that is None may be a section as well; an earlier version may not know one.
        missing = "" if name in _KINDS else None
        if not isinstance(before.get(name, missing), dict | None):
            raise ValueError(f"{path} is of another kind of training: it has no section {name}")


def check_fits(newest: Newest, present: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a run cannot go on from a checkpoint as it is configured now.

    Args:
        newest: The checkpoint.
        present: What a checkpoint of the run would say now.
    """
    path, state, _ = newest
    check_classes(path, state["classes"], present["classes"])
    for key, what in _SIZES.items():
        before, now = state.get(key, present[key]), present[key]
        if before != now:
            raise ValueError(
                f"{path} is of a training with {before} {what}, this one has {now}: the training "
                "images and the batch of all processes must stay the same"
            )
    before, now = state.get("images", present["images"]), present["images"]
    if before != now:
        other = [
            name for name in now if not isinstance(before, dict) or before.get(name) != now[name]
        ]
        raise ValueError(
            f"{path} is of a training with other {' and '.join(other)} images, or with the same in "
            "another order"
        )
    for name, (before, now) in changed_options(state["config"], present["config"]).items():
        if name in _FIXED:
            raise ValueError(f"{path} is of a training with {name}={before}, this one has {now}")


def describe(newest: Newest) -> str:
    """Return the name of a checkpoint, where its training was and a digest of its weights."""
    digest = hashlib.blake2b(digest_size=4)
    for name, tensor in newest.state["model"].items():
        digest.update(str(name).encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"{newest.path.name} at {newest.state.get('position')}, digest {digest.hexdigest()}"


def digests_of(images: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return a digest of each subset's images' names in their order."""
    texts = {  # a file's name may be no valid text
        subset: "\n".join(names).encode(errors="surrogatepass") for subset, names in images.items()
    }
    return {
        subset: hashlib.blake2b(text, digest_size=16).hexdigest() for subset, text in texts.items()
    }


def tell(newest: Newest, config: Mapping[str, Any]) -> None:
    """Log where a run goes on, and which of its options have changed since.

    Args:
        newest: The checkpoint.
        config: The run's configuration now, as plain values.
    """
    path, state, problem = newest
    if problem is not None:
        _log.warning("%s; the checkpoint before it is used", problem)
    position = Position(**state["position"])
    _log.info("going on from %s, step %d of epoch %d", path, position.batch, position.epoch)
    for name, (before, now) in changed_options(state["config"], config).items():
        _log.warning("%s has changed: it was %s, it is now %s", name, before, now)
