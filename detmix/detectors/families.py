"""Building each family of detectors above a backbone with a feature pyramid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from detmix.detectors.config import DetectorConfig, class_arguments
from detmix.detectors.pyramid import BackboneConfig

ASPECT_RATIOS = (0.5, 1.0, 2.0)
_HEAD_DIM = 1024
_SAMPLING_RATIO = 2
_BOX_POOL, _ROI_POOL = 7, 14  # bins per side of a proposal: for its box, for masks and keypoints
_NUM_MASK_CONVS, _NUM_KEYPOINT_CONVS = 4, 8
# Side of the default anchor over the stride of its level: as in the pyramid's paper
# (arXiv 1612.03144, section 4.1), RetinaNet's (1708.02002, section 4) and torchvision's FCOS.
_SIZE_OVER_STRIDE = {"retinanet": 4, "fcos": 1}
_RCNN_SIZE_OVER_STRIDE = 8
# FCOSHead's group norm has 32 groups.
_FCOS_GROUPS = 32


def anchor_sizes(detector: DetectorConfig, backbone: BackboneConfig) -> tuple[int, ...]:
    """Return the size of the anchors at each level of the pyramid, by default from its stride."""
    if detector.anchor_sizes is not None:
        return tuple(detector.anchor_sizes)
    first = 0 if backbone.stem == "small" else 2  # log2 of the stride before the first stage
    strides = [2 ** (first + level - 1) for level in sorted(backbone.levels)]
    strides.append(strides[-1] * 2)
    factor = _SIZE_OVER_STRIDE.get(detector.name, _RCNN_SIZE_OVER_STRIDE)
    return tuple(factor * stride for stride in strides)


def check_family(detector: DetectorConfig, backbone: BackboneConfig) -> None:
    """Check what only the two configurations together can have wrong."""
    sizes = anchor_sizes(detector, backbone)
    if len(sizes) != len(backbone.levels) + 1:
        raise ValueError(
            f"detector.anchor_sizes must have {len(backbone.levels) + 1} entries, one for each "
            f"of backbone.levels {backbone.levels} and one for the coarser level added to them, "
            f"got {sizes}"
        )
    if detector.name != "fcos":
        return
    check_fcos_sizes(detector.name, sizes, f" for backbone.levels {backbone.levels}")
    if backbone.fpn_channels % _FCOS_GROUPS:
        raise ValueError(
            f"backbone.fpn_channels must be a multiple of {_FCOS_GROUPS} for fcos, which has group "
            f"norm in its heads, got {backbone.fpn_channels}"
        )


def check_fcos_sizes(name: str, sizes: tuple[int, ...], levels: str = "") -> None:
    """Check that the locations of an FCOS learn of objects of every size."""
    if any(coarse > 2 * fine for fine, coarse in itertools.pairwise(sizes)):
        raise ValueError(
            f"detector.anchor_sizes of {name} must at most double from level to level, or no "
            f"location learns of the objects between two levels; got {sizes}{levels}"
        )


def build_family(
    detector: DetectorConfig,
    backbone: BackboneConfig,
    pyramid: BackboneWithFPN,
    num_classes: int,
    num_keypoints: int,
) -> nn.Module:
    """Build a detector of one of the families above a pyramid."""
    sizes = anchor_sizes(detector, backbone)
    ratios = tuple(detector.aspect_ratios or ASPECT_RATIOS)
    given = class_arguments(detector)
    model: nn.Module
    if detector.name == "retinanet":
        anchors = retinanet_anchors(sizes, ratios)
        model = RetinaNet(pyramid, num_classes, anchor_generator=anchors, **given)
    elif detector.name == "fcos":
        anchors = single_anchors(sizes, (1.0,))
        model = FCOS(pyramid, num_classes, anchor_generator=anchors, **given)
    else:
        width, num_levels = pyramid.out_channels, len(backbone.levels)
        cls, roi_parts = _roi_parts(detector, width, num_levels, num_classes, num_keypoints)
        anchors = single_anchors(sizes, ratios)
        model = cls(pyramid, rpn_anchor_generator=anchors, **roi_parts, **given)
    return model


def single_anchors(sizes: tuple[int, ...], ratios: tuple[float, ...]) -> AnchorGenerator:
    """Return anchors of one size at each level."""
    return AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * len(sizes))


def retinanet_anchors(sizes: tuple[int, ...], ratios: tuple[float, ...]) -> AnchorGenerator:
    """Return anchors of three sizes at each level, a third of an octave apart (1708.02002)."""
    octaves = tuple((x, int(x * 2 ** (1.0 / 3)), int(x * 2 ** (2.0 / 3))) for x in sizes)
    return AnchorGenerator(octaves, (ratios,) * len(sizes))


def _roi_parts(
    detector: DetectorConfig, width: int, num_levels: int, num_classes: int, num_keypoints: int
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Return the class of an R-CNN, and the parts that work on its proposals."""
    names = [str(level) for level in range(num_levels)]  # RoI align does without the coarsest
    ratio = detector.roi_sampling_ratio or _SAMPLING_RATIO
    head_dim = detector.head_dim or _HEAD_DIM
    parts: dict[str, Any] = {
        "box_roi_pool": MultiScaleRoIAlign(names, _BOX_POOL, ratio),
        "box_head": TwoMLPHead(width * _BOX_POOL**2, head_dim),
        "box_predictor": FastRCNNPredictor(head_dim, num_classes),
    }
    if detector.name == "fasterrcnn":
        return FasterRCNN, parts
    pool = MultiScaleRoIAlign(names, _ROI_POOL, ratio)
    if detector.name == "maskrcnn":
        head = MaskRCNNHeads(width, (width,) * _NUM_MASK_CONVS, dilation=1)
        predictor = MaskRCNNPredictor(width, width, num_classes)
        parts |= {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
        return MaskRCNN, parts
    head = KeypointRCNNHeads(width, (2 * width,) * _NUM_KEYPOINT_CONVS)
    predictor = KeypointRCNNPredictor(2 * width, num_keypoints)
    parts |= {"keypoint_roi_pool": pool, "keypoint_head": head, "keypoint_predictor": predictor}
    return KeypointRCNN, parts
