"""Weighted losses of Faster, Mask and Keypoint R-CNN: torchvision's RPN and RoI heads.

The RPN's subclass overrides how anchors are matched and what their loss is; that of the RoI heads
has a training ``forward`` of its own, as torchvision's calls functions of its module there. They
leave the rest to torchvision's and add no parameters, buffers or random numbers.

Shapes: A anchors of one image over all levels, N objects of one image, R sampled proposals of the
batch, P of them foreground, K classes with background 0, M the side of a mask, J keypoints of an
object, S the side of their heatmaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    keypoints_to_heatmap,
    project_masks_on_boxes,
)
from torchvision.models.detection.rpn import RegionProposalNetwork

from detmix.losses.object_weights import (
    LossWeighting,
    Targets,
    check_labels,
    check_objects,
    sample_weights,
)
from detmix.losses.terms import (
    weighted_binary_cross_entropy,
    weighted_cross_entropy,
    weighted_smooth_l1,
)
from detmix.mixing import box_weights

# Transition point of torchvision's smooth L1 losses, the same for RPN and RoI heads.
SMOOTH_L1_BETA = 1 / 9

# What RoI heads need of a target: dtypes (none for any) and axes after that of the objects.
_FLOATS = (torch.float32, torch.float64, torch.float16)
_FIELDS: dict[str, tuple[tuple[torch.dtype, ...], tuple[int | str, ...]]] = {
    "boxes": (_FLOATS, (4,)),
    "labels": ((torch.int64,), ()),
    "masks": ((), ("H", "W")),
    "keypoints": ((torch.float32,), ("J", 3)),
}


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
        check_objects(targets)
        labels, matched_boxes = _Labels(), []
        labels.weights = []
        matcher, background = self.proposal_matcher, self.loss_weighting.background_weight
        for own, target in zip(anchors, targets, strict=True):
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
            labels.weights.append(
                sample_weights(box_weights(target), matched, foreground, background)
            )
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
        assert targets is not None  # the RPN has refused to train without
        targets = with_empty_branches(targets)
        proposals, matched, labels, regression_targets = self.select_training_samples(
            proposals, targets
        )
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        check_labels(targets, class_logits.shape[1])
        # By labels: matches of the background are clamped to object 0.
        weights = torch.cat(
            [
                sample_weights(box_weights(t), m, y > 0, self.loss_weighting.background_weight)
                for t, m, y in zip(targets, matched, labels, strict=True)
            ]
        )
        losses = self.box_losses(
            class_logits, box_regression, torch.cat(labels), torch.cat(regression_targets), weights
        )
        if self.has_mask() or self.has_keypoint():
            foreground = select_foreground(proposals, matched, labels, weights)
            losses |= self.branch_losses(features, image_shapes, foreground, targets)
        return [], losses

    def check_targets(self, targets: Targets | None) -> None:
        """Check keys, dtypes and shapes; torchvision's ``select_training_samples`` calls it."""
        keys = ["boxes", "labels", *["masks"] * self.has_mask()]
        keys += ["keypoints"] * self.has_keypoint()
        for index, target in enumerate(targets or []):
            for key in keys:
                check_field(target, index, key)

    def box_losses(
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


@dataclass(frozen=True)
class Foreground:
    """The sampled proposals that match an object, image after image.

    Only they have masks and keypoints, so no background weight is involved there.
    """

    proposals: list[Tensor]
    matched_idxs: list[Tensor]
    labels: Tensor
    weights: Tensor


def select_foreground(
    proposals: Sequence[Tensor],
    matched_idxs: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Tensor,
) -> Foreground:
    """Pick the foreground of the sampled proposals."""
    positives = [torch.where(image_labels > 0)[0] for image_labels in labels]
    joined = torch.cat(list(labels))
    foreground = torch.where(joined > 0)[0]
    return Foreground(
        proposals=[boxes[pos] for boxes, pos in zip(proposals, positives, strict=True)],
        matched_idxs=[idxs[pos] for idxs, pos in zip(matched_idxs, positives, strict=True)],
        labels=joined[foreground],
        weights=weights[foreground],
    )


def mask_loss(
    logits: Tensor, foreground: Foreground, masks: Sequence[Tensor], weighting: LossWeighting
) -> Tensor:
    """Mean over P · M · M of weight times binary cross-entropy, of ``(P, K, M, M)`` logits."""
    if len(foreground.labels) == 0:
        return logits.sum() * 0
    size = logits.shape[-1]
    goals = torch.cat(
        [
            project_masks_on_boxes(image_masks, boxes, matched, size)
            for image_masks, boxes, matched in zip(
                masks, foreground.proposals, foreground.matched_idxs, strict=True
            )
        ]
    )
    own_class = logits[torch.arange(len(goals), device=logits.device), foreground.labels]
    weights = foreground.weights.repeat_interleave(size * size)
    loss = weighted_binary_cross_entropy(own_class.flatten(), goals.flatten(), weights)
    return weighting.rescale(loss, foreground.weights)


def keypoint_loss(
    logits: Tensor, foreground: Foreground, keypoints: Sequence[Tensor], weighting: LossWeighting
) -> Tensor:
    """Mean over V valid keypoints of weight times cross-entropy, of ``(P, J, S, S)`` heatmaps."""
    _, num_keypoints, height, size = logits.shape
    if height != size:
        raise ValueError(f"keypoint heatmaps must be square, got {height} x {size}")
    for index, image_keypoints in enumerate(keypoints):
        found = image_keypoints.shape[1]
        if len(image_keypoints) > 0 and found != num_keypoints:
            raise ValueError(
                f"'keypoints' of target {index} must have {num_keypoints} keypoints for each box, "
                f"as the detector predicts, got {found}"
            )
    pairs = [
        keypoints_to_heatmap(image_keypoints[matched], boxes, size)
        for image_keypoints, boxes, matched in zip(
            keypoints, foreground.proposals, foreground.matched_idxs, strict=True
        )
    ]
    # Flat, as an image without objects need not know J.
    cells = torch.cat([image_cells.flatten() for image_cells, _ in pairs])
    valid = torch.where(torch.cat([is_valid.flatten() for _, is_valid in pairs]) > 0)[0]
    if len(valid) == 0:
        return logits.sum() * 0
    weights = foreground.weights.repeat_interleave(num_keypoints)[valid]
    heatmaps = logits.reshape(-1, size * size)[valid]
    loss = weighted_cross_entropy(heatmaps, cells[valid], weights)
    return weighting.rescale(loss, weights)


def with_empty_branches(targets: Targets) -> Targets:
    """Give targets without objects the masks and keypoints of none of them."""
    # torchvision's wrapped data sets leave all keys out for an image of COCO without annotations,
    # and its own heads then fail.
    completed = []
    for target in targets:
        if len(target["boxes"]) == 0:
            device = target["boxes"].device
            none = {"masks": torch.zeros(0, 1, 1), "keypoints": torch.zeros(0, 1, 3)}
            target = {**{key: value.to(device) for key, value in none.items()}, **target}
        completed.append(target)
    return completed


def check_field(target: dict[str, Tensor], index: int, key: str) -> None:
    """Raise ValueError or TypeError unless a target holds what RoI heads need under a key."""
    dtypes, axes = _FIELDS[key]
    if key not in target:
        raise ValueError(f"target {index} must have {key!r}, as the detector predicts them")
    value, expected = target[key], (len(target["boxes"]), *axes)
    if dtypes and value.dtype not in dtypes:
        raise TypeError(f"{key!r} of target {index} must be one of {dtypes}, got {value.dtype}")
    if value.ndim != len(expected) or any(
        isinstance(size, int) and size != found
        for size, found in zip(expected, value.shape, strict=True)
    ):
        raise ValueError(
            f"{key!r} of target {index} must have shape ({', '.join(map(str, expected))}), one row "
            f"for each box, got {tuple(value.shape)}"
        )
