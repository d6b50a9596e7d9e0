"""One of several mixers for each sample."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from detmix.mixing.mixer import DetectionMixer, Sample

__all__ = ["RandomChoice"]


class RandomChoice(DetectionMixer):
    """Picks a mixer for each sample, and leaves to it whether and how the sample is mixed.

    Each mixer keeps its own ``p`` and its own schedule: where the one picked does not mix, the
    sample stays as it is. It serves wherever a mixer does.

    Args:
        mixers: The mixers to choose from.
        probabilities: How likely each is picked, relative to the others; None for all alike.

    Raises:
        ValueError: If there is no mixer, or the probabilities are not one for each, not
            negative, with a positive sum.
        TypeError: If one is not a `DetectionMixer`.

    Example:
        >>> from detmix import DetectionCutMix, DetectionMixUp
        >>> mix = RandomChoice([DetectionMixUp(p=0.5), DetectionCutMix(p=0.5)])
        >>> mix.p
        0.5
    """

    def __init__(
        self, mixers: Sequence[DetectionMixer], probabilities: Sequence[float] | None = None
    ) -> None:
        mixers = list(mixers)
        _check_mixers(mixers)
        shares = _shares(len(mixers), probabilities)
        # as a share of all samples: what the mixers do in the epochs in which they mix
        chance = math.fsum(share * mixer.p for share, mixer in zip(shares, mixers, strict=True))
        super().__init__(min(chance, 1.0))
        self.mixers = nn.ModuleList(mixers)
        self.probabilities = shares
        self._epoch.value = max(mixer.epoch for mixer in mixers)

    @property
    def active(self) -> bool:
        """Whether any of the mixers mixes in this epoch."""
        return any(self._mixer(number).active for number in range(len(self.mixers)))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, in all mixers."""
        super().set_epoch(epoch)
        for number in range(len(self.mixers)):
            self._mixer(number).set_epoch(epoch)

    def draw(self, rng: random.Random) -> tuple[int, Any] | None:
        """Pick a mixer and let it draw whether and how one sample is mixed.

        Args:
            rng: The sample's own random numbers.

        Returns:
            The mixer's number and what it drew; None for a sample that stays as it is.
        """
        number = self._pick(rng)
        how = self._mixer(number).draw(rng)
        return None if how is None else (number, how)

    def draw_pair(self, rng: random.Random) -> tuple[int, Any]:
        """Pick a mixer and let it draw how a pair is mixed: its number and what it drew."""
        number = self._pick(rng)
        return number, self._mixer(number).draw_pair(rng)

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: tuple[int, Any]) -> Sample:
        """Mix two checked samples with the mixer picked."""
        number, drawn = how
        return self._mixer(number).mix_pair(sample_a, sample_b, drawn)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"probabilities={self.probabilities}"

    def _pick(self, rng: random.Random) -> int:
        return rng.choices(range(len(self.mixers)), self.probabilities)[0]

    def _mixer(self, number: int) -> DetectionMixer:
        return cast(DetectionMixer, self.mixers[number])


def _check_mixers(mixers: list[DetectionMixer]) -> None:
    if not mixers:
        raise ValueError("mixers must hold at least one mixer, got none")
    for number, mixer in enumerate(mixers):
        if not isinstance(mixer, DetectionMixer):
            raise TypeError(
                f"mixers[{number}] must be a DetectionMixer, got {type(mixer).__name__}"
            )


def _shares(num: int, probabilities: Sequence[float] | None) -> tuple[float, ...]:
    """Return the probabilities, one for each of ``num`` mixers, with a sum of 1."""
    given = [1.0] * num if probabilities is None else [float(value) for value in probabilities]
    valid = len(given) == num and all(0.0 <= value < math.inf for value in given)
    if not valid or not 0 < sum(given) < math.inf:
        raise ValueError(
            f"probabilities must be {num} finite numbers, one for each mixer, not negative and "
            f"with a positive sum, got {probabilities}"
        )
    return tuple(value / sum(given) for value in given)
