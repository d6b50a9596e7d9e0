"""What every family of weighted detectors shares: the settings and each sample's weight.

Shapes: N objects in an image, S sampled or matched anchors or proposals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

Normalizer = Literal["samples", "weights"]


@dataclass(frozen=True)
class LossWeighting:
    """How the losses of a detector are weighted.

    Attributes:
        background_weight: Weight of every sample that matches no object.
        normalizer: What the weighted sum is divided by: torchvision's number of ``"samples"``,
            or the sum of their ``"weights"``.
    """

    background_weight: float = 1.0
    normalizer: Normalizer = "samples"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.background_weight) and self.background_weight >= 0):
            raise ValueError(
                f"background_weight must be finite and not negative, got {self.background_weight}"
            )
        if self.normalizer not in get_args(Normalizer):
            raise ValueError(
                f"normalizer must be one of {get_args(Normalizer)}, got {self.normalizer!r}"
            )

    def rescale(self, loss: Tensor, weights: Tensor) -> Tensor:
        """Turn a loss divided by the number of samples into one with this normalizer.

        Args:
            loss: A scalar, divided by the number of samples S.
            weights: ``(S,)`` weights of all these samples, background too.
        """
        if self.normalizer == "samples":
            return loss
        total = weights.sum()
        # All weights 0: the loss is 0, and 0 / 0 must not make it NaN.
        return loss * (weights.numel() / total.clamp_min(torch.finfo(total.dtype).eps))


def object_weights(targets: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Return the checked ``box_weights`` ``(N,)`` float32 of each target, ones where none are."""
    all_weights = []
    for index, target in enumerate(targets):
        boxes = target["boxes"]
        weights = target.get("box_weights")
        if weights is None:
            weights = torch.ones(len(boxes), device=boxes.device)
        weights = torch.as_tensor(weights, dtype=torch.float32, device=boxes.device)
        if weights.shape != (len(boxes),):
            raise ValueError(
                f"'box_weights' of target {index} must have shape ({len(boxes)},), one for each "
                f"box, got {tuple(weights.shape)}"
            )
        all_weights.append(weights)
    if all_weights:
        joined = torch.cat(all_weights)
        boxes = torch.cat([target["boxes"] for target in targets])
        # One check for the batch, as each waits for the device.
        valid = (torch.isfinite(joined) & (joined >= 0)).all() & torch.isfinite(boxes).all()
        if not bool(valid):
            _raise_bad_values(targets, all_weights)
    return all_weights


def _raise_bad_values(
    targets: Sequence[dict[str, Tensor]], all_weights: Sequence[Tensor]
) -> NoReturn:
    for index, (target, weights) in enumerate(zip(targets, all_weights, strict=True)):
        rows = zip(target["boxes"].tolist(), weights.tolist(), strict=True)
        for row, (box, weight) in enumerate(rows):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"'box_weights' of target {index} must be finite and not negative, got "
                    f"{weight} for box {row}"
                )
            if not all(map(math.isfinite, box)):
                raise ValueError(
                    f"'boxes' of target {index} must be finite, got {box} for box {row}"
                )
    raise AssertionError("called without a bad value")


def check_labels(targets: Sequence[dict[str, Tensor]], num_classes: int) -> None:
    """Check that all labels are classes of the detector: on a GPU a wrong one is fatal."""
    labels = torch.cat([target["labels"] for target in targets])
    if bool(((labels >= 1) & (labels < num_classes)).all()):
        return
    for index, target in enumerate(targets):
        for row, label in enumerate(target["labels"].tolist()):
            if not 1 <= label < num_classes:
                raise ValueError(
                    f"'labels' of target {index} must be in 1..{num_classes - 1} (0 is "
                    f"background), got {label} for box {row}"
                )


def sample_weights(
    weights: Tensor, matched_idxs: Tensor, foreground: Tensor, background_weight: float
) -> Tensor:
    """Give ``(S,)`` samples the weights of their objects out of ``(N,)``, or the background's."""
    background = weights.new_full((), background_weight)
    if len(weights) == 0:  # nothing to gather from, and nothing is foreground
        return background.expand(len(matched_idxs))
    return torch.where(foreground, weights[matched_idxs.clamp(min=0)], background)
