"""CutMix for object detection: a rectangle of one image pasted into another.

CutMix (arXiv 1905.04899, section 3.1) mixes two labels by area; here every object keeps the weight
of its visible share. Of A is seen what lies outside of the rectangle, of B what lies inside.

Shapes: (H_a, W_a) and (H_b, W_b) the images, with N_a and N_b objects; N objects and K keypoints of
either; (H, W) the canvas.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxFormat

from detmix.mixing.join import join
from detmix.mixing.mixer import RatioMixer, TargetGetter
from detmix.mixing.target import (
    Keys,
    Sample,
    Size,
    Target,
    box_format,
    check_pair,
    check_share,
    checked_samples,
    converted,
    describe,
    image_size,
    key_names,
    plain,
    wrap_like,
    xyxy,
)

Rectangle = tuple[int, int, int, int]


class Cut(NamedTuple):
    """A rectangle as shares of an image whose size is not known yet."""

    lam: float
    """λ in [0, 1]: the rectangle's area is 1 - λ of the image's, before it is clipped to it."""
    x: float
    """Centre from the left as a share of the width, in [0, 1)."""
    y: float
    """Centre from the top as a share of the height, in [0, 1)."""

    def rectangle(self, size: Size) -> Rectangle:
        """Return (x1, y1, x2, y2), x2 and y2 exclusive, of an image of ``size`` (H, W).

        In whole pixels as the paper's code makes it: half a side is rounded down, and what
        exceeds the image is cut off. A share out of range is a ValueError.
        """
        check_share("lam", self.lam)
        if not (0.0 <= self.x < 1.0 and 0.0 <= self.y < 1.0):
            raise ValueError(f"x and y must be in [0, 1), got {self.x} and {self.y}")
        height, width = size
        half_share = 0.5 * math.sqrt(1.0 - self.lam)
        x, y = int(self.x * width), int(self.y * height)
        half_width, half_height = int(half_share * width), int(half_share * height)
        x1, x2 = max(x - half_width, 0), min(x + half_width, width)
        y1, y2 = max(y - half_height, 0), min(y + half_height, height)
        return x1, y1, x2, y2


def cutmix(
    image_a: Tensor,
    target_a: Target,
    image_b: Tensor,
    target_b: Target,
    rectangle: Rectangle,
    *,
    min_visibility: float = 0.1,
    keys: Collection[str] = (),
) -> Sample:
    """Paste a rectangle of B into A, each object weighted by its visible share.

    The weight of each of A's objects is multiplied by the share of its box that the rectangle
    leaves uncovered, that of each of B's by the share inside the rectangle; of the mask's pixels
    in place of the box where the target has ``masks``. Boxes are clipped to what is visible where
    that is a rectangle: always with B, and with A where a whole side of the box is covered from
    edge to edge. Masks are cut exactly, ``area`` is scaled by the visible share, and keypoints
    that are hidden become (0, 0, 0), COCO's "not labelled" (those without a visibility stay).

    Args:
        image_a: A, as `mixup` takes it.
        target_a: A's target.
        image_b: B.
        target_b: B's target.
        rectangle: (x1, y1, x2, y2) in whole pixels, x2 and y2 exclusive, within both images.
        min_visibility: Objects with a smaller share are left out, in [0, 1]; those of which
            nothing is visible always are.
        keys: Further keys of the objects, as `union` takes them.

    Returns:
        The image, of A's size, and what is visible of both targets, joined as by `union`. The
        inputs are not changed. A rectangle without area leaves the image A.

    Raises:
        ValueError: For a rectangle that is not within both images, images that do not match, or
            a target that breaks the contract, naming what was got and what was expected.

    Example:
        >>> import torch
        >>> dark, bright = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
        >>> dog = {"boxes": torch.tensor([[0., 0., 4., 4.]]), "labels": torch.tensor([12])}
        >>> cat = {"boxes": torch.tensor([[2., 0., 4., 2.]]), "labels": torch.tensor([8])}
        >>> image, target = cutmix(dark, dog, bright, cat, (3, 0, 4, 4))
        >>> target["labels"], target["box_weights"]
        (tensor([12,  8]), tensor([0.7500, 0.5000]))
        >>> target["boxes"]
        tensor([[0., 0., 3., 4.],
                [3., 0., 4., 2.]])
    """
    samples, declared = [(image_a, target_a), (image_b, target_b)], key_names(keys)
    sample_a, sample_b = checked_samples(samples, declared)
    check_share("min_visibility", min_visibility)
    height, width = _common_size(image_a, image_b)
    is_integral = len(rectangle) == 4 and all(isinstance(edge, Integral) for edge in rectangle)
    if is_integral:
        x1, y1, x2, y2 = rectangle
    if not is_integral or not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        expected = f"integers (x1, y1, x2, y2) within {width} x {height} pixels"
        raise ValueError(f"rectangle must be {expected}, which both cover, got {rectangle}")
    return _paste(sample_a, sample_b, rectangle, min_visibility, declared)


class DetectionCutMix(RatioMixer):
    """CutMix: each sample gets, with chance ``p``, a rectangle of a partner.

    It serves wherever `DetectionMixUp` does. The rectangle is drawn within the region that both
    images cover; neither is resized. Its sides are sqrt(1 - λ) of that region's, its centre is
    uniform, and what exceeds the region is cut off.

    Args:
        alpha: λ is drawn from Beta(alpha, alpha); 1, so uniform, as in CutMix, section 3.1.
        p, epochs, off_epochs: When to mix, as of `DetectionMixUp`.
        keys, target_getter: How to read targets, as of `DetectionMixUp`.
        min_visibility: Objects of which a smaller share is visible are left out, in [0, 1].

    Raises:
        ValueError: For settings out of range.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        p: float = 0.5,
        min_visibility: float = 0.1,
        *,
        epochs: int | None = None,
        off_epochs: int = 0,
        keys: Collection[str] = (),
        target_getter: TargetGetter | None = None,
    ) -> None:
        super().__init__(alpha, p, epochs, off_epochs, keys=keys, target_getter=target_getter)
        check_share("min_visibility", min_visibility)
        self.min_visibility = min_visibility

    def draw(self, rng: random.Random) -> Cut | None:
        """Draw λ and the rectangle's centre, or None where a sample is not mixed."""
        lam = super().draw(rng)
        return None if lam is None else Cut(lam, rng.random(), rng.random())

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: Cut) -> Sample:
        """Paste the rectangle ``how`` of the second checked sample into the first."""
        rectangle = how.rectangle(_common_size(sample_a[0], sample_b[0]))
        return _paste(sample_a, sample_b, rectangle, self.min_visibility, self.keys)


