"""Images by class, in folders and in tar shards, against torchvision's ImageFolder and Pillow."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import time_limit
from PIL import Image
from torchvision.datasets import ImageFolder

from detmix.data import ImageClasses, eval_loader
from detmix.data.image_file import decode_image_bytes

FILES = {
    "train/cat/a.png": (12, 9), "train/cat/b.jpg": (8, 8), "train/cat/deep/c.webp": (10, 6),
    "train/dog/a.png": (7, 7), "train/dog/z.JPEG": (9, 11), "train/ant/1.bmp": (5, 6),
}  # fmt: skip


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a tree with files that are no images beside those that are."""
    root = tmp_path_factory.mktemp("folders")
    for seed, (name, (height, width)) in enumerate(FILES.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(height, width, seed).save(root / name)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._a.png").write_bytes(b"resource fork")
    (root / "train" / "labels.csv").write_text("no class")
    return root


def write_tar(path, members):
    """Write a tar archive of (name, bytes) in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(folders, tmp_path_factory):
    """Return the same tree as two archives, each class in both where it can be."""
    root = tmp_path_factory.mktemp("shards")
    names = sorted(path for path in (folders / "train").rglob("*") if path.is_file())
    members = [(str(path.relative_to(folders)), path.read_bytes()) for path in names]
    write_tar(root / "train-00.tar", members[::2])
    write_tar(root / "train-01.tar", [(f"./{name}", data) for name, data in members[1::2]])
    return root


def samples(dataset):
    return [(name, *dataset[i]) for i, name in enumerate(dataset.names)]


def assert_same(first, second):
    assert first.classes == second.classes
    for mine, theirs in zip(samples(first), samples(second), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])
        assert mine[2] == theirs[2]


class TestSamples:
    @pytest.mark.parametrize("in_memory", [False, True])
    def test_against_torchvision(self, folders, in_memory):
        dataset = ImageClasses(folders, "train", in_memory=in_memory)
        theirs = ImageFolder(
            folders / "train", is_valid_file=lambda p: "/._" not in p and not p.endswith("txt")
        )
        assert dataset.classes == tuple(theirs.classes) == ("ant", "cat", "dog")
        assert len(dataset) == len(theirs) == len(FILES)
        by_name = {
            Path(path).relative_to(folders).as_posix(): (np.array(image), label)
            for (path, _), (image, label) in zip(theirs.samples, theirs, strict=True)
        }
        for name, image, label in samples(dataset):
            pixels, expected = by_name[name]
            assert image.dtype == torch.uint8
            assert label == expected
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
        assert dataset.labels == tuple(label for _, _, label in samples(dataset))

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_tar_shards_are_the_same(self, folders, shards, in_memory):
        assert_same(ImageClasses(folders), ImageClasses(shards, in_memory=in_memory))

    def test_one_archive(self, folders, tmp_path):
        members = [(name, (folders / name).read_bytes()) for name in FILES]
        write_tar(tmp_path / "val.tar", [(n.replace("train", "val"), d) for n, d in members])
        assert len(ImageClasses(tmp_path, "val")) == len(FILES)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_workers_and_pickled(self, shards, workers):
        for dataset in (ImageClasses(shards), ImageClasses(shards, in_memory=True)):
            copy = pickle.loads(pickle.dumps(dataset))
            loader = eval_loader(copy, 2, workers=workers)
            found = [image for batch in loader for image in batch[0]]
            for image, (_, expected, _) in zip(found, samples(dataset), strict=True):
                assert torch.equal(image, expected)

    def test_memory_is_not_shared_with_what_is_returned(self, folders):
        dataset = ImageClasses(folders, in_memory=True)
        dataset[0][0].zero_()
        assert dataset[0][0].any()

    def test_indices(self, folders):
        dataset = ImageClasses(folders)
        assert torch.equal(dataset[-1][0], dataset[len(dataset) - 1][0])
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError, match="out of range"):
                dataset[index]


class TestClasses:
    def test_class_limit(self, folders):
        dataset = ImageClasses(folders, class_limit=2)
        assert dataset.classes == ("ant", "cat")
        assert set(dataset.labels) == {0, 1}
        val = ImageClasses(folders, class_limit=2, classes=dataset.classes)
        assert val.classes == dataset.classes

    def test_labels_follow_the_classes_given(self, folders):
        dataset = ImageClasses(folders, classes=("dog", "bird", "cat", "ant"))
        names = {dataset.classes[label] for label in dataset.labels}
        assert names == {"ant", "cat", "dog"}
        assert dataset.labels[0] == 3  # ant

    def test_a_class_that_is_not_known(self, folders):
        with pytest.raises(ValueError, match="dog"):
            ImageClasses(folders, classes=("ant", "cat"))


class TestErrors:
    def test_no_such_split(self, folders):
        with pytest.raises(FileNotFoundError, match=r"'val'.*val-\*\.tar.*found train"):
            ImageClasses(folders, "val")

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            ImageClasses(tmp_path / "nowhere")

    def test_nothing_in_it(self, tmp_path):
        (tmp_path / "train").mkdir()
        with pytest.raises(ValueError, match="no class folder"):
            ImageClasses(tmp_path)
        (tmp_path / "train" / "cat").mkdir()
        with pytest.raises(ValueError, match="cat: the class has no image"):
            ImageClasses(tmp_path)
        write_tar(tmp_path / "val.tar", [("val/cat/notes.txt", b"x")])
        with pytest.raises(ValueError, match=r"val\.tar: no member is an image"):
            ImageClasses(tmp_path, "val")

    def test_links_to_other_files_and_folders_are_followed(self, folders, tmp_path):
        """As torchvision does, which follows all of them."""
        cat, elsewhere = tmp_path / "train" / "cat", tmp_path / "elsewhere"
        (cat / "deep").mkdir(parents=True)
        shutil.copytree(folders / "train", elsewhere)
        (cat / "deep/b.jpg").symlink_to(elsewhere / "cat/b.jpg")
        (cat / "more").symlink_to(elsewhere)
        (cat / "same").symlink_to(cat / "deep")
        (tmp_path / "train" / "dog").symlink_to(elsewhere / "dog")
        (elsewhere / "dog" / "x").symlink_to(elsewhere / "ant")
        theirs = ImageFolder(
            tmp_path / "train", is_valid_file=lambda p: "/._" not in p and p[-3:] not in "txt csv"
        )
        names = [Path(path).relative_to(tmp_path).as_posix() for path, _ in theirs.samples]
        dataset = ImageClasses(tmp_path)
        assert list(dataset.names) == names
        assert dataset.labels == tuple(theirs.targets)

    def test_links_in_circles(self, folders, tmp_path):
        """Followed for ever, two of them would give more paths than there are atoms."""
        shutil.copytree(folders / "train", tmp_path / "train")
        expected = ImageClasses(tmp_path).names
        cat = tmp_path / "train/cat"
        for name, target in {"x": ".", "y": "..", "z": cat, "deep/x": "..", "deep/y": "/"}.items():
            (cat / name).symlink_to(target)
        with time_limit():
            assert ImageClasses(tmp_path).names == expected
        for first in range(12):
            (cat / f"{first}").mkdir()
            picture(4, 4).save(cat / f"{first}/a.png")
            for second in set(range(12)) - {first}:
                (cat / f"{first}/{second}").symlink_to(f"../{second}")
        with time_limit():
            names = ImageClasses(tmp_path).names
        assert {f"train/cat/{n}/{m}/a.png" for n in range(12) for m in range(12) if n != m} < {
            *names
        }

    @pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\nrubbish", b"text", b"\xff\xd8\xff"])
    def test_a_broken_image_is_named(self, folders, tmp_path, data):
        shutil.copytree(folders / "train", tmp_path / "train")
        (tmp_path / "train" / "cat" / "a.png").write_bytes(data)
        dataset = ImageClasses(tmp_path)
        with pytest.raises(ValueError, match=r"cat/a\.png"):
            dataset[dataset.names.index("train/cat/a.png")]
        with pytest.raises(ValueError, match=r"cat/a\.png"):
            ImageClasses(tmp_path, in_memory=True)

    def test_a_broken_member_is_named(self, tmp_path):
        write_tar(tmp_path / "train.tar", [("train/cat/a.png", b"rubbish")])
        with pytest.raises(ValueError, match=r"train\.tar: train/cat/a\.png"):
            ImageClasses(tmp_path)[0]

    @pytest.mark.parametrize("name", ["/etc/cat/a.png", "train/../../cat/a.png"])
    def test_names_that_lead_outside(self, tmp_path, name):
        write_tar(tmp_path / "train.tar", [(name, b"x")])
        with pytest.raises(ValueError, match=r"train\.tar: member '.*leads outside"):
            ImageClasses(tmp_path)

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
    def test_links(self, tmp_path, kind):
        info = tarfile.TarInfo("train/cat/a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            archive.addfile(info)
        with pytest.raises(ValueError, match=r"member 'train/cat/a\.png' is a link"):
            ImageClasses(tmp_path)

    @pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
    def test_compressed(self, tmp_path, mode):
        for name in ("train.tar", f"val.tar.{mode}"):
            with tarfile.open(tmp_path / name, f"w:{mode}") as archive:
                archive.addfile(tarfile.TarInfo("train/cat/a.png"))
            with pytest.raises(ValueError, match=f"{name}: is compressed"):
                ImageClasses(tmp_path, name.partition(".")[0])

    @pytest.mark.parametrize("keep", [700, 1300, 3000])
    def test_truncated(self, shards, tmp_path, keep):
        data = (shards / "train-00.tar").read_bytes()[:keep]
        (tmp_path / "train.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"train\.tar"):
            ImageClasses(tmp_path)

    def test_no_archive_at_all(self, tmp_path):
        (tmp_path / "train.tar").write_bytes(os.urandom(4096))
        with pytest.raises(ValueError, match=r"train\.tar: not a tar archive"):
            ImageClasses(tmp_path)

    def test_gone_since(self, shards, tmp_path):
        shutil.copy(shards / "train-00.tar", tmp_path / "train.tar")
        dataset = ImageClasses(tmp_path)
        (tmp_path / "train.tar").unlink()
        with pytest.raises(FileNotFoundError, match=r"train\.tar"):
            dataset[0]


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


def test_real_tiny_imagenet():
    data = os.environ.get("DETMIX_DATA")
    if not data or not (Path(data) / "tiny-imagenet").is_dir():
        pytest.skip("DETMIX_DATA names no folder with tiny-imagenet")
    train = ImageClasses(Path(data) / "tiny-imagenet", "train")
    val = ImageClasses(Path(data) / "tiny-imagenet", "val", classes=train.classes)
    for dataset, per_class in ((train, 160), (val, 20)):
        assert len(dataset.classes) == 200
        assert np.bincount(dataset.labels).tolist() == [per_class] * 200
        for index in range(0, len(dataset), 997):
            image, label = dataset[index]
            assert image.shape == (3, 64, 64)
            assert dataset.names[index].split("/")[1] == dataset.classes[label]
