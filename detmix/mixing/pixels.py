"""Blending the pixels of two images on a common canvas.

Shapes: C channels; (H_a, W_a) and (H_b, W_b) the images; H = max(H_a, H_b), W = max(W_a, W_b)
the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Fill", "blend", "canvas_size", "pad_to"]

Fill = float | Sequence[float]


def canvas_size(image_a: Tensor, image_b: Tensor) -> tuple[int, int]:
    """Return (H, W) of the smallest canvas that holds both images at its top left."""
    return (
        max(image_a.shape[-2], image_b.shape[-2]),
        max(image_a.shape[-1], image_b.shape[-1]),
    )


def pad_to(image: Tensor, size: tuple[int, int], fill: Fill = 0) -> Tensor:
    """Pad an image at its bottom and right.

    Args:
        image: ``(C, H', W')`` of any dtype.
        size: (H, W), at least (H', W').
        fill: The value of the new pixels, in the image's own scale: one number, or one for
            each channel.

    Returns:
        ``(C, H, W)``; the image itself where it has this size already.
    """
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image
    canvas = image.new_empty((image.shape[0], *size))
    value = torch.as_tensor(fill, device=image.device).to(image.dtype)
    if value.ndim and len(value) != image.shape[0]:
        raise ValueError(
            f"fill must be one number or one for each of the {image.shape[0]} channels, got {fill}"
        )
    value = value.reshape(-1, 1, 1)
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
        ``(C, H, W)`` in the input's dtype; uint8 is rounded to nearest.
    """
    size = canvas_size(image_a, image_b)
    image_a, image_b = pad_to(image_a, size, fill), pad_to(image_b, size, fill)
    if image_a.is_floating_point():
        return torch.lerp(image_b, image_a, lam)
    return torch.lerp(image_b.float(), image_a.float(), lam).round_().to(image_a.dtype)
