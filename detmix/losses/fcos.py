"""Weighted losses of FCOS: torchvision's head.

The subclass has a loss of its own and leaves everything else to torchvision's. It adds no
parameters, buffers or random numbers.

Shapes: B images, A anchors (points) of one image over all levels, N objects, P foreground
anchors of the whole batch, K classes with background 0 (torchvision's FCOS has an output for it
that no object uses).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detmix.losses.object_weights import LossWeighting, check_labels, object_weights, sample_weights
from detmix.losses.terms import foreground_normalizer, weighted_sum

Targets = list[dict[str, Tensor]]


class WeightedFCOSHead(FCOSHead):  # type: ignore[misc]
    """Torchvision's FCOS head with a weight for each anchor."""

    # All three sums over the batch are divided by max(1, P), or by max(1, sum of the P weights).

    loss_weighting: LossWeighting

    def compute_loss(
        self,
        targets: Targets,
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of the batch."""
        all_weights = object_weights(targets)
        check_labels(targets, head_outputs["cls_logits"].shape[2])
        matched = torch.stack(matched_idxs)
        foreground = torch.where(matched >= 0)
        weights = torch.stack(
            [
                sample_weights(w, m, m >= 0, self.loss_weighting.background_weight)
                for w, m in zip(all_weights, matched, strict=True)
            ]
        )
        # Image after image, which is the order of `foreground` too.
        labels = torch.cat([t["labels"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])
        boxes = torch.cat([t["boxes"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])
        sums = {
            "classification": _classification_sum(
                head_outputs["cls_logits"], foreground, labels, weights
            ),
            **self._box_sums(
                head_outputs["bbox_regression"][foreground],
                head_outputs["bbox_ctrness"].squeeze(dim=2)[foreground],
                torch.stack(anchors)[foreground],
                boxes,
                weights[foreground],
            ),
        }
        divisor = foreground_normalizer(
            len(labels), weights[foreground], self.loss_weighting.normalizer
        )
        return {name: total / divisor for name, total in sums.items()}

    def _box_sums(
        self,
        regression: Tensor,
        centerness: Tensor,
        anchors: Tensor,
        boxes: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Sum the GIoU and centerness losses of the foreground, all arguments ``(P, ...)``."""
        giou = generalized_box_iou_loss(self.box_coder.decode(regression, anchors), boxes)
        goals = centerness_targets(self.box_coder.encode(anchors, boxes))
        bce = F.binary_cross_entropy_with_logits(centerness, goals, reduction="none")
        return {
            "bbox_regression": weighted_sum(giou, weights),
            "bbox_ctrness": weighted_sum(bce, weights),
        }


def centerness_targets(distances: Tensor) -> Tensor:
    """Return how central points are, by ``(P, 4)`` distances to sides: FCOS, equation 3."""
    horizontal, vertical = distances[:, [0, 2]], distances[:, [1, 3]]
    return torch.sqrt(
        (horizontal.amin(dim=1) / horizontal.amax(dim=1))
        * (vertical.amin(dim=1) / vertical.amax(dim=1))
    )


def _classification_sum(
    logits: Tensor, foreground: tuple[Tensor, ...], labels: Tensor, weights: Tensor
) -> Tensor:
    """Sum the focal losses of ``(B, A, K)`` logits; ``(B, A)`` weights hold for all classes."""
    goals = torch.zeros_like(logits)
    image, anchor = foreground
    goals[image, anchor, labels] = 1.0
    return weighted_sum(sigmoid_focal_loss(logits, goals), weights)
