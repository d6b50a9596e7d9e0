"""Torchvision's tv_tensors: what they hold as plain tensors, and the way back.

Arithmetic on a tv_tensor mostly returns a plain tensor, and where it does not it keeps a canvas
size that is no longer true. So everything is computed on plain tensors, and typed at the end.
Legend: N boxes, (H, W) the canvas.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, TVTensor

__all__ = [
    "box_format",
    "converted",
    "is_rotated",
    "plain",
    "typed_as",
    "wrap_like",
    "xyxy",
]

_AXIS_ALIGNED = (BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)
_ON_CANVAS = tuple(  # the types that know their canvas; torchvision 0.21 has no KeyPoints
    getattr(tv_tensors, name)
    for name in ("BoundingBoxes", "KeyPoints")
    if hasattr(tv_tensors, name)
)


def plain(tensor: Tensor) -> Tensor:
    """Return the same values without the type of a tv_tensor; anything else as it is."""
    # only where needed: it makes a new tensor object, which takes longer than the question
    return tensor.as_subclass(Tensor) if isinstance(tensor, TVTensor) else tensor


def box_format(boxes: Tensor) -> BoundingBoxFormat:
    """Return the format of `BoundingBoxes`; that of plain boxes is (x1, y1, x2, y2)."""
    return boxes.format if isinstance(boxes, BoundingBoxes) else BoundingBoxFormat.XYXY


def is_rotated(boxes: Tensor) -> bool:
    """Tell whether boxes are of a format with an angle or free corners."""
    return box_format(boxes) not in _AXIS_ALIGNED


def xyxy(boxes: Tensor) -> Tensor:
    """Return boxes of any format as plain (x1, y1, x2, y2), ``(N, 4)``."""
    return converted(plain(boxes), box_format(boxes), BoundingBoxFormat.XYXY)


def converted(boxes: Tensor, old: BoundingBoxFormat, new: BoundingBoxFormat) -> Tensor:
    """Convert plain boxes from one format to another; of the same format they stay as they are."""
    if old == new:
        return boxes
    result: Tensor = convert_bounding_box_format(boxes, old, new)
    return result


def typed_as(values: Tensor, like: Any, size: tuple[int, int]) -> Tensor:
    """Give plain values the type of another tensor, on a canvas of their own.

    Args:
        values: Plain values; boxes as (x1, y1, x2, y2), whatever the format of ``like`` is.
        like: A tv_tensor, or anything else for no type.
        size: (H, W) of the canvas.
    """
    if not isinstance(like, TVTensor):
        return values
    if isinstance(like, BoundingBoxes):
        values = converted(values, BoundingBoxFormat.XYXY, like.format)
    return wrap_like(values, like, size)


def wrap_like(values: Tensor, like: TVTensor, size: tuple[int, int]) -> Tensor:
    """Give plain values the type of a tv_tensor, on a canvas of their own.

    Args:
        values: Plain values; boxes in the format of ``like`` already.
        like: The tv_tensor.
        size: (H, W) of the canvas.
    """
    canvas = {"canvas_size": size} if isinstance(like, _ON_CANVAS) else {}
    typed: Tensor = tv_tensors.wrap(values, like=like, **canvas)
    return typed
