"""The box weights that a configuration's mixing produces."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from detmix.mixing import box_weights
from detmix.training.config import TrainConfig
from detmix.training.preview import mixed_samples

__all__ = ["sample_box_weights"]


def sample_box_weights(config: TrainConfig, *, num_images: int = 512, epoch: int = 0) -> Tensor:
    """Return the weight of every box in the first images of an epoch, as a training sees them.

    Args:
        config: The training's configuration.
        num_images: How many images; at most an epoch's.
        epoch: The epoch, from 0; in the last ``mixing.off_epochs`` nothing is mixed.

    Returns:
        ``(N,)`` float32 in (0, 1].

    Raises:
        ValueError: If there is no such epoch.
    """
    samples = islice(mixed_samples(config, epoch=epoch), num_images)
    return torch.cat([torch.zeros(0), *(box_weights(target) for _, target in samples)])
