"""Object crops: the pixels by a crop of the padded image, and what is written, and when not."""

from __future__ import annotations

import json
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from torch.nn.functional import interpolate

import detmix.data.object_crops as object_crops
from detmix.data import (
    SHAPE_CLASSES,
    ImageClasses,
    VOCAnnotation,
    VOCDetection,
    VOCObject,
    write_annotation,
    write_object_crops,
)
from detmix.data.object_crops import crop_square

CLASSES = ("cat", "dog", "fox")


def coordinates(height, width):
    """Return an image whose channels say row, column and 7."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2).astype(np.uint8)


def crop_by_padding(image, box, context):
    """Cut the square out of the image with repeated edges; the rule, step by step."""
    x1, y1, x2, y2 = box
    side = max(1, round(context * max(x2 - x1, y2 - y1)))
    height, width = image.shape[:2]
    left, top = round((x1 + x2) / 2 - side / 2), round((y1 + y2) / 2 - side / 2)
    if side <= width:
        while left < 0:
            left += 1
        while left + side > width:
            left -= 1
    if side <= height:
        while top < 0:
            top += 1
        while top + side > height:
            top -= 1
    padded = Image.fromarray(np.pad(image, ((side, side), (side, side), (0, 0)), mode="edge"))
    left, top = left + side, top + side
    return np.asarray(padded.crop((left, top, left + side, top + side)))


def write_devkit(root, year, splits, seed=0):
    """Write ``{split: {image id: (height, width, objects)}}`` as VOC, with images of noise."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for split, images in splits.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(images) + "\n")
        for image_id, (height, width, objects) in images.items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"JPEGImages/{image_id}.jpg", quality=95)
            annotation = VOCAnnotation(f"{image_id}.jpg", width, height, tuple(objects))
            write_annotation(folder / f"Annotations/{image_id}.xml", annotation)
    return root


@pytest.fixture
def devkit(tmp_path):
    train = {
        "000003": (40, 50, [VOCObject("dog", (10, 10, 30, 26)), VOCObject("cat", (0, 0, 10, 20))]),
        "000001": (
            30,
            60,
            [
                VOCObject("cat", (35, 2, 45, 12), difficult=True),
                VOCObject("cat", (20, 0, 60, 30)),
                VOCObject("cat", (56, 26, 60, 30)),
            ],
        ),
        "000007": (20, 20, []),
    }
    val = {"000002": (32, 32, [VOCObject("cat", (3, 4, 13, 14))])}
    return write_devkit(tmp_path / "devkit", "2007", {"trainval": train, "test": val})


def png_files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))


def file_bytes(out):
    return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}


class TestCropSquare:
    @pytest.mark.parametrize(
        ("box", "context", "rows", "columns"),
        [
            # within the image: the centre (10, 8), the side 1.5 * 8 = 12
            ((6, 6, 14, 10), 1.5, range(2, 14), range(4, 16)),
            # at each edge: moved inside, just as large
            ((0, 6, 8, 10), 1.5, range(2, 14), range(12)),
            ((22, 6, 30, 10), 1.5, range(2, 14), range(18, 30)),
            ((6, 0, 14, 4), 1.5, range(12), range(4, 16)),
            ((6, 16, 14, 20), 1.5, range(8, 20), range(4, 16)),
            # as large as the image is high: just fits
            ((10, 9, 20, 11), 2, range(20), range(5, 25)),
            # higher than the image, not wider: rows repeated, columns moved
            ((0, 4, 24, 16), 1, [0, 0, *range(20), 19, 19], range(24)),
            # larger than the image on both axes
            (
                (0, 0, 30, 20),
                1.2,
                [0] * 8 + list(range(20)) + [19] * 8,
                [0] * 3 + list(range(30)) + [29] * 3,
            ),
            # fractions, and less than a pixel
            ((9.4, 6.4, 10.6, 9.6), 1.2, range(6, 10), range(8, 12)),
            ((5.1, 7.1, 5.3, 7.2), 1.2, [7], [5]),
        ],
    )
    def test_by_hand(self, box, context, rows, columns):
        crop = crop_square(coordinates(20, 30), box, context)
        assert crop.dtype == np.uint8
        expected_rows, expected_columns = np.meshgrid(list(rows), list(columns), indexing="ij")
        assert np.array_equal(crop[..., 0], expected_rows)
        assert np.array_equal(crop[..., 1], expected_columns)
        assert (crop[..., 2] == 7).all()

    @given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40))
    def test_as_a_crop_of_the_padded_image(self, data, height, width):
        def draw(low, high):
            return data.draw(st.floats(low, high, allow_subnormal=False))

        x1, y1 = draw(0, width - 0.1), draw(0, height - 0.1)
        box = (x1, y1, draw(x1 + 0.05, width), draw(y1 + 0.05, height))
        context = draw(1, 3)
        image = coordinates(height, width)
        crop = crop_square(image, box, context)
        assert np.array_equal(crop, crop_by_padding(image, box, context))
        if max(crop.shape) <= min(height, width):  # what is really there, nothing twice
            assert len(np.unique(crop.reshape(-1, 3), axis=0)) == crop.shape[0] * crop.shape[1]


