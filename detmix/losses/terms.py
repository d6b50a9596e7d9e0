r"""The losses of detectors with a weight for each sample, as pure functions.

A loss of samples i with weights :math:`w_i` is :math:`\frac{1}{n} \sum_i w_i l_i` with
torchvision's own normalizer n, so it is linear in the weights. The forms are chosen so that
with all weights 1 values and gradients equal torchvision's bit for bit, which
``(w * loss(reduction="none")).sum() / n`` does not achieve for the cross-entropies.

Shapes: S sampled anchors or proposals, P of them foreground, K classes with background 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over S of weight times cross-entropy, of ``(S, K)`` logits and ``(S,)`` labels."""
    if logits.dtype in _HALF:  # not every device's autocast treats log_softmax as cross-entropy
        logits = logits.float()
    return F.nll_loss(F.log_softmax(logits, dim=1) * weights[:, None], labels)


def weighted_binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over S of weight times binary cross-entropy, of ``(S,)`` logits and targets."""
    return F.binary_cross_entropy_with_logits(logits, targets, weight=weights)


def weighted_smooth_l1(
    predictions: Tensor, targets: Tensor, weights: Tensor, *, beta: float, num_samples: int
) -> Tensor:
    """Sum over P of weight times smooth L1 loss of ``(P, 4)`` regressions, divided by S."""
    losses = F.smooth_l1_loss(predictions, targets, beta=beta, reduction="none")
    return weighted_sum(losses, weights) / num_samples


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of losses, ``(S,)`` or several for each sample, each times the sample's weight."""
    # Weights are rounded to the losses' dtype: else the sum of half precision would be of another.
    trailing = (1,) * (losses.ndim - weights.ndim)
    return (losses * weights.to(losses.dtype).reshape(*weights.shape, *trailing)).sum()
