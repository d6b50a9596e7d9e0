"""Boxes in float32 under autocast: hooks of what predicts, and of what places anchors.

In bfloat16 only every second whole number exists from 256 on, only every fourth from 512 on. Under
autocast torchvision would decode boxes from such numbers, and place anchors on such a grid.
"""

# TorchScript compiles hooks with a part, and reads no strings: annotations are not postponed.

import re

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

# What predicts, and what places anchors, in detectors of one stage and of two.
_LAYERS = "cls_logits|cls_score|bbox_pred|bbox_reg|bbox_ctrness|module_list[.][0-9]+"
_PREDICTOR = re.compile(
    rf"((rpn[.])?head|roi_heads)[.](.*[.])?({_LAYERS}|(mask|keypoint)_predictor)"
)
_GENERATORS = ("anchor_generator", "rpn.anchor_generator")


def keep_boxes_in_float32(model: nn.Module) -> None:
    """Let a detector place anchors and decode boxes, masks and keypoints in float32, in place."""
    for name, part in model.named_modules():
        if _PREDICTOR.fullmatch(name):
            part.register_forward_hook(_return_float32)
        elif name in _GENERATORS:
            part.register_forward_pre_hook(_give_float32)


def _return_float32(self: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _give_float32(
    self: nn.Module, inputs: tuple[ImageList, list[Tensor]]
) -> tuple[ImageList, list[Tensor]]:
    """Hand feature maps of float32 to a generator, which reads nothing but their shape and type."""
    # One number seen as a whole map: nothing is copied.
    images, features = inputs
    return images, [f.new_zeros((), dtype=torch.float32).expand(f.shape) for f in features]
