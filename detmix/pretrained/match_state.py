"""Putting a state dict into a module completely, or refusing it by the keys that do not fit.

The module is a whole detector, with a new head, or a classifier or the body of a detector.
"""

from __future__ import annotations

import copy
import itertools
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from detmix.backbones.resnet import resnet_names
from detmix.backbones.timm import head_names, plain_name, recorded_statistics
from detmix.pretrained.read_state import PretrainedState, Source, find_source, read_source

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What depends on the classes: SSDlite has a convolution of each channel before that into them.
_CLASS_HEAD = re.compile(
    r"roi_heads\.(box_predictor|mask_predictor\.mask_fcn_logits)\."
    r"|head\.classification_head\.(cls_logits|module_list\.\d+(\.1)?)\.(weight|bias)$"
)
_KEYPOINT_HEAD = "roi_heads.keypoint_predictor"
_KEYPOINTS = f"{_KEYPOINT_HEAD}.kps_score_lowres.bias"
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_COUNTER = "num_batches_tracked"
# How torch tells of another shape.
_OTHER_SHAPE = re.compile(r"size mismatch for (.+): .*Size\((.+)\) from .*Size\((.+)\)\.")
_SHOWN = 4
# Networks have some names in common by chance: this part of one's tensors is no chance.
_LEAST_PART = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; its text is one line."""

    source: str  #: where the weights are from
    model: str  #: what they were loaded into
    loaded: tuple[str, ...]  #: keys of the module's tensors that were loaded
    total: int  #: the module's tensors without its head; counters of batches may not be loaded
    left_out: tuple[str, ...]  #: keys that were not used: the weights' head
    absent: tuple[str, ...]  #: names of parts of the file that are not of the module
    new: tuple[str, ...]  #: keys of the module's tensors that stay as they were: its own head
    mean: tuple[float, ...]  #: what the weights expect images in [0, 1] to be normalised with
    std: tuple[float, ...]  #: the same
    head: str  #: what the head is, for the text
    norm_eps: float | None = None  #: epsilon of frozen batch norm that belongs to the weights
    prefix: str = ""  #: their place in the file: the name of a dict, and what keys begin with
    assumed: tuple[str, ...] = ()  #: which of image_mean and image_std the weights do not tell

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} of {self.total} tensors of {self.model} loaded"
        if self.prefix:
            text += f" from {self.prefix}"
        if len(self.loaded) < self.total:
            text += " (the rest are counters of batches)"
        if self.assumed:
            taken = {"image_mean": list(self.mean), "image_std": list(self.std)}
            text += f"; assumed: {', '.join(f'{name} {taken[name]}' for name in self.assumed)}"
        if self.left_out:
            text += f"; left out: {', '.join(self.left_out)} ({self.head})"
        if self.absent:
            text += f"; {_listing('not used', self.absent)}"
        return text


def load_detector(model: Any, source: Source, title: str, num_classes: int) -> LoadReport:
    """Load a trained detector into another, all but what depends on the classes."""
    transform, own = model.transform, model.state_dict()
    head = [key for key in own if _CLASS_HEAD.match(key)]
    usual = recorded_statistics(model, transform.image_mean, transform.image_std)
    weights = read_source(source, *usual)
    weights = _choose(weights, own, head)
    state = weights.state
    if not any(key.startswith("backbone.") for key in state):
        raise ValueError(f"{source.what} holds no detector: for a classifier set backbone.weights")
    text = f"the head, which is new for {num_classes} classes, background included"
    keypoints = [tensors[_KEYPOINTS].numel() for tensors in (state, own) if _KEYPOINTS in tensors]
    if len({*keypoints}) == 2:
        head.append(_KEYPOINT_HEAD)
        text += ", and for {1} keypoints in the place of {0}".format(*keypoints)
    return _load_matching(model, weights, model=title, heads=head, head=text)


def load_classifier(
    module: nn.Module, source: Source, name: str, stem: str | None = None
) -> LoadReport:
    """Load a network, or that in a larger one, into another or a body, all but the head."""
    usual = recorded_statistics(module, IMAGENET_MEAN, IMAGENET_STD)
    weights, heads = read_source(source, *usual), head_names(module)
    for option, wanted in (("name", source.network), ("stem", stem)):
        found = weights.network.get(option)
        if wanted and found and plain_name(str(found)) != plain_name(wanted):
            told = f"is of {option}={found}, not {wanted}: set backbone.{option}={found}"
            raise ValueError(f"{source.what} {told}")
    return _load_matching(
        module,
        _choose(weights, module.state_dict(), heads),
        model=name,
        heads=heads,
        head="the classifier head",
        # The body of a torchvision detector ends at the last stage that it returns.
        absent=[stage for stage in _STAGES if not hasattr(module, stage)],
    )


def load_backbone_weights(
    module: nn.Module, source: str | Path, weights_prefix: str | None = None
) -> LoadReport:
    """Load pretrained weights into a ResNet or the body of a torchvision detector, in place.

    They are taken from the place in a file, dicts and a prefix of their keys, that has most of the
    network; of equal ones from the first, with a warning. There every tensor but those of the
    classifier's head must be, with its shape, and no other. Set ``model.transform.image_mean`` and
    ``image_std`` to the report's.

    Args:
        module: A ResNet of torchvision, a classifier of timm, or ``model.backbone.body``.
        source: A file as `BackboneConfig.weights` takes it, a full name such as
            ``"ResNet50_Weights.IMAGENET1K_V2"``, or ``"timm:NAME"``.
        weights_prefix: The place in a file to look at alone, such as ``"model_ema"`` or
            ``"state_dict.module.encoder_k"``.

    Raises:
        TypeError: If the module is a whole detector or a backbone with its pyramid.
        FileNotFoundError: If there is no such file.
        ValueError: If the weights are unknown, broken or of another network; the module is
            unchanged then.
        ConnectionError: If they cannot be downloaded.
    """
    name = type(module).__name__
    if hasattr(module, "backbone") or isinstance(module, BackboneWithFPN):
        raise TypeError(f"got {name}: expected a classifier or a detector's model.backbone.body")
    known = [member for each in resnet_names() for member in get_model_weights(each)]
    return load_classifier(module, find_source(source, weights_prefix, "source", known), name)


def _choose(weights: PretrainedState, own: Iterable[str], heads: Sequence[str]) -> PretrainedState:
    """Take what lies under the prefix that most of a network's keys have in a file."""
    within = f"{weights.prefix.removesuffix('.')}." if weights.prefix else ""
    state = {key: value for key, value in weights.state.items() if key.startswith(within)}
    if not state:
        there_are = _listing("there are", [*dict.fromkeys(_part(k, within) for k in weights.state)])
        raise ValueError(f"{weights.source} has no weights_prefix={weights.prefix}; {there_are}")
    wanted = {key for key in own if not _is_in(key, heads) and not key.endswith(_COUNTER)}
    starts = ((key, name.end()) for key in state for name in re.finditer(r"^|\.", key))
    inside = ((key, start) for key, start in starts if start >= len(within))
    counts = Counter(key[:start] for key, start in inside if key[start:] in wanted)
    most = max(counts.values(), default=0)
    places = [place for place in counts if counts[place] == most]
    prefix, *others = places if most > _LEAST_PART * len(wanted) else [within]
    if others:
        names = [place.removesuffix(".") or "null" for place in places]
        what = f"weights_prefix={names[0]} is taken, {', '.join(names[1:])} would fit as well"
        warnings.warn(f"{weights.source}: {what}", UserWarning, stacklevel=4)
    beside = dict.fromkeys(_part(key, prefix) for key in state if not key.startswith(prefix))
    return replace(
        weights,
        state={k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        prefix=prefix.removesuffix("."),
        beside=tuple(beside),
    )


def _part(key: str, prefix: str) -> str:
    """Return a key up to the first name in which it differs from a prefix."""
    parts = itertools.accumulate(key.split("."), "{}.{}".format)
    return next((part for part in parts if not prefix.startswith(f"{part}.")), key)


def _load_matching(
    module: nn.Module,
    weights: PretrainedState,
    *,
    model: str,
    heads: Sequence[str],
    head: str,
    absent: Sequence[str] = (),
) -> LoadReport:
    """Load a state if every tensor but the head's is there with its shape, and log that."""
    own = module.state_dict()
    wanted = {k: v for k, v in weights.state.items() if not _is_in(k, (*heads, *absent))}
    # A copy without memory shows what would happen, and gives keys of torchvision before 0.13
    # their present names.
    outline = copy.deepcopy(module).to("meta")
    missing, unexpected, other = [], [], []
    try:
        missing, unexpected = outline.load_state_dict(wanted, strict=False, assign=True)
    except RuntimeError as error:  # with a line for each tensor of another shape
        lines = str(error).split("\n\t")[1:]
        other = [_OTHER_SHAPE.sub(r"\1 of shape \2, expected \3", line) for line in lines]
    found = {
        key: value
        for key, value in outline.state_dict().items()
        if not value.is_meta and (key in wanted or not key.endswith(_COUNTER))
    }
    other += [
        f"{k} of {kind_of(v)} numbers, expected {kind_of(own[k])}"
        for k, v in found.items()
        if kind_of(v) != kind_of(own[k]) and not k.endswith(_COUNTER)
    ]
    missing = [k for k in missing if not _is_in(k, heads) and not k.endswith(_COUNTER)]
    unexpected = [k for k in unexpected if not k.endswith(_COUNTER)]
    if missing or unexpected or other:
        problems = {"missing": missing, "unexpected": unexpected, "other tensors": other}
        told = "; ".join(_listing(what, keys) for what, keys in problems.items() if keys)
        hint = _hint(missing, unexpected, other)
        where = f"weights_prefix={weights.prefix or 'null'}"
        raise ValueError(f"{weights.source} does not fit {model} with {where}: {told}{hint}")
    module.load_state_dict(found, strict=False)
    report = LoadReport(
        source=weights.source,
        model=model,
        loaded=tuple(found),
        total=sum(not _is_in(key, heads) for key in own),
        left_out=tuple(key for key in weights.state if _is_in(key, heads)),
        absent=(
            *(p for p in absent if any(_is_in(k, (p,)) for k in weights.state)),
            *weights.beside,
        ),
        new=tuple(key for key in own if _is_in(key, heads)),
        mean=weights.mean,
        std=weights.std,
        head=head,
        norm_eps=weights.norm_eps,
        prefix=weights.prefix or "",
        assumed=weights.assumed,
    )
    _log.info("%s", report)
    return report


def _is_in(key: str, names: Iterable[str]) -> bool:
    """Return whether a key is one of the names, or of a module that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _listing(what: str, entries: Sequence[str]) -> str:
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{what}: {', '.join(entries[:_SHOWN])}{more}"


def _hint(missing: Sequence[str], unexpected: Sequence[str], other: Sequence[str]) -> str:
    """Say what most often lies behind keys that do not fit."""
    statistics = (".running_mean", ".running_var")
    if unexpected and all(key.endswith(statistics) for key in unexpected):
        return ". These are weights of batch norm: norm must be frozen, batch or sync"
    if missing and all(key.endswith(statistics) for key in missing):
        return ". These are weights without batch norm's statistics: norm must be group"
    if len(other) == 1 and other[0].startswith("conv1.weight of shape"):
        return ". The first convolution differs: stem must be as in the pretraining"
    return ""


def kind_of(tensor: Tensor) -> str:
    """Return ``"real"``, ``"complex"`` or ``"whole"``: what torch would convert without a word."""
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"
