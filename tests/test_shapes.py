"""The synthetic data sets, of COCO's layout and a devkit: against the drawn pixels, and whole."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.datasets import ImageFolder

from detmix.data import (
    SHAPE_CLASSES,
    CocoDetection,
    VOCDetection,
    write_shape_crops,
    write_shapes,
    write_shapes_coco,
)
from detmix.data.shapes import render_scene
from detmix.data.shapes_coco import outline

OPTIONS = {"num_train": 40, "num_test": 15, "image_size": 96, "seed": 3}
SMALL = {"num_train": 2, "num_test": 1}
SPLITS = {"train2017": "trainval", "val2017": "test"}
WRITERS = pytest.mark.parametrize("write", [write_shapes, write_shapes_coco])


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory):
    return write_shapes_coco(tmp_path_factory.mktemp("shapes") / "coco", **OPTIONS)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), **OPTIONS)


def open_voc(root, split, **options):
    return VOCDetection(root, (("2007", split),), classes=SHAPE_CLASSES, **options)


def modified(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.filterwarnings("error::UserWarning")
def test_both_layouts_hold_what_is_drawn(coco_root, devkit):
    seen = []
    for number, (split, name) in enumerate(SPLITS.items()):
        path = coco_root / f"annotations/instances_{split}.json"
        dataset = CocoDetection(coco_root / split, path, masks=True, keypoints=True)
        for item in json.loads(path.read_text())["annotations"]:  # as torchvision's converter needs
            assert all(
                type(polygon) is list and len(polygon) >= 8 for polygon in item["segmentation"]
            )
        voc = open_voc(devkit, name)
        assert len(dataset) == len(voc) == (40, 15)[number]
        assert dataset.category_ids == (1, 3, 7, 8, 20)
        assert dataset.classes == SHAPE_CLASSES
        assert dataset.keypoint_names == ("top", "bottom", "left_side", "right_side")
        assert dataset.keypoint_flip == (0, 1, 3, 2)
        for index in range(len(dataset)):
            target, expected = dataset.target(index), voc.target(index)
            scene = render_scene(3, number, index, 96)
            names = [SHAPE_CLASSES[k - 1] for k in target["labels"]]
            assert names == [item.name for item in scene.objects]
            assert dataset.image_path(index).read_bytes() == voc.image_path(index).read_bytes()
            assert all(torch.equal(target[key], expected[key]) for key in ("boxes", "labels"))
            assert torch.equal(target["area"], target["masks"].sum((1, 2)).float())
            seen.append((target["image_id"], voc.image_size(index), target["labels"].tolist()))
            for k, (mask, box, points) in enumerate(
                zip(target["masks"].numpy(), target["boxes"], target["keypoints"], strict=True)
            ):
                assert np.array_equal(mask, scene.owners == k)
                rows, columns = np.nonzero(mask)
                x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                assert box.tolist() == [x1, y1, x2, y2]
                x, y, visibility = points.int().T.tolist()  # outermost pixels of the mask
                assert (y[0], y[1], x[2], x[3]) == (y1, y2 - 1, x1, x2 - 1)
                assert mask[y, x].all()
                assert visibility == [2] * 4
                # A star fills a quarter of its box; a hidden object would own next to nothing.
                assert mask.sum() >= 0.12 * (x2 - x1) * (y2 - y1)
    ids, sizes, labels = zip(*seen, strict=True)
    assert ids == tuple(range(1, 56))
    assert len(set(sizes)) > 10
    assert {max(size) for size in sizes} == {96}
    assert {len(objects) for objects in labels} == {1, 2, 3, 4}
    assert set(itertools.chain(*labels)) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("seed", range(20))
def test_outlines_are_exact(seed):
    """Of anything, with parts, holes and pixels that touch at a corner."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        mask = rng.random(rng.integers(1, 24, 2)) < rng.random()
        mask[tuple(rng.integers(mask.shape))] = True
        rle = coco_mask.frPyObjects([outline(mask)], *mask.shape)
        assert np.array_equal(coco_mask.decode(rle)[..., 0], mask)


def test_objects_differ_from_what_is_around_them():
    """But for the few that are meant to be hard to see."""
    seen = []
    for index in range(40):
        scene = render_scene(0, 0, index, 128)
        for number, item in enumerate(scene.objects):
            x1, y1, x2, y2 = (int(side) for side in item.box)
            near = np.s_[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3]
            pixels, owners = scene.image[near].astype(float), scene.owners[near]
            inside, outside = np.median(pixels[owners == number], 0), pixels[owners < 0]
            seen.append(np.abs(inside - np.median(outside, 0)).max() > 35)
    assert np.mean(seen) > 0.9


@WRITERS
def test_written_once_and_nothing_else_is_overwritten(write, tmp_path):
    root = write(tmp_path / "new" / "folder", **SMALL)
    before = modified(root)
    assert write(root, **SMALL) == root
    with pytest.raises(FileExistsError, match="'seed': 1"):
        write(root, **SMALL, seed=1)
    assert modified(root) == before
    next(root.rglob("shapes.json")).unlink()
    with pytest.raises(FileExistsError, match="folder"):
        write(root, **SMALL)
    for name, value in (("num_train", 0), ("image_size", 32)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            write(tmp_path / "other", **{name: value})
    assert not (tmp_path / "other").exists()


@WRITERS
def test_an_interruption_leaves_nothing(write, tmp_path, monkeypatch):
    save = Image.Image.save

    def interrupted(image, path, *args, **kwargs):
        if "3" in path.name:
            raise KeyboardInterrupt
        save(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "shapes", num_train=4, num_test=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_processes_may_write_the_same(tmp_path, monkeypatch):
    def rename(source, destination):
        monkeypatch.undo()  # the other process is faster
        write_shapes(tmp_path, **SMALL)
        os.rename(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    root = write_shapes(tmp_path, **SMALL)
    assert json.loads((root / "VOC2007/shapes.json").read_text())["num_train"] == 2
    assert len(list(tmp_path.rglob("*.jpg"))) == 3


def test_crops_are_the_squares_around_the_objects(devkit):
    out = write_shape_crops(devkit)
    found = 0
    for split, name in (("trainval", "train"), ("test", "val")):
        dataset = open_voc(devkit, split, difficult="drop")
        for image_name, (image, target) in zip(dataset.names, dataset, strict=True):
            for number, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
                side = round(1.2 * max(x2 - x1, y2 - y1))
                left, top = (round((low + high - side) / 2) for low, high in ((x1, x2), (y1, y2)))
                left = min(max(left, 0), image.shape[2] - side)
                top = min(max(top, 0), image.shape[1] - side)
                square = image[:, top : top + side, left : left + side].permute(1, 2, 0).numpy()
                label = SHAPE_CLASSES[target["labels"][number] - 1]
                path = out / name / label / f"{image_name[8:]}_{number}.png"
                expected = Image.fromarray(square).resize((48, 48), Image.Resampling.BILINEAR)
                assert np.array_equal(Image.open(path), expected)
                found += 1
        assert ImageFolder(out / name).classes == list(SHAPE_CLASSES)
    assert found == len(list(out.rglob("*.png")))
    before = modified(out)
    assert modified(write_shape_crops(devkit)) == before
