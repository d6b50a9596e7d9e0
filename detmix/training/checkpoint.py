"""Checkpoints: written whole or not at all, read without running code, and going on from one.

A run goes on from its newest whole checkpoint, if that fits what it is to do now.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from detmix.files import write_atomically
from detmix.pretrained.read_state import CHECKPOINT_KEYS, read_torch_file
from detmix.training.config import changed_options
from detmix.training.optim import load_optimizer
from detmix.training.progress import LossMeter, Position

# Raised when what a checkpoint holds changes its meaning.
FORMAT = 1
# Options of earlier versions, by section and name, with the values that mean what is done now.
_GONE = {("backbone", "reduced_tail"): (None, True)}
LAST, PREVIOUS = "last.pt", "previous.pt"
"""The names of a run's newest checkpoint and of the one before it."""
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


def save_checkpoint(path: Path, state: dict[str, Any], *, keep: Path | None = None) -> None:
    """Save a checkpoint that ``torch.load(path, weights_only=True)`` reads.

    Args:
        path: The file; one that exists is replaced once the new one is complete.
        state: Tensors and plain values: ``model``, ``config``, ``classes`` and more.
        keep: What the file that exists is renamed to, if anything.

    Raises:
        OSError: If the file cannot be written, as on a full disk; what was there is kept.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch hides the system's error behind its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, write, keep=keep)


def check_classes(path: Path, saved: Sequence[str], classes: Sequence[str]) -> None:
    """Raise `ValueError` naming the first class in which a checkpoint differs from a data set."""
    for number, (before, now) in enumerate(zip_longest(saved, classes)):
        if before != now:
            raise ValueError(
                f"{path} was trained on other classes: class {number} was {before}, is now {now}"
            )


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Load a checkpoint of `save_checkpoint` onto the CPU.

    Args:
        path: The file.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, holds more than tensors and plain values (such a file
            could run code), or is no checkpoint of detmix or one of a newer format.
    """
    return check_content(path, read_whole(path))


def read_whole(path: Path | str) -> Any:
    """Read a file of `save_checkpoint`, whatever is in it, if its checksums are right."""
    return read_torch_file(path, checksums=True)


def check_content(path: Path | str, state: Any) -> dict[str, Any]:
    """Return what was read from a file, or raise `ValueError` unless it is such a checkpoint."""
    missing = CHECKPOINT_KEYS - state.keys() if isinstance(state, dict) else CHECKPOINT_KEYS
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of detmix: it lacks {', '.join(sorted(missing))}"
        )
    for key, kind in (("config", dict), ("classes", list), ("model", dict)):
        if not isinstance(state[key], kind):
            raise ValueError(
                f"{path} is not a checkpoint of detmix: expected {key} to be a {kind.__name__}, "
                f"got {type(state[key]).__name__}"
            )
    if not all(isinstance(name, str) for name in state["classes"]):
        raise ValueError(f"{path} is not a checkpoint of detmix: expected strings in classes")
    found = state["format"]
    if not isinstance(found, int) or found > FORMAT:
        found = found if isinstance(found, int | str | None) else type(found).__name__
        raise ValueError(
            f"{path} has checkpoint format {found}, this version of detmix reads up to {FORMAT}"
        )
    return {**state, "config": _without_gone(path, state["config"])}


def _without_gone(path: Path | str, config: dict[str, Any]) -> dict[str, Any]:
    """Leave out options of earlier versions, but refuse what is not done any more."""
    config = {
        key: dict(value) if isinstance(value, dict) else value for key, value in config.items()
    }
    for (section, name), meant in _GONE.items():
        options = config.get(section)
        value = options.pop(name, meant[0]) if isinstance(options, dict) else meant[0]
        if value not in meant:
            raise ValueError(
                f"{path} is of an earlier version, with {section}.{name}={value}: this one has no "
                f"such option, and does what {meant[-1]} meant"
            )
    return config


@dataclass(frozen=True)
class TrainingState:
    """What a training changes as it goes."""

    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: Any
    meter: LossMeter

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take on a state."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            average = state["model"] if state["ema"] is None else state["ema"]
            self.ema.module.load_state_dict(average)
            self.ema.n_averaged.fill_(state["ema_updates"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], device)


class Newest(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    state: dict[str, Any]
    problem: str | None


def load_newest(run_dir: Path, config: Mapping[str, Any]) -> Newest | None:
    """Load the newest checkpoint of a run that is whole."""
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
    """Raise `ValueError` if a run cannot go on from a checkpoint as it is configured now."""
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
    """Log where a run goes on, and which of its options have changed since."""
    path, state, problem = newest
    if problem is not None:
        _log.warning("%s; the checkpoint before it is used", problem)
    position = Position(**state["position"])
    _log.info("going on from %s, step %d of epoch %d", path, position.batch, position.epoch)
    for name, (before, now) in changed_options(state["config"], config).items():
        _log.warning("%s has changed: it was %s, it is now %s", name, before, now)
