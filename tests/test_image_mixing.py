"""Cropping, Cutout, mixup and CutMix of a classifier's images, against torchvision called directly.

In the batches that are mixed image i has the value i everywhere and is alone in its class.
"""

from __future__ import annotations

import pytest
import torch
from mixing_oracle import make_image
from torchvision.transforms import v2

from detmix.training import ImageAugmentConfig, ImageDataConfig, ImageMixingConfig, PretrainConfig
from detmix.training.classifier import build_batch_mix, build_image_transform

CLASSES = 9
LABELS = torch.tensor([4, 0, 8, 2, 5])
IMAGES = torch.arange(1.0, 6)[:, None, None, None].repeat(1, 3, 20, 20)
FILL = [51, 102, 153]
SCALE = {"scale": (0.2, 0.7)}
RESIZED = v2.RandomResizedCrop(32, **SCALE)
ERASED = v2.RandomErasing(0.3, scale=(0.1, 0.1), ratio=(1, 1), value=FILL)


@pytest.mark.parametrize(
    ("settings", "mixing", "theirs"),
    [
        (SCALE, {}, [RESIZED]),
        ({"crop": "padded", "padding": 3}, {}, [v2.RandomCrop(32, padding=3, fill=FILL)]),
        (
            SCALE | {"flip": 0.3, "jitter": 0.4},
            {},
            [RESIZED, v2.RandomHorizontalFlip(0.3), v2.ColorJitter(0.4, 0.4, 0.4)],
        ),
        (SCALE, {"p": 0.3, "cutout_area": 0.1}, [RESIZED, ERASED]),
        ({"size": 24, "eval_resize": 30}, None, [v2.Resize([30]), v2.CenterCrop(24)]),
        ({"size": 40}, None, [v2.CenterCrop(40)]),
    ],
)
def test_images_are_transformed_as_torchvision_does(settings, mixing, theirs):
    """Those to evaluate on, where there is no mixing, without chance."""
    config = PretrainConfig(
        mix="cutout" if mixing else "none",
        mixing=ImageMixingConfig(**(mixing or {})),
        data=ImageDataConfig(mean=tuple(value / 255 for value in FILL)),
        augment=ImageAugmentConfig(**{"size": 32, "flip": 0.0, **settings}),
    )
    mine = build_image_transform(config, train=mixing is not None)
    image, found = make_image(40, 60) if mixing is None else make_image(32, 32), []
    for call in (mine, v2.Compose(theirs)):
        torch.manual_seed(1)
        found.append(torch.stack([call(image) for _ in range(30)]))
    assert torch.equal(*found)
    assert mine(make_image(64, 48)).shape == (3, config.augment.size, config.augment.size)


MIXUP, CUTMIX = v2.MixUp(alpha=0.4, num_classes=CLASSES), v2.CutMix(alpha=3.0, num_classes=CLASSES)


@pytest.mark.parametrize(
    ("mix", "theirs", "p"),
    [("mixup", MIXUP, 0.5), ("cutmix", CUTMIX, 1.0),
     ("mixup+cutmix", v2.RandomChoice([MIXUP, CUTMIX]), 0.5)],
)  # fmt: skip
def test_batches_are_mixed_as_torchvision_does(mix, theirs, p):
    options = ImageMixingConfig(mixup_alpha=0.4, cutmix_alpha=3.0, p=p)
    mine = build_batch_mix(PretrainConfig(mix=mix, mixing=options), CLASSES)
    found = []
    for call in (mine, v2.RandomApply([theirs], p=p)):
        torch.manual_seed(0)
        found.append([part for _ in range(20) for part in call(IMAGES, LABELS)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    mixed = [labels for labels in found[0][1::2] if labels.ndim == 2]
    assert len(mixed) == 20 if p == 1 else 4 < len(mixed) < 16
