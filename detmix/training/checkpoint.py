"""What is saved of a training: written whole or not at all, read without running code.

A run goes on from its newest whole checkpoint, if that fits what it is to do now. Format 2 holds

    format, versions, config, classes    what made it; the configuration as plain values
    normalization                        image_mean, image_std, norm_eps: what the model normalises
                                         with, which is no part of a state dict
    model, ema, ema_updates              state dicts
    optimizer, scaler, meter             what else a training changes
    position, steps_per_epoch, ...       how far it has come, in which epochs of which images

Format 1 has the normalization in its configuration.
"""

from __future__ import annotations

import hashlib
import logging
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import nn
from torch.optim.swa_utils import AveragedModel

from detmix.files import write_atomically
from detmix.pretrained.read_state import model_state, section, take_normalization
from detmix.pretrained.torch_file import read_torch_file
from detmix.training.config import flat_options
from detmix.training.optim import load_optimizer
from detmix.training.progress import LossMeter, Position

# Raised when what a checkpoint holds changes its meaning.
FORMAT = 2
LAST, PREVIOUS = "last.pt", "previous.pt"
"""The names of a run's newest checkpoint and of the one before it."""
Normalization = Mapping[str, Any]
"""What a model normalises with; None is torchvision's own."""
_log = logging.getLogger(__name__)
# Options that a run goes on with as they were.
_FIXED = ("seed", "data.format", "data.test", "data.test_limit")
_SIZES = ("num_images", "batch_size", "steps_per_epoch")  # the batch is of all processes


class _Content(BaseModel, strict=True):
    format: Annotated[int, Field(le=FORMAT)]
    model: dict[Any, Any]
    config: dict[str, Any]
    classes: list[str]
    normalization: dict[str, Any] = {}


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


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Load a checkpoint of `save_checkpoint` onto the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, holds more than tensors and plain values (such a file
            could run code), or is no checkpoint of detmix or one of a newer format.
    """
    return _check_content(path, read_torch_file(path, checksums=True))


def _check_content(path: Path | str, content: Any) -> dict[str, Any]:
    """Return what was read from a file as the present format has it, if it is a checkpoint."""
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}, got {reprlib.repr(item['input'])}"
            for item in error.errors()
        )
        raise ValueError(
            f"{path} is not a checkpoint that this version of detmix reads: {problems}"
        ) from error
    state: dict[str, Any] = {"normalization": {}, **content}
    update_options(state["config"])
    if state["format"] == 1:
        state["normalization"] = take_normalization(state["config"])
    return state


def update_options(config: dict[str, Any]) -> None:
    """Turn a run's options of an earlier version into those of the present one."""
    section(config, "data", "coco").pop("backend", None)  # an option once
    schedule, backbone = section(config, "schedule"), section(config, "backbone")
    if schedule.get("name") == "multistep" and not schedule.get("milestones"):
        schedule["name"] = "constant"  # which it was, before it was refused
    if backbone.get("reduced_tail") is not False:  # an option too, of which False is gone
        backbone.pop("reduced_tail", None)


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
            self.ema.module.load_state_dict(model_state(state))
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


def load_newest(run_dir: Path) -> Newest | None:
    """Load the newest checkpoint of a run that is whole."""
    problems = []
    for path in (run_dir / LAST, run_dir / PREVIOUS):
        try:
            content = read_torch_file(path, checksums=True)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            continue
        return Newest(path, _check_content(path, content), problems[0] if problems else None)
    if not any((run_dir / name).exists() for name in (LAST, PREVIOUS)):
        return None
    raise ValueError(f"{run_dir} cannot be resumed: {'; '.join(problems)}")


def restore(
    newest: Newest, present: Mapping[str, Any], training: TrainingState, device: torch.device
) -> Position:
    """Take on a checkpoint that fits what is ``present``; return how far its training had come."""
    path, state, _ = newest
    for kind in ("detector", "model"):
        if kind in present["config"] and kind not in state["config"]:
            raise ValueError(f"{path} is of another kind of training: it has no section {kind}")
    before, now = _facts(state), _facts(present)
    for name, value in now.items():
        if name in before and before[name] != value:
            raise ValueError(
                f"{path} is of a training with {name} = {before[name]}, this one has {value}: it "
                "must stay the same; another run_dir starts anew"
            )
    try:
        training.load_state_dict(state, device)
        return Position(**state["position"])
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: only a last.pt can be resumed from") from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the configuration: {error}") from error


def _facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must stay the same, or a place in an epoch and a score would mean others."""
    normalization, options = state["normalization"], flat_options(state["config"])
    return {
        "the number of classes": len(state["classes"]),
        **{f"class {number}": name for number, name in enumerate(state["classes"])},
        **{name: value for name, value in normalization.items() if value is not None},
        **{name: state[name] for name in _SIZES if name in state},
        **{f"the digest of the {name} images": v for name, v in state.get("images", {}).items()},
        **{name: options[name] for name in _FIXED if name in options},
    }


def describe(newest: Newest) -> str:
    """Return the name of a checkpoint, where its training was and a digest of its weights."""
    digest = hashlib.blake2b(digest_size=4)
    for name, tensor in newest.state["model"].items():
        digest.update(str(name).encode())
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return f"{newest.path.name} at {newest.state.get('position')}, digest {digest.hexdigest()}"


def digest_of(names: Sequence[str]) -> str:
    """Return a digest of images' names in their order."""
    text = "\n".join(names).encode(errors="surrogatepass")  # a file's name may be no valid text
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def tell(newest: Newest, config: Mapping[str, Any]) -> None:
    """Log where a run goes on, and which of its options have changed since."""
    path, state, problem = newest
    if problem is not None:
        _log.warning("%s; the checkpoint before it is used", problem)
    position = Position(**state["position"])
    _log.info("going on from %s, after epoch %d, step %d", path, position.epoch, position.batch)
    before, now = flat_options(state["config"]), flat_options(config)
    for name in sorted(before.keys() & now.keys() - {"run_dir", "resume"}):
        if before[name] != now[name]:
            _log.warning("%s was %s, it is now %s", name, before[name], now[name])
