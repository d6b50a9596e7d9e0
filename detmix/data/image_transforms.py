"""torchvision's transforms for classification, as a function of (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.mixing.epoch import SharedEpoch
from detmix.mixing.seeding import sample_seed

__all__ = ["TransformedImages", "classification_transforms"]

_CROPS = ("resized", "padded")
_IMAGENET_MEAN = (124, 116, 104)


def classification_transforms(
    size: int,
    *,
    train: bool,
    crop: str = "resized",
    scale: tuple[float, float] = (0.08, 1.0),
    padding: int = 4,
    flip: float = 0.5,
    jitter: float = 0.0,
    cutout: float = 0.0,
    cutout_area: float = 0.25,
    fill: Sequence[int] = _IMAGENET_MEAN,
    eval_resize: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """Build the usual pipeline for classification: crop, flip, colours, Cutout.

    It takes and returns uint8 ``(3, H, W)`` tensors; what it returns is ``size`` pixels square.

    Cutout erases one square that lies wholly inside the image, at a random place. The original
    (DeVries and Taylor, arXiv 1708.04552) draws the square's centre instead and clips what
    reaches beyond the image, so that it erases less on average. An area of 0.25 is the 112 x 112
    of 224 x 224 pixels that CutMix compares itself with (arXiv 1905.04899).

    Args:
        size: Side of the square images that come out, in pixels.
        train: Whether to augment. For evaluation the image is only resized and its centre taken.
        crop: ``"resized"`` takes a part of random size and shape, as is usual for ImageNet;
            ``"padded"`` pads the image and takes a random square of its former size, as is usual
            for CIFAR. There, images of another size are first resized to it.
        scale: Range of the part's area for ``"resized"``, relative to the image's.
        padding: On each side for ``"padded"``, in pixels.
        flip: The probability of a horizontal flip.
        jitter: How much brightness, contrast and saturation vary: factors from ``1 - jitter`` to
            ``1 + jitter``. CutMix's official code has 0.4 for ImageNet.
        cutout: The probability of Cutout.
        cutout_area: The erased square's area, relative to the image's.
        fill: What padding and Cutout show, R, G, B from 0 to 255: usually the data's mean.
        eval_resize: For evaluation the shorter side is resized to so many pixels first; None
            for ``size``.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_arguments(size, crop, scale, padding, jitter, fill, eval_resize)
    for name, p in (("flip", flip), ("cutout", cutout)):
        if not 0 <= p <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], got {p}")
    if cutout > 0 and not 1 <= round(cutout_area**0.5 * size) < size:
        raise ValueError(
            f"cutout_area must leave a square of at least one and less than all of {size} x {size} "
            f"pixels, got {cutout_area}"
        )
    from torchvision.transforms import v2

    if not train:
        return _compose([v2.Resize(eval_resize or size, antialias=True), v2.CenterCrop(size)])
    steps: list[Any] = []
    if crop == "resized":
        steps.append(v2.RandomResizedCrop(size, scale=scale, antialias=True))
    else:
        steps += [v2.Resize(size, antialias=True), v2.CenterCrop(size)]  # pass others untouched
        steps.append(v2.RandomCrop(size, padding=padding, fill=list(fill)))
    if flip > 0:
        steps.append(v2.RandomHorizontalFlip(flip))
    if jitter > 0:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    if cutout > 0:
        area = (cutout_area, cutout_area)
        steps.append(v2.RandomErasing(cutout, scale=area, ratio=(1, 1), value=list(fill)))
    return _compose(steps)


class TransformedImages(Dataset[tuple[Tensor, int, int]]):
    """Images for classification, transformed as a function of (seed, epoch, index) alone.

    A sample is ``(image, label, index)``: the image as the transform returns it, uint8
    ``(3, size, size)`` with :func:`classification_transforms`, the label from 0, and the sample's
    index, from which batches can draw what they mix.

    Args:
        dataset: Yields ``(image, label)`` by index and has a length.
        transform: Called with the image; may draw from torch's global CPU generator (as
            torchvision's transforms do), which is seeded for it and afterwards put back.
        seed: The run's seed.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, int]],
        transform: Callable[[Tensor], Tensor],
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, here, in running workers and in the data set below."""
        self._epoch.value = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        image, label = self.dataset[index]
        seed = sample_seed(self.seed, self._epoch.value, index, "augment")
        return _call_seeded(self.transform, image, seed), label, index


def _call_seeded(transform: Callable[[Tensor], Tensor], image: Tensor, seed: int) -> Tensor:
    """Call with torch's global CPU generator seeded, and leave that as it was.

    ``torch.manual_seed`` would seed the GPUs' generators as well, in the training process where
    there are no workers, and with ``torch.random.fork_rng`` takes 100 µs where this takes 3.
    """
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        return transform(image)
    finally:
        torch.default_generator.set_state(state)


def _compose(steps: list[Any]) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    pipeline: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return pipeline


def _check_arguments(
    size: int,
    crop: str,
    scale: tuple[float, float],
    padding: int,
    jitter: float,
    fill: Sequence[int],
    eval_resize: int | None,
) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if crop not in _CROPS:
        raise ValueError(f"crop must be one of {', '.join(_CROPS)}, got {crop!r}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be two areas in (0, 1], the smaller one first, got {scale}")
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter must be in [0, 1], got {jitter}")
    if len(fill) != 3 or not all(0 <= value <= 255 and value == int(value) for value in fill):
        raise ValueError(f"fill must be three whole numbers from 0 to 255, got {fill}")
    if eval_resize is not None and eval_resize < size:
        raise ValueError(f"eval_resize must be at least size = {size}, got {eval_resize}")
