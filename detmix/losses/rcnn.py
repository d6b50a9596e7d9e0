"""Weighted losses of Faster, Mask and Keypoint R-CNN: torchvision's RPN and RoI heads.

The RPN's subclass overrides how anchors are matched and what their loss is; that of the RoI heads
has a training ``forward`` of its own, as torchvision's calls functions of its module there. They
leave the rest to torchvision's and add no parameters, buffers or random numbers.

Shapes: A anchors of one image over all levels, N objects, R sampled proposals of the batch,
K classes with background 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from detmix.losses.object_weights import LossWeighting, check_labels, object_weights, sample_weights
from detmix.losses.roi_branches import (
    Foreground,
    check_keypoints,
    check_masks,
    keypoint_loss,
    mask_loss,
    select_foreground,
    with_empty_branches,
)
from detmix.losses.terms import (
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
    weighted_smooth_l1,
)

Targets = list[dict[str, Tensor]]

# Transition point of torchvision's smooth L1 losses, the same for RPN and RoI heads.
SMOOTH_L1_BETA = 1 / 9


class _Labels(list[Tensor]):
    """Labels ``(A,)`` of each image, with weights, on their way through torchvision's code."""

    weights: list[Tensor]


class WeightedRegionProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Torchvision's region proposal network with a weight for each sampled anchor."""

    loss_weighting: LossWeighting

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: Targets
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return labels (1 object, 0 background, -1 neither) with weights, and matched boxes."""
        # By torchvision's rule, whose own method does not tell which object an anchor matches.
        labels, matched_boxes = _Labels(), []
        labels.weights = []
        matcher, background = self.proposal_matcher, self.loss_weighting.background_weight
        for own, target, box_weights in zip(anchors, targets, object_weights(targets), strict=True):
            boxes = target["boxes"]
            if boxes.numel() == 0:
                boxes = own.new_zeros((1, 4), dtype=torch.float32)
                matched = own.new_full((len(own),), matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
            else:
                matched = matcher(self.box_similarity(boxes, own))
            matched_boxes.append(boxes[matched.clamp(min=0)])
            foreground = matched >= 0
            neither = matched == matcher.BETWEEN_THRESHOLDS
            labels.append(foreground.to(torch.float32).masked_fill(neither, -1.0))
            labels.weights.append(sample_weights(box_weights, matched, foreground, background))
        return labels, matched_boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the objectness and the box loss, both divided by the number of sampled anchors."""
        assert isinstance(labels, _Labels)
        positives, negatives = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positives))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negatives))[0]])
        weights = torch.cat(labels.weights)
        object_loss = weighted_binary_cross_entropy(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], weights[sampled]
        )
        box_loss = weighted_smooth_l1(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            weights[positive],
            beta=SMOOTH_L1_BETA,
            num_samples=sampled.numel(),
        )
        rescale = self.loss_weighting.rescale
        return rescale(object_loss, weights[sampled]), rescale(box_loss, weights[sampled])


class WeightedRoIHeads(RoIHeads):  # type: ignore[misc]
    """Torchvision's RoI heads with a weight for each sampled proposal."""

    # With normalizer "weights" each loss is divided by the weights of what torchvision counts for
    # it: sampled proposals, the pixels of foreground masks, valid keypoints.

    loss_weighting: LossWeighting

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Classify and refine proposals, and in training return the weighted losses."""
        if not self.training:
            return super().forward(  # type: ignore[no-any-return]
                features, proposals, image_shapes, targets
            )
        if targets is not None:
            targets = with_empty_branches(targets, self.has_mask(), self.has_keypoint())
        self.check_targets(targets)
        assert targets is not None  # checked above
        proposals, matched, labels, regression_targets = self.select_training_samples(
            proposals, targets
        )
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        weights = torch.cat(
            [
                sample_weights(w, m, y > 0, self.loss_weighting.background_weight)
                for w, m, y in zip(object_weights(targets), matched, labels, strict=True)
            ]
        )
        check_labels(targets, class_logits.shape[1])
        losses = self.weighted_losses(
            class_logits, box_regression, torch.cat(labels), torch.cat(regression_targets), weights
        )
        if self.has_mask() or self.has_keypoint():
            foreground = select_foreground(proposals, matched, labels, weights)
            losses |= self.branch_losses(features, image_shapes, foreground, targets)
        return [], losses

    def check_targets(self, targets: Targets | None) -> None:
        """Check keys and dtypes as torchvision's own ``forward`` does, and counts."""
        if self.has_mask():
            check_masks(targets or [])
        super().check_targets(targets)
        if self.has_keypoint():
            check_keypoints(targets or [])
        for index, target in enumerate(targets or []):
            for key, expected in _DTYPES.items():
                if target[key].dtype not in expected:
                    raise TypeError(
                        f"{key!r} of target {index} must be one of {expected}, "
                        f"got {target[key].dtype}"
                    )

    def weighted_losses(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        labels: Tensor,
        regression_targets: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """Compute both losses of ``(R, K)`` logits and ``(R, 4 K)`` boxes, one for each class."""
        foreground = torch.where(labels > 0)[0]
        deltas = box_regression.reshape(len(labels), -1, 4)
        losses = {
            "loss_classifier": weighted_cross_entropy(class_logits, labels, weights),
            "loss_box_reg": weighted_smooth_l1(
                deltas[foreground, labels[foreground]],
                regression_targets[foreground],
                weights[foreground],
                beta=SMOOTH_L1_BETA,
                num_samples=labels.numel(),
            ),
        }
        return {name: self.loss_weighting.rescale(loss, weights) for name, loss in losses.items()}

    def branch_losses(
        self,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        foreground: Foreground,
        targets: Targets,
    ) -> dict[str, Tensor]:
        """Run the mask and the keypoint branch that there are, and compute their losses."""
        losses = {}
        where = (features, foreground.proposals, image_shapes)
        if self.has_mask():
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(*where)))
            masks = [target["masks"] for target in targets]
            losses["loss_mask"] = mask_loss(logits, foreground, masks, self.loss_weighting)
        if self.has_keypoint():
            logits = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(*where)))
            keypoints = [target["keypoints"] for target in targets]
            losses["loss_keypoint"] = keypoint_loss(
                logits, foreground, keypoints, self.loss_weighting
            )
        return losses


_DTYPES: dict[str, tuple[Any, ...]] = {
    "boxes": (torch.float32, torch.float64, torch.float16),
    "labels": (torch.int64,),
}
