"""Weighted losses of SSD300 and SSDlite320: torchvision's SSD with a weight for each anchor.

Unlike in the other families the losses sit on the model itself, so the model's own class is
replaced. The subclass adds no parameters, buffers or random numbers.

Shapes: B images, A anchors of one image over all levels, N objects of one image, F anchors of
one image matched to an object, K classes with background 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.ssd import SSD

from detmix.losses.object_weights import LossWeighting, check_labels, object_weights, sample_weights
from detmix.losses.terms import foreground_normalizer, weighted_smooth_l1

Targets = list[dict[str, Tensor]]

# Transition point of torchvision's smooth L1 loss in SSD: the default of `torch.nn`.
SMOOTH_L1_BETA = 1.0


class WeightedSSD(SSD):  # type: ignore[misc]
    r"""Torchvision's SSD with a weight for each matched anchor and each mined negative."""

    # Negatives are mined by their unweighted losses, so that both losses are linear in the weights;
    # both are divided by max(1, matched anchors of the batch), or by max(1, sum of their weights).

    loss_weighting: LossWeighting

    def compute_loss(
        self,
        targets: Targets,
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Compute both weighted losses of a batch."""
        cls_logits = head_outputs["cls_logits"]
        weights = torch.stack(
            [
                sample_weights(w, m, m >= 0, self.loss_weighting.background_weight)
                for w, m in zip(object_weights(targets), matched_idxs, strict=True)
            ]
        )
        check_labels(targets, cls_logits.size(-1))
        foreground = [torch.where(matched >= 0)[0] for matched in matched_idxs]
        box_loss = self.weighted_box_loss(
            targets, head_outputs["bbox_regression"], anchors, matched_idxs, foreground, weights
        )
        class_loss = self.weighted_class_loss(
            targets, cls_logits, matched_idxs, foreground, weights
        )
        matched_weights = [w[chosen] for w, chosen in zip(weights, foreground, strict=True)]
        normalizer = foreground_normalizer(
            sum(chosen.numel() for chosen in foreground),
            torch.cat(matched_weights),
            self.loss_weighting.normalizer,
        )
        return {
            "bbox_regression": box_loss / normalizer,
            "classification": class_loss / normalizer,
        }

    def weighted_box_loss(
        self,
        targets: Targets,
        bbox_regression: Tensor,
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
        foreground: list[Tensor],
        weights: Tensor,
    ) -> Tensor:
        """Sum weight times smooth L1 loss of ``(B, A, 4)`` regressions over all matched anchors."""
        losses = []
        for index, (target, chosen) in enumerate(zip(targets, foreground, strict=True)):
            goals = self.box_coder.encode_single(
                target["boxes"][matched_idxs[index][chosen]], anchors[index][chosen]
            )
            losses.append(
                weighted_smooth_l1(
                    bbox_regression[index][chosen],
                    goals,
                    weights[index][chosen],
                    beta=SMOOTH_L1_BETA,
                    num_samples=1,  # the sum; the normalizer is that of the whole batch
                )
            )
        return torch.stack(losses).sum()

    def weighted_class_loss(
        self,
        targets: Targets,
        cls_logits: Tensor,
        matched_idxs: list[Tensor],
        foreground: list[Tensor],
        weights: Tensor,
    ) -> Tensor:
        """Sum weight times cross-entropy of ``(B, A, K)`` logits: matched and hard negatives."""
        labels = torch.zeros_like(torch.stack(matched_idxs))
        for index, chosen in enumerate(foreground):
            labels[index, chosen] = targets[index]["labels"][matched_idxs[index][chosen]]
        losses = F.cross_entropy(
            cls_logits.view(-1, cls_logits.size(-1)), labels.view(-1), reduction="none"
        ).view(labels.size())
        positive = labels > 0
        negative = hard_negatives(losses.detach(), positive, self.neg_to_pos_ratio)
        weighted = losses * weights
        return weighted[positive].sum() + weighted[negative].sum()


def hard_negatives(losses: Tensor, foreground: Tensor, ratio: float) -> Tensor:
    """Choose ``(B, A)`` negatives of highest loss, ``ratio`` times an image's positives."""
    ranked = losses.masked_fill(foreground, -torch.inf)
    order = ranked.sort(1, descending=True)[1]
    rank = order.sort(1)[1]
    return rank < ratio * foreground.sum(1, keepdim=True)
