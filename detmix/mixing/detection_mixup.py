"""Mixup for object detection (Bag of Freebies, arXiv 1902.04103, section 3.1).

Shapes: C channels; (H_a, W_a) and (H_b, W_b) the images, with N_a and N_b objects; H and W the
larger of their heights and widths, the canvas.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from detmix.mixing.mixer import DetectionMixer, Sample, check_alpha
from detmix.mixing.target import (
    Target,
    check_pair,
    check_ratio,
    check_sample,
    completed,
    image_size,
    join,
    plain,
    typed_as,
)

Fill = float | Sequence[float]


def mixup(
    image_a: Tensor,
    target_a: Target,
    image_b: Tensor,
    target_b: Target,
    lam: float,
    fill: Fill = 0,
) -> Sample:
    r"""Blend two images and join their objects, each weighted by its image's ratio.

    The image is :math:`\lambda A + (1 - \lambda) B` on the smallest canvas that holds both, at
    the top left and not resized. The target holds A's objects with weights multiplied by λ,
    then B's with weights multiplied by 1 - λ; so mixing what was mixed already is right too.

    Args:
        image_a: ``(C, H_a, W_a)``, uint8 or floating point.
        target_a: Target with ``boxes`` ``(N_a, 4)``; ``box_weights`` default to 1.
        image_b: ``(C, H_b, W_b)`` of the same dtype, on the same device.
        target_b: Target with ``boxes`` ``(N_b, 4)``.
        lam: The blend ratio λ, in [0, 1].
        fill: The value of padded pixels, in the images' own scale: one number, or one for each
            channel.

    Returns:
        The image, ``(C, H, W)`` in the input's dtype (uint8 rounded to nearest), and the target
        with N_a + N_b objects, those of weight 0 left out; ``image_id`` and other keys of the
        image are A's. tv_tensors come out as such, of A's type and box format. The inputs are
        not changed.

    Raises:
        ValueError: For λ outside [0, 1], images that do not match, or a target that breaks the
            contract, naming what was got and what was expected.

    Example:
        >>> import torch
        >>> dark, bright = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
        >>> dog = {"boxes": torch.tensor([[0., 0., 1., 2.]]), "labels": torch.tensor([12])}
        >>> cat = {"boxes": torch.tensor([[0., 0., 2., 2.]]), "labels": torch.tensor([8])}
        >>> image, target = mixup(dark, dog, bright, cat, lam=0.25)
        >>> image.unique(), target["labels"], target["box_weights"]
        (tensor([0.7500]), tensor([12,  8]), tensor([0.2500, 0.7500]))
    """
    check_sample(image_a, target_a, "sample a")
    check_sample(image_b, target_b, "sample b")
    return _mixup((image_a, target_a), (image_b, target_b), lam, fill)


def _mixup(sample_a: Sample, sample_b: Sample, lam: float, fill: Fill) -> Sample:
    (image_a, target_a), (image_b, target_b) = sample_a, sample_b
    image = blend(image_a, image_b, lam, fill)
    targets = completed(target_a, image_a.device), completed(target_b, image_b.device)
    return image, join(targets, (lam, 1.0 - lam), canvas_size(image_a, image_b))


class DetectionMixUp(DetectionMixer):
    """Mixup of the samples of a batch, as a module.

    It serves as it is as a ``collate_fn`` (on a list of samples), on a batch of images and
    targets, on the CPU as well as on the GPU, and within `MixedDataset`. Each sample is mixed
    with chance ``p``, with a partner from the same batch and a ratio of its own; the only sample of
    a batch stays as it is.

    Args:
        alpha: Ratios are drawn from Beta(alpha, alpha); 1.5 as in Bag of Freebies, section 3.1.
        p: The chance that a sample is mixed, in [0, 1].
        fill: The value of padded pixels, in the images' own scale: one number, or one for each
            channel.
        epochs: How many epochs the training has; needed for ``off_epochs``.
        off_epochs: For how many epochs at the end nothing is mixed; see `set_epoch`.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> mix = DetectionMixUp(alpha=1.5, p=0.5)
        >>> loader = DataLoader(dataset, batch_size=4, collate_fn=mix)  # doctest: +SKIP
    """

    def __init__(
        self,
        alpha: float = 1.5,
        p: float = 0.5,
        fill: Fill = 0,
        *,
        epochs: int | None = None,
        off_epochs: int = 0,
    ) -> None:
        super().__init__(p, epochs=epochs, off_epochs=off_epochs)
        check_alpha(alpha)
        self.alpha = alpha
        self.fill = fill

    def draw_pair(self, rng: random.Random) -> float:
        """Draw λ from Beta(alpha, alpha)."""
        return rng.betavariate(self.alpha, self.alpha)

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: float) -> Sample:
        """Mix two checked samples; ``how`` is the ratio λ of A."""
        return _mixup(sample_a, sample_b, how, self.fill)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"alpha={self.alpha}, fill={self.fill}, {super().extra_repr()}"


def canvas_size(image_a: Tensor, image_b: Tensor) -> tuple[int, int]:
    """Return (H, W) of the smallest canvas that holds both images at its top left."""
    return max(image_a.shape[-2], image_b.shape[-2]), max(image_a.shape[-1], image_b.shape[-1])


def pad_to(image: Tensor, size: tuple[int, int], fill: Sequence[float]) -> Tensor:
    """Pad an image at its bottom and right with one number, or one for each channel."""
    height, width = image_size(image)
    if (height, width) == size:
        return image
    if _channels_last(image):
        canvas = image.new_empty((*size, image.shape[0])).permute(2, 0, 1)
    else:
        canvas = image.new_empty((image.shape[0], *size))
    # one number by itself fills memory several times as fast
    value = fill[0] if len(fill) == 1 else image.new_tensor(fill)[:, None, None]
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
    check_pair(image_a, image_b)
    blended = _blend(plain(image_a), plain(image_b), lam, fill)
    return typed_as(blended, image_a, canvas_size(image_a, image_b))


def _blend(image_a: Tensor, image_b: Tensor, lam: float, fill: Fill) -> Tensor:
    """Blend two images that match."""
    size, values = canvas_size(image_a, image_b), _fill_values(fill, image_a)
    image_a, image_b = pad_to(image_a, size, values), pad_to(image_b, size, values)
    if image_a.is_floating_point():
        return torch.lerp(image_b, image_a, lam)
    if image_a.dtype == torch.uint8 and image_a.device.type == "cpu":
        return _blend_bytes(image_a, image_b, lam)
    return torch.lerp(image_b.float(), image_a.float(), lam).round_().to(image_a.dtype)


def _blend_bytes(image_a: Tensor, image_b: Tensor, lam: float) -> Tensor:
    """Blend uint8 images of one size on the CPU, where torch takes many times as long as OpenCV."""
    import cv2

    last = _channels_last(image_a)
    a, b = ((x.permute(1, 2, 0) if last else x).contiguous() for x in (image_a, image_b))
    blended = torch.empty_like(a)
    if blended.numel():
        rows = [x.view(1, -1).numpy() for x in (a, b, blended)]
        cv2.addWeighted(rows[0], lam, rows[1], 1.0 - lam, 0.0, dst=rows[2])
    return blended.permute(2, 0, 1) if last else blended


def _channels_last(image: Tensor) -> bool:
    """Tell whether a pixel's channels lie together in memory, as an image decoder leaves them."""
    return image.stride(0) == 1


def _fill_values(fill: Fill, image: Tensor) -> list[float]:
    """Return ``fill`` as a list of one number or C, whole ones for an image of integers."""
    values = [float(value) for value in (fill if isinstance(fill, Sequence) else [fill])]
    if isinstance(fill, Sequence) and len(values) != image.shape[0]:
        raise ValueError(
            f"fill must be one number or one for each of the {image.shape[0]} channels, got {fill}"
        )
    if image.is_floating_point():
        return values
    limits = torch.iinfo(image.dtype)
    if not all(limits.min <= value <= limits.max for value in values):
        raise ValueError(
            f"fill must be in [{limits.min}, {limits.max}] for {image.dtype}, got {fill}"
        )
    return [round(value) for value in values]
