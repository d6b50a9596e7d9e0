"""Images by class against torchvision's ImageFolder and Pillow, and their randomness."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from detmix.data import ImageClasses
from detmix.data.images import decode_image_bytes

FILES = {
    "train/ant/1.bmp": (5, 6), "train/cat/a.png": (12, 9), "train/cat/b.jpg": (8, 8),
    "train/cat/deep/c.webp": (10, 6), "train/dog/a.png": (7, 7), "train/dog/z.JPEG": (9, 11),
    "val/dog/a.png": (6, 6),
}  # fmt: skip
TRAIN = [name for name in FILES if name.startswith("train")]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path):
    """Return a tree with files that are no images beside those that are."""
    for seed, (name, (height, width)) in enumerate(FILES.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(height, width, seed).save(tmp_path / name)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "labels.csv").write_text("no class")
    return tmp_path


def test_against_torchvision(root):
    dataset, theirs = ImageClasses(root), ImageFolder(root / "train")
    assert dataset.classes == tuple(theirs.classes) == ("ant", "cat", "dog")
    assert list(dataset.names) == TRAIN
    assert len(dataset) == len(theirs) == 6
    for number, (pixels, expected) in enumerate(theirs):
        image, label, index = dataset[number]
        assert (image.dtype, label, index) == (torch.uint8, expected, number)
        assert np.array_equal(image.permute(1, 2, 0), pixels)


def test_what_the_readme_does_to_tiny_imagenet(tmp_path):
    """Its archive has train/<class>/images/*.JPEG, and val/images/*.JPEG beside a list."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    ((unpack, commands),) = re.findall(r"^(wget .*)\n((?:.*\n)*?)```", readme, flags=re.MULTILINE)
    assert unpack.endswith("unzip -q tiny-imagenet-200.zip -d data")
    folder = tmp_path / "data/tiny-imagenet-200"
    for name in ("train/n01/images/n01_0", "train/n02/images/n02_0", "val/images/val_0"):
        (folder / name).parent.mkdir(parents=True)
        picture(4, 4).save(folder / f"{name}.JPEG")
    picture(4, 4).save(folder / "val/images/val_1.JPEG")
    (folder / "train/n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t3\t3\n")
    (folder / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t3\t3\nval_1.JPEG\tn01\t0\t0\t3\t3\n"
    )
    subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, check=True)
    train = ImageClasses(tmp_path / "data/tiny-imagenet")
    val = ImageClasses(tmp_path / "data/tiny-imagenet", "val", classes=train.classes)
    assert train.names == ("train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG")
    assert val.names == ("val/n01/val_1.JPEG", "val/n02/val_0.JPEG")


class TestClasses:
    def test_those_of_training_say_the_labels(self, root):
        val = ImageClasses(root, "val", classes=ImageClasses(root).classes)
        assert val.classes == ("ant", "cat", "dog")
        assert [label for _, label, _ in val] == [2]

    def test_a_class_that_training_has_not(self, root):
        with pytest.raises(ValueError, match=r"val/dog: class 'dog' is not among the 1 expected"):
            ImageClasses(root, "val", classes=("cat",))

    def test_a_class_without_images(self, root):
        (root / "val" / "cat").mkdir()
        with pytest.raises(FileNotFoundError, match="no valid file for the classes cat"):
            ImageClasses(root, "val")


class TestErrors:
    def test_no_such_folder(self, root):
        with pytest.raises(FileNotFoundError, match=r"test: there is no such folder$"):
            ImageClasses(root, "test")

    def test_archives_are_to_be_unpacked(self, root, tmp_path):
        """The command that the error says does it."""
        packed = tmp_path / "packed"
        packed.mkdir()
        expected = ImageClasses(root).names
        for name in ("ant", "cat", "dog"):
            archive = ["tar", "-cf", packed / f"train-{name}.tar", "-C", root, f"train/{name}"]
            subprocess.run(archive, check=True)
        with pytest.raises(FileNotFoundError, match="no such folder; unpack it: cd") as error:
            ImageClasses(packed)
        subprocess.run(["bash", "-c", str(error.value).partition("unpack it: ")[2]], check=True)
        assert ImageClasses(packed).names == expected

    @pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\nrubbish", b"text", b"\xff\xd8\xff"])
    def test_a_broken_image_is_named(self, root, data):
        (root / "train" / "cat" / "a.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"cat/a\.png"):
            ImageClasses(root)[1]


class TestSkip:
    def test_broken_images_are_left_out(self, root):
        whole = {name: sample[:2] for name, sample in zip(TRAIN, ImageClasses(root), strict=True)}
        (root / "train/ant/1.bmp").write_bytes(b"")
        (root / "train/dog/a.png").write_bytes(b"rubbish")
        with pytest.warns(UserWarning, match=r"2 of 6 images left out \(unusable image: 2\)"):
            dataset = ImageClasses(root, on_error="skip")
        assert [image.name for image in dataset.skipped] == ["train/ant/1.bmp", "train/dog/a.png"]
        assert dataset.names == (*TRAIN[1:4], TRAIN[5])
        assert dataset.classes == ("ant", "cat", "dog")  # labels stay as they were
        for name, (image, label, _) in zip(dataset.names, dataset, strict=True):
            assert torch.equal(image, whole[name][0])
            assert label == whole[name][1]

    def test_not_all(self, root):
        for path in (root / "val/dog").iterdir():
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"1 of 1 images left out .*; there is none left"):
            ImageClasses(root, "val", on_error="skip")

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_good_images_stay(self, root):
        assert ImageClasses(root, on_error="skip").skipped == ()


class TestRandomness:
    def dataset(self, root, seed=0):
        return ImageClasses(root, transform=v2.RandomResizedCrop(16), seed=seed)

    def test_it_is_a_function_of_seed_epoch_and_index(self, root):
        first, second = self.dataset(root), self.dataset(root)
        torch.manual_seed(5)
        before = [image for image, _, _ in first]
        torch.manual_seed(6)
        assert all(torch.equal(second[i][0], before[i]) for i in reversed(range(6)))
        second.set_epoch(1)
        assert not any(torch.equal(second[i][0], before[i]) for i in range(6))
        assert not any(torch.equal(self.dataset(root, 1)[i][0], before[i]) for i in range(6))

    def test_the_global_state_is_left_alone(self, root):
        state = torch.get_rng_state()
        _ = self.dataset(root)[0]
        with pytest.raises(TypeError):
            _ = ImageClasses(root, transform=lambda image: torch.rand(3) + "")[0]
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_epoch_reaches_running_workers(self, root):
        dataset = self.dataset(root)
        loader = DataLoader(dataset, 3, num_workers=2, persistent_workers=True)
        for epoch in (0, 1, 2):
            dataset.set_epoch(epoch)
            images, labels, indices = map(torch.cat, zip(*loader, strict=True))
            assert torch.equal(images, torch.stack([image for image, _, _ in dataset]))
            assert labels.tolist() == [0, 1, 1, 1, 2, 2]
            assert indices.tolist() == [0, 1, 2, 3, 4, 5]


class TestDecoding:
    """Whatever a file is called, its content decides."""

    @pytest.mark.parametrize(
        ("mode", "extension", "options"),
        [
            ("RGB", "png", {}), ("L", "png", {}), ("P", "png", {}), ("RGBA", "png", {}),
            ("1", "png", {}), ("RGB", "webp", {"lossless": True}), ("RGBA", "webp", {}),
            ("L", "bmp", {}), ("P", "gif", {}), ("L", "jpeg", {}), ("CMYK", "jpeg", {}),
        ],
    )  # fmt: skip
    def test_against_pillow(self, mode, extension, options):
        file = io.BytesIO()
        picture(9, 7).convert(mode).save(file, extension, **options)
        image = decode_image_bytes(file.getvalue(), "x")
        expected = np.array(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
        tolerance = 2 if mode == "CMYK" else 0
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=tolerance)

    def test_sixteen_bits(self):
        values = np.arange(0, 65536, 1000, dtype=np.uint16)[None]
        file = io.BytesIO()
        Image.fromarray(values).save(file, "png")
        image = decode_image_bytes(file.getvalue(), "x")
        np.testing.assert_array_equal(image[0], values >> 8)

    def test_a_decompression_bomb(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        file = io.BytesIO()
        picture(9, 7).save(file, "png")
        with pytest.raises(ValueError, match=r"bomb\.png: refused"):
            decode_image_bytes(file.getvalue(), "bomb.png")
