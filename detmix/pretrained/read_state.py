"""Reading files of weights, whoever wrote them, without running code.

Understood are plain state dicts, also as safetensors, checkpoints that hold one under a usual name,
such as the official CutMix repository's (github.com/clovaai/CutMix-PyTorch, train.py), and the
checkpoints of detmix.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Where checkpoints keep their state dict.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
# What DataParallel, DistributedDataParallel and torch.compile put before every key.
_PREFIXES = ("module.", "_orig_mod.")
# How torch names what a pickle would import.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# How an archive of torch.save begins; older formats have no entries and no checksums.
_ARCHIVE = b"PK\x03\x04"
# The bit of an entry's attributes that makes a folder of it.
_FOLDER = 0x10
CHECKPOINT_KEYS = frozenset({"format", "model", "config", "classes"})
"""What every checkpoint of detmix holds."""
STATISTICS = ("image_mean", "image_std")
"""What images are normalised with, by torchvision's names."""


@dataclass(frozen=True)
class PretrainedState:
    """Tensors that were trained before, and what is known of their training."""

    state: Mapping[str, Tensor]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    norm_eps: float | None = None
    network: Mapping[str, Any] = field(default_factory=dict)  # a classifier's name and stem
    source: str = ""


def read_torch_file(path: Path | str, what: str = "checkpoint", *, checksums: bool = False) -> Any:
    """Read a file of ``torch.save`` onto the CPU, in the present or the old format."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}")
    with open(path, "rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
        problem = _find_problem(file, what, checksums) if is_archive else None
    if problem is not None:
        raise ValueError(f"{path} {problem}")
    try:
        # A Namespace is plain values by name: torchvision's training scripts save their arguments.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's whole message would advise to run the file's code.
        found = _GLOBAL.search(str(error))
        refers = f"it refers to {found[1]}" if found else "it is no file of torch.save"
        raise ValueError(
            f"{path} is not a {what} that loads with weights_only=True: {refers}; what is no "
            "tensor or plain value could run code, so save a state dict alone"
        ) from error
    except Exception as error:  # flipped bytes have torch raise nearly anything
        raise ValueError(f"{path} is broken: {type(error).__name__}: {error}") from error


def _find_problem(file: BinaryIO, what: str, checksums: bool) -> str | None:
    """Say what is wrong with an archive of torch, None if nothing is."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if any(part.filename.endswith("/constants.pkl") for part in parts):
                return f"is a TorchScript archive, expected a {what}"
            for part in parts:
                # Torch compresses nothing: what is compressed may be a thousand times as large,
                # and what it takes for shorter, or for a folder, it would fill with whatever lies
                # in memory.
                if part.compress_size != part.file_size or part.external_attr & _FOLDER:
                    return f"is broken: the entry of {part.filename} in it is wrong"
            # Entries may have the same bytes for their content.
            if sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
                return "is broken: its entries are larger than the file"
            name = archive.testzip() if checksums else None
    except Exception as error:  # flipped bytes have it raise nearly anything
        return f"is broken: {type(error).__name__}: {error}"
    return None if name is None else f"is broken: the checksum of {name} in it is wrong"


def read_weight_file(path: Path | str) -> PretrainedState:
    """Read the weights out of a file, whatever they are packed in."""
    path = Path(path)
    content: Any
    if path.suffix == ".safetensors" and path.is_file():
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is broken: {error}") from error
    else:
        content = read_torch_file(path, "file of weights")
    is_own = isinstance(content, dict) and content.keys() >= CHECKPOINT_KEYS
    state = content
    if is_own:
        state = model_state(content)
    elif isinstance(content, dict):
        nested = (content.get(name) for name in _CONTAINERS)
        state = next((each for each in nested if isinstance(each, dict)), content)
    if not _is_state(state):
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else None
        found = type(content).__name__ if keys is None else f"a dict of {keys or 'nothing'}"
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, or such a dict under "
            f"{', '.join(_CONTAINERS)}, found {found}"
        )
    return PretrainedState(_strip_prefixes(state), **(_notes(content) if is_own else {}))


def _notes(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint of detmix says beside its weights, as `PretrainedState` has it."""
    config = section(checkpoint, "config")
    noted = section(checkpoint, "normalization") or take_normalization(config)
    mean, std = (_statistic(noted.get(name)) for name in STATISTICS)
    eps = noted.get("norm_eps")
    eps = float(eps) if isinstance(eps, (int, float)) else None
    return {"mean": mean, "std": std, "norm_eps": eps, "network": section(config, "model")}


def take_normalization(config: dict[str, Any]) -> dict[str, Any]:
    """Take what a model normalises with out of the configuration that format 1 has it in."""
    if "model" in config:  # of a classifier
        data = section(config, "data")
        found = {"image_mean": data.get("mean"), "image_std": data.get("std")}
    else:
        options = section(config, "detector", "options")
        found = {name: options.pop(name, None) for name in STATISTICS}
    return {**found, "norm_eps": section(config, "backbone").pop("norm_eps", None)}


def section(content: Any, *keys: str) -> dict[str, Any]:
    """Return a section of plain values, in a file of whoever; an empty one where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _statistic(value: Any) -> tuple[float, ...]:
    """Return a number for each channel, if a value is that."""
    is_one = isinstance(value, (list, tuple)) and len(value) == 3
    return tuple(value) if is_one and all(isinstance(n, (int, float)) for n in value) else ()


def model_state(checkpoint: Mapping[str, Any]) -> Any:
    """Return the averaged weights in a checkpoint of detmix, or the only ones."""
    average = checkpoint.get("ema")
    return checkpoint["model"] if average is None else average


def kind_of(tensor: Tensor) -> str:
    """Return ``"real"``, ``"complex"`` or ``"whole"``: what torch would convert without a word."""
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    )


def _strip_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take away what wrappers put before all keys, in whatever order they were nested."""
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
