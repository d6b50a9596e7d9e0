"""Samples to mix, and the float64 formula their pixels are held against."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
# Half a step for the rounding of the result, and a little for that of the arithmetic.
TOLERANCE = {
    torch.uint8: 0.5 + 1e-4,
    torch.float16: 2**-10,
    torch.float32: 2e-7,
    torch.float64: 4e-16,
}
LAMS = [0.0, 1.0, 0.5, 0.3, 1e-12, 1e-3, 1 - 1e-3, math.nextafter(1.0, 0.0)]


def make_image(height, width, dtype=torch.uint8, seed=0, channels=3, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        image = torch.randint(0, 256, (channels, height, width), generator=generator, dtype=dtype)
    else:
        image = torch.rand((channels, height, width), generator=generator).to(dtype)
    return image.to(device)


def make_target(count, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand((count, 4), generator=generator) * 20
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], 1)
    labels = torch.randint(1, 21, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, "image_id": seed, **extra}


def expected_pixels(image_a, image_b, lam, fill):
    """λ·pad(A) + (1 - λ)·pad(B) in float64, both padded explicitly."""
    images = [image.double().cpu().numpy() for image in (image_a, image_b)]
    size = np.max([image.shape for image in images], axis=0)
    padded = []
    for image in images:
        canvas = np.broadcast_to(np.reshape(fill, (-1, 1, 1)), size).astype(np.float64)
        canvas[:, : image.shape[1], : image.shape[2]] = image
        padded.append(canvas)
    return lam * padded[0] + (1 - lam) * padded[1]


def assert_pixels(result, image_a, image_b, lam, fill=0):
    expected = expected_pixels(image_a, image_b, lam, fill)
    assert result.dtype == image_a.dtype
    assert result.shape == expected.shape
    error = np.abs(result.double().cpu().numpy() - expected).max(initial=0)
    assert error <= TOLERANCE[result.dtype]
