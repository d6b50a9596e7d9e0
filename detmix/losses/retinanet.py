"""Weighted losses of RetinaNet, both versions: torchvision's head.

The subclass has a loss of its own and leaves everything else to torchvision's. It adds no
parameters, buffers or random numbers.

Shapes: B images, A anchors of one image over all levels, N objects, P foreground anchors,
K classes with background 0 (torchvision's RetinaNet has an output for it that no object uses).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detmix.losses.object_weights import Targets, TensorDict, Tensors, WeightedPart, weighted_sum
from detmix.losses.targets import checked


class WeightedRetinaNetHead(RetinaNetHead, WeightedPart):  # type: ignore[misc]
    """Torchvision's RetinaNet head with a weight for each anchor."""

    # Each image's sums are divided by max(1, P), or by max(1, sum of the P weights). Anchors
    # between the thresholds have no classification loss.

    @torch.jit.unused
    def compute_loss(
        self, targets: Targets, head_outputs: TensorDict, anchors: Tensors, matched_idxs: Tensors
    ) -> TensorDict:
        """Compute the weighted losses of the batch."""
        logits, regression = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        targets = checked(targets, logits.shape[2])
        all_weights = self.loss_weighting.of_anchors(targets, matched_idxs)
        classification, box = [], []
        for i, (target, matched, weights) in enumerate(
            zip(targets, matched_idxs, all_weights, strict=True)
        ):
            classification.append(self.classification_loss(logits[i], target, matched, weights))
            box.append(self.box_loss(regression[i], anchors[i], target["boxes"], matched, weights))
        # Added up one by one like torchvision's: the sum of a stack rounds differently.
        return {
            "classification": functools.reduce(torch.add, classification) / len(targets),
            "bbox_regression": functools.reduce(torch.add, box) / len(targets),
        }

    def classification_loss(
        self, logits: Tensor, target: TensorDict, matched: Tensor, weights: Tensor
    ) -> Tensor:
        """Focal loss of one image's ``(A, K)`` logits; an anchor's weight holds for all classes."""
        foreground = matched >= 0
        goals = torch.zeros_like(logits)
        goals[foreground, target["labels"][matched[foreground]]] = 1.0
        kept = matched != Matcher.BETWEEN_THRESHOLDS
        total = weighted_sum(sigmoid_focal_loss(logits[kept], goals[kept]), weights[kept])
        return total / self.loss_weighting.divisor(foreground.sum(), weights[foreground])

    def box_loss(
        self, regression: Tensor, anchors: Tensor, boxes: Tensor, matched: Tensor, weights: Tensor
    ) -> Tensor:
        """Box loss of one image over its foreground anchors: L1 (v1), GIoU (v2)."""
        foreground = torch.where(matched >= 0)[0]
        weights = weights[foreground]
        deltas, anchors = regression[foreground], anchors[foreground]
        boxes = boxes[matched[foreground]]
        coder, loss_type = self.regression_head.box_coder, self.regression_head._loss_type
        if loss_type == "l1":
            losses = F.l1_loss(deltas, coder.encode_single(boxes, anchors), reduction="none")
        elif loss_type == "giou":
            losses = generalized_box_iou_loss(coder.decode_single(deltas, anchors), boxes)
        else:
            raise ValueError(f"the box loss must be of type l1 or giou, got {loss_type!r}")
        divisor = self.loss_weighting.divisor(len(foreground), weights)
        return weighted_sum(losses, weights) / divisor
