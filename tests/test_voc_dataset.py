"""Reading the Pascal VOC devkit: against torchvision's reader, hand-made files and real data."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
import torchvision
from data_files import BOX, DOG, SIZE, dog, make_devkit
from hypothesis import given, settings
from hypothesis import strategies as st

from detmix.data import SHAPE_CLASSES, VOC_CLASSES, VOCAnnotation, VOCDetection, VOCObject
from detmix.data.voc.devkit import read_annotation, write_annotation


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("root", "classes"), [("shapes_root", SHAPE_CLASSES), ("voc_root", VOC_CLASSES)]
)
def test_everything_equals_torchvisions_reader(tmp_path, request, root, classes):
    root = request.getfixturevalue(root)
    (tmp_path / "VOCdevkit").symlink_to(root)
    reader = torchvision.datasets.VOCDetection(str(tmp_path), "2007", "trainval")
    dataset = pickle.loads(pickle.dumps(VOCDetection(root, classes=classes)))  # as for a worker
    lines = (root / "VOC2007/ImageSets/Main/trainval.txt").read_text().split()
    assert dataset.names == [f"VOC2007/{name}" for name in lines]
    assert dataset.image_ids == list(range(len(reader)))
    assert dataset.category_ids == tuple(range(1, len(classes) + 1))
    for index in random.Random(0).sample(range(len(dataset)), 20):
        image, target = dataset[index]
        photo, tree = reader[index]
        assert image.dtype == torch.uint8
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(photo).astype(int)).max() <= 2
        assert dataset.image_size(index) == image.shape[1:]
        assert dataset.image_path(index).stem == dataset.names[index][8:]
        items = tree["annotation"]["object"]
        boxes = [[float(i["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for i in items]
        expected = {
            "boxes": torch.tensor(boxes) - torch.tensor([1.0, 1.0, 0.0, 0.0]),
            "labels": torch.tensor([classes.index(i["name"]) + 1 for i in items]),
            "difficult": torch.tensor([i["difficult"] == "1" for i in items]),
        }
        assert dataset.index_of(target.pop("image_id")) == index
        assert target.keys() == expected.keys()
        for key, value in expected.items():
            assert target[key].dtype == value.dtype
            assert torch.equal(target[key], value)
            target[key].fill_(1)  # a copy
            assert torch.equal(dataset.target(index)[key], value)
    with pytest.raises(IndexError, match="is out of range for"):
        dataset[len(dataset)]
    with pytest.raises(ValueError, match=f"image_id {len(dataset)}"):
        dataset.index_of(len(dataset))


@pytest.mark.filterwarnings("ignore:.* boxes were")
def test_empty_images_and_difficult_objects(tmp_path):
    hard = dog(60, 40, 60, 40, "<difficult>1</difficult>")  # of one pixel
    hard += dog(60, 40, 59, 40, "<difficult>1</difficult>")  # without area
    root = make_devkit(tmp_path, {"a": SIZE + DOG + hard, "b": SIZE})
    for choice, expected in (
        ("keep", [[10, 5, 30, 20], [59, 39, 60, 40]]),
        ("drop", [[10, 5, 30, 20]]),
    ):
        dataset = VOCDetection(root, difficult=choice)
        assert dataset[0][1]["boxes"].tolist() == expected
        report, num_hard = dataset.report, len(expected) - 1
        assert (report.num_objects, report.num_empty_images) == (len(expected), 1)
        assert (report.num_difficult, report.num_difficult_dropped) == (num_hard, 1 - num_hard)
    empty = dataset[-1][1]
    assert empty.pop("image_id") == 1
    assert [tuple(column.shape) for column in empty.values()] == [(0, 4), (0,), (0,)]


def test_years_are_joined_and_the_parent_of_vocdevkit_is_accepted(tmp_path):
    devkit = make_devkit(tmp_path / "VOCdevkit", {"a": SIZE + DOG})
    make_devkit(devkit, {"a": SIZE, "c": SIZE}, year="2012")
    for root in (tmp_path, devkit):
        dataset = VOCDetection(root, ((2007, "trainval"), ("2012", "trainval")))
        assert dataset.names == ["VOC2007/a", "VOC2012/a", "VOC2012/c"]
        assert [year for year, _ in dataset.image_sets] == ["2007", "2012", "2012"]
        assert [len(dataset[i][1]["boxes"]) for i in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("lines", "names"), [("a  1\n\n b -1 \nc  0\n", "ac"), ("\ufeffa\nb\nc", "abc")]
)
def test_split_files(tmp_path, lines, names):
    """With flags, and as Windows' editors write them."""
    root = make_devkit(tmp_path, {"a": SIZE + DOG, "b": SIZE, "c": SIZE}, split=lines)
    assert VOCDetection(root).names == [f"VOC2007/{name}" for name in names]


def test_parts_are_not_objects_and_classes_and_transforms_can_be_given(tmp_path):
    part = f"<part><name>head</name>{BOX}</part>"
    whole = dog(1, 1, 20, 30).replace("<object>", f"<object>{part}")
    root = make_devkit(tmp_path, {"a": SIZE + whole})
    dataset = VOCDetection(root, classes=("cat", "dog"), transforms=lambda i, t: (i[:, :7], t))
    image, target = dataset[0]
    assert image.shape == (3, 7, 60)
    assert target["boxes"].tolist() == [[0, 0, 20, 30]]
    assert target["labels"].tolist() == [2]


@pytest.mark.parametrize("size", [SIZE, "", "<size><width>0</width><height>0</height></size>"])
def test_boxes_are_clipped_or_dropped_with_one_warning(tmp_path, size):
    """By the size that the annotation says, or else the image's."""
    bodies = {
        "a": size + DOG + dog(0, -3, 30.5, 45.75),
        "b": size + dog(61, 1, 70, 9) + dog(20, 9, 19, 20) + dog(1, 41, 9, 80),
    }
    root = make_devkit(tmp_path, bodies)
    with pytest.warns(UserWarning, match="boxes were") as caught:
        dataset = VOCDetection(root)
    assert [warning.filename for warning in caught] == [__file__]
    for told in ("1 of 5", "a.xml", "3 of 5", "b.xml", "61, 1, 70, 9 in 60 x 40"):
        assert told in str(caught[0].message)
    assert dataset[0][1]["boxes"].tolist() == [[10.0, 5.0, 30.0, 20.0], [0.0, 0.0, 30.5, 40.0]]
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (2, 1, 3)


coordinates = st.integers(-40, 4000).map(lambda n: n / 8) | st.integers(-5, 500).map(float)
corners = st.tuples(*[coordinates] * 4)
objects = st.builds(VOCObject, st.sampled_from(VOC_CLASSES), corners, st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(objects, max_size=4))
def test_annotations_survive_writing_and_reading(tmp_path_factory, objects):
    """What is written is one-based, as torchvision's reader of the shapes shows above."""
    path = tmp_path_factory.mktemp("xml") / "a.xml"
    annotation = VOCAnnotation("a & <b>.jpg", 60, 40, tuple(objects))
    write_annotation(path, annotation)
    assert read_annotation(path) == annotation