def _common_size(image_a: Tensor, image_b: Tensor) -> Size:
    """Return (H, W) of the region at the top left that both images cover; they must match."""
    check_pair(image_a, image_b)
    return min(image_a.shape[-2], image_b.shape[-2]), min(image_a.shape[-1], image_b.shape[-1])


def _paste(
    sample_a: Sample, sample_b: Sample, rectangle: Rectangle, min_visibility: float, keys: Keys
) -> Sample:
    """Paste a rectangle of B, within both images, into A."""
    image_a, size = sample_a[0], image_size(sample_a[0])
    x1, y1, x2, y2 = rectangle
    image = plain(image_a).clone()
    image[:, y1:y2, x1:x2] = plain(sample_b[0])[:, y1:y2, x1:x2]
    left, share_a = _visible(sample_a, rectangle, False, size, min_visibility)
    pasted, share_b = _visible(sample_b, rectangle, True, size, min_visibility)
    return wrap_like(image, image_a, size), join((left, pasted), (share_a, share_b), size, keys)


def _visible(
    sample: Sample, rectangle: Rectangle, inside: bool, size: Size, min_visibility: float
) -> tuple[Target, Tensor]:
    """Cut objects to what is seen in or out of a rectangle; return shares too, 0 to leave out."""
    image, target = sample
    boxes, box_share = _cut_boxes(target["boxes"], image_size(image), rectangle, inside, size)
    cut, share = {**target, "boxes": boxes}, box_share
    if target.get("masks") is not None:
        cut["masks"] = _cut_masks(target["masks"], rectangle, inside, size)
        share = _mask_share(target["masks"], cut["masks"], otherwise=box_share)
    is_kept = (share >= min_visibility) & (box_share > 0)
    share = torch.where(is_kept, share, 0.0).clamp(0.0, 1.0)
    if target.get("area") is not None:
        cut["area"] = _scaled(target["area"], share)
    if target.get("keypoints") is not None:
        cut["keypoints"] = _hide(target["keypoints"], rectangle, inside)
    return cut, share.float()


