"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch

from detmix.detectors.weight_file import CHECKPOINT_KEYS, read_torch_file

__all__ = ["FORMAT", "check_classes", "load_checkpoint", "save_checkpoint", "write_atomically"]

# Raised when what a checkpoint holds changes its meaning.
FORMAT = 1


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name and rename it, so that it is never half there.

    Args:
        path: The file; one that exists is replaced.
        write: Writes the content to an open binary file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint that ``torch.load(path, weights_only=True)`` reads.

    Args:
        path: The file; one that exists is replaced once the new one is complete.
        state: Tensors and plain values: ``model``, ``config``, ``classes`` and more.
    """
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


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
    state = read_torch_file(path)
    missing = CHECKPOINT_KEYS - state.keys() if isinstance(state, dict) else CHECKPOINT_KEYS
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of detmix: it lacks {', '.join(sorted(missing))}"
        )
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state['format']}, this version of detmix reads up to "
            f"{FORMAT}"
        )
    return dict(state)
