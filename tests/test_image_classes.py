"""Images by class against torchvision's ImageFolder, and their randomness."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import ramp, tiff
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from detmix.data import ImageClasses

TRAIN = [
    "train/ant/1.bmp", "train/cat/a.png", "train/cat/b.jpg", "train/cat/deep/c.webp",
    "train/dog/a.png", "train/dog/z.JPEG",
]  # fmt: skip


def write_picture(path, seed=0):
    rng = np.random.default_rng(seed)
    shape = (*rng.integers(4, 12, 2), 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Return a tree with files that are no images beside those that are."""
    for seed, name in enumerate([*TRAIN, "val/dog/a.png"]):
        write_picture(tmp_path / name, seed)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/labels.csv").write_text("no class")
    return tmp_path


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_against_torchvision(root, on_error):
    dataset, theirs = ImageClasses(root, on_error=on_error), ImageFolder(root / "train")
    assert dataset.classes == tuple(theirs.classes) == ("ant", "cat", "dog")
    assert list(dataset.names) == TRAIN
    assert (dataset.skipped, len(dataset)) == ((), len(theirs))
    for number, (pixels, expected) in enumerate(theirs):
        image, label, index = dataset[number]
        assert (image.dtype, label, index) == (torch.uint8, expected, number)
        assert np.array_equal(image.permute(1, 2, 0), pixels)
    ((_, label, _),) = ImageClasses(root, "val", classes=dataset.classes)
    assert label == 2
    with pytest.raises(IndexError, match="index 6 is out of range for 6"):
        dataset[6]


def test_what_the_docs_do_to_tiny_imagenet(tmp_path):
    """Its archive has train/<class>/images/*.JPEG, and val/images/*.JPEG beside a list."""
    page = (Path(__file__).parents[1] / "docs" / "detectors.md").read_text(encoding="utf-8")
    ((unpack, commands),) = re.findall(r"^(wget .*)\n((?:.*\n)*?)```", page, flags=re.MULTILINE)
    assert unpack.endswith("unzip -q tiny-imagenet-200.zip -d data")
    folder = tmp_path / "data/tiny-imagenet-200"
    for part in ("train/n01/images/n01", "train/n02/images/n02", "val/images/val"):
        write_picture(folder / f"{part}_0.JPEG")
    write_picture(folder / "val/images/val_1.JPEG")
    (folder / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t3\t3\n")
    lines = "val_0.JPEG\tn02\t0\t0\t3\t3\nval_1.JPEG\tn01\t0\t0\t3\t3\n"
    (folder / "val/val_annotations.txt").write_text(lines)
    subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, check=True)
    train = ImageClasses(tmp_path / "data/tiny-imagenet")
    val = ImageClasses(tmp_path / "data/tiny-imagenet", "val", classes=train.classes)
    assert train.names == ("train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG")
    assert val.names == ("val/n01/val_1.JPEG", "val/n02/val_0.JPEG")


def test_wrong_folders(root):
    with pytest.raises(ValueError, match=r"val/dog: .*'dog'"):
        ImageClasses(root, "val", classes=("cat",))
    (root / "val" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat"):
        ImageClasses(root, "val")
    with pytest.raises(FileNotFoundError, match="test"):
        ImageClasses(root, "test")


def test_broken_images_are_named_or_left_out(root):
    whole = list(ImageClasses(root))
    (root / "train/ant/1.bmp").write_bytes(b"")
    (root / "train/dog/a.png").write_bytes(tiff(ramp("f4"), 1))  # values of no known range
    with pytest.raises(ValueError, match=r"ant/1\.bmp"):
        ImageClasses(root)[0]
    with pytest.warns(UserWarning, match="2 of 6"):
        dataset = ImageClasses(root, on_error="skip")
    assert [image.name for image in dataset.skipped] == ["train/ant/1.bmp", "train/dog/a.png"]
    assert dataset.names == (*TRAIN[1:4], TRAIN[5])
    for (image, label, _), index in zip(dataset, (1, 2, 3, 5), strict=True):
        assert torch.equal(image, whole[index][0])
        assert label == whole[index][1]  # as before, without an ant


def test_randomness_is_a_function_of_seed_epoch_and_index(root):
    """In running workers too; torch's own generator plays no part and stays as it was."""

    def cropped(seed):
        return ImageClasses(root, transform=v2.RandomResizedCrop(16), seed=seed)

    first, second, other = cropped(0), cropped(0), cropped(1)
    before = [image for image, _, _ in first]
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert all(torch.equal(second[i][0], before[i]) for i in range(-1, -7, -1))
    second.set_epoch(1)
    for dataset in (second, other):
        assert not any(torch.equal(dataset[i][0], before[i]) for i in range(6))
    with pytest.raises(TypeError):
        _ = ImageClasses(root, transform=lambda image: torch.rand(3) + "")[0]
    assert torch.equal(torch.get_rng_state(), state)
    loader = DataLoader(first, 3, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        first.set_epoch(epoch)
        images = torch.cat([images for images, _, _ in loader])
        assert torch.equal(images, torch.stack([image for image, _, _ in first]))
