"""Weighted losses of Faster, Mask and Keypoint R-CNN: torchvision's RPN and RoI heads.

The RPN's subclass overrides how anchors are matched and what their loss is; that of the RoI heads
has a training ``forward`` of its own, as torchvision's calls functions of its module there. They
leave the rest to torchvision's and add no parameters, buffers or random numbers.

Shapes: A anchors of one image over all levels, N objects of one image, R sampled proposals of the
batch, P of them foreground, K classes with background 0, M the side of a mask, J keypoints of an
object, S the side of their heatmaps.
"""

import math
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    keypoints_to_heatmap,
    project_masks_on_boxes,
)
from torchvision.models.detection.rpn import RegionProposalNetwork

from detmix.losses.object_weights import Targets, TensorDict, Tensors, WeightedPart, weighted_sum
from detmix.losses.targets import check_field, check_objects, check_roi, checked, with_branches

#: of each image: target, sampled proposals, the object that each matches, and its label
Samples = list[tuple[TensorDict, Tensor, Tensor, Tensor]]
Sizes = list[tuple[int, int]]


class _Labels(list[Tensor]):
    """Labels ``(A,)`` of each image, with weights, on their way through torchvision's code."""

    weights: Tensors


class WeightedRegionProposalNetwork(RegionProposalNetwork, WeightedPart):  # type: ignore[misc]
    """Torchvision's region proposal network with a weight for each sampled anchor."""

    # `heads` are the RoI heads, in a tuple: as a module they would be a part of this one.

    @torch.jit.unused
    def assign_targets_to_anchors(
        self, anchors: Tensors, targets: Targets
    ) -> tuple[Tensors, Tensors]:
        """Return labels (1 object, 0 background, -1 neither) with weights, and matched boxes."""
        # By torchvision's rule, whose own method does not tell which object an anchor matches.
        heads = self.heads[0]
        if isinstance(heads, WeightedRoIHeads) and heads.training:
            heads.check_targets(targets)  # which sample after this one
        else:
            check_objects(targets)
        labels, matched_boxes = _Labels(), []
        labels.weights = []
        matcher = self.proposal_matcher
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
            labels.weights.append(self.loss_weighting.of_samples(target, matched, foreground))
        return labels, matched_boxes

    @torch.jit.unused
    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: Tensors,
        regression_targets: Tensors,
    ) -> tuple[Tensor, Tensor]:
        """Return the objectness and the box loss, each over the sampled anchors' normalizer."""
        assert isinstance(labels, _Labels)
        positives, negatives = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positives))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negatives))[0]])
        weights, rescale = torch.cat(labels.weights), self.loss_weighting.rescale
        logits, is_object = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        object_loss = weighted_binary_cross_entropy(logits, is_object, weights[sampled])
        goals = torch.cat(regression_targets)[positive]
        box_loss = smooth_l1_sum(pred_bbox_deltas[positive], goals, weights[positive])
        box_loss = box_loss / len(sampled)
        return rescale(object_loss, weights[sampled]), rescale(box_loss, weights[sampled])


def renamed(method: FunctionType, name: str) -> FunctionType:
    """Return a copy by another name, as TorchScript has no ``super()``, nor two of one name."""
    copy = FunctionType(method.__code__, method.__globals__, name, method.__defaults__)
    copy.__annotations__ = method.__annotations__
    return copy


