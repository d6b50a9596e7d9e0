"""Samples to mix, and what their pixels and objects are held against, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchvision.tv_tensors import BoundingBoxes, TVTensor

from detmix.mixing import SharedEpoch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
# Half a step for the rounding of the result, and a little for that of the arithmetic.
TOLERANCE = {
    torch.uint8: 0.5 + 1e-3,
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


class Plain(Dataset):
    """Sample i is an image of one value and of a size of its own; an object i + 1 covers it all."""

    def __init__(self, size=12):
        self.size = size
        self.epoch = SharedEpoch()

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch.value = epoch

    def __getitem__(self, index):
        height, width = 16 + index % 3, 24 - index % 4
        image = torch.full((3, height, width), self.value(index), dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0.0, width, height]])
        target = {"boxes": boxes, "labels": torch.tensor([index + 1]), "image_id": index}
        return image, {**target, "epoch": self.epoch.value}

    @staticmethod
    def value(index):
        return 20 * index % 256


def on(device, sample):
    """Move an image and the tensors of its target."""
    image, target = sample
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
    return image.to(device), moved


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


def visible_pixels(box, rectangle, inside, size, mask=None):
    """Count pixel by pixel what is seen of an object.

    Args:
        box: Four integers (x1, y1, x2, y2).
        rectangle: Four integers, the pasted rectangle.
        inside: Whether its inside is seen, or all but that.
        size: (H, W) of the object's image; what is beyond is no part of the object.
        mask: The pixels of the object, in place of all in its box.

    Returns:
        The share that is seen, the smallest box around what is seen of ``box`` (None if nothing
        is), and the mask that is seen (None without one).
    """
    y, x = np.mgrid[-32:96, -32:96]
    x1, y1, x2, y2 = rectangle
    seen = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    seen = seen if inside else ~seen
    in_box = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
    in_box &= (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    rows, columns = np.nonzero(in_box & seen)
    left = None
    if len(rows):
        left = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        left = [int(edge) - 32 for edge in left]
        limits = [0, 0, size[1], size[0]]
        whole = [*np.maximum(box[:2], 0).tolist(), *np.minimum(box[2:], limits[2:]).tolist()]
        left = list(box) if left == whole and not inside else left  # pasted, it is clipped
    share = len(rows) / in_box.sum() if in_box.any() else 0.0
    if mask is None:
        return share, left, None
    cut = mask & seen[32 : 32 + mask.shape[0], 32 : 32 + mask.shape[1]]
    return (cut.sum() / mask.sum() if mask.any() else share), left, cut


def assert_same_target(target, expected):
    """The same keys with the same values, types and dtypes, to the last bit."""
    assert target.keys() == expected.keys()
    for key, value in expected.items():
        found = target[key]
        assert type(found) is type(value), key
        if isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype, key
            assert torch.equal(found.as_subclass(torch.Tensor), value.as_subclass(torch.Tensor))
        else:
            assert found == value, key
        if isinstance(value, BoundingBoxes):
            assert found.format == value.format
        if isinstance(value, TVTensor) and hasattr(value, "canvas_size"):
            assert found.canvas_size == value.canvas_size
