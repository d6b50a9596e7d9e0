"""The synthetic data set in COCO's layout: against the drawn pixels and pycocotools."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from detmix.data import (
    SHAPE_CLASSES,
    CocoDetection,
    VOCDetection,
    shapes_coco,
    write_shapes,
    write_shapes_coco,
)
from detmix.data.shapes import render_scene
from detmix.training.console import run_tool

TOOL = Path(__file__).parents[1] / "tools" / "prepare_shapes.py"
SPLITS = {"train2017": (0, 40), "val2017": (1, 10)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes_coco")
    return write_shapes_coco(root, num_train=40, num_test=10, image_size=96, seed=3)


def open_split(root, split, **kwargs):
    return CocoDetection(root / split, root / f"annotations/instances_{split}.json", **kwargs)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("split", SPLITS)
def test_masks_and_boxes_are_what_is_drawn(root, split):
    number, num_images = SPLITS[split]
    dataset = open_split(root, split, masks=True)
    assert len(dataset) == num_images
    assert dataset.classes == SHAPE_CLASSES
    assert dataset.category_ids == (1, 3, 7, 8, 20)
    for index in range(num_images):
        image, target = dataset[index]
        scene = render_scene(3, number, index, 96)
        assert image.shape[1:] == scene.owners.shape
        assert [SHAPE_CLASSES[k - 1] for k in target["labels"]] == [o.name for o in scene.objects]
        for k, (mask, box) in enumerate(zip(target["masks"].numpy(), target["boxes"], strict=True)):
            assert np.array_equal(mask, scene.owners == k)
            rows, columns = np.nonzero(mask)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == extent
        assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()


def test_keypoints_are_the_outermost_pixels_of_the_masks(root):
    dataset = open_split(root, "train2017", masks=True, keypoints=True)
    assert dataset.keypoint_names == ("top", "bottom", "left_side", "right_side")
    assert dataset.keypoint_flip == (0, 1, 3, 2)
    for index in range(len(dataset)):
        target = dataset.target(index)
        for mask, box, points in zip(
            target["masks"], target["boxes"].tolist(), target["keypoints"].tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            assert (points[0][1], points[1][1]) == (y1, y2 - 1)
            assert (points[2][0], points[3][0]) == (x1, x2 - 1)
            for x, y, visibility in points:
                assert mask[int(y), int(x)] == 1
                assert visibility == 2


def test_pycocotools_reads_it(root, capsys):
    num_objects = 0
    for split, (_, num_images) in SPLITS.items():
        oracle = COCO(str(root / f"annotations/instances_{split}.json"))
        dataset = open_split(root, split)
        assert len(oracle.imgs) == num_images
        for index, image_id in enumerate(dataset.image_ids):
            items = oracle.imgToAnns[image_id]
            assert [oracle.annToMask(item).sum() for item in items] == [i["area"] for i in items]
            assert all(
                i["num_keypoints"] == sum(v > 0 for v in i["keypoints"][2::3]) for i in items
            )
            assert len(dataset.target(index)["boxes"]) == len(items) > 0
        assert min(oracle.anns) == num_objects + 1
        num_objects += len(oracle.anns)
    assert max(oracle.anns) == num_objects
    assert sorted(oracle.imgs) == list(range(41, 51))


def test_images_are_those_of_the_devkit(root, tmp_path):
    devkit = write_shapes(tmp_path, num_train=40, num_test=10, image_size=96, seed=3)
    for split, name in (("train2017", "trainval"), ("val2017", "test")):
        dataset = open_split(root, split)
        voc = VOCDetection(devkit, (("2007", name),), classes=SHAPE_CLASSES)
        for index in range(len(dataset)):
            assert dataset.image_path(index).read_bytes() == voc.image_path(index).read_bytes()
            target, expected = dataset.target(index), voc.target(index)
            assert torch.equal(target["boxes"], expected["boxes"])
            assert torch.equal(target["labels"], expected["labels"])


def test_it_is_written_once_and_nothing_else_is_overwritten(tmp_path):
    root = write_shapes_coco(tmp_path / "new" / "folder", num_train=2, num_test=1)
    path = root / "train2017/000000000001.jpg"
    before = path.stat().st_mtime_ns
    assert write_shapes_coco(root, num_train=2, num_test=1) == root
    assert path.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"folder: exists .*'seed': 1"):
        write_shapes_coco(root, num_train=2, num_test=1, seed=1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="got None"):
        write_shapes_coco(other, num_train=2, num_test=1)
    assert [p.name for p in other.iterdir()] == ["mine.txt"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_image = shapes_coco._write_image

    def interrupted(folder, image_id, scene):
        if image_id == 3:
            raise KeyboardInterrupt
        return write_image(folder, image_id, scene)

    monkeypatch.setattr(shapes_coco, "_write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes_coco(tmp_path / "shapes", num_train=4, num_test=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"num_train": 0}, {"num_test": 0}, {"image_size": 32}, {"seed": -1}]
)
def test_arguments_are_checked(tmp_path, arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} must be at least"):
        write_shapes_coco(tmp_path / "shapes", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(capsys):
    """Return a function that runs the command within this process: its import takes seconds."""

    def run(*args):
        code = run_tool(runpy.run_path(str(TOOL))["main"], [str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


def test_tool_writes_cocos_layout_and_refuses_in_one_line(tmp_path, run):
    root = tmp_path / "coco"
    options = ("--root", root, "--num_train", 3, "--num_test", 2, "--image_size", 64)
    assert run(*options, "--seed", 5) == (0, f"shapes data: {root} (3 + 2 images)\n", "")
    assert json.loads((root / "shapes.json").read_text())["seed"] == 5
    assert len(open_split(root, "train2017")) == 3
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {root}: exists and is not the data set asked for")
    assert len(err.splitlines()) == 1


def test_tool_writes_a_devkit(tmp_path, run):
    options = ("--root", tmp_path, "--format", "voc", "--num_train", 3, "--num_test", 2)
    assert run(*options)[0] == 0
    assert len(VOCDetection(tmp_path, classes=SHAPE_CLASSES)) == 3
