"""What is left of an image's objects when only a part of the image is seen.

Two parts are asked for: what lies inside a rectangle, and what lies outside of it.
Shapes: N objects; (H, W) the canvas; K keypoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxFormat, TVTensor

from detmix.mixing.pixels import Rectangle
from detmix.mixing.target import Target
from detmix.mixing.tv import box_format, converted, plain, typed_as, wrap_like, xyxy

__all__ = ["visible"]


def visible(
    target: Target,
    image_size: tuple[int, int],
    rectangle: Rectangle,
    size: tuple[int, int],
    *,
    inside: bool,
    min_visibility: float,
) -> tuple[Target, Tensor]:
    """Cut the ground truth of an image to the part that is seen.

    Boxes are clipped where what is seen of them is a rectangle, masks exactly; ``area`` is
    scaled by the visible share; hidden keypoints become (0, 0, 0), COCO's "not labelled"
    (those without a visibility stay). What of a box lies beyond its image is not seen of it to
    begin with: resizing alone can move an edge there by a rounding.

    Args:
        target: A target with ``boxes`` ``(N, 4)``.
        image_size: (H, W) of the target's own image.
        rectangle: (x1, y1, x2, y2) in whole pixels, x2 and y2 exclusive.
        size: (H, W) of the canvas that masks are cut to; it covers all that is seen.
        inside: Whether the inside of the rectangle is seen, or all but that.
        min_visibility: Below which share an object counts as not visible at all.

    Returns:
        A new target, still with N objects, and their visible shares ``(N,)`` in [0, 1]: of the
        mask where there is one with any pixel, else of the box. The share is 0 for an object of
        which too little or no area is left.

    Raises:
        ValueError: If keypoints are no tensor ``(N, K, 2 or 3)``.
    """
    boxes = _intersection(xyxy(target["boxes"]), (0, 0, image_size[1], image_size[0]))
    common = _intersection(boxes, rectangle)
    seen = common if inside else _remainder(boxes, common)
    whole, covered = _area(boxes), _area(common)
    # not 1 - covered / whole, which is off by a rounding where little is left
    share = torch.where(whole > 0, (covered if inside else whole - covered) / whole, 0.0)
    cut = {**target, "boxes": _replaced(target["boxes"], boxes, seen, size)}
    masks = target.get("masks")
    if masks is not None:
        cut["masks"] = _cut_masks(masks, rectangle, size, inside)
        share = _mask_share(plain(masks), plain(cut["masks"]), share)
    keep = (share >= min_visibility) & (_area(seen) > 0)
    share = torch.where(keep, share, 0.0).clamp(0.0, 1.0)
    if target.get("area") is not None:
        cut["area"] = _scaled(target["area"], share)
    if target.get("keypoints") is not None:
        cut["keypoints"] = _hide(target["keypoints"], rectangle, inside)
    return cut, share.float()


def _intersection(boxes: Tensor, rectangle: Rectangle) -> Tensor:
    """Return what of each box is in the rectangle, ``(N, 4)``; without area where nothing is."""
    x1, y1, x2, y2 = rectangle
    common = torch.empty_like(boxes)
    common[:, 0::2] = boxes[:, 0::2].clamp(x1, x2)
    common[:, 1::2] = boxes[:, 1::2].clamp(y1, y2)
    return common


def _remainder(boxes: Tensor, common: Tensor) -> Tensor:
    """Return the boxes without ``common``, the part of each that is covered: ``(N, 4)``.

    That is a rectangle again where a whole side is covered from edge to edge: there the side
    moves. Otherwise the box stays. One that is covered entirely is turned inside out, which
    leaves it no area.
    """
    left, top, right, bottom = (common == boxes).unbind(1)
    moved = torch.stack(
        [left & top & bottom, top & left & right, right & top & bottom, bottom & left & right], 1
    )
    # A side moves to the far edge of what is covered: x1 to its x2, y1 to its y2, and back.
    return torch.where(moved, common[:, [2, 3, 0, 1]], boxes)


def _area(boxes: Tensor) -> Tensor:
    """Return the area of boxes as a number with enough digits, ``(N,)``."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]


def _replaced(boxes: Tensor, old: Tensor, new: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``boxes`` in their own type and format, of which ``old`` became ``new``.

    Those that did not change are not converted there and back, which would round them.
    """
    back = converted(new, BoundingBoxFormat.XYXY, box_format(boxes))
    changed = (new != old).any(1, keepdim=True)
    values = torch.where(changed, back, plain(boxes))
    return wrap_like(values, boxes, size) if isinstance(boxes, TVTensor) else values


def _cut_masks(masks: Tensor, rectangle: Rectangle, size: tuple[int, int], inside: bool) -> Tensor:
    """Return ``(N, H, W)`` masks, zero where they are not seen."""
    x1, y1, x2, y2 = rectangle
    whole = plain(masks)
    if inside:
        cut = whole.new_zeros((len(whole), *size))
        cut[:, y1:y2, x1:x2] = whole[:, y1:y2, x1:x2]
    else:
        cut = whole.clone()
        cut[:, y1:y2, x1:x2] = 0
    return typed_as(cut, masks, size)


def _mask_share(whole: Tensor, cut: Tensor, otherwise: Tensor) -> Tensor:
    """Return the share of each mask's pixels that is left, or ``otherwise`` of an empty one."""
    pixels, left = _count_pixels(whole), _count_pixels(cut)
    return torch.where(pixels > 0, left / pixels.clamp(min=1), otherwise)


def _count_pixels(masks: Tensor) -> Tensor:
    """Count the pixels of each mask, ``(N,)``."""
    # One by one: along an axis torch counts seven times as slowly on the CPU.
    counts = [mask.count_nonzero() for mask in masks]
    return torch.stack(counts) if counts else masks.new_zeros(0, dtype=torch.int64)


def _scaled(values: Any, share: Tensor) -> Any:
    """Multiply ``(N,)`` numbers, a tensor or a list, by the shares."""
    if isinstance(values, list):
        return [value * part for value, part in zip(values, share.tolist(), strict=True)]
    scaled = values * share
    return scaled.to(values.dtype) if values.is_floating_point() else scaled


def _hide(keypoints: Any, rectangle: Rectangle, inside: bool) -> Tensor:
    """Set keypoints ``(N, K, 3)`` that are not seen to 0; leave ``(N, K, 2)`` as they are."""
    if not isinstance(keypoints, Tensor) or (
        len(keypoints) and (keypoints.ndim != 3 or keypoints.shape[2] not in (2, 3))
    ):
        found = (
            tuple(keypoints.shape) if isinstance(keypoints, Tensor) else type(keypoints).__name__
        )
        raise ValueError(f"'keypoints' must be a tensor (N, K, 3) to be cut, got {found}")
    if len(keypoints) == 0 or keypoints.shape[2] == 2:
        return keypoints
    x, y, _ = (keypoints + 0.5).unbind(-1)  # whole numbers are the centres of pixels
    x1, y1, x2, y2 = rectangle
    within = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return torch.where((within if inside else ~within)[..., None], keypoints, 0)
