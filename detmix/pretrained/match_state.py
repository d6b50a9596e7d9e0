"""Putting a state dict into a module completely, or refusing it by the keys that do not fit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from detmix.pretrained.read_state import PretrainedState, kind_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_COUNTER = "num_batches_tracked"
_SHOWN = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; its text is one line."""

    source: str  #: where the weights are from
    model: str  #: what they were loaded into
    loaded: tuple[str, ...]  #: keys of the module's tensors that were loaded
    total: int  #: the module's tensors without its head; counters of batches may not be loaded
    left_out: tuple[str, ...]  #: keys that were not used: the weights' head
    absent: tuple[str, ...]  #: names of parts that were not used, as the module has them not
    new: tuple[str, ...]  #: keys of the module's tensors that stay as they were: its own head
    mean: tuple[float, ...]  #: what the weights expect images in [0, 1] to be normalised with
    std: tuple[float, ...]  #: the same
    head: str  #: what the head is, for the text
    norm_eps: float | None = None  #: epsilon of frozen batch norm that belongs to the weights

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} of {self.total} tensors of {self.model} loaded"
        if len(self.loaded) < self.total:
            text += " (the rest are counters of batches)"
        if self.left_out:
            text += f"; left out: {', '.join(self.left_out)} ({self.head})"
        if self.absent:
            text += f"; not in this body: {', '.join(self.absent)}"
        return text


def load_matching(
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
        other = str(error).split("\n\t")[1:]
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
        raise ValueError(f"{weights.source} does not fit {model}: {told}{hint}")
    module.load_state_dict(found, strict=False)
    report = LoadReport(
        source=weights.source,
        model=model,
        loaded=tuple(found),
        total=sum(not _is_in(key, heads) for key in own),
        left_out=tuple(key for key in weights.state if _is_in(key, heads)),
        absent=tuple(part for part in absent if any(_is_in(k, (part,)) for k in weights.state)),
        new=tuple(key for key in own if _is_in(key, heads)),
        mean=weights.mean,
        std=weights.std,
        head=head,
        norm_eps=weights.norm_eps,
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
    if len(other) == 1 and "for conv1.weight:" in other[0]:
        return " The first convolution differs: stem must be as in the pretraining"
    return ""
