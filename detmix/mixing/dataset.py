"""A data set whose samples are mixed with independent partners."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from detmix.mixing.mixer import DetectionMixer, MixParams, Sample
from detmix.mixing.seeding import draw_seeds, sample_seed
from detmix.mixing.target import Target, check_sample, completed


class MixedDataset(Dataset[tuple[Tensor, Target]]):
    """A map-style detection data set, each sample mixed with one drawn from all the others.

    Costs a second decode for each mixed sample; a mixer on the batch costs none, but finds its
    partners within the batch.

    Args:
        dataset: Yields (image, target) by index and has a length.
        mix: The mixer, such as `DetectionMixUp`.
        seed: With a seed, whether a sample is mixed, its partner and how they are mixed are
            a function of (seed, epoch, index) alone: call `set_epoch` at the start of each
            epoch. With None they come from torch's global generator.
    """

    def __init__(
        self, dataset: Dataset[Any], mix: DetectionMixer, *, seed: int | None = None
    ) -> None:
        self.dataset = dataset
        self.mix = mix
        self.seed = seed
        # Each of several one within the other, and a mixer on the batch, draw their own.
        depth = 0
        inner: Any = dataset
        while inner is not None:
            depth += isinstance(inner, MixedDataset)
            inner = getattr(inner, "dataset", None)
        self._stream = f"mixing/dataset/{depth}"

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, here and in the data set underneath."""
        self.mix.set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def draw_params(self, index: int) -> MixParams | None:
        """Draw a sample's partner and how they are mixed; None if it stays as it is.

        Args:
            index: The sample's index, from 0.

        Returns:
            The partner's index in the data set and what the mixer drew; with a seed, always the
            same within an epoch.
        """
        rng = self._random(index)
        how, others = self.mix.draw(rng), len(self) - 1
        if how is None or not others:
            return None
        partner = rng.randrange(others)
        partner += partner >= index  # every index but its own is equally likely
        return MixParams(partner, how)

    def __getitem__(self, index: int) -> Sample:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        params = self.draw_params(index)
        image, target = self._load(index)
        if params is None:
            return image, completed(target, image.device)
        names = (f"sample {index}", f"sample {params.partner}")
        partner = self._load(params.partner)
        return self.mix.mix_named((image, target), partner, params.how, names)

    def _random(self, index: int) -> random.Random:
        if self.seed is None:
            return random.Random(*draw_seeds(1))
        return random.Random(sample_seed(self.seed, self.mix.epoch, index, self._stream))

    def _load(self, index: int) -> Sample:
        image, target = self.dataset[index]
        check_sample(image, target, f"sample {index}")
        return image, target
