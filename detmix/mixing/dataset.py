"""A data set whose samples are mixed with independent partners."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from detmix.mixing.mixer import DetectionMixer, MixParams
from detmix.mixing.seeding import draw_seeds, sample_seed
from detmix.mixing.target import Sample, Target


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
        """Draw a sample's partner in the data set and how they are mixed; None if it is not.

        With a seed, always the same within an epoch.
        """
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        if self.seed is None:
            (seed,) = draw_seeds(1)
        else:
            seed = sample_seed(self.seed, self.mix.epoch, index, self._stream)
        rng = random.Random(seed)
        how = self.mix.draw(rng)
        if how is None or size == 1:
            return None
        partner = rng.randrange(size - 1)
        partner += partner >= index  # every index but its own is equally likely
        return MixParams(partner, how)

    def __getitem__(self, index: int) -> Sample:
        params = self.draw_params(index)
        index %= len(self)
        if params is None:
            return self.mix.transform([self.dataset[index]], [None], numbers=[index])[0]
        pair = [self.dataset[index], self.dataset[params.partner]]
        in_pair = MixParams(1, params.how)
        return self.mix.transform(pair, [in_pair, None], numbers=[index, params.partner])[0]