class WeightedRoIHeads(RoIHeads, WeightedPart):  # type: ignore[misc]
    """Torchvision's RoI heads with a weight for each sampled proposal."""

    # With normalizer "weights" each loss is divided by the weights of what torchvision counts for
    # it: sampled proposals, the pixels of foreground masks, valid keypoints.

    torchvision_forward = renamed(RoIHeads.forward, "torchvision_forward")

    def forward(
        self,
        features: TensorDict,
        proposals: Tensors,
        image_shapes: Sizes,
        targets: Targets | None = None,
    ) -> tuple[list[TensorDict], TensorDict]:
        """Classify and refine proposals, and in training return the weighted losses."""
        if self.training:
            return self.training_forward(features, proposals, image_shapes, targets)
        return self.torchvision_forward(  # type: ignore[no-any-return]
            features, proposals, image_shapes, targets
        )

    @torch.jit.unused
    def training_forward(
        self, features: TensorDict, proposals: Tensors, image_shapes: Sizes, targets: Targets | None
    ) -> tuple[list[TensorDict], TensorDict]:
        """Return no detections, and the weighted losses."""
        assert targets is not None  # the RPN has refused to train without
        targets = with_branches(targets)
        proposals, matched, labels, goals = self.select_training_samples(proposals, targets)
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, boxes = self.box_predictor(box_features)
        if self.num_classes() == math.inf:
            checked(targets, logits.shape[1])
        # By labels: matches of the background are clamped to object 0.
        samples = list(zip(targets, proposals, matched, labels, strict=True))
        of_samples = self.loss_weighting.of_samples
        weights = torch.cat([of_samples(target, m, y > 0) for target, _, m, y in samples])
        losses = self.box_losses(logits, boxes, torch.cat(labels), torch.cat(goals), weights)
        if self.has_mask() or self.has_keypoint():
            losses |= self.branch_losses(features, image_shapes, samples, weights)
        return [], losses

    @torch.jit.unused
    def check_targets(self, targets: Targets | None) -> None:
        """Check targets for the RPN, and for ``select_training_samples`` where that is frozen."""
        assert targets is not None  # the RPN has refused to train without
        branches = [*["masks"] * self.has_mask(), *["keypoints"] * self.has_keypoint()]
        check_roi(targets, self.num_classes(), branches)

    def num_classes(self) -> float:
        """Return K if the box predictor is like torchvision's; others tell it when they run."""
        layer = getattr(self.box_predictor, "cls_score", None)
        found: float = getattr(layer, "out_features", math.inf)
        return found

    def box_losses(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, goals: Tensor, weights: Tensor
    ) -> TensorDict:
        """Compute both losses of ``(R, K)`` logits and ``(R, 4 K)`` boxes, one for each class."""
        foreground = torch.where(labels > 0)[0]
        deltas = boxes.reshape(len(labels), -1, 4)[foreground, labels[foreground]]
        box_sum = smooth_l1_sum(deltas, goals[foreground], weights[foreground])
        losses = {
            "loss_classifier": weighted_cross_entropy(logits, labels, weights),
            "loss_box_reg": box_sum / len(labels),
        }
        return {name: self.loss_weighting.rescale(loss, weights) for name, loss in losses.items()}

    def branch_losses(
        self, features: TensorDict, image_shapes: Sizes, samples: Samples, weights: Tensor
    ) -> TensorDict:
        """Run the mask and the keypoint branch that there are, and compute their losses."""
        # Only foreground has masks and keypoints: no background weight is involved.
        weights = weights[torch.where(torch.cat([labels for *_, labels in samples]) > 0)[0]]
        objects = []
        for target, boxes, matched, labels in samples:
            own = torch.where(labels > 0)[0]
            objects.append((target, boxes[own], matched[own], labels[own]))
        where = (features, [boxes for _, boxes, *_ in objects], image_shapes)
        losses = {}
        if self.has_mask():
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(*where)))
            losses["loss_mask"] = self.mask_loss(logits, objects, weights)
        if self.has_keypoint():
            logits = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(*where)))
            losses["loss_keypoint"] = self.keypoint_loss(logits, objects, weights)
        return losses

    def mask_loss(self, logits: Tensor, objects: Samples, weights: Tensor) -> Tensor:
        """Mean over P · M · M of weight times binary cross-entropy, of ``(P, K, M, M)`` logits."""
        if len(weights) == 0:
            return logits.sum() * 0
        size = logits.shape[-1]
        goals = [project_masks_on_boxes(t["masks"], *where, size) for t, *where, _ in objects]
        labels = torch.cat([own for *_, own in objects])
        own_class = logits[torch.arange(len(labels), device=logits.device), labels]
        loss = weighted_binary_cross_entropy(own_class, torch.cat(goals), weights[:, None, None])
        return self.loss_weighting.rescale(loss, weights)

    def keypoint_loss(self, logits: Tensor, objects: Samples, weights: Tensor) -> Tensor:
        """Mean over valid keypoints of weight times cross-entropy, of ``(P, J, S, S)`` heatmaps."""
        _, num_keypoints, height, size = logits.shape
        if height != size:
            raise ValueError(f"keypoint heatmaps must be square, got {height} x {size}")
        for index, (target, *_) in enumerate(objects):
            check_field(target, index, "keypoints", (), (num_keypoints, 3))
        pairs = [keypoints_to_heatmap(t["keypoints"][m], boxes, size) for t, boxes, m, _ in objects]
        # Flat, as an image without objects need not know J.
        cells = torch.cat([image_cells.flatten() for image_cells, _ in pairs])
        valid = torch.where(torch.cat([is_valid.flatten() for _, is_valid in pairs]) > 0)[0]
        if len(valid) == 0:
            return logits.sum() * 0
        weights = weights.repeat_interleave(num_keypoints)[valid]
        heatmaps = logits.reshape(-1, size * size)[valid]
        loss = weighted_cross_entropy(heatmaps, cells[valid], weights)
        return self.loss_weighting.rescale(loss, weights)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over R of weight times cross-entropy, of ``(R, K)`` logits and ``(R,)`` labels."""
    # ``(w * loss(reduction="none")).sum() / n`` is not torchvision's bit for bit.
    if logits.dtype in (torch.float16, torch.bfloat16):
        # not every device's autocast treats log_softmax as cross-entropy
        logits = logits.float()
    return F.nll_loss(F.log_softmax(logits, dim=1) * weights[:, None], labels)


def weighted_binary_cross_entropy(logits: Tensor, goals: Tensor, weights: Tensor) -> Tensor:
    """Mean of weight times binary cross-entropy; gradients reach the weights too."""
    loss = F.binary_cross_entropy_with_logits(logits, goals, weight=weights.detach())
    if weights.requires_grad:  # which torch has no derivative by: a sum of zeros has it
        losses = F.binary_cross_entropy_with_logits(logits, goals, reduction="none")
        loss = loss + (losses * (weights - weights.detach())).mean()
    return loss


def smooth_l1_sum(predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over P of weight times smooth L1 loss of ``(P, 4)`` regressions, in RPN and RoI heads."""
    losses = F.smooth_l1_loss(predictions, targets, beta=1 / 9, reduction="none")
    return weighted_sum(losses, weights)
