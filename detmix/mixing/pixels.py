"""Mixing the pixels of two images: blending them on a common canvas, pasting a part of one.

Shapes: C channels; (H_a, W_a) and (H_b, W_b) the images; H = max(H_a, H_b), W = max(W_a, W_b)
the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from detmix.mixing.tv import plain, typed_as

__all__ = ["Fill", "Rectangle", "blend", "canvas_size", "common_size", "pad_to", "paste"]

Fill = float | Sequence[float]
Rectangle = tuple[int, int, int, int]

# Values of one image in a strip of `_blend_strips`: two strips of float32 are 1 MiB.
_STRIP_VALUES = 2**17


def check_ratio(lam: float) -> None:
    """Raise ValueError unless λ is in [0, 1]."""
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must be in [0, 1], got {lam}")


def canvas_size(image_a: Tensor, image_b: Tensor) -> tuple[int, int]:
    """Return (H, W) of the smallest canvas that holds both images at its top left."""
    return (
        max(image_a.shape[-2], image_b.shape[-2]),
        max(image_a.shape[-1], image_b.shape[-1]),
    )


def common_size(image_a: Tensor, image_b: Tensor) -> tuple[int, int]:
    """Return (H, W) of the region at the top left that both images cover."""
    return (
        min(image_a.shape[-2], image_b.shape[-2]),
        min(image_a.shape[-1], image_b.shape[-1]),
    )


def pad_to(image: Tensor, size: tuple[int, int], fill: Fill = 0) -> Tensor:
    """Pad an image at its bottom and right.

    Args:
        image: ``(C, H', W')`` of any dtype.
        size: (H, W), at least (H', W').
        fill: The value of the new pixels, in the image's own scale: one number, or one for
            each channel. Rounded to nearest where the image holds integers.

    Returns:
        ``(C, H, W)``; the image itself where it has this size already.

    Raises:
        ValueError: If ``fill`` does not suit the image's channels or dtype.
    """
    value = _fill_value(fill, image)
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image
    canvas = image.new_empty((image.shape[0], *size))
    canvas[:, height:] = value
    canvas[:, :height, width:] = value
    canvas[:, :height, :width] = image
    return canvas


def blend(image_a: Tensor, image_b: Tensor, lam: float, fill: Fill = 0) -> Tensor:
    r"""Blend two images: :math:`\lambda A + (1 - \lambda) B`, without resizing either.

    Both lie at the top left of the canvas, so the geometry of every object is preserved (Bag of
    Freebies, arXiv 1902.04103, section 3.1). Each is padded to the canvas with ``fill`` first:
    what neither covers is ``fill``.

    Args:
        image_a: ``(C, H_a, W_a)``, uint8 or floating point.
        image_b: ``(C, H_b, W_b)`` of the same dtype, on the same device.
        lam: The blend ratio λ of ``image_a``, in [0, 1].
        fill: The value of padded pixels, in the images' own scale: one number, or one for each
            channel.

    Returns:
        ``(C, H, W)`` in the input's dtype; uint8 is rounded to nearest. It is a tv_tensor
        where ``image_a`` is one.

    Raises:
        ValueError: If λ is outside [0, 1], the images differ in dtype, device or number of
            channels, or ``fill`` does not suit them.
    """
    check_ratio(lam)
    _check_pair(image_a, image_b)
    blended = _blend(plain(image_a), plain(image_b), lam, fill)
    return typed_as(blended, image_a, canvas_size(image_a, image_b))


def _blend(image_a: Tensor, image_b: Tensor, lam: float, fill: Fill) -> Tensor:
    """Blend two images that match."""
    if image_a.dtype == torch.uint8 and image_a.device.type == "cpu":
        return _blend_strips(image_a, image_b, lam, fill)
    size = canvas_size(image_a, image_b)
    image_a, image_b = pad_to(image_a, size, fill), pad_to(image_b, size, fill)
    if image_a.is_floating_point():
        return torch.lerp(image_b, image_a, lam)
    return torch.lerp(image_b.float(), image_a.float(), lam).round_().to(image_a.dtype)


def paste(image_a: Tensor, image_b: Tensor, rectangle: Rectangle) -> Tensor:
    """Paste a rectangle of one image into another, at the same place.

    Args:
        image_a: ``(C, H_a, W_a)``.
        image_b: ``(C, H_b, W_b)`` of the same dtype, on the same device.
        rectangle: (x1, y1, x2, y2) in pixels, x2 and y2 exclusive; within both images.

    Returns:
        A new image of A's size; a tv_tensor where ``image_a`` is one.

    Raises:
        ValueError: If the images differ in dtype, device or number of channels, or the rectangle
            is not within both.
    """
    _check_pair(image_a, image_b)
    x1, y1, x2, y2 = _checked_rectangle(rectangle, image_a, image_b)
    pasted = plain(image_a).clone()
    pasted[:, y1:y2, x1:x2] = plain(image_b)[:, y1:y2, x1:x2]
    return typed_as(pasted, image_a, (image_a.shape[-2], image_a.shape[-1]))


def _checked_rectangle(rectangle: Rectangle, image_a: Tensor, image_b: Tensor) -> Rectangle:
    """Return the rectangle; raise ValueError unless it is one within both images."""
    height, width = common_size(image_a, image_b)
    whole = len(rectangle) == 4 and all(isinstance(edge, Integral) for edge in rectangle)
    if whole:
        x1, y1, x2, y2 = rectangle
    if not whole or not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        raise ValueError(
            f"rectangle must be four integers (x1, y1, x2, y2) within the {width} x {height} "
            f"pixels that both images cover, got {rectangle}"
        )
    return rectangle


def _check_pair(image_a: Tensor, image_b: Tensor) -> None:
    """Raise ValueError for images that cannot be blended."""
    for name in ("dtype", "device"):
        a, b = getattr(image_a, name), getattr(image_b, name)
        if a != b:
            raise ValueError(f"images to mix must have the same {name}, got {a} and {b}")
    if image_a.shape[0] != image_b.shape[0]:
        raise ValueError(
            f"images to mix must have as many channels, got {image_a.shape[0]} and "
            f"{image_b.shape[0]}"
        )


def _fill_value(fill: Fill, image: Tensor) -> Tensor:
    """Return ``fill`` in the image's dtype and on its device: ``(1 or C, 1, 1)``."""
    values = [float(value) for value in (fill if isinstance(fill, Sequence) else [fill])]
    if isinstance(fill, Sequence) and len(values) != image.shape[0]:
        raise ValueError(
            f"fill must be one number or one for each of the {image.shape[0]} channels, got {fill}"
        )
    if not image.is_floating_point():
        limits = torch.iinfo(image.dtype)
        if not all(limits.min <= value <= limits.max for value in values):
            raise ValueError(
                f"fill must be in [{limits.min}, {limits.max}] for {image.dtype}, got {fill}"
            )
        values = [round(value) for value in values]
    return torch.tensor(values, dtype=image.dtype, device=image.device).reshape(-1, 1, 1)


