"""Boxes and scores in float32 where a detector's layers compute in half precision.

In bfloat16 only every second whole number exists from 256 on, only every fourth from 512 on. Under
autocast torchvision would decode boxes from such numbers, and place anchors on such a grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

_HALF = (torch.bfloat16, torch.float16)
_ROI_PARTS = ("box_predictor", "mask_predictor", "keypoint_predictor")


def keep_boxes_in_float32(model: nn.Module) -> None:
    """Let a detector place anchors and decode boxes, masks and keypoints in float32, in place."""
    heads, generator = _parts(model)
    for head in heads:
        head.register_forward_hook(_return_float32)
    generator.register_forward_pre_hook(_give_float32)


def _parts(model: Any) -> tuple[list[nn.Module], nn.Module]:
    """Return the parts that predict, and the one that generates anchors."""
    if not isinstance(model, GeneralizedRCNN):
        return [model.head], model.anchor_generator
    predictors = [getattr(model.roi_heads, name, None) for name in _ROI_PARTS]
    heads = [model.rpn.head, *(part for part in predictors if part is not None)]
    return heads, model.rpn.anchor_generator


def _return_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return _to_float32(outputs)


def _to_float32(values: Any) -> Any:
    """Convert tensors of half precision, in lists, tuples and dicts too."""
    if isinstance(values, Tensor):
        return values.float() if values.dtype in _HALF else values
    if isinstance(values, dict):
        return {key: _to_float32(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_to_float32(value) for value in values)
    return values


def _give_float32(module: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Hand feature maps of float32 to a generator, which reads nothing but their shape and type."""
    images, features = inputs
    # One number seen as a whole map: nothing is copied.
    maps = [f.new_zeros((), dtype=torch.float32).expand(f.shape) for f in features]
    return images, maps
