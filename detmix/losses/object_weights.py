"""What every family of weighted detectors shares: settings, each sample's weight, weighted sums.

A loss of samples i with weights ``w_i`` is ``sum_i w_i l_i / n`` with torchvision's own normalizer
n, so it is linear in the weights, or with their sum as n. Its form is chosen so that with all
weights 1 values and gradients equal torchvision's bit for bit.

Shapes: B images, N objects in one of them, S sampled or matched anchors or proposals, A anchors of
an image over all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from detmix.mixing import box_weights

Normalizer = Literal["samples", "weights"]
Tensors = list[Tensor]
TensorDict = dict[str, Tensor]
Targets = list[TensorDict]


@dataclass(frozen=True)
class LossWeighting:
    """How the losses of a detector are weighted."""

    background_weight: float = 1.0  #: of every sample that matches no object
    #: what the weighted sum is divided by: the number of samples, or the sum of their weights
    normalizer: Normalizer = "samples"

    def __post_init__(self) -> None:
        if not 0 <= self.background_weight < math.inf:
            raise ValueError(f"background_weight must be in [0, inf), got {self.background_weight}")
        if self.normalizer not in get_args(Normalizer):
            raise ValueError(f"normalizer must be samples or weights, got {self.normalizer!r}")

    def of_samples(self, target: TensorDict, matched_idxs: Tensor, foreground: Tensor) -> Tensor:
        """Give ``(S,)`` samples of an image the weights of their objects, or the background's."""
        weights = box_weights(target)
        background = weights.new_full((), self.background_weight)
        if len(weights) == 0:  # nothing to gather from, and nothing is foreground
            return background.expand(len(matched_idxs))
        return torch.where(foreground, weights[matched_idxs.clamp(min=0)], background)

    def of_anchors(self, targets: Targets, matched_idxs: Sequence[Tensor]) -> Tensor:
        """Give all anchors of all images their weights: ``(B, A)``. A match < 0 is none."""
        pairs = zip(targets, matched_idxs, strict=True)
        return torch.stack([self.of_samples(target, own, own >= 0) for target, own in pairs])

    def rescale(self, loss: Tensor, weights: Tensor) -> Tensor:
        """Turn a loss divided by S into one with this normalizer, of all S samples' weights."""
        if self.normalizer == "samples":
            return loss
        total = weights.sum()
        # All weights 0, or next to it: the loss is 0, and 0 / 0 must not make it NaN.
        return loss * (weights.numel() / total.clamp_min(torch.finfo(total.dtype).eps))

    def divisor(self, num_foreground: Tensor | int, weights: Tensor) -> Tensor | int:
        """Return what one-stage detectors divide their sums by, of the foreground's weights."""
        # Not less than 1: a few objects of little weight must not blow up the loss of the
        # background. A count that is a tensor in torchvision is one here: a GPU divides by a host
        # number differently.
        if self.normalizer == "weights":
            return weights.sum().clamp(min=1)
        return max(num_foreground, 1)


class WeightedPart:
    """The settings of a part of a detector that computes losses; last of its class's bases."""

    # TorchScript takes the first annotations it finds along the bases: declared in a subclass of
    # torchvision's part, this one would hide those of its `box_coder` and `proposal_matcher`. It
    # reads no strings in signatures, either, so files of such parts do not postpone annotations.
    loss_weighting: LossWeighting


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of losses, ``(S,)`` or several for each sample, each times the sample's weight."""
    # Weights are rounded to the losses' dtype: else the sum of half precision would be of another.
    trailing = (1,) * (losses.ndim - weights.ndim)
    return (losses * weights.to(losses.dtype).reshape(*weights.shape, *trailing)).sum()
