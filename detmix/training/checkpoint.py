"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch

from detmix.pretrained.read_state import CHECKPOINT_KEYS, read_torch_file

__all__ = [
    "FORMAT",
    "LAST",
    "PREVIOUS",
    "check_classes",
    "check_content",
    "load_checkpoint",
    "read_whole",
    "save_checkpoint",
    "temporary_path",
    "write_atomically",
    "write_errors",
]

# Raised when what a checkpoint holds changes its meaning.
FORMAT = 1
# Options of earlier versions, by section and name, with the values that mean what is done now.
_GONE = {("backbone", "reduced_tail"): (None, True)}
LAST, PREVIOUS = "last.pt", "previous.pt"
"""The names of a run's newest checkpoint and of the one before it."""


def temporary_path(path: Path) -> Path:
    """Return where `write_atomically` writes a file first; a killed process may leave it there."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Have an `OSError` name the file that could not be written; that of a full disk does not."""
    try:
        yield
    except OSError as error:
        message = f"{path} could not be written: {error.strerror or error}"
        raise OSError(error.errno, message) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], None], *, keep: Path | None = None
) -> None:
    """Write a file under a temporary name and rename it, so that it is never half there.

    The content is on the disk before the file gets its name: not even a power cut leaves half
    of it.

    Args:
        path: The file; one that exists is replaced.
        write: Writes the content to an open binary file.
        keep: What the file that exists is renamed to, if anything. For a moment there is only
            that one.

    Raises:
        OSError: If the file cannot be written, as on a full disk; what was there is kept.
    """
    temporary = temporary_path(path)
    try:
        with write_errors(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk too, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    """Read a file of `save_checkpoint`, whatever is in it, if its checksums are right.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken or could run code, as `load_checkpoint`.
    """
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
