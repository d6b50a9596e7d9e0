"""Weighted losses of FCOS: torchvision's head.

The subclass has a loss of its own and leaves everything else to torchvision's. It adds no
parameters, buffers or random numbers.

Shapes: B images, A anchors (points) of one image over all levels, N objects, P foreground
anchors of the whole batch, K classes with background 0 (torchvision's FCOS has an output for it
that no object uses).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detmix.losses.object_weights import Targets, TensorDict, Tensors, WeightedPart, weighted_sum
from detmix.losses.targets import checked


class WeightedFCOSHead(FCOSHead, WeightedPart):  # type: ignore[misc]
    """Torchvision's FCOS head with a weight for each anchor."""

    # All three sums over the batch are divided by max(1, P), or by max(1, sum of the P weights).

    @torch.jit.unused
    def compute_loss(
        self, targets: Targets, head_outputs: TensorDict, anchors: Tensors, matched_idxs: Tensors
    ) -> TensorDict:
        """Compute the weighted losses of the batch."""
        logits = head_outputs["cls_logits"]
        targets = checked(targets, logits.shape[2])
        all_weights = self.loss_weighting.of_anchors(targets, matched_idxs)
        matched = torch.stack(matched_idxs)
        foreground = torch.where(matched >= 0)
        # Image after image, which is the order of `foreground` too.
        labels = torch.cat([t["labels"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])
        boxes = torch.cat([t["boxes"][m[m >= 0]] for t, m in zip(targets, matched, strict=True)])
        points, weights = torch.stack(anchors)[foreground], all_weights[foreground]

        goals = torch.zeros_like(logits)
        image, anchor = foreground
        goals[image, anchor, labels] = 1.0
        predicted = self.box_coder.decode(head_outputs["bbox_regression"][foreground], points)
        centerness = F.binary_cross_entropy_with_logits(
            head_outputs["bbox_ctrness"].squeeze(dim=2)[foreground],
            centerness_targets(self.box_coder.encode(points, boxes)),
            reduction="none",
        )
        sums = {
            "classification": weighted_sum(sigmoid_focal_loss(logits, goals), all_weights),
            "bbox_regression": weighted_sum(generalized_box_iou_loss(predicted, boxes), weights),
            "bbox_ctrness": weighted_sum(centerness, weights),
        }
        divisor = self.loss_weighting.divisor(len(labels), weights)
        return {name: total / divisor for name, total in sums.items()}


def centerness_targets(distances: Tensor) -> Tensor:
    """Return how central points are, by ``(P, 4)`` distances to sides: FCOS, equation 3."""
    sides = distances[:, [[0, 2], [1, 3]]]  # horizontal, vertical
    return torch.sqrt((sides.amin(dim=2) / sides.amax(dim=2)).prod(dim=1))
