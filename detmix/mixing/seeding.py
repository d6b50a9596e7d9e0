"""Seeds as a pure function of what is seeded, and the epoch as every process sees it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def sample_seed(seed: int, epoch: int, index: int, stream: str = "") -> int:
    """Hash (seed, epoch, sample index) to an independent seed.

    Args:
        seed: The run's seed.
        epoch: The epoch, from 0 (or a process's number).
        index: The sample's index in its data set (or a step: whatever is seeded).
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

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedEpoch:
        # A copied tensor would not be in shared memory any more.
        return SharedEpoch(self.value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Neither would one that came through plain pickling or torch.save.
        self.__dict__.update(state)
        self._value.share_memory_()  # type: ignore[no-untyped-call]