class TestFiles:
    def test_layout_and_read_by_image_classes(self, devkit, tmp_path):
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES, size=16)
        assert out == tmp_path / "crops"
        # Numbered without the difficult one; no folder for foxes, of which there are none.
        assert png_files(out) == [
            "train/cat/000001_0.png",
            "train/cat/000001_1.png",
            "train/cat/000003_1.png",
            "train/dog/000003_0.png",
            "val/cat/000002_0.png",
        ]
        assert sorted(p.name for p in (out / "train").iterdir()) == ["cat", "dog"]
        train = ImageClasses(out, "train")
        val = ImageClasses(out, "val", classes=train.classes)
        assert train.classes == ("cat", "dog")
        assert (train.labels, val.labels) == ((0, 0, 0, 1), (0,))
        assert all(train[i][0].shape == (3, 16, 16) for i in range(4))

    def test_pixels_where_nothing_is_resized(self, tmp_path):
        """Squares of just the written size, so that each pixel is one of the image's."""
        boxes = [(20, 12, 40, 20), (0, 0, 12, 20), (44, 20, 64, 30), (30, 28, 50, 48)]
        objects = [VOCObject(CLASSES[k % 3], box) for k, box in enumerate(boxes)]
        images = {"a": (48, 64, objects)}
        root = write_devkit(tmp_path / "devkit", "2007", {"trainval": images, "test": images})
        out = write_object_crops(root, tmp_path / "crops", classes=CLASSES, size=24)
        image = VOCDetection(root, classes=CLASSES)[0][0].permute(1, 2, 0).numpy()
        for split in ("train", "val"):
            for number, (item, box) in enumerate(zip(objects, boxes, strict=True)):
                written = np.asarray(Image.open(out / split / item.name / f"a_{number}.png"))
                assert np.array_equal(written, crop_by_padding(image, box, 1.2))

    @pytest.mark.parametrize("size", [8, 48])
    def test_resized_with_antialiasing(self, devkit, tmp_path, size):
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES, size=size)
        image = np.asarray(Image.open(devkit / "VOC2007/JPEGImages/000003.jpg"))
        square = crop_by_padding(image, (10, 10, 30, 26), 1.2)  # 24 x 24
        batch = torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float()
        expected = interpolate(batch, (size, size), mode="bilinear", antialias=True)[0]
        written = np.asarray(Image.open(out / "train/dog/000003_0.png"))
        difference = np.abs(written - expected.permute(1, 2, 0).numpy())
        assert difference.max() <= 2  # Pillow rounds after each axis
        plain = interpolate(batch, (size, size), mode="bilinear")[0].permute(1, 2, 0).numpy()
        assert size > 24 or np.abs(written - plain).max() > 30

    def test_context(self, devkit, tmp_path):
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES, size=20, context=2)
        image = VOCDetection(devkit, (("2007", "test"),), classes=CLASSES)[0][0]
        written = torch.from_numpy(np.asarray(Image.open(out / "val/cat/000002_0.png")).copy())
        assert torch.equal(written.permute(2, 0, 1), image[:, 0:20, 0:20])  # moved from -2, -1

    def test_shapes(self, shapes_root, tmp_path):
        """All of a data set: one crop for each object the evaluation counts."""
        out = write_object_crops(shapes_root, tmp_path / "crops", classes=SHAPE_CLASSES, size=16)
        for split, image_set in (("train", "trainval"), ("val", "test")):
            dataset = VOCDetection(shapes_root, (("2007", image_set),), classes=SHAPE_CLASSES)
            expected = []
            for index, name in enumerate(dataset.names):
                target = dataset.target(index)
                labels = target["labels"][~target["difficult"]].tolist()
                image_id = name.split("/")[1]
                expected += [
                    f"{split}/{SHAPE_CLASSES[label - 1]}/{image_id}_{number}.png"
                    for number, label in enumerate(labels)
                ]
            assert sorted(expected) == list(ImageClasses(out, split).names)

    def test_several_years_do_not_collide(self, devkit, tmp_path):
        cat = VOCObject("cat", (1, 1, 11, 11))
        write_devkit(devkit, "2012", {"trainval": {"000003": (30, 30, [cat])}}, seed=1)
        sets = (("2007", "trainval"), ("2012", "trainval"))
        out = write_object_crops(
            devkit, tmp_path / "crops", train_sets=sets, classes=CLASSES, size=12
        )
        assert png_files(out) == [
            "train/cat/VOC2007_000001_0.png",
            "train/cat/VOC2007_000001_1.png",
            "train/cat/VOC2007_000003_1.png",
            "train/cat/VOC2012_000003_0.png",
            "train/dog/VOC2007_000003_0.png",
            "val/cat/000002_0.png",
        ]
        image = VOCDetection(devkit, (("2012", "trainval"),), classes=CLASSES)[0][0]
        written = np.asarray(Image.open(out / "train/cat/VOC2012_000003_0.png"))
        assert np.array_equal(written, image[:, 0:12, 0:12].permute(1, 2, 0).numpy())


