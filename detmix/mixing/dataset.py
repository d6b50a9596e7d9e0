"""A data set whose samples are mixed with independent partners."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from detmix.mixing.ground_truth import Target, check_sample, with_box_weights
from detmix.mixing.mixer import DetectionMixer, Sample
from detmix.mixing.seeding import generator_to_random, sample_seed

__all__ = ["MixedDataset"]


class MixedDataset(Dataset[tuple[Tensor, Target]]):
    """A map-style detection data set, each sample mixed with one drawn from all the others.

    Costs a second decode for each mixed sample; a mixer on the batch costs none, but finds its
    partners within the batch.

    Args:
        dataset: Yields (image, target) by index and has a length.
        mix: The mixer, such as `DetectionMixUp`.
        seed: With a seed, whether a sample is mixed, its partner and its ratio are a function
            of (seed, epoch, index) alone: call `set_epoch` at the start of each epoch. With
            None they come from torch's global generator.
    """

    def __init__(
        self, dataset: Dataset[Any], mix: DetectionMixer, *, seed: int | None = None
    ) -> None:
        self.dataset = dataset
        self.mix = mix
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, here and in the data set underneath."""
        self.mix.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> Sample:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        rng = self._random(index)
        sample = self._load(index)
        mixed = rng.random() < self.mix.p and self.mix.active and size > 1
        if not mixed:
            return sample[0], with_box_weights(sample[1])
        partner = rng.randrange(size - 1)
        partner += partner >= index  # every index but its own is equally likely
        names = (f"sample {index}", f"sample {partner}")
        return self.mix.mix_named(sample, self._load(partner), self.mix.draw_ratio(rng), names)

    def _random(self, index: int) -> random.Random:
        if self.seed is None:
            return generator_to_random(None)
        return random.Random(sample_seed(self.seed, self.mix.epoch, index, "mixing"))

    def _load(self, index: int) -> Sample:
        image, target = self.dataset[index]
        check_sample(image, target, f"sample {index}")
        return image, target
