"""From what a configuration says, a name or a file, to tensors that were trained before.

Files are read whoever wrote them, and no code in them is run: plain state dicts, also as
safetensors, checkpoints that hold one under a usual name, such as the official CutMix repository's
(github.com/clovaai/CutMix-PyTorch, train.py), and the checkpoints of detmix.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from detmix.backbones.timm import TIMM_PREFIX, read_timm_weights

_FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl"}
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


@dataclass(frozen=True)
class Source:
    """Where a pretrained state comes from: decided, and nothing opened yet."""

    setting: str
    text: str
    what: str  # both, for messages
    # A member of torchvision's weights, the name of one of timm's, or a path.
    place: WeightsEnum | str | Path
    is_torchvisions: bool
    # What it is for, where that is known, and which names there are for that.
    network: str | None
    names: tuple[str, ...]


def find_source(
    text: str | Path,
    setting: str,
    known: Sequence[WeightsEnum],
    network: str | None = None,
    *,
    timm: bool = True,
) -> Source:
    """Decide whether a setting names one of torchvision's weights, one of timm's or a file."""
    place: WeightsEnum | str | Path = Path(text)
    if isinstance(text, str):
        if timm and text.startswith(TIMM_PREFIX):
            place = text
        for enum in {type(member): None for member in known}:
            name = text.removeprefix(f"{enum.__name__}.")
            # Where the network is not known, only a full name tells whose weights are meant.
            if name in enum.__members__ and (network is not None or name != text):
                place = enum[name]
    names = [str(member) if network is None else member.name for member in known]
    return Source(
        setting=setting,
        text=os.fspath(text),
        what=f"{setting}={text}",
        place=place,
        is_torchvisions=isinstance(place, WeightsEnum),
        network=network,
        names=(*names, f"{TIMM_PREFIX}NAME") if timm else tuple(names),
    )


def read_source(
    source: Source, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> PretrainedState:
    """Read a state, with the mean and deviation of its images, these where it tells none."""
    if isinstance(source.place, WeightsEnum):
        found = PretrainedState(_download(source, source.place))
    elif isinstance(source.place, Path):
        found = read_weight_file(_existing(source, source.place.expanduser()))
    else:
        found = PretrainedState(*read_timm_weights(source.place, source.setting, source.network))
    return replace(found, source=source.what, mean=found.mean or mean, std=found.std or std)


def _download(source: Source, member: WeightsEnum) -> dict[str, Tensor]:
    """Return torchvision's weights, from its folder of downloads where they are there already."""
    try:
        state: dict[str, Tensor] = member.get_state_dict(
            check_hash=True, map_location="cpu", weights_only=True
        )
    # OSError is URLError and whatever else a broken connection gives; the others, a broken file.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "its file holds more than tensors" if unsafe else error
        raise ConnectionError(
            f"cannot load {member} of {source.network or type(member).__name__} ({reason}); put "
            f"the file of {member.url} into torch's hub folder "
            "(torch.hub.get_dir()/checkpoints) by hand, or set "
            f"{source.setting}=null to start from scratch"
        ) from error
    return state


def _existing(source: Source, path: Path) -> Path:
    """Return the path of a file that is there."""
    if path.is_file():
        return path
    if path.is_dir():
        raise FileNotFoundError(f"{source.what} is a folder, expected a file such as best.pt")
    if os.sep in source.text or path.suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(f"{source.what}: there is no file {path}")
    of = "" if source.network is None else f" of {source.network}"
    known = f"one of {', '.join(source.names)} or a file"
    raise ValueError(
        f"{source.setting}{of} must be {known}, got {source.text!r}, and there is no such file"
    )


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
    if path.suffix == ".safetensors":
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
