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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds."""

    state: dict[str, Tensor]
    config: Mapping[str, Any]

    def setting(self, *keys: str) -> Any:
        """Return a nested entry of the configuration; None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def statistic(self, *keys: str) -> tuple[float, ...] | None:
        """Return a mean or deviation, one number for each channel; None where there is none."""
        value = self.setting(*keys)
        is_one = isinstance(value, list) and len(value) == 3
        return tuple(value) if is_one and all(isinstance(v, (int, float)) for v in value) else None


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
        reason = (
            f"it refers to {found[1]}, and what is no tensor or plain value could run code; if you "
            "trust its author, save its state dict alone"
            if found
            else "it is no file of torch.save, or of another pickle protocol"
        )
        raise ValueError(
            f"{path} is not a {what} that loads with weights_only=True: {reason}"
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


def read_weight_file(path: Path | str) -> WeightFile:
    """Read the weights out of a file, whatever they are packed in."""
    content: Any = _read_safetensors(path)
    if content is None:
        content = read_torch_file(path, "file of weights")
    config: Mapping[str, Any] = {}
    if isinstance(content, dict) and content.keys() >= CHECKPOINT_KEYS:
        state = model_state(content)
        if isinstance(content["config"], dict):
            config = content["config"]
    else:
        state = _find_state(content)
    if not _is_state(state):
        kind = f"a dict of {_some(content)}" if isinstance(content, dict) else type(content)
        raise ValueError(
            f"{path} holds no state dict: expected tensors by name, or such a dict under "
            f"{', '.join(_CONTAINERS)}, found {kind}"
        )
    return WeightFile(_strip_prefixes(state), config)


def model_state(checkpoint: Mapping[str, Any]) -> Any:
    """Return the averaged weights in a checkpoint of detmix, or the only ones."""
    average = checkpoint.get("ema")
    return checkpoint["model"] if average is None else average


def kind_of(tensor: Tensor) -> str:
    """Return ``"real"``, ``"complex"`` or ``"whole"``: what torch would convert without a word."""
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _read_safetensors(path: Path | str) -> dict[str, Tensor] | None:
    """Return the tensors of a ``.safetensors`` file; None if it is called otherwise."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    return tensors


def _find_state(content: Any) -> Any:
    if isinstance(content, dict):
        for name in _CONTAINERS:
            if isinstance(content.get(name), dict):
                return content[name]
    return content


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(key, str) for key in state)
        and all(isinstance(value, Tensor) for value in state.values())
    )


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take away what wrappers put before all keys, in whatever order they were nested."""
    stripped = dict(state)
    while True:
        common = [p for p in _PREFIXES if all(key.startswith(p) for key in stripped)]
        if not common:
            return stripped
        stripped = {key.removeprefix(common[0]): value for key, value in stripped.items()}


def _some(content: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in content]
    return ", ".join(keys[:8]) + (" and more" if len(keys) > 8 else "") if keys else "nothing"
