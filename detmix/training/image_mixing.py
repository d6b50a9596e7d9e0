"""Mixup and CutMix of a classifier's batches, by torchvision's transforms.

B images, K classes. In a batch of B images, image i is mixed with image i - 1, and the first with
the last, with one ratio for all, as the papers' official code has it (with a permutation in place
of the shift, which makes no difference in a shuffled batch).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

from detmix.training.pretrain_config import ImageMixingConfig, Mix

__all__ = ["BatchMix", "build_batch_mix"]

BatchMix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_batch_mix(mix: Mix, config: ImageMixingConfig, num_classes: int) -> BatchMix | None:
    """Build what mixes a batch, or None where batches stay as they are.

    Cutout needs no second image: it is part of `detmix.data.classification_transforms`.

    Args:
        mix: The way of mixing.
        config: Its parameters.
        num_classes: K.

    Returns:
        A function of float images ``(B, 3, H, W)`` and int64 labels ``(B,)`` that returns images
        and, when it mixed them, float targets ``(B, K)`` whose rows sum to 1; labels as they are
        when it did not. It draws from torch's global random state on the CPU, so that a GPU need
        not be waited for. CutMix takes the share of what was really pasted for the targets, not
        the one drawn, of which the image's border may have cut off a part (arXiv 1905.04899,
        official code).
    """
    mixup = v2.MixUp(alpha=config.mixup_alpha, num_classes=num_classes)
    cutmix = v2.CutMix(alpha=config.cutmix_alpha, num_classes=num_classes)
    transforms = {
        "mixup": mixup,
        "cutmix": cutmix,
        "mixup+cutmix": v2.RandomChoice([mixup, cutmix]),
    }
    if mix not in transforms:
        return None
    mixed: BatchMix = v2.RandomApply([transforms[mix]], p=config.p)
    return mixed
