"""Torchvision's tv_tensors: what they hold as plain tensors, and the way back.

Arithmetic on a tv_tensor mostly returns a plain tensor, and where it does not it keeps a canvas
size that is no longer true. So everything is computed on plain tensors, and typed at the end.
Legend: N boxes, (H, W) the canvas.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, TVTensor

__all__ = [
    "box_format",
    "converted",
    "num_coordinates",
    "plain",
    "typed_as",
    "wrap_like",
    "xyxy",
]

_AXIS_ALIGNED = (BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH)
_COORDINATES = {"XYWHR": 5, "CXCYWHR": 5, "XYXYXYXY": 8}  # from torchvision 0.23 on
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


def num_coordinates(boxes: Tensor) -> int:
    """Return how many numbers a box has in its format: 4, or more where it is rotated."""
    return _COORDINATES.get(boxes.format.value, 4) if isinstance(boxes, BoundingBoxes) else 4


def xyxy(boxes: Tensor) -> Tensor:
    """Return plain boxes ``(N, 4)`` as (x1, y1, x2, y2).

    Args:
        boxes: Plain boxes, or `BoundingBoxes` of any format that is not rotated.

    Raises:
        ValueError: If the boxes are rotated.
    """
    old = box_format(boxes)
    if old not in _AXIS_ALIGNED:
        raise ValueError(f"boxes must not be rotated, got the format {old.value}")
    return converted(plain(boxes), old, BoundingBoxFormat.XYXY)


def converted(boxes: Tensor, old: BoundingBoxFormat, new: BoundingBoxFormat) -> Tensor:
    """Convert plain boxes from one format to another; of the same format they stay as they are.

    Raises:
        ValueError: If only one of the formats is rotated.
    """
    if old == new:
        return boxes
    if (old in _AXIS_ALIGNED) != (new in _AXIS_ALIGNED):
        raise ValueError(f"boxes of the format {old.value} cannot be made {new.value} boxes")
    result: Tensor = F.convert_bounding_box_format(boxes, old, new)
    return result


def typed_as(values: Tensor, like: Any, size: tuple[int, int]) -> Tensor:
    """Give plain values the type of another tensor, on a canvas of their own.

    Args:
        values: Plain values; boxes as (x1, y1, x2, y2), whatever the format of ``like`` is,
            unless it is rotated: then in that.
        like: A tv_tensor, or anything else for no type.
        size: (H, W) of the canvas.
    """
    if not isinstance(like, TVTensor):
        return values
    if isinstance(like, BoundingBoxes) and like.format in _AXIS_ALIGNED:
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
