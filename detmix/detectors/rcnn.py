"""Weighted losses of Faster, Mask and Keypoint R-CNN: torchvision's RPN and RoI heads.

Both subclasses have a training ``forward`` of their own and leave evaluation to torchvision's.
They add no parameters, buffers or random numbers.

Shapes: A anchors of one image over all levels, N objects, R sampled proposals of the batch,
K classes with background 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    concat_box_prediction_layers,
)

from detmix.detectors.losses import (
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
    weighted_smooth_l1,
)
from detmix.detectors.roi_losses import (
    Foreground,
    check_keypoints,
    check_masks,
    keypoint_loss,
    mask_loss,
    select_foreground,
    with_empty_branches,
)
from detmix.detectors.weighting import (
    LossWeighting,
    check_labels,
    object_weights,
    sample_weights,
)

__all__ = ["WeightedRegionProposalNetwork", "WeightedRoIHeads"]

Targets = list[dict[str, Tensor]]

# Transition point of torchvision's smooth L1 losses, the same for RPN and RoI heads.
SMOOTH_L1_BETA = 1 / 9


class WeightedRegionProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """Torchvision's region proposal network with a weight for each sampled anchor.

    Made from a built `RegionProposalNetwork` by `detmix.weight_losses`.
    """

    loss_weighting: LossWeighting

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes, and in training return the weighted losses.

        Args:
            images: The batch.
            features: Feature maps by level name.
            targets: Targets with ``boxes`` ``(N, 4)`` and, as a rule, ``box_weights`` ``(N,)``.

        Returns:
            Proposals of each image, and ``loss_objectness`` and ``loss_rpn_box_reg``, both
            divided by the number of sampled anchors (none in evaluation).
        """
        if not self.training:
            return super().forward(images, features, targets)  # type: ignore[no-any-return]
        if targets is None:
            raise ValueError("targets should not be None in training")
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        num_anchors_per_level = [level[0].numel() for level in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        # Proposals are taken as given by the second stage: no gradient flows through them.
        proposals = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        boxes, _ = self.filter_proposals(
            proposals, objectness, images.image_sizes, num_anchors_per_level
        )
        labels, matched_boxes, weights = self.match_anchors(anchors, targets)
        regression_targets = self.box_coder.encode(matched_boxes, anchors)
        return boxes, self.weighted_losses(objectness, deltas, labels, regression_targets, weights)

    def match_anchors(
        self, anchors: list[Tensor], targets: Targets
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Assign each anchor a label, a box and a weight.

        The rule is that of ``assign_targets_to_anchors``, which does not tell its matches.

        Args:
            anchors: ``(A, 4)`` for each image.
            targets: A target for each image.

        Returns:
            For each image: labels ``(A,)`` float32 (1 foreground, 0 background, -1 neither),
            matched boxes ``(A, 4)``, weights ``(A,)``.
        """
        labels, matched_boxes, weights = [], [], []
        for image_anchors, target, box_weights in zip(
            anchors, targets, object_weights(targets), strict=True
        ):
            boxes = target["boxes"]
            if boxes.numel() == 0:
                matched = image_anchors.new_full(
                    (len(image_anchors),),
                    self.proposal_matcher.BELOW_LOW_THRESHOLD,
                    dtype=torch.int64,
                )
                matched_boxes.append(torch.zeros_like(image_anchors, dtype=torch.float32))
            else:
                matched = self.proposal_matcher(self.box_similarity(boxes, image_anchors))
                matched_boxes.append(boxes[matched.clamp(min=0)])
            foreground = matched >= 0
            image_labels = foreground.to(torch.float32)
            image_labels[matched == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1.0
            labels.append(image_labels)
            weights.append(
                sample_weights(
                    box_weights, matched, foreground, self.loss_weighting.background_weight
                )
            )
        return labels, matched_boxes, weights

    def weighted_losses(
        self,
        objectness: Tensor,
        deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
        weights: list[Tensor],
    ) -> dict[str, Tensor]:
        """Sample anchors and compute both losses.

        Args:
            objectness: ``(ΣA, 1)`` logits of all images.
            deltas: ``(ΣA, 4)`` predicted regression.
            labels: ``(A,)`` for each image: 1, 0, or -1 for anchors left out.
            regression_targets: ``(A, 4)`` for each image.
            weights: ``(A,)`` for each image.

        Returns:
            ``loss_objectness`` and ``loss_rpn_box_reg``.
        """
        positives, negatives = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positives))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negatives))[0]])
        all_weights = torch.cat(weights)
        sampled_weights = all_weights[sampled]
        losses = {
            "loss_objectness": weighted_binary_cross_entropy(
                objectness.flatten()[sampled], torch.cat(labels)[sampled], sampled_weights
            ),
            "loss_rpn_box_reg": weighted_smooth_l1(
                deltas[positive],
                torch.cat(regression_targets)[positive],
                all_weights[positive],
                beta=SMOOTH_L1_BETA,
                num_samples=sampled.numel(),
            ),
        }
        return {
            name: self.loss_weighting.rescale(loss, sampled_weights)
            for name, loss in losses.items()
        }


class WeightedRoIHeads(RoIHeads):  # type: ignore[misc]
    """Torchvision's RoI heads with a weight for each sampled proposal.

    The mask and the keypoint branch see foreground proposals only. With
    ``normalizer="weights"`` each loss is divided by the weights of what torchvision counts for
    it: all sampled proposals (classes and boxes), the pixels of all foreground proposals'
    masks, the valid keypoints.

    Made from built `RoIHeads` by `detmix.weight_losses`.
    """

    loss_weighting: LossWeighting

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Classify and refine proposals, and in training return the weighted losses.

        Args:
            features: Feature maps by level name.
            proposals: Proposed boxes of each image.
            image_shapes: (H, W) of each image.
            targets: Targets with ``boxes`` ``(N, 4)``, ``labels`` ``(N,)`` and, as a rule,
                ``box_weights`` ``(N,)``; ``masks`` ``(N, H, W)`` and ``keypoints``
                ``(N, J, 3)`` float32 where the detector predicts them (not needed where N is 0).

        Returns:
            Detections of each image (none in training), and ``loss_classifier`` and
            ``loss_box_reg``, both divided by the number of sampled proposals, ``loss_mask`` by
            that of the foreground's pixels and ``loss_keypoint`` by that of valid keypoints
            (none in evaluation).
        """
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
        """Compute both losses over all sampled proposals.

        Args:
            class_logits: ``(R, K)``.
            box_regression: ``(R, 4 K)``, a box for each class.
            labels: ``(R,)`` int64, 0 for background.
            regression_targets: ``(R, 4)``.
            weights: ``(R,)``.

        Returns:
            ``loss_classifier`` and ``loss_box_reg``.
        """
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
        """Run the mask and the keypoint branch that there are, over the foreground.

        Args:
            features: Feature maps by level name.
            image_shapes: (H, W) of each image.
            foreground: The proposals that match an object.
            targets: Targets with ``masks`` and ``keypoints``.

        Returns:
            ``loss_mask`` and ``loss_keypoint``, or one of them.

        Raises:
            ValueError: For another number of keypoints than the detector predicts.
        """
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
