"""Mixup for object detection (Bag of Freebies, arXiv 1902.04103, section 3.1).

Shapes: C channels; (H_a, W_a) and (H_b, W_b) the images, with N_a and N_b objects; H and W the
larger of their heights and widths, the canvas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from detmix.mixing.join import join
from detmix.mixing.mixer import RatioMixer, TargetGetter
from detmix.mixing.target import (
    Sample,
    Size,
    Target,
    check_pair,
    check_share,
    checked_samples,
    image_size,
    key_names,
    plain,
    wrap_like,
)

Fill = float | Sequence[float]


def mixup(
    image_a: Tensor,
    target_a: Target,
    image_b: Tensor,
    target_b: Target,
    lam: float,
    fill: Fill = 0,
    *,
    keys: Collection[str] = (),
) -> Sample:
    """Blend two images and join their objects, each weighted by its image's ratio.

    The image is ``λ A + (1 - λ) B`` on the smallest canvas that holds both, at
    the top left and not resized. The target holds A's objects with weights multiplied by λ,
    then B's with weights multiplied by 1 - λ; so mixing what was mixed already is right too.

    Args:
        image_a: ``(C, H_a, W_a)``, uint8 or floating point.
        target_a: Target with ``boxes`` ``(N_a, 4)``; ``box_weights`` default to 1.
        image_b: ``(C, H_b, W_b)`` of the same dtype, on the same device.
        target_b: Target with ``boxes`` ``(N_b, 4)``.
        lam: The blend ratio λ, in [0, 1].
        fill: The value of padded pixels, in the images' own scale: a number, or one a channel.
        keys: Further keys of the objects, as `union` takes them.

    Returns:
        The image, ``(C, H, W)`` in the input's dtype (uint8 rounded to nearest), and the joined
        target, as `union` describes it. The inputs are not changed.

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
    samples, declared = [(image_a, target_a), (image_b, target_b)], key_names(keys)
    (_, target_a), (_, target_b) = checked_samples(samples, declared)
    image = blend(image_a, image_b, lam, fill)
    return image, join((target_a, target_b), (lam, 1.0 - lam), image_size(image), declared)


class DetectionMixUp(RatioMixer):
    """Mixup of each sample of a batch with a partner from it, with a ratio λ of its own.

    It serves as a ``collate_fn``, on a batch of images and targets on any device, and within
    `MixedDataset`. The only sample of a batch stays as it is.

    Args:
        alpha: λ is drawn from Beta(alpha, alpha); 1.5 as in Bag of Freebies, section 3.1.
        p: The chance that a sample is mixed, in [0, 1].
        fill: The value of padded pixels, as `mixup` takes it.
        epochs: How many epochs the training has; needed for ``off_epochs``.
        off_epochs: For how many epochs at the end nothing is mixed, so that the detector sees
            plain images last; fewer than ``epochs``. Takes effect through `set_epoch`.
        keys: What else than the known keys belongs to the objects, such as ``["track_ids"]``, and
            which of the known ones must not be left out, such as ``["masks"]``; see `union`.
        target_getter: Turns a target as it comes into one under torchvision's names, such as
            ``lambda t: {"boxes": t["bboxes"], "labels": t["class_labels"]}``, which comes out.

    Raises:
        ValueError: For settings out of range; ``fill`` is checked when images are mixed.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        p: float = 0.5,
        fill: Fill = 0,
        *,
        epochs: int | None = None,
        off_epochs: int = 0,
        keys: Collection[str] = (),
        target_getter: TargetGetter | None = None,
    ) -> None:
        super().__init__(alpha, p, epochs, off_epochs, keys=keys, target_getter=target_getter)
        self.fill = fill

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: float) -> Sample:
        """Mix two checked samples as `mixup` does; ``how`` is the ratio λ of A."""
        (image_a, target_a), (image_b, target_b) = sample_a, sample_b
        image = blend(image_a, image_b, how, self.fill)
        return image, join((target_a, target_b), (how, 1.0 - how), image_size(image), self.keys)


def blend(image_a: Tensor, image_b: Tensor, lam: float, fill: Fill = 0) -> Tensor:
    """Blend two images, ``λ A + (1 - λ) B``, without resizing either.

    Both lie at the top left of the canvas, so the geometry of every object is preserved (Bag of
    Freebies, arXiv 1902.04103, section 3.1). Each is padded to the canvas with ``fill`` first:
    what neither covers is ``fill``. Arguments and result are those of `mixup`.

    Raises:
        ValueError: If λ is outside [0, 1], the images differ in dtype, device or number of
            channels, or ``fill`` does not suit them.
    """
    check_share("lam", lam)
    check_pair(image_a, image_b)
    size = max(image_a.shape[-2], image_b.shape[-2]), max(image_a.shape[-1], image_b.shape[-1])
    values = _fill_values(fill, image_a)
    a, b = (_pad(plain(image), size, values) for image in (image_a, image_b))
    if a.is_floating_point():
        blended = torch.lerp(b, a, lam)
    elif a.dtype == torch.uint8 and a.device.type == "cpu":
        blended = _blend_bytes(a, b, lam)
    else:
        blended = torch.lerp(b.float(), a.float(), lam).round_().to(a.dtype)
    return wrap_like(blended, image_a, size)


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


def _pad(image: Tensor, size: Size, fill: Sequence[float]) -> Tensor:
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


def _channels_last(image: Tensor) -> bool:
    """Tell whether a pixel's channels lie together in memory, as an image decoder leaves them."""
    return image.stride(0) == 1


def _fill_values(fill: Fill, image: Tensor) -> list[float]:
    """Return ``fill`` as a list of one number or C, whole ones for an image of integers."""
    values = [float(value) for value in (fill if isinstance(fill, Sequence) else [fill])]
    if isinstance(fill, Sequence) and len(values) != image.shape[0]:
        raise ValueError(f"fill must be a number, or {len(image)}, one a channel, got {fill}")
    if image.is_floating_point():
        return values
    info = torch.iinfo(image.dtype)
    if not all(info.min <= value <= info.max for value in values):
        raise ValueError(f"fill must be in [{info.min}, {info.max}] of {info.dtype}, got {fill}")
    return [round(value) for value in values]
