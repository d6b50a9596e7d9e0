"""Cropping, Cutout, mixup and CutMix of a classifier's images, against torchvision called directly.

In the batches that are mixed image i has the value i everywhere and is alone in its class.
"""

from __future__ import annotations

import pytest
import torch
from mixing_oracle import make_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from detmix.training import ImageAugmentConfig, ImageDataConfig, ImageMixingConfig, PretrainConfig
from detmix.training.classifier import build_batch_mix, build_image_transform

CLASSES = 9
LABELS = torch.tensor([4, 0, 8, 2, 5])
IMAGES = torch.arange(1.0, 6)[:, None, None, None].repeat(1, 3, 20, 20)
FILL = (51, 102, 153)


def transform(mix="none", *, train=True, mixing=None, **augment):
    config = PretrainConfig(
        mix=mix,
        mixing=ImageMixingConfig(**(mixing or {})),
        data=ImageDataConfig(mean=tuple(value / 255 for value in FILL)),
        augment=ImageAugmentConfig(**{"size": 32, "flip": 0.0, **augment}),
    )
    return build_image_transform(config, train=train)


def test_evaluation_is_resize_and_centre_crop():
    image = make_image(40, 60)
    found = transform(train=False, size=24, eval_resize=30)(image)
    assert torch.equal(found, functional.center_crop(functional.resize(image, [30]), [24, 24]))
    assert torch.equal(transform(train=False, size=40)(image), image[:, :, 10:50])


RESIZED = v2.RandomResizedCrop(32, scale=(0.2, 0.7))
ERASED = v2.RandomErasing(0.3, scale=(0.1, 0.1), ratio=(1, 1), value=list(FILL))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"scale": (0.2, 0.7)}, [RESIZED]),
        ({"crop": "padded", "padding": 3}, [v2.RandomCrop(32, padding=3, fill=list(FILL))]),
        (
            {"scale": (0.2, 0.7), "flip": 0.3, "jitter": 0.4},
            [RESIZED, v2.RandomHorizontalFlip(0.3), v2.ColorJitter(0.4, 0.4, 0.4)],
        ),
        (
            {"mix": "cutout", "mixing": {"p": 0.3, "cutout_area": 0.1}, "scale": (0.2, 0.7)},
            [RESIZED, ERASED],
        ),
    ],
)
def test_augmentation_is_torchvisions(settings, theirs):
    image, found = make_image(32, 32), []
    for call in (transform(**settings), v2.Compose(theirs)):
        torch.manual_seed(1)
        found.append(torch.stack([call(image) for _ in range(30)]))
    assert torch.equal(*found)
    assert transform(**settings)(make_image(64, 48)).shape == (3, 32, 32)


MIXUP, CUTMIX = v2.MixUp(alpha=0.4, num_classes=CLASSES), v2.CutMix(alpha=3.0, num_classes=CLASSES)


@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize(
    ("mix", "theirs"),
    [("mixup", MIXUP), ("cutmix", CUTMIX), ("mixup+cutmix", v2.RandomChoice([MIXUP, CUTMIX]))],
)
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
    torch.testing.assert_close(torch.stack(mixed).sum(2), torch.ones(len(mixed), 5))
