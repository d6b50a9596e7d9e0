r"""What every family of weighted detectors shares: settings, each sample's weight, weighted sums.

A loss of samples i with weights :math:`w_i` is :math:`\frac{1}{n} \sum_i w_i l_i` with
torchvision's own normalizer n, so it is linear in the weights, or with their sum as n. Its form is
chosen so that with all weights 1 values and gradients equal torchvision's bit for bit.

Targets are checked where they come to the first loss, before anything is sampled: in an R-CNN's
RPN, in the head of a one-stage detector. What torchvision computes is computed; labels that it
refuses, or gets wrong without a word, are refused by target.

Shapes: B images, N objects in one of them, S sampled or matched anchors or proposals, A anchors of
an image over all levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from detmix.mixing import box_weights

Normalizer = Literal["samples", "weights"]
Targets = list[dict[str, Tensor]]
#: a key, each target's values, what they must be, and the rule for each row of them
Column = tuple[str, list[Tensor], str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class _LabelKinds:
    """With which labels torchvision computes the losses of a family, as it stacks and indexes."""

    of_image: tuple[torch.dtype, ...]
    of_batch: tuple[torch.dtype, ...]  #: what all of a batch promote to, some of `of_image`
    of_none: Callable[[torch.Size], bool]  #: whether labels of no object may have this shape


_INDICES = (torch.int64, torch.int32)
_SIGNED = (*_INDICES, torch.int16, torch.int8)
_SMALL = (*_SIGNED, torch.uint8, torch.bool)
_LABELS = {
    "rcnn": _LabelKinds((torch.int64,), (torch.int64,), lambda shape: True),
    "mask_rcnn": _LabelKinds((torch.int64,), (torch.int64,), lambda shape: len(shape) == 1),
    "retinanet": _LabelKinds(_INDICES, _INDICES, lambda shape: shape[-1] <= 1),
    "fcos": _LabelKinds(_SIGNED, _INDICES, lambda shape: shape[0] == 0),
    "ssd": _LabelKinds(_SMALL, (torch.int64, torch.uint8), lambda shape: len(shape) == 1),
}


@dataclass(frozen=True)
class LossWeighting:
    """How the losses of a detector are weighted."""

    background_weight: float = 1.0  #: of every sample that matches no object
    #: what the weighted sum is divided by: the number of samples, or the sum of their weights
    normalizer: Normalizer = "samples"

    def __post_init__(self) -> None:
        if not 0 <= self.background_weight < math.inf:
            raise ValueError(
                f"background_weight must be finite and not negative, got {self.background_weight}"
            )
        if self.normalizer not in get_args(Normalizer):
            raise ValueError(
                f"normalizer must be one of {get_args(Normalizer)}, got {self.normalizer!r}"
            )

    def of_samples(
        self, target: dict[str, Tensor], matched_idxs: Tensor, foreground: Tensor
    ) -> Tensor:
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


def checked(targets: Targets, num_classes: float, family: str, *more: Column) -> Targets:
    """Return targets with ``(N,)`` int64 labels, or raise for the first of no right loss."""
    _check_labels(targets, _LABELS[family])
    labels = [target["labels"].flatten().to(torch.int64) for target in targets]
    expected = f"in 1..{num_classes - 1} (0 is background)"
    # On a GPU others would be fatal.
    column: Column = ("labels", labels, expected, lambda y: (y >= 1) & (y < num_classes))
    check_objects(targets, column, *more)
    return [target | {"labels": own} for target, own in zip(targets, labels, strict=True)]


def _check_labels(targets: Targets, kinds: _LabelKinds) -> None:
    """Raise TypeError or ValueError for the first labels of another dtype or shape."""
    dtypes = [getattr(target.get("labels"), "dtype", None) for target in targets]
    known = [dtype for dtype in dtypes if dtype in kinds.of_image]
    joined = functools.reduce(torch.promote_types, known, torch.bool)
    allowed = kinds.of_image if joined in kinds.of_batch else kinds.of_batch
    for index, (target, dtype) in enumerate(zip(targets, dtypes, strict=True)):
        if "labels" not in target:
            raise ValueError(f"target {index} must have 'labels', one for each box")
        if dtype not in allowed:
            found = dtype or type(target["labels"]).__name__
            raise TypeError(
                f"'labels' of target {index} must be a tensor of one of {allowed}, got {found}"
            )
        shape, count = target["labels"].shape, len(target["boxes"])
        is_none = count == 0 and shape.numel() == 0
        if not (kinds.of_none(shape) if is_none else shape == (count,)):
            raise ValueError(
                f"'labels' of target {index} must have shape ({count},), one for each box, "
                f"got {tuple(shape)}"
            )


def check_objects(targets: Targets, *more: Column) -> None:
    """Raise ValueError for the first weight, box or row of more that no loss is computed with."""
    weights = [box_weights(target) for target in targets]
    for index, (target, own) in enumerate(zip(targets, weights, strict=True)):
        count = len(target["boxes"])
        if own.shape != (count,):
            raise ValueError(
                f"'box_weights' of target {index} must have shape ({count},), one for each box, "
                f"got {tuple(own.shape)}"
            )
    boxes = [target["boxes"] for target in targets]
    _check_rows(
        ("box_weights", weights, "finite and not negative", lambda w: torch.isfinite(w) & (w >= 0)),
        ("boxes", boxes, "finite", lambda boxes: torch.isfinite(boxes).all(1)),
        *more,
    )


def _check_rows(*columns: Column) -> None:
    """Raise ValueError for the first row that breaks its column's rule."""
    valid = [is_valid(torch.cat(values)) for _, values, _, is_valid in columns]
    if bool(torch.cat(valid).all()):  # asked once, as it waits for the device
        return
    for key, values, expected, is_valid in columns:
        for index, own in enumerate(values):
            for row in (~is_valid(own)).nonzero()[:, 0].tolist():
                raise ValueError(
                    f"{key!r} of target {index} must be {expected}, got {own[row].tolist()} "
                    f"for box {row}"
                )