def _blend_strips(image_a: Tensor, image_b: Tensor, lam: float, fill: Fill) -> Tensor:
    """Blend uint8 images on the CPU, a strip of rows after the other.

    The same arithmetic as on whole images, but the floats stay in the cache and padding costs
    no copy of its own.
    """
    (height, width), channels = canvas_size(image_a, image_b), image_a.shape[0]
    value = _fill_value(fill, image_a).float()
    rows = max(1, min(height, _STRIP_VALUES // max(1, channels * width)))
    canvas = _empty_like_order(image_a, (channels, height, width), torch.uint8)
    strip_a = _empty_like_order(image_a, (channels, rows, width), torch.float32)
    strip_b = torch.empty_like(strip_a)
    for top in range(0, height, rows):
        rows = min(rows, height - top)
        a = _load_rows(strip_a[:, :rows], image_a[:, top : top + rows], value)
        b = _load_rows(strip_b[:, :rows], image_b[:, top : top + rows], value)
        # By way of int16, because torch converts float to uint8 without vector instructions.
        canvas[:, top : top + rows] = torch.lerp(b, a, lam, out=b).round_().short()
    return canvas


def _load_rows(strip: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """Copy rows of an image to the top left of a float strip, ``value`` to what is left."""
    height, width = rows.shape[1:]
    strip[:, :height, :width] = rows
    if (height, width) != strip.shape[1:]:
        strip[:, height:] = value
        strip[:, :height, width:] = value
    return strip


def _empty_like_order(image: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Return an empty ``(C, H, W)`` tensor, channels last in memory where the image is."""
    channels, height, width = shape
    if image.stride(0) == 1:  # as an image decoder leaves it
        return torch.empty((height, width, channels), dtype=dtype).permute(2, 0, 1)
    return torch.empty(shape, dtype=dtype)