def _cut_boxes(
    boxes: Tensor, own_size: Size, rectangle: Rectangle, inside: bool, canvas: Size
) -> tuple[Tensor, Tensor]:
    """Clip boxes to what is seen of them where that is a rectangle; return their shares too."""
    # What of a box lies beyond its image is not seen to begin with: resizing alone can move an edge
    # there. A box of A may stay there, as it was given, but one of B would lie on A's pixels.
    given = xyxy(boxes)
    whole = _intersection(given, (0, 0, own_size[1], own_size[0]))
    covered = _intersection(whole, rectangle)
    area, common = _area(whole), _area(covered)
    # not 1 - common / area, which is off by a rounding where little is left
    share = torch.where(area > 0, (common if inside else area - common) / area, 0.0)
    seen = covered if inside else _remainder(whole, covered)
    changed = (seen != (given if inside else whole)).any(1, keepdim=True)
    # Those that did not change are not converted there and back, which would round them.
    back = converted(seen, BoundingBoxFormat.XYXY, box_format(boxes))
    if not boxes.is_floating_point():
        back = back.round().to(boxes.dtype)
    return wrap_like(torch.where(changed, back, plain(boxes)), boxes, canvas), share


def _intersection(boxes: Tensor, rectangle: Rectangle) -> Tensor:
    """Return what of each box is in the rectangle, ``(N, 4)``; without area where nothing is."""
    x1, y1, x2, y2 = rectangle
    common = torch.empty_like(boxes)
    common[:, 0::2] = boxes[:, 0::2].clamp(x1, x2)
    common[:, 1::2] = boxes[:, 1::2].clamp(y1, y2)
    return common


def _remainder(boxes: Tensor, common: Tensor) -> Tensor:
    """Return the boxes without ``common``, the part of each that is covered: ``(N, 4)``."""
    # A rectangle again where a whole side is covered from edge to edge: there the side moves. A box
    # that is covered entirely is turned inside out, which leaves it no area.
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


def _cut_masks(masks: Tensor, rectangle: Rectangle, inside: bool, size: Size) -> Tensor:
    """Return ``(N, H, W)`` masks, zero where they are not seen."""
    x1, y1, x2, y2 = rectangle
    whole = plain(masks)
    cut = whole.new_zeros((len(whole), *size)) if inside else whole.clone()
    cut[:, y1:y2, x1:x2] = whole[:, y1:y2, x1:x2] if inside else 0
    return wrap_like(cut, masks, size)


def _mask_share(whole: Tensor, cut: Tensor, otherwise: Tensor) -> Tensor:
    """Return the share of each mask's pixels that is left, or ``otherwise`` of an empty one."""
    if not len(whole):
        return otherwise
    # One by one: along an axis torch counts seven times as slowly on the CPU.
    pixels, left = (
        torch.stack([mask.count_nonzero() for mask in plain(masks)]) for masks in (whole, cut)
    )
    return torch.where(pixels > 0, left / pixels.clamp(min=1), otherwise)


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
        raise ValueError(f"'keypoints' to be cut must be (N, K, 3), got {describe(keypoints)}")
    if len(keypoints) == 0 or keypoints.shape[2] == 2:
        return keypoints
    x, y, _ = (keypoints + 0.5).unbind(-1)  # whole numbers are the centres of pixels
    x1, y1, x2, y2 = rectangle
    within = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return torch.where((within if inside else ~within)[..., None], keypoints, 0)
