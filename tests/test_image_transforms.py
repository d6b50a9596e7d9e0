"""Cropping, flipping and Cutout of images for classification, and their randomness."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from detmix.data import TransformedImages, classification_transforms, eval_loader

FILL = (1, 2, 3)


def coordinates(height, width):
    """Return an image whose first two channels tell each pixel's row and column, from 10."""
    rows = torch.arange(10, 10 + height)[:, None].expand(height, width)
    columns = torch.arange(10, 10 + width).expand(height, width)
    return torch.stack([rows, columns, torch.full((height, width), 200)]).to(torch.uint8)


class Images(torch.utils.data.Dataset):
    """Some images of different sizes."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return coordinates(32, 32 + index), index % 2


def draw(transform, image, num=50):
    for seed in range(num):
        torch.manual_seed(seed)
        yield transform(image)


def test_evaluation_is_resize_and_centre_crop():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    found = classification_transforms(24, train=False, eval_resize=30)(image)
    assert torch.equal(found, functional.center_crop(functional.resize(image, [30]), [24, 24]))
    plain = classification_transforms(40, train=False)(image)
    assert torch.equal(plain, image[:, :, 10:50])  # no resizing where the side fits


def test_resized_crop_is_torchvisions():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    transform = classification_transforms(24, train=True, scale=(0.2, 0.7), flip=0)
    theirs = v2.RandomResizedCrop(24, scale=(0.2, 0.7), antialias=True)
    for mine, expected in zip(draw(transform, image, 10), draw(theirs, image, 10), strict=True):
        assert torch.equal(mine, expected)


def test_padded_crop_shifts_by_up_to_the_padding():
    image = coordinates(32, 32)
    transform = classification_transforms(
        32, train=True, crop="padded", padding=3, flip=0, fill=FILL
    )
    shifts = set()
    for found in draw(transform, image, 300):
        assert found.shape == (3, 32, 32)
        covered = found[2] == 200
        dy, dx = (int(value) - 10 for value in found[:2, 16, 16] - 16)
        shifts.add((dy, dx))
        assert covered.sum() == (32 - abs(dy)) * (32 - abs(dx))
        assert torch.equal(found[:, ~covered].T.unique(dim=0), torch.tensor([FILL])) or not (
            dy or dx
        )
    assert len(shifts) == 49
    assert max(abs(value) for shift in shifts for value in shift) == 3


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_flip(flip):
    image = coordinates(16, 16)
    transform = classification_transforms(16, train=True, crop="padded", padding=0, flip=flip)
    flipped = [torch.equal(found, image.flip(2)) for found in draw(transform, image, 300)]
    assert sum(flipped) / 300 == pytest.approx(flip, abs=0.08)


def test_jitter_is_torchvisions():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    transform = classification_transforms(
        16, train=True, crop="padded", padding=0, flip=0, jitter=0.4
    )
    outcomes = list(draw(transform, image, 30))
    assert len({outcome.numpy().tobytes() for outcome in outcomes}) == 30
    grey = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    for found in draw(transform, grey, 30):  # contrast and saturation leave plain grey alone
        assert 59 <= int(found.min()) <= int(found.max()) <= 141


@pytest.mark.parametrize("area", [0.25, 0.1])
def test_cutout_erases_one_square_with_the_fill(area):
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    transform = classification_transforms(
        32, train=True, crop="padded", padding=0, flip=0, cutout=1.0, cutout_area=area, fill=FILL
    )
    side = round(area**0.5 * 32)
    places = set()
    for found in draw(transform, image):
        erased = (found != 200).all(0)
        rows, columns = torch.nonzero(erased).T
        assert len(rows) == side**2
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == side - 1
        assert (found[:, erased] == torch.tensor(FILL)[:, None]).all()
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 30


def test_cutout_by_chance():
    image = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    transform = classification_transforms(
        16, train=True, crop="padded", padding=0, flip=0, cutout=0.3
    )
    cut = [bool((found != 200).any()) for found in draw(transform, image, 400)]
    assert sum(cut) / 400 == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"crop": "centre"}, "crop must be one of resized, padded, got 'centre'"),
        ({"scale": (0.5, 0.2)}, "scale must be two areas"),
        ({"padding": -1}, "padding must not be negative, got -1"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"jitter": 2}, "jitter must be in"),
        ({"cutout": -0.1}, "cutout must be a probability"),
        ({"cutout": 1, "cutout_area": 1.0}, "cutout_area must leave a square"),
        ({"fill": (0.5, 0.5, 0.5)}, "fill must be three whole numbers"),
        ({"eval_resize": 8}, "eval_resize must be at least size = 16, got 8"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        classification_transforms(**{"size": 16, "train": True, **options})


class TestRandomness:
    def dataset(self, seed=0):
        transform = classification_transforms(16, train=True, jitter=0.3, cutout=0.5)
        return TransformedImages(Images(), transform, seed=seed)

    def test_a_sample_is_image_label_and_index(self):
        image, label, index = self.dataset()[-1]
        assert (image.dtype, image.shape) == (torch.uint8, (3, 16, 16))
        assert (label, index) == (1, 5)
        with pytest.raises(IndexError, match="out of range"):
            self.dataset()[6]

    def test_it_is_a_function_of_seed_epoch_and_index(self):
        first, second = self.dataset(), self.dataset()
        torch.manual_seed(5)
        before = [sample[0] for sample in (first[i] for i in range(6))]
        torch.manual_seed(6)
        assert all(torch.equal(second[i][0], before[i]) for i in reversed(range(6)))
        second.set_epoch(1)
        assert not any(torch.equal(second[i][0], before[i]) for i in range(6))
        assert not any(torch.equal(self.dataset(1)[i][0], before[i]) for i in range(6))

    def test_the_global_state_is_left_alone(self):
        state = torch.get_rng_state()
        _ = self.dataset()[0]
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_epoch_reaches_running_workers(self):
        dataset = self.dataset()
        loader = torch.utils.data.DataLoader(dataset, 3, num_workers=2, persistent_workers=True)
        for epoch in (0, 1, 2):
            dataset.set_epoch(epoch)
            images = torch.cat([batch[0] for batch in loader])
            assert torch.equal(images, torch.stack([dataset[i][0] for i in range(6)]))

    def test_loader_of_batches(self):
        loader = eval_loader(
            self.dataset(), 4, workers=0, collate_fn=torch.utils.data.default_collate
        )
        images, labels, indices = next(iter(loader))
        assert images.shape == (4, 3, 16, 16)
        assert labels.tolist() == [0, 1, 0, 1]
        assert indices.tolist() == [0, 1, 2, 3]
