"""Seeds as a pure function of what is seeded, and the epoch as every process sees it.

`held_by` is the one rule for what lies underneath a data set, a loader or a collate function.
"""

from __future__ import annotations

import gc
import hashlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from inspect import getattr_static
from types import FunctionType, MethodType
from typing import Any

import torch

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_OF_HOLDERS = ("__getitem__", "__iter__", "set_epoch")
_telling: set[int] = set()  # whose own `set_epoch` is running


def sample_seed(seed: int, epoch: int, index: int | str, stream: str = "") -> int:
    """Hash (seed, epoch, sample index) to an independent seed.

    Args:
        seed: The run's seed.
        epoch: The epoch, from 0 (or a process's number).
        index: The sample's index in its data set (or its id, a step: whatever is seeded).
        stream: A name that keeps apart the uses of one sample's randomness, such as
            ``"augment"`` and ``"mixing"``.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every process.
    """
    key = f"{seed}/{epoch}/{index}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def draw_seeds(num: int, generator: torch.Generator | None = None) -> list[int]:
    """Draw seeds for generators of the standard library."""
    # Only Python's generators draw Beta variates from an explicit generator; torch's do not.
    seeds: list[int] = torch.randint(0, 2**62, (num,), generator=generator).tolist()
    return seeds


class SharedEpoch:
    """An epoch number in shared memory.

    ``DataLoader(persistent_workers=True)`` keeps copies of the data set and of the collate
    function, so a plain attribute set in the parent is never seen there. This number is: it
    survives both forking and pickling to a worker as a view of the same memory.
    """

    def __init__(self, value: int = 0) -> None:
        self._value = torch.zeros(1, dtype=torch.int64)
        self._value.share_memory_()  # type: ignore[no-untyped-call]
        self.value = value

    @property
    def value(self) -> int:
        """The epoch, from 0."""
        return int(self._value)

    @value.setter
    def value(self, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self._value.fill_(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, in every process that has this number."""
        self.value = epoch

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedEpoch:
        # A copied tensor would not be in shared memory any more.
        return SharedEpoch(self.value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Neither would one that came through plain pickling or torch.save.
        self.__dict__.update(state)
        self._value.share_memory_()  # type: ignore[no-untyped-call]


class HasEpoch:
    """What begins an epoch together with all that it holds."""

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, here and in all underneath, in running workers too."""
        for part in list(held_by(self)):
            _tell(part, epoch)


def set_epoch(holder: Any, epoch: int) -> None:
    """Begin an epoch in a data set, loader or collate function and in all that lies underneath.

    Call it at the start of each epoch with what is outermost. It calls every ``set_epoch`` there
    is, the innermost first, and so reaches schedules, augmentation, partners and samplers, in
    running workers too. Underneath is what can be indexed, iterated or called, under any attribute
    of another that can, in a list, tuple, dict or set (or one in another), or in a function's
    closure; not class attributes, a function's globals, or what is made when a sample is read.

    Args:
        holder: Such as a ``DataLoader`` or a ``ConcatDataset``; or several, as a list.
        epoch: The epoch, from 0.

    Raises:
        ValueError: The epoch is negative, or there is nothing with a ``set_epoch``.
    """
    told = [_tell(part, epoch) for part in [*held_by(holder), holder]]
    if not any(told):
        raise ValueError(
            f"set_epoch({type(holder).__name__}, {epoch}): expected something with a set_epoch "
            "underneath, found none; call it with what is hidden there"
        )


def held_by(holder: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield what lies underneath as `set_epoch` has it, each once, the innermost first."""
    seen = {id(holder)} if seen is None else seen
    for part in _unpacked(_referents(holder), depth=2):
        can_hold = callable(part) or any(hasattr(type(part), name) for name in _OF_HOLDERS)
        if can_hold and id(part) not in seen and not isinstance(part, type | torch.Tensor):
            seen.add(id(part))
            yield from held_by(part, seen)
            yield part


def _referents(holder: Any) -> list[Any]:
    if isinstance(holder, FunctionType):
        return [holder.__defaults__, *gc.get_referents(*(holder.__closure__ or ()))]
    # Of Python's own types only these: a generator refers to all that its module knows.
    has_slots = hasattr(type(holder), "__slots__") and not hasattr(holder, "__dict__")
    if has_slots or isinstance(holder, (*_CONTAINERS, MethodType, partial)):
        return gc.get_referents(holder)
    return list(getattr(holder, "__dict__", {}).values())


def _unpacked(values: list[Any], depth: int) -> Iterator[Any]:
    # What is not tracked, as a number or a tuple of numbers, holds nothing. Deeper containers hold
    # samples, which may be millions.
    for value in filter(gc.is_tracked, values):
        if type(value) not in _CONTAINERS:
            yield value
        elif depth:
            yield from _unpacked(gc.get_referents(value), depth - 1)


def _tell(part: Any, epoch: int) -> bool:
    """Call a `set_epoch` that does more than to pass it on; return whether there is any."""
    method = getattr_static(part, "set_epoch", None)
    if method not in (None, HasEpoch.set_epoch) and id(part) not in _telling:
        _telling.add(id(part))  # its `set_epoch` may lead back here
        try:
            part.set_epoch(epoch)
        finally:
            _telling.discard(id(part))
    return method is not None
