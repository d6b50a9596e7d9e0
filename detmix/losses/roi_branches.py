"""The mask and keypoint losses of Mask R-CNN and Keypoint R-CNN with a weight for each object.

Pure functions; `detmix.losses.rcnn.WeightedRoIHeads` runs the network's branches around them.
Only proposals matched to an object, the foreground, have masks and keypoints, so no background
weight is involved.

Shapes: P foreground proposals of the batch, P_i of one image, N objects of one image, K classes
with background 0, M the side of a mask, J keypoints of an object, S the side of their heatmaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import keypoints_to_heatmap, project_masks_on_boxes

from detmix.losses.object_weights import LossWeighting
from detmix.losses.terms import weighted_binary_cross_entropy, weighted_cross_entropy


@dataclass(frozen=True)
class Foreground:
    """The sampled proposals that match an object, image after image."""

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


def mask_targets(foreground: Foreground, masks: Sequence[Tensor], size: int) -> Tensor:
    """Cut ``(N, H, W)`` masks of each image to the foreground's proposals: ``(P, M, M)``."""
    return torch.cat(
        [
            project_masks_on_boxes(image_masks, boxes, matched, size)
            for image_masks, boxes, matched in zip(
                masks, foreground.proposals, foreground.matched_idxs, strict=True
            )
        ]
    )


def weighted_mask_loss(logits: Tensor, labels: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over P · M · M of weight times binary cross-entropy, of ``(P, K, M, M)`` logits."""
    if len(labels) == 0:
        return logits.sum() * 0
    own_class = logits[torch.arange(len(labels), device=labels.device), labels]
    pixels = own_class[0].numel()
    return weighted_binary_cross_entropy(
        own_class.flatten(), targets.flatten(), weights.repeat_interleave(pixels)
    )


def keypoint_targets(
    foreground: Foreground, keypoints: Sequence[Tensor], size: int
) -> tuple[Tensor, Tensor]:
    """Return ``(P * J,)`` cells of the heatmaps, and the ``(V,)`` of visible keypoints inside."""
    pairs = [
        keypoints_to_heatmap(image_keypoints[matched], boxes, size)
        for image_keypoints, boxes, matched in zip(
            keypoints, foreground.proposals, foreground.matched_idxs, strict=True
        )
    ]
    # Flat, as an image without objects need not know J.
    cells = torch.cat([image_cells.flatten() for image_cells, _ in pairs])
    valid = torch.cat([image_valid.flatten() for _, image_valid in pairs])
    return cells, torch.where(valid > 0)[0]


def weighted_keypoint_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over V valid keypoints of weight times cross-entropy, of ``(V, S * S)`` heatmaps."""
    if len(targets) == 0:
        return logits.sum() * 0
    return weighted_cross_entropy(logits, targets, weights)


def mask_loss(
    logits: Tensor, foreground: Foreground, masks: Sequence[Tensor], weighting: LossWeighting
) -> Tensor:
    """Compute the weighted mask loss of a batch from ``(P, K, M, M)`` logits."""
    targets = mask_targets(foreground, masks, logits.shape[-1])
    loss = weighted_mask_loss(logits, foreground.labels, targets, foreground.weights)
    return weighting.rescale(loss, foreground.weights)


def keypoint_loss(
    logits: Tensor, foreground: Foreground, keypoints: Sequence[Tensor], weighting: LossWeighting
) -> Tensor:
    """Compute the weighted keypoint loss of a batch from ``(P, J, S, S)`` heatmaps."""
    _, num_keypoints, height, size = logits.shape
    if height != size:
        raise ValueError(f"keypoint heatmaps must be square, got {height} x {size}")
    check_keypoint_number(keypoints, num_keypoints)
    cells, valid = keypoint_targets(foreground, keypoints, size)
    weights = foreground.weights.repeat_interleave(num_keypoints)[valid]
    heatmaps = logits.reshape(-1, size * size)[valid]
    loss = weighted_keypoint_loss(heatmaps, cells[valid], weights)
    return weighting.rescale(loss, weights)


def with_empty_branches(
    targets: Sequence[dict[str, Tensor]], has_mask: bool, has_keypoint: bool
) -> list[dict[str, Tensor]]:
    """Give targets without objects the masks and keypoints of none of them."""
    # torchvision's wrapped data sets leave all keys out for an image of COCO without annotations,
    # and its own heads then fail.
    needed = [("masks", (0, 1, 1))] * has_mask + [("keypoints", (0, 1, 3))] * has_keypoint
    return [
        {**{key: target["boxes"].new_zeros(shape) for key, shape in needed}, **target}
        if len(target["boxes"]) == 0
        else target
        for target in targets
    ]


def check_masks(targets: Sequence[dict[str, Tensor]]) -> None:
    """Check that every target has a mask for each box."""
    for index, target in enumerate(targets):
        count = len(target["boxes"])
        if "masks" not in target:
            raise ValueError(f"target {index} must have 'masks', as the detector predicts masks")
        if target["masks"].ndim != 3 or len(target["masks"]) != count:
            raise ValueError(
                f"'masks' of target {index} must have shape ({count}, H, W), one for each box, "
                f"got {tuple(target['masks'].shape)}"
            )


def check_keypoints(targets: Sequence[dict[str, Tensor]]) -> None:
    """Check that every target has float32 keypoints for each box."""
    for index, target in enumerate(targets):
        if "keypoints" not in target:
            raise ValueError(
                f"target {index} must have 'keypoints', as the detector predicts keypoints"
            )
        keypoints, count = target["keypoints"], len(target["boxes"])
        if keypoints.dtype != torch.float32:
            raise TypeError(
                f"'keypoints' of target {index} must be torch.float32, got {keypoints.dtype}"
            )
        if keypoints.ndim != 3 or len(keypoints) != count or keypoints.shape[2] != 3:
            raise ValueError(
                f"'keypoints' of target {index} must have shape ({count}, J, 3), x, y and "
                f"visibility for each box, got {tuple(keypoints.shape)}"
            )


def check_keypoint_number(keypoints: Sequence[Tensor], expected: int) -> None:
    """Check that objects have as many keypoints as the detector predicts."""
    for index, image_keypoints in enumerate(keypoints):
        if len(image_keypoints) > 0 and image_keypoints.shape[1] != expected:
            raise ValueError(
                f"'keypoints' of target {index} must have {expected} keypoints for each box, as "
                f"the detector predicts, got {image_keypoints.shape[1]}"
            )
