"""Seeds as a pure function of what is seeded: never of a worker, a process or a call order."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["draw_seeds", "sample_seed"]


def sample_seed(seed: int, epoch: int, index: int, stream: str = "") -> int:
    """Hash (seed, epoch, sample index) to an independent seed.

    Args:
        seed: The run's seed.
        epoch: The epoch, from 0.
        index: The sample's index in its data set (or a step, or a rank: whatever is seeded).
        stream: A name that keeps apart the uses of one sample's randomness, such as
            ``"augment"`` and ``"mixing"``.

    Returns:
        An integer in [0, 2**63), the same on every machine and in every process.
    """
    key = f"{seed}/{epoch}/{index}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def draw_seeds(num: int, generator: torch.Generator | None = None) -> list[int]:
    """Draw seeds for generators of the standard library.

    Only those draw Beta variates from an explicit generator; torch's public interface does not.

    Args:
        num: How many.
        generator: A CPU generator, or None for torch's global one (which ``DataLoader`` seeds
            differently in each worker).
    """
    seeds: list[int] = torch.randint(0, 2**62, (num,), generator=generator).tolist()
    return seeds
