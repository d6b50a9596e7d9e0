"""Putting a state dict into a module completely, or refusing it by the keys that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from detmix.pretrained.read_state import kind_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_COUNTER = "num_batches_tracked"
_SHOWN = 8


@dataclass(frozen=True)
class SourceWeights:
    """Weights that were read, and what belongs to them."""

    source: str
    state: Mapping[str, Tensor]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; its text is one line.

    Attributes:
        source: Where the weights are from.
        model: What they were loaded into.
        loaded: Keys of the module's tensors that were loaded.
        total: How many tensors the module has, without a head of its own: what was not loaded of
            them are counters of batches.
        left_out: Keys that were not used, of the head that is of no use here.
        absent: Names of parts that were not used, as the module does not have them.
        new: Keys of the module's tensors that stay as they were: its own head.
        mean: What the weights expect to be subtracted from an image's channels in [0, 1].
        std: What they expect the channels to be divided by then.
        head: What the head is, for the text.
    """

    source: str
    model: str
    loaded: tuple[str, ...]
    total: int
    left_out: tuple[str, ...]
    absent: tuple[str, ...]
    new: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: str

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
    weights: SourceWeights,
    *,
    model: str,
    heads: Sequence[str],
    head: str,
    absent: Sequence[str] = (),
) -> LoadReport:
    """Load weights into a module if every tensor but the head's is there with its shape."""
    own = {k: v for k, v in module.state_dict().items() if not _is_in(k, heads)}
    left_out = [key for key in weights.state if _is_in(key, heads)]
    not_here = [name for name in absent if any(_is_in(key, (name,)) for key in weights.state)]
    state = {k: v for k, v in weights.state.items() if not _is_in(k, (*heads, *absent))}
    missing = [k for k in own if k not in state and not k.endswith(_COUNTER)]
    unexpected = [k for k in state if k not in own and not k.endswith(_COUNTER)]
    reshaped = [
        f"{k} {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    other = [
        f"{k} {kind_of(state[k])}, expected {kind_of(v)}"
        for k, v in own.items()
        if k in state and kind_of(state[k]) != kind_of(v) and not k.endswith(_COUNTER)
    ]
    if missing or unexpected or reshaped or other:
        problems = [
            _listing("missing", missing),
            _listing("unexpected", unexpected),
            _listing("of another shape", reshaped),
            _listing("of other numbers", other),
        ]
        raise ValueError(
            f"{weights.source} does not fit {model}: {'; '.join(filter(None, problems))}"
            f"{_hint(missing, unexpected, reshaped)}"
        )
    loaded = {key: value for key, value in state.items() if key in own}
    module.load_state_dict(loaded, strict=False)
    return LoadReport(
        source=weights.source,
        model=model,
        loaded=tuple(loaded),
        total=len(own),
        left_out=tuple(left_out),
        absent=tuple(not_here),
        new=tuple(key for key in module.state_dict() if _is_in(key, heads)),
        mean=weights.mean,
        std=weights.std,
        head=head,
    )


def _is_in(key: str, names: Iterable[str]) -> bool:
    return any(key.startswith(f"{name}.") for name in names)


def _listing(what: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{what}: {', '.join(entries[:_SHOWN])}{more}"


def _hint(missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str]) -> str:
    """Say what most often lies behind keys that do not fit."""
    statistics = (".running_mean", ".running_var")
    if unexpected and all(key.endswith(statistics) for key in unexpected):
        return ". These are weights of batch norm: norm must be frozen, batch or sync"
    if missing and all(key.endswith(statistics) for key in missing):
        return ". These are weights without batch norm's statistics: norm must be group"
    if len(reshaped) == 1 and "conv1.weight (64, 3, " in reshaped[0] and not missing:
        return ". The first convolution differs: stem must be as in the pretraining"
    return ""
