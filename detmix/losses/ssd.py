"""Weighted losses of SSD300 and SSDlite320: torchvision's SSD with a weight for each anchor.

Unlike in the other families the losses sit on the model itself, so the model's own class is
replaced. The subclass adds no parameters, buffers or random numbers.

Shapes: B images, A anchors of one image over all levels, K classes with background 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.ssd import SSD

from detmix.losses.object_weights import Targets, TensorDict, Tensors, WeightedPart, weighted_sum
from detmix.losses.targets import checked


class WeightedSSD(SSD, WeightedPart):  # type: ignore[misc]
    """Torchvision's SSD with a weight for each matched anchor and each mined negative."""

    # Negatives are mined by their unweighted losses, so that both losses are linear in the weights;
    # both are divided by max(1, matched anchors of the batch), or by max(1, sum of their weights).

    @torch.jit.unused
    def compute_loss(
        self, targets: Targets, head_outputs: TensorDict, anchors: Tensors, matched_idxs: Tensors
    ) -> TensorDict:
        """Compute both weighted losses of a batch."""
        logits, regression = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        targets = checked(targets, logits.size(-1))
        all_weights = self.loss_weighting.of_anchors(targets, matched_idxs)
        labels = torch.zeros_like(torch.stack(matched_idxs))
        box_sums = []
        for i, (target, matched, weights) in enumerate(
            zip(targets, matched_idxs, all_weights, strict=True)
        ):
            foreground = torch.where(matched >= 0)[0]
            own = matched[foreground]
            labels[i, foreground] = target["labels"][own]
            goals = self.box_coder.encode_single(target["boxes"][own], anchors[i][foreground])
            losses = F.smooth_l1_loss(regression[i][foreground], goals, reduction="none")
            box_sums.append(weighted_sum(losses, weights[foreground]))
        foreground_weights = all_weights[labels > 0]
        normalizer = self.loss_weighting.divisor(len(foreground_weights), foreground_weights)
        class_sum = self.class_sum(logits, labels, all_weights)
        return {
            "bbox_regression": torch.stack(box_sums).sum() / normalizer,
            "classification": class_sum / normalizer,
        }

    def class_sum(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Sum weight times cross-entropy of ``(B, A, K)`` logits: matched and hard negatives."""
        losses = F.cross_entropy(
            logits.view(-1, logits.size(-1)), labels.view(-1), reduction="none"
        ).view(labels.size())
        positive = labels > 0
        negative = hard_negatives(losses.detach(), positive, self.neg_to_pos_ratio)
        weighted = losses * weights
        return weighted[positive].sum() + weighted[negative].sum()


def hard_negatives(losses: Tensor, foreground: Tensor, ratio: float) -> Tensor:
    """Choose ``(B, A)`` negatives of highest loss, ``ratio`` times an image's positives."""
    # Where there are fewer, positives fill up the number, and count twice: as in torchvision.
    ranked = losses.masked_fill(foreground, -torch.inf)
    order = ranked.sort(1, descending=True)[1]
    rank = order.sort(1)[1]
    return rank < ratio * foreground.sum(1, keepdim=True)
