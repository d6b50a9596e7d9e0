"""The synthetic data set: boxes against the drawn pixels, determinism, and writing it whole."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import detmix.data.shapes as shapes
from detmix.data import (
    SHAPE_CLASSES,
    VOCDetection,
    read_annotation,
    write_shape_crops,
    write_shapes,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=60, num_test=15, seed=3)


@pytest.mark.filterwarnings("error::UserWarning")
def test_reads_as_voc(root):
    train = VOCDetection(root, classes=SHAPE_CLASSES)
    test = VOCDetection(root, (("2007", "test"),), classes=SHAPE_CLASSES)
    assert (len(train), len(test)) == (60, 15)
    assert not set(train.names) & set(test.names)
    labels = torch.cat([train[i][1]["labels"] for i in range(60)])
    assert set(labels.tolist()) == set(range(1, len(SHAPE_CLASSES) + 1))
    sizes = {train.image_size(i) for i in range(60)}
    assert all(max(size) == 128 and min(size) >= 96 for size in sizes)
    assert len(sizes) > 10
    assert {len(train.target(i)["boxes"]) for i in range(60)} == {1, 2, 3, 4}


def test_boxes_are_the_extents_of_what_is_seen(root):
    """An independent search over the map of owners must find the boxes read from the XML."""
    for index in range(15):
        scene = shapes.render_scene(3, 1, index, 128)
        annotation = read_annotation(root / f"VOC2007/Annotations/{61 + index:06d}.xml")
        assert (annotation.height, annotation.width) == scene.owners.shape
        for number, item in enumerate(annotation.objects):
            pixels = [(x, y) for y, x in zip(*np.nonzero(scene.owners == number), strict=True)]
            columns, rows = zip(*pixels, strict=True)
            assert item.box == (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
        assert scene.owners.max() + 1 == len(annotation.objects)


def test_boxes_surround_what_is_drawn(monkeypatch):
    """Draw on plain grey: what differs from it clearly must be what the boxes surround."""
    grey = np.float32(128)
    monkeypatch.setattr(
        shapes, "_draw_background", lambda rng, h, w: np.full((h, w, 3), grey, np.float32)
    )
    monkeypatch.setattr(shapes, "_FAINT_SHARE", 0.0)
    monkeypatch.setattr(shapes, "_MAX_OVERLAP", 0.0)
    monkeypatch.setattr(shapes, "_MAX_OBJECTS", 1)
    for index in range(40):
        scene = shapes.render_scene(0, 0, index, 128)
        (item,) = scene.objects
        # Noise has a standard deviation of at most 7: 35 is beyond it.
        drawn = np.abs(scene.image.astype(float) - 128).max(axis=2) > 35
        rows, columns = np.nonzero(drawn)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        # A pixel at the rim is covered by a quarter at least: it may still look grey.
        assert np.abs(np.subtract(seen, item.box)).max() <= 2
        assert 8 <= item.box[2] - item.box[0] <= 60


def test_an_image_depends_on_seed_split_and_index_alone():
    first = shapes.render_scene(1, 0, 5, 128)
    again = shapes.render_scene(1, 0, 5, 128)
    assert np.array_equal(first.image, again.image)
    assert first.objects == again.objects
    for other in ((2, 0, 5), (1, 1, 5), (1, 0, 6)):
        scene = shapes.render_scene(*other, 128)
        assert scene.image.shape != first.image.shape or (scene.image != first.image).any()


def test_more_images_leave_the_first_ones_as_they_are(tmp_path):
    small = write_shapes(tmp_path / "small", num_train=2, num_test=1)
    large = write_shapes(tmp_path / "large", num_train=4, num_test=1)
    for name in ("JPEGImages/000002.jpg", "Annotations/000002.xml"):
        assert (small / "VOC2007" / name).read_bytes() == (large / "VOC2007" / name).read_bytes()
    # The test images are the same too, under other numbers.
    first, second = small / "VOC2007/JPEGImages/000003.jpg", large / "VOC2007/JPEGImages/000005.jpg"
    assert first.read_bytes() == second.read_bytes()


def test_overlap_is_limited():
    for index in range(30):
        scene = shapes.render_scene(0, 0, index, 128)
        for number in range(len(scene.objects)):
            x1, y1, x2, y2 = scene.objects[number].box
            # A star fills a quarter of its box; a hidden object would own next to nothing.
            assert (scene.owners == number).sum() >= 0.12 * (x2 - x1) * (y2 - y1)


def test_the_same_data_set_is_not_written_twice(tmp_path):
    root = write_shapes(tmp_path / "new" / "folder", num_train=2, num_test=1)
    marker = root / "VOC2007/JPEGImages/000001.jpg"
    before = marker.stat().st_mtime_ns
    assert write_shapes(root, num_train=2, num_test=1) == root
    assert marker.stat().st_mtime_ns == before
    assert [p.name for p in root.iterdir()] == ["VOC2007"]


def test_something_else_is_not_overwritten(tmp_path):
    root = write_shapes(tmp_path, num_train=2, num_test=1)
    with pytest.raises(FileExistsError, match=r"VOC2007: exists .*'seed': 1"):
        write_shapes(root, num_train=2, num_test=1, seed=1)
    (root / "VOC2007/shapes.json").unlink()
    with pytest.raises(FileExistsError, match="got None"):
        write_shapes(root, num_train=2, num_test=1)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_scene = shapes._write_scene

    def interrupted(folder, image_id, scene):
        if image_id == "000003":
            raise KeyboardInterrupt
        write_scene(folder, image_id, scene)

    monkeypatch.setattr(shapes, "_write_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, num_train=4, num_test=1)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_the_same(tmp_path, monkeypatch):
    def rename(source, destination):
        monkeypatch.undo()  # the other process is faster
        write_shapes(tmp_path, num_train=1, num_test=1)
        os.rename(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    assert write_shapes(tmp_path, num_train=1, num_test=1) == tmp_path
    assert json.loads((tmp_path / "VOC2007/shapes.json").read_text())["num_train"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["VOC2007"]


@pytest.mark.parametrize(
    "arguments", [{"num_train": 0}, {"num_test": 0}, {"image_size": 32}, {"seed": -1}]
)
def test_arguments_are_checked(tmp_path, arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} must be at least"):
        write_shapes(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def square_inside(image, box):
    """Move a square of 1.2 times the longer side step by step until it is inside the image."""
    x1, y1, x2, y2 = box
    side = round(1.2 * max(x2 - x1, y2 - y1))
    corner = [round((y1 + y2) / 2 - side / 2), round((x1 + x2) / 2 - side / 2)]
    for axis in (0, 1):
        while corner[axis] < 0:
            corner[axis] += 1
        while corner[axis] + side > image.shape[axis]:
            corner[axis] -= 1
    top, left = corner
    return image[top : top + side, left : left + side]


def test_crops_are_the_squares_around_the_objects(root):
    out = write_shape_crops(root)
    found = 0
    for split, name in (("trainval", "train"), ("test", "val")):
        dataset = VOCDetection(root, (("2007", split),), classes=SHAPE_CLASSES, difficult="drop")
        for index, image_name in enumerate(dataset.names):
            image, target = dataset[index]
            boxes = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
            for number, (box, label) in enumerate(boxes):
                square = square_inside(image.permute(1, 2, 0).numpy(), box)
                image_id = image_name.rpartition("/")[2]
                path = out / name / SHAPE_CLASSES[label - 1] / f"{image_id}_{number}.png"
                expected = Image.fromarray(square).resize((48, 48), Image.Resampling.BILINEAR)
                assert np.array_equal(Image.open(path), expected)
                found += 1
        assert ImageFolder(out / name).classes == list(SHAPE_CLASSES)
    assert found == len(list(out.rglob("*.png")))


def test_crops_are_written_once_and_of_the_same_shapes_only(tmp_path):
    root = write_shapes(tmp_path, num_train=2, num_test=1)
    before = {path: path.stat().st_mtime_ns for path in write_shape_crops(root).rglob("*")}
    assert {path: path.stat().st_mtime_ns for path in write_shape_crops(root).rglob("*")} == before
    (root / "VOC2007").rename(root / "old")
    with pytest.raises(FileNotFoundError, match=r"shapes\.json"):
        write_shape_crops(root)
    write_shapes(root, num_train=2, num_test=1, seed=1)
    with pytest.raises(FileExistsError, match=r"crops: exists .*'seed': 1"):
        write_shape_crops(root)
