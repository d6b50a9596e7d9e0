"""Broken data sets of both formats: an error names the file, and the entry and value in it.

Names that lead elsewhere, entities and what fills the memory are in contract/test_safety.py, files
that are not there and images of another size in contract/test_left_out.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from data_files import (
    BOX,
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
from fuzz import limits, time_limit

from detmix.data import CocoDetection, VOCDetection, read_annotation

NAN = float("nan")
SEGMENTATIONS = [
    (None, "segmentation"),
    ([*TRIANGLE, [1, 2, 3, 4, 5, 6, 7]], "polygon 1 .*7"),
    ([[1, 2, 3, 4, NAN, 6]], "polygon 0 .*nan"),
    ([[1, 2, 3, -1e9, 5, 6]], "polygon 0 .*-1000000000"),
    ([1, 2, 3, 4, 5, 6], "polygon 0 .*got 1"),
    (plain_rle(np.eye(60, 40)), r"\(60, 40\), .*40 x 60"),
    ({"size": [40, 60], "counts": [5, 7]}, "12 pixels, .*2400 pixels"),
    ({"size": [40, 60], "counts": [2401, -1]}, "counts"),
    (compressed_rle(np.eye(40, 60)) | {"counts": "\ud800"}, "RLE"),
    ({"size": [2**20, 2**20], "counts": [2**40]}, "size"),
    ({"size": [40, 60], "counts": "o" * 30 + "0"}, "RLE"),
]

CAT = [*CATEGORIES, {"id": 4, "name": "cat", "keypoints": ["nose"]}]
# Of the second annotation, whose id is 5.
ANNOTATION_FIELDS = [
    ("image_id", "1", "'1'"),
    ("bbox", [1, 2, "3", 4], "'3'"),
    ("bbox", [1, 2, 10**400, 4], ""),
    ("area", -1, "-1"),
    ("iscrowd", 2, "2"),
    *(("keypoints", [x, *POINTS[1:]], "") for x in (NAN, -1e39, 10**400)),
]
PARTS = [
    *(
        ({"annotations": [box_object(), box_object(5, **{field: value})]},
         rf"annotation 5.*{field}.*{named}")
        for field, value, named in ANNOTATION_FIELDS
    ),
    ({"images": [image_entry(), image_entry()]}, "image 1: "),
    ({"images": [image_entry(1.0)]}, r"image number 0 .*1\.0"),
    ({"images": [image_entry(width=-3)]}, "image 1: width .*-3"),
    ({"annotations": [box_object()] * 2}, "annotation 1: "),
    ({"annotations": [box_object(None)]}, "annotation number 0 .*None"),
    ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "category 18: "),
    ({"categories": [{"id": 1}]}, "category 1: .*None"),
    ({"categories": [{"id": 1, "name": "a", "keypoints": 3}]}, "category 1: keypoints .*3"),
]  # fmt: skip
OTHER_FILES = [
    b"\xff\xd8\xff\x00",
    b"[" * 200_000,
    b'[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
    b'{"images": [], "annotations": [], "categories": []}',
]

# Content of the JSON, options and what is named.
COCO_CASES = [
    *((content, {"keypoints": True}, rf"instances\.json, {named}") for content, named in PARTS),
    *(
        (
            {"annotations": [box_object(), box_object(5, segmentation=value)]}, {"masks": True},
            rf"annotation 5 of image 1 \(a\.jpg\).*{named}",
        )
        for value, named in SEGMENTATIONS
    ),
    ({"categories": CAT, "annotations": []}, {"keypoints": True}, "'person' has 3 .*'cat' has 1"),
    ({}, {"keypoints": True, "classes": ["dog"]}, r"instances\.json: .*keypoints"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "options", "named"), COCO_CASES)
def test_content_of_coco(tmp_path, content, options, named):
    arguments = write_coco(tmp_path, **{"annotations": [box_object()]} | content)
    with pytest.raises(ValueError, match=named):
        CocoDetection(*arguments, **options)


@pytest.mark.parametrize("content", OTHER_FILES)
def test_files_of_another_kind(tmp_path, content):
    folder, path = write_coco(tmp_path, [])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"instances\.json: "):
        CocoDetection(folder, path)


def test_missing_files_of_coco(tmp_path):
    folder, path = write_coco(tmp_path, [], [image_entry(), image_entry(2, "x/./b.jpg")])
    assert len(CocoDetection(folder, path)) == 2
    (folder / "x/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"x/b\.jpg: .*1 of 2"):
        CocoDetection(folder, path)
    for files in ((tmp_path / "nowhere", path), (folder, tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            CocoDetection(*files)
    with pytest.raises(ValueError, match="images: is a folder"):
        CocoDetection(folder, folder)


ANNOTATIONS = [
    ("<?xml version='1.0'?><annotation><object>", "line 1"),
    ("<?xml version='1.0' encoding='none'?><annotation/>", "XML"),
    (f"<object>{BOX}</object>", "object 0: <name>"),
    (DOG + "<object><name>cat</name></object>", r"object 1 \(cat\): <bndbox>"),
    (f"<object><name>cat</name>{BOX.replace('xmax', 'x')}</object>", r"object 0 \(cat\): <xmax>"),
    (dog(1, 2, 3, "1e999"), "<ymax> .*'1e999'"),
    (dog(1, 2, 3, 4, "<difficult>maybe</difficult>"), "'maybe'"),
    ("<size><width>-4</width><height>3</height></size>", "<size>.*-4 x 3"),
    ("<size><width>1e300</width><height>3</height></size>", "<size>.*300"),
]
# What the devkit is made of, options and what is named.
VOC_CASES = [
    *(
        ({"xml": {"good": SIZE + DOG, "bad": xml}}, {}, rf"bad\.xml.*{named}")
        for xml, named in ANNOTATIONS
    ),
    ({"split": "a\nb\na"}, {}, r"trainval\.txt.*'VOC2007/a'"),
    ({"split": "a -1"}, {}, r"trainval\.txt.*lists no image"),
    ({"split": "a\nb 7"}, {}, r"trainval\.txt.*line 2: .*'b 7'"),
    ({"split": "a b c"}, {}, r"trainval\.txt.*line 1: .*'a b c'"),
    ({"split": "caf\udce9"}, {}, r"trainval\.txt.*UTF-8"),
    ({}, {"image_sets": ("2007", "trainval")}, "pairs of year and split"),
    ({}, {"image_sets": (("2007", "trainval"),) * 2}, "'VOC2007/a'"),
    ({}, {"classes": ("dog", "cat", "dog")}, "'dog'"),
    ({}, {"difficult": "ignore"}, "'ignore'"),
]


@pytest.mark.parametrize(("files", "options", "named"), VOC_CASES)
def test_content_of_voc(tmp_path, files, options, named):
    root = make_devkit(tmp_path, **{"xml": {"a": SIZE + DOG, "b": SIZE}} | files)
    with pytest.raises(ValueError, match=named):
        VOCDetection(root, **options)


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


def test_deep_nesting_does_not_exhaust_the_stack(tmp_path):
    inner = "<a>" * 200_000 + "</a>" * 200_000
    path = make_devkit(tmp_path, {"a": SIZE + inner + DOG}) / "VOC2007/Annotations/a.xml"
    with limits(), time_limit():
        assert len(read_annotation(path).objects) == 1
