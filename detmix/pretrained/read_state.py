"""From what a configuration says, a name or a file, to tensors that were trained before.

Files are read whoever wrote them, and no code in them is run: plain state dicts, also as
safetensors, checkpoints that hold some under any name, such as the official CutMix repository's
(github.com/clovaai/CutMix-PyTorch, train.py), and the checkpoints of detmix. Which tensors of a
file a network takes is `match_state`'s to find: all have a key here, with the name of their dict.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from detmix.backbones.timm import TIMM_PREFIX, read_timm_weights
from detmix.pretrained.torch_file import read_torch_file

_FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl"}
CHECKPOINT_KEYS = frozenset({"format", "model", "config", "classes"})
"""What every checkpoint of detmix holds."""
STATISTICS = ("image_mean", "image_std")
"""What images are normalised with, by torchvision's names."""


@dataclass(frozen=True)
class PretrainedState:
    """Tensors that were trained before, and what is known of their training."""

    state: Mapping[str, Tensor]  # all of a file's, or those that are meant
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    norm_eps: float | None = None
    network: Mapping[str, Any] = field(default_factory=dict)  # a classifier's name and stem
    source: str = ""
    prefix: str | None = None  # the place of what is meant, or to look at alone
    beside: tuple[str, ...] = ()  # other places in the file
    assumed: tuple[str, ...] = ()  # which of image_mean and image_std a file does not tell


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
    prefix: str | None


def find_source(
    text: str | Path,
    prefix: str | None,
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
    if prefix and not isinstance(place, Path):
        raise ValueError(f"weights_prefix={prefix!r} is for files, got {setting}={text}")
    names = [str(member) if network is None else member.name for member in known]
    return Source(
        setting=setting,
        text=os.fspath(text),
        what=f"{setting}={text}",
        place=place,
        is_torchvisions=isinstance(place, WeightsEnum),
        network=network,
        names=(*names, f"{TIMM_PREFIX}NAME") if timm else tuple(names),
        prefix=prefix,
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
    told = {"image_mean": found.mean, "image_std": found.std}
    assumed = () if source.is_torchvisions else tuple(name for name in told if not told[name])
    mean, std, prefix = found.mean or mean, found.std or std, source.prefix or found.prefix
    return replace(found, source=source.what, mean=mean, std=std, prefix=prefix, assumed=assumed)


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
            f"cannot load {source.what} ({reason}); put {member.url} into torch.hub.get_dir()/"
            f"checkpoints by hand, or set {source.setting}=null to start from scratch"
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
    known = f"one of {', '.join(source.names)} or a file that is there"
    raise ValueError(f"{source.setting}{of} must be {known}, got {source.text!r}")


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
    state = _named_tensors(content) if isinstance(content, dict) else {}
    if not state:
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else None
        found = type(content).__name__ if keys is None else f"a dict of {keys or 'nothing'}"
        raise ValueError(f"{path} holds no tensors by name, nor dicts of such, but {found}")
    is_own = content.keys() >= CHECKPOINT_KEYS
    return PretrainedState(state, **(_notes(content) if is_own else {}))


def _named_tensors(content: dict[Any, Any]) -> dict[str, Tensor]:
    """Return all tensors of a file, those of dicts in it under ``"name of the dict.key"``."""
    named: dict[str, Tensor] = {}
    places, seen = [("", content)], {id(content)}  # one may hold itself
    for place, part in places:
        for key, value in part.items():
            if isinstance(key, str) and isinstance(value, Tensor):
                named[f"{place}{key}"] = value
            elif isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                places.append((f"{place}{key}.", value))
    return named


def _notes(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint of detmix says beside its weights, as `PretrainedState` has it."""
    config = section(checkpoint, "config")
    noted = section(checkpoint, "normalization") or take_normalization(config)
    mean, std = (_statistic(noted.get(name)) for name in STATISTICS)
    eps = noted.get("norm_eps")
    eps = float(eps) if isinstance(eps, (int, float)) else None
    prefix = "model" if checkpoint.get("ema") is None else "ema"
    network = section(config, "model") or section(config, "backbone")
    return {"mean": mean, "std": std, "norm_eps": eps, "network": network, "prefix": prefix}


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
