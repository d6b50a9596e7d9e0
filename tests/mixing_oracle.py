"""Samples to mix, and what their pixels and objects are held against, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, TVTensor

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
FORMATS = ("XYXY", "XYWH", "CXCYWH")


def make_image(height, width, dtype=torch.uint8, seed=0, channels=3, device="cpu"):
    generator = seeded(seed)
    if dtype == torch.uint8:
        image = torch.randint(0, 256, (channels, height, width), generator=generator, dtype=dtype)
    else:
        image = torch.rand((channels, height, width), generator=generator).to(dtype)
    return image.to(device)


def make_target(count, seed=0, **extra):
    generator = seeded(seed)
    corners = torch.rand((count, 4), generator=generator) * 20
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], 1)
    labels = torch.randint(1, 21, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, "image_id": seed, **extra}


def make_boxes(rows, size, kind=None):
    """Return boxes, given as (x1, y1, x2, y2), plain or in a format of torchvision's."""
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    if kind is None:
        return boxes
    typed = BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return convert_bounding_box_format(typed, new_format=BoundingBoxFormat[kind])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


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
        image = torch.full((3, height, width), 20 * index % 256, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0.0, width, height]])
        target = {"boxes": boxes, "labels": torch.tensor([index + 1]), "image_id": index}
        return image, {**target, "epoch": self.epoch.value}


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


def assert_same_samples(samples, expected):
    for (image, target), (other, other_target) in zip(samples, expected, strict=True):
        assert torch.equal(image, other)
        assert_same_target(target, other_target)


def assert_same_batch(batch, expected):
    assert_same_samples(zip(*batch, strict=True), zip(*expected, strict=True))
