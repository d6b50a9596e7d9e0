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

from detmix.data import VOC_CLASSES, VOCAnnotation, VOCDetection, VOCObject
from detmix.data.voc.devkit import read_annotation, write_annotation


@pytest.mark.filterwarnings("error::UserWarning")
def test_sample_follows_the_contract(tmp_path):
    hard = dog(60, 40, 60, 40, "<difficult>1</difficult>")  # of one pixel
    dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + DOG + hard, "b": SIZE}))
    dataset = pickle.loads(pickle.dumps(dataset))  # as a worker gets it
    image, target = dataset[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 40, 60))
    target["boxes"] += 1  # a copy
    assert dataset[0][1]["boxes"].tolist() == [[10, 5, 30, 20], [59, 39, 60, 40]]
    assert target["labels"].tolist() == [VOC_CLASSES.index("dog") + 1] * 2
    assert target["difficult"].tolist() == [False, True]
    types = {"boxes": (torch.float32, 4), "labels": (torch.int64,), "difficult": (torch.bool,)}
    for index, num in ((0, 2), (1, 0)):
        columns = dataset[index][1]
        assert columns.keys() == {*types, "image_id"}
        for key, (dtype, *shape) in types.items():
            assert (columns[key].dtype, columns[key].shape) == (dtype, (num, *shape))
    assert dataset.names == ["VOC2007/a", "VOC2007/b"]
    assert dataset.image_size(0) == (40, 60)
    assert dataset.image_path(-1) == tmp_path / "VOC2007/JPEGImages/b.jpg"
    assert (dataset.report.num_empty_images, dataset.report.num_difficult) == (1, 1)
    dropped = VOCDetection(tmp_path, difficult="drop")
    assert len(dropped[0][1]["boxes"]) == dropped.report.num_difficult_dropped == 1
    assert [dataset[i][1]["image_id"] for i in (0, -1)] == dataset.image_ids == [0, 1]
    assert dataset.index_of(1) == 1
    assert dataset.category_ids == tuple(range(1, 21))
    with pytest.raises(IndexError, match="index 2 is out of range for 2"):
        dataset[2]
    with pytest.raises(ValueError, match="image_id 2"):
        dataset.index_of(2)


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
    assert len(dataset[1][1]["boxes"]) == 0
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (2, 1, 3)


coordinates = st.integers(-40, 4000).map(lambda n: n / 8) | st.integers(-5, 500).map(float)
corners = st.tuples(*[coordinates] * 4)
objects = st.builds(VOCObject, st.sampled_from(VOC_CLASSES), corners, st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(objects, max_size=4))
def test_annotations_survive_writing_and_reading(tmp_path_factory, objects):
    path = tmp_path_factory.mktemp("xml") / "a.xml"
    annotation = VOCAnnotation("a & <b>.jpg", 60, 40, tuple(objects))
    write_annotation(path, annotation)
    assert read_annotation(path) == annotation


def test_written_boxes_are_one_based_and_inclusive_and_torchvision_reads_them(tmp_path):
    root = make_devkit(tmp_path / "VOCdevkit", {"a": SIZE}).parent
    written = VOCAnnotation("a.jpg", 60, 40, (VOCObject("cow", (0.0, 4.0, 1.0, 9.5), True),))
    write_annotation(root / "VOCdevkit/VOC2007/Annotations/a.xml", written)
    reader = torchvision.datasets.VOCDetection(str(root), "2007", "trainval")
    item = reader[0][1]["annotation"]["object"][0]
    assert item["bndbox"] == {"xmin": "1", "ymin": "5", "xmax": "1", "ymax": "9.5"}
    assert (item["name"], item["difficult"]) == ("cow", "1")


def test_real_data_equals_torchvisions_reader(voc_root):
    dataset = VOCDetection(voc_root)
    lines = (voc_root / "VOC2007/ImageSets/Main/trainval.txt").read_text().split()
    assert dataset.names == [f"VOC2007/{name}" for name in lines]
    assert dataset.report.num_clipped == dataset.report.num_without_area == 0
    reader = torchvision.datasets.VOCDetection(str(voc_root.parent), "2007", "trainval")
    for index in random.Random(0).sample(range(len(dataset)), 60):
        image, target = dataset[index]
        photo, tree = reader[index]
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(photo).astype(int)).max() <= 2
        items = tree["annotation"]["object"]
        boxes = [[float(i["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for i in items]
        expected = torch.tensor(boxes) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        torch.testing.assert_close(target["boxes"], expected, rtol=0, atol=0)
        assert [VOC_CLASSES[k - 1] for k in target["labels"]] == [i["name"] for i in items]
        assert target["difficult"].tolist() == [i["difficult"] == "1" for i in items]
