"""Seeds as a pure function of what is seeded, and the epoch as every process sees it.

`held_by` is the one rule for what lies underneath a data set, a loader or a collate function.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from types import CellType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import numpy as np
import torch

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# These hold nothing, and data sets keep millions of them.
_PLAIN = (str, bytes, int, float, np.generic, np.ndarray, torch.Tensor, type, ModuleType)
_OF_HOLDERS = ("__getitem__", "__iter__", "__call__", "set_epoch")


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
        _begin(held_by(self), epoch)


def set_epoch(holder: Any, epoch: int) -> None:
    """Begin an epoch in a data set, loader or collate function and in all that lies underneath.

    Call it at the start of each epoch with what is outermost. It calls every ``set_epoch`` there
    is, the innermost first, and so reaches schedules, augmentation, partners and samplers, in
    running workers too; a ``set_epoch`` of your own need not pass the epoch on. Underneath is what
    can be indexed, iterated or called, under any attribute of another that can, in a list, tuple,
    dict or set (or one in another), or in a function's closure. Out of reach is what only a class,
    a function's globals or an object of another kind holds, and what is made on reading a sample.

    Args:
        holder: Such as a ``DataLoader`` or a ``ConcatDataset``; or several, as a list.
        epoch: The epoch, from 0.

    Raises:
        ValueError: The epoch is negative, or there is nothing with a ``set_epoch``.
    """
    if not _begin([*held_by(holder), holder], epoch):
        raise ValueError(
            f"set_epoch({type(holder).__name__}, {epoch}): expected something with a set_epoch "
            "underneath, found none; call it with what is hidden there"
        )


def _begin(parts: Iterable[Any], epoch: int) -> bool:
    """Call each `set_epoch` that does more than to pass it on; return whether there is any."""
    found = [part for part in parts if hasattr(type(part), "set_epoch")]
    for part in found:
        if type(part).set_epoch is not HasEpoch.set_epoch:
            part.set_epoch(epoch)
    return bool(found)


def held_by(holder: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield what lies underneath as `set_epoch` has it, each once, the innermost first."""
    seen = {id(holder)} if seen is None else seen
    for part in _holders(_kept(holder), depth=2):
        if id(part) not in seen:
            seen.add(id(part))
            yield from held_by(part, seen)
            yield part


def _holders(values: Iterable[Any], depth: int) -> Iterator[Any]:
    """Yield the values that can hold others, of containers what is in them."""
    for value in values:
        if not _can_hold(type(value)):  # type: ignore[arg-type]
            continue
        if not isinstance(value, _CONTAINERS) or hasattr(value, "__dict__"):
            yield value
        elif depth:  # deeper ones hold samples, which may be millions
            yield from _holders(_items(value), depth - 1)


@lru_cache
def _can_hold(kind: type) -> bool:
    # not hasattr: every class can be called
    names = {name for base in kind.__mro__ for name in vars(base)}
    return not names.isdisjoint(_OF_HOLDERS) and not issubclass(kind, _PLAIN)


def _kept(holder: Any) -> Iterable[Any]:
    """Return the attributes and items of an object, or what a function has from around it."""
    attributes = [*getattr(holder, "__dict__", {}).values()]
    if isinstance(holder, FunctionType):
        cells = [cell.cell_contents for cell in holder.__closure__ or () if cell != CellType()]
        return [*attributes, *cells, holder.__defaults__, holder.__kwdefaults__]
    for kind in type(holder).__mro__:
        # Such are slots, the instance of a bound method, and what a partial is made of.
        members = [x for x in vars(kind).values() if isinstance(x, MemberDescriptorType)]
        attributes += [getattr(holder, member.__name__, None) for member in members]
    return chain(attributes, _items(holder) if isinstance(holder, _CONTAINERS) else ())


def _items(container: Any) -> Iterable[Any]:
    return chain(container, container.values()) if isinstance(container, dict) else container
