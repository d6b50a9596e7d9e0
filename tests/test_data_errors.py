"""Broken data sets of both formats: an error names the file, and the entry and value in it.

Names that lead elsewhere, entities and what fills the memory are in contract/test_safety.py, files
that are not there and images of another size in contract/test_left_out.py, files that are broken
anyhow in test_fuzz.py.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from data_files import (
    CATEGORIES,
    DOG,
    POINTS,
    SIZE,
    TRIANGLE,
    box_object,
    compressed_rle,
    dog,
    image_entry,
    make_devkit,
    plain_rle,
    write_coco,
)

from detmix.data import CocoDetection, VOCDetection

NAN = float("nan")
CAT = [*CATEGORIES, {"id": 4, "name": "cat", "keypoints": ["nose"]}]
# Of the second annotation, whose id is 5.
FIELDS = [
    *(("image_id", value, f".*{value!r}") for value in ("1", 1.5, True, [1])),
    *(("category_id", value, f".*{value!r}") for value in ("1", 1.5, 2.0)),
    ("bbox", [1, 2, 10**400, 4], ".*"),
    ("area", -1, ".*-1"),
    ("iscrowd", 2, ".*2"),
    *(("keypoints", [x, *POINTS[1:]], "") for x in (NAN, -1e39, 10**400)),
    ("segmentation", None, ""),
    ("segmentation", [*TRIANGLE, [1, 2, 3, 4, 5, 6, 7]], "polygon 1 .*7"),
    ("segmentation", [[1, 2, 3, 4, NAN, 6]], "polygon 0 .*nan"),
    ("segmentation", [[1, 2, 3, -1e9, 5, 6]], "polygon 0 .*-1000000000"),
    ("segmentation", [1, 2, 3, 4, 5, 6], "polygon 0 .*got 1"),
    ("segmentation", plain_rle(np.eye(60, 40)), r"60 x 40, .*40 x 60"),
    ("segmentation", {"size": [40, 60], "counts": [5, 7]}, "12 pixels, .*40 x 60"),
    ("segmentation", {"size": [40, 60], "counts": [2401, -1]}, "counts"),
    ("segmentation", compressed_rle(np.eye(40, 60)) | {"counts": "\ud800"}, "RLE"),
    ("segmentation", {"size": [2**20, 2**20], "counts": [2**40]}, "size"),
    ("segmentation", {"size": [40, 60], "counts": "o" * 30 + "0"}, "RLE"),
]
# Content of the JSON, and what is named.
COCO_CASES = [
    *(
        ({"annotations": [box_object(), box_object(5, **{field: value})]}, f"annotation 5.*{named}")
        for field, value, named in FIELDS
    ),
    ({"images": [image_entry(), image_entry()]}, "image 1: "),
    *(
        ({part: [entry(value)]}, rf"{part[:-1]} number 0 .*{re.escape(repr(value))}")
        for value in (1.5, "", None, True, 2.0**70)
        for part, entry in (("images", image_entry), ("annotations", box_object))
    ),
    ({"images": [image_entry(), image_entry(1.0)]}, "image 1: "),
    ({"categories": [{"id": "1", "name": "dog"}]}, "category '1'"),
    ({"images": [image_entry(width=-3)]}, "image 1: width .*-3"),
    ({"images": []}, "images"),
    ({"annotations": None}, "annotations"),
    ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "category 18: "),
    ({"categories": CAT, "annotations": []}, ".*'person' has 3 .*'cat' has 1"),
    ({"categories": CATEGORIES[:1], "annotations": []}, ".*keypoints"),
]


@pytest.mark.parametrize(("content", "named"), COCO_CASES)
def test_content_of_coco(tmp_path, content, named):
    arguments = write_coco(tmp_path, **{"annotations": [box_object()]} | content)
    with pytest.raises(ValueError, match=rf"instances\.json.*{named}"):
        CocoDetection(*arguments, masks=True, keypoints=True)


OUTSIDE = ("/data/a.jpg", "\\data\\a.jpg", "C:\\x\\a.jpg", "C:/x/a.jpg", "..\\..\\media\\a.jpg")


@pytest.mark.parametrize("key", ["file_name", "coco_url"])
@pytest.mark.parametrize("name", [*OUTSIDE, "https://h/a.jpg", "", 5])
def test_names_of_no_file_within_the_folder(tmp_path, name, key):
    """The remedy is told. A URL is cut to a path where it is a ``coco_url``."""
    folder, path = write_coco(tmp_path, [])
    entry = {"id": 1, "width": 60, "height": 40, key: name}
    path.write_text(json.dumps({"images": [entry], "annotations": [], "categories": CATEGORIES}))
    if key == "file_name":
        message = rf"instances\.json, image 1: .*got {re.escape(repr(name))}"
        with pytest.raises(ValueError, match=message) as caught:
            CocoDetection(folder, path)
        assert "path within" in str(caught.value)
    else:
        with pytest.raises((ValueError, FileNotFoundError), match="image"):
            CocoDetection(folder, path)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\x00", b"[" * 200_000, b"[]"])
def test_files_of_another_kind(tmp_path, content):
    folder, path = write_coco(tmp_path, [])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"instances\.json: "):
        CocoDetection(folder, path)


def test_missing_files_of_coco(tmp_path):
    folder, path = write_coco(tmp_path, [], [image_entry(), image_entry(2, "x/./b.jpg")])
    assert len(CocoDetection(folder, path)) == 2
    (folder / "x/b.jpg").unlink()
    for files, named in (
        ((folder, path), r"x/b\.jpg: .*1 of 2"),
        ((tmp_path / "nowhere", path), "nowhere"),
        ((folder, tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(FileNotFoundError, match=named):
            CocoDetection(*files)


# What the devkit is made of, options and what is named.
VOC_CASES = [
    *(
        ({"xml": {"good": SIZE + DOG, "bad": xml}}, {}, rf"bad\.xml.*{named}")
        for xml, named in [
            ("<?xml version='1.0' encoding='none'?><annotation/>", "XML"),
            ("<?xml version='1.0'?><annotation><object>", "line 1"),
            (DOG + "<object><name>cat</name></object>", r"object 1 \(cat\): <bndbox>"),
            (dog(1, 2, 3, "1e999"), "<ymax> .*'1e999'"),
            (dog(1, 2, 3, 4, "<difficult>Maybe</difficult>"), "'Maybe'"),
            (dog(1, 2, 3, 4, "<difficult>2</difficult>"), "'2'"),
            (dog(1, 2, 3, ""), "<ymax> .*''"),
            ("<size><width>-4</width><height>3</height></size>", "<size>.*-4 x 3"),
            ("<size><width>4 px</width><height>3</height></size>", "width> .*'4 px'"),
            ("<?xml version='1.0'?>狗".encode("gbk"), "XML: .*utf-8.* encoding='gbk'"),
            (DOG.replace("dog", "è"), "unknown class 'è'.*dog.*UTF-8"),
            (b"<?xml version='1.0' encoding='ascii'?><a>\xe9</a>", "XML: .*ascii"),
            (b"<?xml version='1.0' encoding='utf-16'?><a></a>", "XML: .*'utf-16'"),
        ]
    ),
    ({"split": "a\nb\na"}, {}, r"trainval\.txt.*'VOC2007/a'"),
    ({"split": "a 1\na"}, {}, r"trainval\.txt.*'VOC2007/a'"),
    ({"xml": {"a": "", "a 1": ""}, "split": "a\na 1"}, {}, r"line 2: .*'a 1'.*'a 1' and 'a'"),
    ({"split": "a\nb c 1"}, {}, r"trainval\.txt.*line 2: .*'b c 1'.*none"),
    ({"split": "a -1"}, {}, r"trainval\.txt.*lists no image"),
    ({"split": "a\nb 7"}, {}, r"trainval\.txt.*line 2: .*'b 7'"),
    ({"split": "caf\udce9"}, {}, r"trainval\.txt.*UTF-8"),
    ({}, {"image_sets": ("2007", "trainval")}, "pairs of year and split"),
    ({}, {"classes": ("dog", "cat", "dog")}, "'dog'"),
    ({}, {"difficult": "ignore"}, "'ignore'"),
    ({}, {"corners": "0"}, "corners must be .*'0'"),
]


@pytest.mark.parametrize(("files", "options", "named"), VOC_CASES)
def test_content_of_voc(tmp_path, files, options, named):
    root = make_devkit(tmp_path, **{"xml": {"a": SIZE + DOG, "b": SIZE}} | files)
    with pytest.raises(ValueError, match=named):
        VOCDetection(root, **options)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_two_files_of_one_image(tmp_path, on_error):
    folder = make_devkit(tmp_path, {"a": SIZE, "x/b": SIZE, "c": SIZE}) / "VOC2007"
    for part, name in (("JPEGImages", "x/b.PNG"), ("Annotations", "c.XML")):
        (folder / part / name).touch()
        with pytest.raises(ValueError, match=rf"{part}: image '{name[:-4]}' .*{name[-5:]} and "):
            VOCDetection(tmp_path, on_error=on_error)
        (folder / part / name).unlink()
    assert len(VOCDetection(tmp_path, on_error=on_error)) == 3


def test_missing_files_of_voc(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG, "b": SIZE})
    for folder, image_set, named in (
        (tmp_path / "nowhere", ("2007", "trainval"), "nowhere"),
        (root / "VOC2007", ("2007", "trainval"), "meant"),
        (root, ("2007", "test"), "'test'.*trainval"),
        (root, ("2012", "trainval"), r"VOC2012.*VOC2007"),
    ):
        with pytest.raises(FileNotFoundError, match=named):
            VOCDetection(folder, (image_set,))
    (root / "VOC2007/JPEGImages/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: .*\.jpeg, \.png.* \(1 of 2 "):
        VOCDetection(root)
