"""The albumentations adapter: fields follow their boxes, and seeds decide everything."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxFormat

from detmix.data import (
    AlbumentationsTransform,
    AugmentedDataset,
    detection_transforms,
    init_worker,
)

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as alb


def make_image(height=40, width=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def make_target(boxes, **fields):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.arange(1, len(boxes) + 1)
    return {"boxes": boxes, "labels": labels, "image_id": 7, **fields}


BOXES = [[0, 0, 10, 10], [30, 20, 60, 40], [5, 5, 25, 35]]


def test_importing_the_package_does_not_import_albumentations():
    heavy = "{'albumentations', 'cv2', 'matplotlib', 'accelerate', 'jsonargparse'}"
    code = f"import sys, detmix.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flip_equals_torchvision():
    image, target = make_image(), make_target(BOXES)
    flipped, result = AlbumentationsTransform([alb.HorizontalFlip(p=1)])(image, target)
    assert torch.equal(flipped, v2.functional.horizontal_flip(image))
    assert flipped.is_contiguous()
    expected = v2.functional.horizontal_flip_bounding_boxes(
        target["boxes"], format=BoundingBoxFormat.XYXY, canvas_size=(40, 60)
    )
    torch.testing.assert_close(result["boxes"], expected, rtol=0, atol=1e-4)
    assert result["boxes"].dtype == torch.float32
    assert result["image_id"] == 7


def test_every_field_follows_its_box():
    fields = {
        "box_weights": torch.tensor([0.25, 0.5, 0.75]),
        "difficult": torch.tensor([True, False, True]),
        "iscrowd": torch.tensor([0, 1, 0]),
        "area": torch.tensor([100.0, 600.0, 600.0]),
        "embedding": torch.arange(6).reshape(3, 2),
        "text": ["a", "b", "c"],
        "orig_size": torch.tensor([40, 60, 3]),  # of length N, but of the image
        "note": "kept",
    }
    # The crop to x >= 20 loses the first box and cuts the third down to a quarter.
    crop = AlbumentationsTransform([alb.Crop(20, 0, 60, 40)])
    image, result = crop(make_image(), make_target(BOXES, **fields))
    assert image.shape == (3, 40, 40)
    torch.testing.assert_close(
        result["boxes"], torch.tensor([[10.0, 20, 40, 40], [0, 5, 5, 35]]), rtol=0, atol=1e-4
    )
    assert result["labels"].tolist() == [2, 3]
    assert result["box_weights"].tolist() == [0.5, 0.75]
    assert result["difficult"].tolist() == [False, True]
    assert result["iscrowd"].tolist() == [1, 0]
    assert result["embedding"].tolist() == [[2, 3], [4, 5]]
    assert result["text"] == ["b", "c"]
    torch.testing.assert_close(result["area"], torch.tensor([600.0, 150.0]), rtol=0, atol=1e-2)
    assert result["orig_size"].tolist() == [40, 60, 3]
    assert result["note"] == "kept"


def test_min_visibility_and_min_area():
    crop = [alb.Crop(20, 0, 60, 40)]
    target = make_target(BOXES)
    seen = AlbumentationsTransform(crop, min_visibility=0.3)(make_image(), target)[1]
    assert seen["labels"].tolist() == [2]
    large = AlbumentationsTransform(crop, min_area=200)(make_image(), target)[1]
    assert large["labels"].tolist() == [2]


def test_boxes_are_clipped_and_never_empty():
    boxes = [[-5, -5, 10, 10], [50, 30, 99, 99], [70, 5, 90, 9], [5, 5, 5, 9]]
    result = AlbumentationsTransform([])(make_image(), make_target(boxes))[1]
    torch.testing.assert_close(
        result["boxes"], torch.tensor([[0.0, 0, 10, 10], [50, 30, 60, 40]]), rtol=0, atol=1e-4
    )
    assert result["labels"].tolist() == [1, 2]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_inputs_are_not_changed_and_not_shared(layout):
    image = make_image()
    if layout == "channels last":
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    target = make_target(BOXES, box_weights=torch.ones(3))
    kept = image.clone(), {k: v.clone() for k, v in target.items() if isinstance(v, torch.Tensor)}
    for transforms in ([], [alb.HorizontalFlip(p=1), alb.ColorJitter(p=1)]):
        new_image, result = AlbumentationsTransform(transforms)(image, target, seed=1)
        if not transforms:
            assert torch.equal(new_image, image)
        new_image.zero_()
        result["boxes"].zero_()
        result["box_weights"].zero_()
        assert torch.equal(image, kept[0])
        assert all(torch.equal(target[k], v) for k, v in kept[1].items())


@pytest.mark.parametrize("train", [True, False])
def test_images_without_boxes(train):
    transform = detection_transforms(32, train=train, flip=1, photometric=1, crop=1)
    target = make_target([], difficult=torch.zeros(0, dtype=torch.bool))
    for seed in range(5):
        image, result = transform(make_image(), target, seed=seed)
        assert image.shape[0] == 3
        assert result["boxes"].shape == (0, 4)
        assert result["labels"].shape == result["difficult"].shape == (0,)
    # A pipeline that has seen no boxes must still carry them afterwards, and the other way round.
    assert len(transform(make_image(), make_target(BOXES))[1]["labels"]) == 3
    assert len(transform(make_image(), target)[1]["labels"]) == 0


def test_all_boxes_may_be_lost():
    target = make_target([[0, 0, 10, 10]], box_weights=torch.tensor([0.5]))
    result = AlbumentationsTransform([alb.Crop(20, 20, 60, 40)])(make_image(), target)[1]
    assert result["boxes"].shape == (0, 4)
    assert result["box_weights"].shape == (0,)


def test_evaluation_shrinks_only_and_keeps_every_box():
    transform = detection_transforms(30, train=False)
    target = make_target([*BOXES, [10, 10, 11, 11]])  # a quarter of a square pixel afterwards
    image, result = transform(make_image(), target)
    assert image.shape == (3, 20, 30)
    torch.testing.assert_close(result["boxes"], target["boxes"] / 2, rtol=0, atol=1e-4)
    for size in (60, 200, None):
        image, result = detection_transforms(size, train=False)(make_image(), target)
        assert torch.equal(image, make_image())
        torch.testing.assert_close(result["boxes"], target["boxes"], rtol=0, atol=1e-4)


def test_training_boxes_still_surround_their_pixels():
    """Objects are painted red, green and blue; after crop, shrink and flip each is in its box."""
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    target = make_target([[10, 20, 40, 60], [50, 10, 70, 30], [80, 40, 110, 70]])
    for channel, (x1, y1, x2, y2) in enumerate(target["boxes"].int().tolist()):
        image[channel, y1:y2, x1:x2] = 255
    transform = detection_transforms(60, train=True, photometric=0, crop=1)
    for seed in range(30):
        new_image, result = transform(image, target, seed=seed)
        assert max(new_image.shape) <= 60
        assert result["labels"].tolist() == [1, 2, 3]  # the crop is safe for every box
        for label, box in zip(result["labels"].tolist(), result["boxes"].tolist(), strict=True):
            rows, columns = np.nonzero(new_image[label - 1].numpy() > 127)
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(seen, box, atol=1.0)


def test_the_seed_decides_everything():
    transform = detection_transforms(train=True)
    image, target = make_image(), make_target(BOXES)
    results = [transform(image, target, seed=seed) for seed in (5, 6, 5)]
    transform(image, target)
    again = detection_transforms(train=True)(image, target, seed=5)
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][0], again[0])
    assert torch.equal(results[0][1]["boxes"], again[1]["boxes"])
    outcomes = {transform(image, target, seed=s)[0].numpy().tobytes() for s in range(30)}
    assert len(outcomes) > 15


def test_without_a_seed_torch_governs():
    transform = detection_transforms(train=True, photometric=1)
    torch.manual_seed(3)
    first, second = (transform(make_image(), make_target(BOXES))[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(transform(make_image(), make_target(BOXES))[0], first)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_transforms_draw_independently():
    """Flip and inversion must not be decided by the same draw."""
    transform = AlbumentationsTransform([alb.HorizontalFlip(p=0.5), alb.InvertImg(p=0.5)])
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :, 0] = 200
    counts = torch.zeros(2, 2)
    for seed in range(800):
        corners = transform(image, make_target([]), seed=seed)[0][0, 0]
        is_inverted = int(corners[1] == 255)
        is_flipped = int(corners[0] == (255 if is_inverted else 0))
        counts[is_flipped, is_inverted] += 1
    assert (counts - 200).abs().max() < 60  # five standard deviations of a quarter of 800


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.full((3, 4), torch.nan)}, "'boxes'.*nan"),
        ({"boxes": torch.zeros(3, 5)}, r"'boxes'.*\(3, 5\)"),
        ({"labels": torch.tensor([1, 2])}, r"'labels' .*3 entries.*\(2,\)"),
        ({"labels": torch.tensor([1, 0, 2])}, r"'labels'\[1\] must be at least 1.*got 0"),
        ({"box_weights": torch.ones(4)}, r"'box_weights' .*3 entries.*\(4,\)"),
        ({"box_weights": torch.tensor([1.0, -0.5, 1.0])}, "'box_weights'.*-0.5"),
        ({"box_weights": torch.tensor([1.0, torch.nan, 1.0])}, "'box_weights'.*nan"),
    ],
)
def test_broken_targets_are_named(change, message):
    with pytest.raises(ValueError, match=f"image_id 7.*{message}"):
        AlbumentationsTransform([])(make_image(), {**make_target(BOXES), **change})


def test_broken_images_and_arguments_are_named():
    transform = AlbumentationsTransform([])
    for image in (make_image().float(), make_image()[0], make_image()[:2]):
        with pytest.raises(ValueError, match="image_id 7: image must be uint8"):
            transform(image, make_target(BOXES))
    with pytest.raises(ValueError, match=r"min_visibility.*1\.5"):
        AlbumentationsTransform([], min_visibility=1.5)
    with pytest.raises(ValueError, match=r"min_area.*-1"):
        AlbumentationsTransform([], min_area=-1)
    with pytest.raises(ValueError, match=r"crop must be a probability.*2"):
        detection_transforms(train=True, crop=2)
    with pytest.raises(ValueError, match="size must be at least 1"):
        detection_transforms(0, train=True)


class Images(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return make_image(seed=index), {**make_target(BOXES), "image_id": index}


def collate(batch):
    return batch


def run(loader, epochs, dataset):
    found = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        found.append([(i, t["boxes"]) for batch in loader for i, t in batch])
    return found


def equal(a, b):
    return all(
        x[0].shape == y[0].shape and torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
        for x, y in zip(a, b, strict=True)
    )


def test_samples_are_a_function_of_seed_epoch_and_index():
    def load(num_workers, epochs, seed=0, **options):
        dataset = AugmentedDataset(Images(), detection_transforms(train=True), seed=seed)
        loader = DataLoader(
            dataset,
            2,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=init_worker,
            **options,
        )
        return run(loader, epochs, dataset)

    torch.manual_seed(0)
    expected = load(0, (0, 1))
    assert not equal(*expected)
    torch.manual_seed(1)  # must make no difference
    for options in ({"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}):
        found = load(epochs=(0, 1), **options)
        assert equal(found[0], expected[0])
        assert equal(found[1], expected[1])
    assert equal(load(0, (1,))[0], expected[1])  # a resumed run
    assert not equal(load(0, (0,), seed=1)[0], expected[0])


def test_spawned_persistent_workers_see_the_epoch():
    dataset = AugmentedDataset(Images(), detection_transforms(20, train=True))
    expected = run(DataLoader(dataset, 2, collate_fn=collate), (0, 1), dataset)
    loader = DataLoader(
        dataset,
        2,
        num_workers=1,
        collate_fn=collate,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    found = run(loader, (0, 1), dataset)
    assert equal(found[0], expected[0])
    assert equal(found[1], expected[1])


def test_augmented_dataset_passes_epochs_down_and_checks_the_index():
    inner = AugmentedDataset(Images(), detection_transforms(train=True))
    outer = AugmentedDataset(inner, AlbumentationsTransform([]))
    outer.set_epoch(0)
    first = outer[0][0]
    outer.set_epoch(1)
    assert inner[0][0].shape == outer[0][0].shape
    assert first.shape != outer[0][0].shape or not torch.equal(first, outer[0][0])
    assert torch.equal(outer[-1][0], outer[5][0])
    with pytest.raises(IndexError, match="index 6 is out of range for 6"):
        outer[6]
