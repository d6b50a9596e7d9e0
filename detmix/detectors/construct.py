"""Torchvision's detectors from a specification: on a given pyramid, or by their own builders.

The builders download what they are asked to start from. `_StandIn` lets them build the same
architecture (frozen norm, frozen layers) from tensors at hand.

In bfloat16 only every second whole number exists from 256 on, only every fourth from 512 on. Under
autocast torchvision would decode boxes from such numbers, and place anchors on such a grid:
`keep_boxes_in_float32` has what predicts answer in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from detmix.detectors.spec import DetectorSpec
from detmix.pretrained.match_state import LoadReport
from detmix.pretrained.sources import load_classifier, read_source

_HEAD_DIM = 1024
_SAMPLING_RATIO = 2
_BOX_POOL, _ROI_POOL = 7, 14  # bins per side of a proposal: for its box, for masks and keypoints
_NUM_MASK_CONVS, _NUM_KEYPOINT_CONVS = 4, 8
_PREDICTORS = ("box_predictor", "mask_predictor", "keypoint_predictor")
_HALF = (torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)


def build_family(
    spec: DetectorSpec, pyramid: BackboneWithFPN, num_classes: int, num_keypoints: int
) -> nn.Module:
    """Build a detector of one of the families above a pyramid."""
    if issubclass(spec.kind.cls, FasterRCNN):
        parts = _roi_parts(spec, pyramid.out_channels, num_classes, num_keypoints)
    else:
        parts = {"num_classes": num_classes}
    return spec.kind.cls(pyramid, **spec.anchors, **parts, **spec.arguments)


def _roi_parts(
    spec: DetectorSpec, width: int, num_classes: int, num_keypoints: int
) -> dict[str, Any]:
    """Return the parts of an R-CNN that work on its proposals."""
    # RoI align does without the coarsest level.
    names = [str(level) for level in range(len(spec.backbone.levels))]
    ratio = spec.detector.roi_sampling_ratio or _SAMPLING_RATIO
    head_dim = spec.detector.head_dim or _HEAD_DIM
    parts = {
        "box_roi_pool": MultiScaleRoIAlign(names, _BOX_POOL, ratio),
        "box_head": TwoMLPHead(width * _BOX_POOL**2, head_dim),
        "box_predictor": FastRCNNPredictor(head_dim, num_classes),
    }
    pool = MultiScaleRoIAlign(names, _ROI_POOL, ratio)
    if spec.kind.cls is MaskRCNN:
        head = MaskRCNNHeads(width, (width,) * _NUM_MASK_CONVS, dilation=1)
        predictor = MaskRCNNPredictor(width, width, num_classes)
        parts |= {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
    elif spec.kind.cls is KeypointRCNN:
        head = KeypointRCNNHeads(width, (2 * width,) * _NUM_KEYPOINT_CONVS)
        predictor = KeypointRCNNPredictor(2 * width, num_keypoints)
        parts |= {"keypoint_roi_pool": pool, "keypoint_head": head, "keypoint_predictor": predictor}
    return parts


class _StandIn:
    """Passes for one of torchvision's weights, and gives a builder the tensors it is made with."""

    def __init__(
        self, member: WeightsEnum, state: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> None:
        self._kind = type(member)
        self._state = state
        self.meta = meta

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance asks for it, and so do torchvision's checks
        return self._kind

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Return the tensors, downloading nothing."""
        return self._state


def build_by_name(
    spec: DetectorSpec, num_classes: int, num_keypoints: int, *, load_weights: bool
) -> tuple[nn.Module, LoadReport | None]:
    """Build a detector as torchvision's builder of that name does, and tell what was loaded."""
    kind, source = spec.kind, spec.backbone_source
    arguments = {**spec.arguments, "num_classes": num_classes}
    if kind.cls is KeypointRCNN:
        arguments["num_keypoints"] = num_keypoints
    if not kind.sets_anchors:
        arguments |= spec.anchors
    start: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if source is not None:
        if kind.stands_on_resnet or not load_weights:
            state = get_model(kind.network, weights=None).state_dict()
        else:
            state = read_source(source).state
            _log.info("%s: all of %s loaded", source.what, kind.network)
        member = kind.backbone_weights[0]
        start["weights_backbone"] = _StandIn(member, state, member.meta)
    elif spec.source is not None:
        state = get_model(kind.name, **start, **arguments).state_dict()
        # The builder asks for the number of both, to check those it was given.
        meta = {"categories": range(num_classes), "keypoint_names": range(num_keypoints)}
        start["weights"] = _StandIn(kind.weights[0], state, meta)
    if spec.is_pretrained:  # torchvision warns of it without any
        arguments["trainable_backbone_layers"] = spec.backbone.trainable_layers
    model: Any = get_model(kind.name, **start, **arguments)
    if kind.sets_anchors:
        for name, generator in spec.anchors.items():
            part = model.rpn if name == "rpn_anchor_generator" else model
            part.anchor_generator = generator
    if source is None or not (kind.stands_on_resnet and load_weights):
        return model, None
    return model, load_classifier(model.backbone.body, source, kind.network, "standard")


def keep_boxes_in_float32(model: Any) -> None:
    """Let a detector place anchors and decode boxes, masks and keypoints in float32, in place."""
    is_rcnn = isinstance(model, GeneralizedRCNN)
    heads = [model.rpn.head] if is_rcnn else [model.head]
    if is_rcnn:
        heads += [part for name, part in model.roi_heads.named_children() if name in _PREDICTORS]
    for head in heads:
        head.register_forward_hook(_return_float32)
    generator = model.rpn.anchor_generator if is_rcnn else model.anchor_generator
    generator.register_forward_pre_hook(_give_float32)


def _return_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in _HALF else t, outputs)


def _give_float32(module: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Hand feature maps of float32 to a generator, which reads nothing but their shape and type."""
    images, features = inputs
    # One number seen as a whole map: nothing is copied.
    maps = [f.new_zeros((), dtype=torch.float32).expand(f.shape) for f in features]
    return images, maps