class TestOnceAndWhole:
    def test_deterministic(self, devkit, tmp_path):
        first = write_object_crops(devkit, tmp_path / "first", classes=CLASSES)
        second = write_object_crops(devkit, tmp_path / "deep" / "second", classes=CLASSES)
        assert len(file_bytes(first)) == 6
        assert file_bytes(first) == file_bytes(second)

    def test_the_same_crops_are_not_written_twice(self, devkit, tmp_path, monkeypatch):
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES)
        moved = devkit.rename(tmp_path / "moved")  # where the images lie does not matter
        monkeypatch.setattr(object_crops, "_write_splits", None)
        assert write_object_crops(str(moved), str(out), classes=CLASSES) == out

    def test_a_subset_of_the_classes_cannot_pass_for_all(self, devkit, tmp_path):
        with pytest.raises(ValueError, match="unknown class 'cat'"):
            write_object_crops(devkit, tmp_path / "crops", classes=("dog", "fox"))
        assert not (tmp_path / "crops").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"size": 17},
            {"context": 1.25},
            {"train_sets": (("2007", "test"),)},
            {"val_sets": (("2007", "trainval"),)},
        ],
    )
    def test_other_crops_are_refused(self, devkit, tmp_path, change):
        arguments = {"classes": CLASSES, "size": 16}
        out = write_object_crops(devkit, tmp_path / "crops", **arguments)
        before = file_bytes(out)
        with pytest.raises(FileExistsError, match=r"crops: exists .*crops\.json"):
            write_object_crops(devkit, out, **{**arguments, **change})
        assert file_bytes(out) == before

    def test_other_objects_are_refused(self, devkit, tmp_path):
        """A box that was corrected: as many objects, of the same classes."""
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES)
        annotation = VOCAnnotation("000002.jpg", 32, 32, (VOCObject("cat", (3, 4, 13, 15)),))
        write_annotation(devkit / "VOC2007/Annotations/000002.xml", annotation)
        with pytest.raises(FileExistsError, match="not the data set asked for"):
            write_object_crops(devkit, out, classes=CLASSES)

    @pytest.mark.parametrize("content", [None, "not json", "{}"])
    def test_something_else_is_not_overwritten(self, devkit, tmp_path, content):
        out = tmp_path / "crops"
        out.mkdir()
        if content is not None:
            (out / "crops.json").write_text(content)
        before = file_bytes(out)
        with pytest.raises(FileExistsError, match="crops: exists"):
            write_object_crops(devkit, out, classes=CLASSES)
        assert file_bytes(out) == before

    def test_an_interruption_leaves_nothing(self, devkit, tmp_path, monkeypatch):
        write_crops = object_crops._write_crops

        def interrupted(folder, image_id, *rest):
            if image_id == "000002":
                raise KeyboardInterrupt
            write_crops(folder, image_id, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(object_crops, "_write_crops", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_object_crops(devkit, tmp_path / "crops", classes=CLASSES)
        assert [p.name for p in tmp_path.iterdir()] == ["devkit"]
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES)
        assert len(png_files(out)) == 5

    def test_the_description_counts_the_objects(self, devkit, tmp_path):
        out = write_object_crops(devkit, tmp_path / "crops", classes=CLASSES)
        objects = json.loads((out / "crops.json").read_text())["objects"]
        assert objects["train"]["classes"] == {"cat": 3, "dog": 1}
        assert objects["val"]["classes"] == {"cat": 1}


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"size": 0}, "size must be at least 1 pixel, got 0"),
            ({"context": 0.9}, "context must be at least 1, got 0.9"),
            ({"context": float("nan")}, "context must be at least 1, got nan"),
            ({"context": float("inf")}, "context must be at least 1, got inf"),
            ({"classes": ("cat", "dog", "a/b")}, "class 'a/b' cannot name a folder"),
            ({"classes": ("cat", "dog", "..")}, "class '..' cannot name a folder"),
        ],
    )
    def test_arguments_are_checked(self, devkit, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            write_object_crops(devkit, tmp_path / "crops", **{"classes": CLASSES, **arguments})
        assert not (tmp_path / "crops").exists()

    def test_a_split_without_objects(self, tmp_path):
        hard = {"a": (20, 20, [VOCObject("cat", (2, 2, 12, 12), difficult=True)])}
        easy = {"b": (20, 20, [VOCObject("cat", (2, 2, 12, 12))])}
        root = write_devkit(tmp_path / "devkit", "2007", {"trainval": easy, "test": hard})
        with pytest.raises(ValueError, match=r"no object to cut out for 'val' in VOC2007/a"):
            write_object_crops(root, tmp_path / "crops", classes=CLASSES)

    def test_a_missing_split(self, devkit, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no VOC2012"):
            write_object_crops(
                devkit, tmp_path / "crops", val_sets=(("2012", "test"),), classes=CLASSES
            )

    def test_a_broken_image_leaves_nothing(self, devkit, tmp_path):
        (devkit / "VOC2007/JPEGImages/000002.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"000002\.jpg"):
            write_object_crops(devkit, tmp_path / "crops", classes=CLASSES)
        assert [p.name for p in tmp_path.iterdir()] == ["devkit"]


def test_real_pascal_voc(voc_root, tmp_path):
    """A few real images, copied: their crops by the rule, from Pillow's decoding."""
    source, folder = voc_root / "VOC2007", tmp_path / "VOC2007"
    ids = (source / "ImageSets/Main/test.txt").read_text().split()[:20]
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for image_id in ids:
        for name in (f"JPEGImages/{image_id}.jpg", f"Annotations/{image_id}.xml"):
            shutil.copy(source / name, folder / name)
    for split, some in (("trainval", ids[:15]), ("test", ids[15:])):
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(some))
    out = write_object_crops(tmp_path, tmp_path / "crops")
    dataset = VOCDetection(tmp_path, difficult="drop")
    num_checked = 0
    for index, name in enumerate(dataset.names):
        target, image_id = dataset.target(index), name.split("/")[1]
        image = np.asarray(Image.open(folder / f"JPEGImages/{image_id}.jpg"))
        for number, box in enumerate(target["boxes"].tolist()):
            class_name = dataset.classes[int(target["labels"][number]) - 1]
            square = Image.fromarray(crop_by_padding(image, box, 1.2))
            expected = square.resize((48, 48), Image.Resampling.BILINEAR)
            written = Image.open(out / "train" / class_name / f"{image_id}_{number}.png")
            difference = np.abs(np.asarray(written, int) - np.asarray(expected, int))
            assert difference.max() <= 4  # two decoders
            num_checked += 1
    assert num_checked == len(ImageClasses(out, "train")) == dataset.report.num_objects
