"""Cropping, Cutout, mixup and CutMix of a classifier's images, against torchvision called directly.

In the batches that are mixed image i has the value i everywhere and is alone in its class.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from detmix.training import ImageAugmentConfig, ImageDataConfig, ImageMixingConfig, PretrainConfig
from detmix.training.classifier import build_batch_mix, build_image_transform

BATCH, CLASSES, SIZE = 5, 9, 20
LABELS = torch.tensor([4, 0, 8, 2, 5])
IMAGES = torch.arange(1.0, BATCH + 1)[:, None, None, None].repeat(1, 3, SIZE, SIZE)
FILL = (51, 102, 153)


def transform(mix="none", mixing=None, *, train=True, **augment):
    config = PretrainConfig(
        mix=mix,
        mixing=ImageMixingConfig(**(mixing or {})),
        data=ImageDataConfig(mean=tuple(value / 255 for value in FILL)),
        augment=ImageAugmentConfig(**{"size": 32, "flip": 0.0, **augment}),
    )
    return build_image_transform(config, train=train)


def draw(call, image, num):
    for seed in range(num):
        torch.manual_seed(seed)
        yield call(image)


def noise(height, width):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def test_evaluation_is_resize_and_centre_crop():
    image = noise(40, 60)
    found = transform(train=False, size=24, eval_resize=30)(image)
    assert torch.equal(found, functional.center_crop(functional.resize(image, [30]), [24, 24]))
    assert torch.equal(transform(train=False, size=40)(image), image[:, :, 10:50])


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"scale": (0.2, 0.7)}, [v2.RandomResizedCrop(32, scale=(0.2, 0.7))]),
        ({"crop": "padded", "padding": 3}, [v2.RandomCrop(32, padding=3, fill=list(FILL))]),
        (
            {"scale": (0.5, 1), "flip": 0.3, "jitter": 0.4},
            [
                v2.RandomResizedCrop(32, scale=(0.5, 1)),
                v2.RandomHorizontalFlip(0.3),
                v2.ColorJitter(0.4, 0.4, 0.4),
            ],
        ),
    ],
)
def test_augmentation_is_torchvisions(settings, theirs):
    image = noise(32, 32)
    outcomes = [draw(call, image, 20) for call in (transform(**settings), v2.Compose(theirs))]
    for mine, expected in zip(*outcomes, strict=True):
        assert torch.equal(mine, expected)
    assert transform(**settings)(noise(64, 48)).shape == (3, 32, 32)


@pytest.mark.parametrize("area", [0.25, 0.1])
def test_cutout_erases_one_square_with_the_mean(area):
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    call = transform("cutout", {"cutout_area": area, "p": 0.3}, crop="padded", padding=0)
    side = round(area**0.5 * 32)
    places = []
    for found in draw(call, image, 200):
        erased = (found != 200).all(0)
        if not erased.any():
            assert torch.equal(found, image)
            continue
        rows, columns = torch.nonzero(erased).T
        assert len(rows) == side**2
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == side - 1
        assert (found[:, erased] == torch.tensor(FILL)[:, None]).all()
        places.append((int(rows.min()), int(columns.min())))
    assert len(places) / 200 == pytest.approx(0.3, abs=0.1)
    assert len(set(places)) > 30


def mix_batch(mix, seed, **options):
    config = PretrainConfig(mix=mix, mixing=ImageMixingConfig(**options))
    torch.manual_seed(seed)
    return build_batch_mix(config, CLASSES)(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("mix", "theirs"),
    [
        ("mixup", v2.MixUp(alpha=0.4, num_classes=CLASSES)),
        ("cutmix", v2.CutMix(alpha=3.0, num_classes=CLASSES)),
    ],
)
def test_batches_are_mixed_as_torchvision_does(mix, theirs):
    for seed in range(10):
        found = mix_batch(mix, seed, mixup_alpha=0.4, cutmix_alpha=3.0)
        torch.manual_seed(seed)
        expected = v2.RandomApply([theirs], p=1.0)(IMAGES, LABELS)
        for mine, its in zip(found, expected, strict=True):
            assert torch.equal(mine, its)


def test_p_is_the_chance_of_a_batch_and_both_ways_come_in_turn():
    untouched = blends = 0
    for seed in range(200):
        mixed, targets = mix_batch("mixup+cutmix", seed, mixup_alpha=1.0, p=0.5)
        if targets.ndim == 1:
            assert torch.equal(mixed, IMAGES)
            assert torch.equal(targets, LABELS)
            untouched += 1
        else:
            torch.testing.assert_close(targets.sum(1), torch.ones(BATCH))
            blends += bool(((mixed != IMAGES) & (mixed != IMAGES.roll(1, 0))).any())
    assert untouched / 200 == pytest.approx(0.5, abs=0.12)
    assert blends / (200 - untouched) == pytest.approx(0.5, abs=0.18)
