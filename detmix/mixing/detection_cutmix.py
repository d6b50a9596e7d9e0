"""CutMix for object detection: a rectangle of one image pasted into another.

CutMix (arXiv 1905.04899, section 3.1) mixes two labels by area; here every object keeps the
weight of its visible share. Shapes: (H_a, W_a) and (H_b, W_b) the images, with N_a and N_b objects.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from torch import Tensor

from detmix.mixing.joining import join
from detmix.mixing.mixer import DetectionMixer, Sample, check_alpha
from detmix.mixing.pixels import Rectangle, check_ratio, common_size, paste
from detmix.mixing.target import Target, check_sample, completed
from detmix.mixing.visibility import visible

__all__ = ["Cut", "DetectionCutMix", "cutmix"]


class Cut(NamedTuple):
    """A rectangle as shares of an image whose size is not known yet."""

    lam: float
    """λ in [0, 1]: the rectangle's area is 1 - λ of the image's, before it is clipped to it."""
    x: float
    """Centre from the left as a share of the width, in [0, 1)."""
    y: float
    """Centre from the top as a share of the height, in [0, 1)."""

    def rectangle(self, size: tuple[int, int]) -> Rectangle:
        """Return (x1, y1, x2, y2) in pixels, x2 and y2 exclusive.

        In whole pixels as the paper's code makes it: half a side is rounded down, and what
        exceeds the image is cut off.

        Args:
            size: (H, W) of the image.

        Raises:
            ValueError: If a share is out of range.
        """
        check_ratio(self.lam)
        if not (0.0 <= self.x < 1.0 and 0.0 <= self.y < 1.0):
            raise ValueError(f"x and y must be in [0, 1), got {self.x} and {self.y}")
        height, width = size
        half_share = 0.5 * math.sqrt(1.0 - self.lam)
        x, y = int(self.x * width), int(self.y * height)
        half_width, half_height = int(half_share * width), int(half_share * height)
        return (
            max(x - half_width, 0),
            max(y - half_height, 0),
            min(x + half_width, width),
            min(y + half_height, height),
        )


def cutmix(
    image_a: Tensor,
    target_a: Target,
    image_b: Tensor,
    target_b: Target,
    rectangle: Rectangle,
    *,
    min_visibility: float = 0.1,
) -> Sample:
    """Paste a rectangle of B into A, each object weighted by its visible share.

    The weight of each of A's objects is multiplied by the share of its box that the rectangle
    leaves uncovered, that of each of B's by the share inside the rectangle; of the mask's pixels
    in place of the box where the target has ``masks``. Boxes are clipped to what is visible where
    that is a rectangle: always with B, and with A where a whole side of the box is covered from
    edge to edge. Masks are cut exactly, ``area`` is scaled by the visible share, and keypoints
    that are hidden become (0, 0, 0), COCO's "not labelled" (those without a visibility stay).

    Args:
        image_a: ``(C, H_a, W_a)``, uint8 or floating point.
        target_a: Target with ``boxes`` ``(N_a, 4)``; ``box_weights`` default to 1.
        image_b: ``(C, H_b, W_b)`` of the same dtype, on the same device.
        target_b: Target with ``boxes`` ``(N_b, 4)``.
        rectangle: (x1, y1, x2, y2) in whole pixels, x2 and y2 exclusive, within both images.
        min_visibility: Objects with a smaller share are left out, in [0, 1]; those of which
            nothing is visible always are.

    Returns:
        The image, of A's size, and the target with at most N_a + N_b objects; ``image_id`` and
        other keys of the image are A's. tv_tensors come out as such, of A's type and box format.
        The inputs are not changed. A rectangle without area leaves the image A.

    Raises:
        ValueError: For a rectangle that is not within both images, images that do not match, or
            a target that breaks the contract (as rotated boxes do), naming what was got and what
            was expected.

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
    check_sample(image_a, target_a, "sample a")
    check_sample(image_b, target_b, "sample b")
    _check_min_visibility(min_visibility)
    return _cutmix((image_a, target_a), (image_b, target_b), rectangle, min_visibility)


def _check_min_visibility(share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"min_visibility must be in [0, 1], got {share}")


def _cutmix(
    sample_a: Sample, sample_b: Sample, rectangle: Rectangle, min_visibility: float
) -> Sample:
    (image_a, target_a), (image_b, target_b) = sample_a, sample_b
    image = paste(image_a, image_b, rectangle)
    size = (image_a.shape[-2], image_a.shape[-1])
    seen = [
        visible(
            completed(target, part.device),
            (part.shape[-2], part.shape[-1]),
            rectangle,
            size,
            inside=inside,
            min_visibility=min_visibility,
        )
        for part, target, inside in ((image_a, target_a, False), (image_b, target_b, True))
    ]
    (left, share_a), (pasted, share_b) = seen
    return image, join((left, pasted), (share_a, share_b), size)


class DetectionCutMix(DetectionMixer):
    """CutMix of the samples of a batch, as a module.

    It serves wherever `DetectionMixUp` does: as a ``collate_fn``, on a batch of images and
    targets, on the CPU as well as on the GPU, and within `MixedDataset`. Each sample gets, with
    chance ``p``, a rectangle of a partner from the same batch, drawn within the region that both
    images cover; neither is resized. Its sides are sqrt(1 - λ) of that region's, its centre is
    uniform, and what exceeds the region is cut off.

    Args:
        alpha: λ is drawn from Beta(alpha, alpha); 1, so uniform, as in CutMix, section 3.1.
        p: The chance that a sample is mixed, in [0, 1].
        min_visibility: Objects of which a smaller share is visible are left out, in [0, 1].
        epochs: How many epochs the training has; needed for ``off_epochs``.
        off_epochs: For how many epochs at the end nothing is mixed; see `set_epoch`.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> mix = DetectionCutMix(p=0.5)
        >>> loader = DataLoader(dataset, batch_size=4, collate_fn=mix)  # doctest: +SKIP
    """

    def __init__(
        self,
        alpha: float = 1.0,
        p: float = 0.5,
        min_visibility: float = 0.1,
        *,
        epochs: int | None = None,
        off_epochs: int = 0,
    ) -> None:
        super().__init__(p, epochs=epochs, off_epochs=off_epochs)
        check_alpha(alpha)
        _check_min_visibility(min_visibility)
        self.alpha = alpha
        self.min_visibility = min_visibility

    def draw_pair(self, rng: random.Random) -> Cut:
        """Draw λ from Beta(alpha, alpha) and the rectangle's centre."""
        return Cut(rng.betavariate(self.alpha, self.alpha), rng.random(), rng.random())

    def mix_pair(self, sample_a: Sample, sample_b: Sample, how: Cut) -> Sample:
        """Paste the rectangle ``how`` of the second checked sample into the first."""
        rectangle = how.rectangle(common_size(sample_a[0], sample_b[0]))
        return _cutmix(sample_a, sample_b, rectangle, self.min_visibility)

    def extra_repr(self) -> str:
        """Describe the settings."""
        return f"alpha={self.alpha}, min_visibility={self.min_visibility}, {super().extra_repr()}"
