"""Boxes in float32 under autocast: hooks of what predicts, and of what places anchors.

In bfloat16 only every second whole number exists from 256 on, only every fourth from 512 on. Under
autocast torchvision would decode boxes from such numbers, and place anchors on such a grid.

TorchScript compiles the hooks of a part: their types are those of its ``forward``, and as it reads
no strings, this file does not postpone annotations.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList


def keep_boxes_in_float32(model: nn.Module) -> None:
    """Let a detector place anchors and decode boxes, masks and keypoints in float32, in place."""
    for name, part in model.named_modules():
        if name in _OF_PREDICTORS:
            part.register_forward_hook(_OF_PREDICTORS[name])
        elif name in ("anchor_generator", "rpn.anchor_generator"):
            part.register_forward_pre_hook(_give_float32)


def _float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _return_map(self: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> Tensor:
    return _float32(outputs)


def _return_scores_and_boxes(
    self: nn.Module, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    return _float32(outputs[0]), _float32(outputs[1])


def _return_levels(
    self: nn.Module, inputs: tuple[list[Tensor]], outputs: tuple[list[Tensor], list[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    return [_float32(level) for level in outputs[0]], [_float32(level) for level in outputs[1]]


def _return_named(
    self: nn.Module, inputs: tuple[list[Tensor]], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {key: _float32(value) for key, value in outputs.items()}


def _give_float32(
    self: nn.Module, inputs: tuple[ImageList, list[Tensor]]
) -> tuple[ImageList, list[Tensor]]:
    """Hand feature maps of float32 to a generator, which reads nothing but their shape and type."""
    # One number seen as a whole map: nothing is copied.
    zeros = [level.new_zeros((), dtype=torch.float32).expand(level.shape) for level in inputs[1]]
    return inputs[0], zeros


_OF_PREDICTORS = {
    "head": _return_named,  # of a detector of one stage
    "rpn.head": _return_levels,
    "roi_heads.box_predictor": _return_scores_and_boxes,
    "roi_heads.mask_predictor": _return_map,
    "roi_heads.keypoint_predictor": _return_map,
}
