"""Reading data in the COCO format: against pycocotools and hand-made files."""

from __future__ import annotations

import json
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from data_files import (
    CATEGORIES,
    box_object,
    compressed_rle,
    image_entry,
    plain_rle,
    write_coco,
)
from PIL import Image
from pycocotools.coco import COCO

from detmix.data import CocoDetection


@pytest.fixture(scope="module")
def random_files(tmp_path_factory):
    """Images with random objects: one or two polygons, crowds as RLE; the last has none."""
    rng = np.random.default_rng(3)
    annotations = []
    image_ids = rng.permutation(1000)[:12].tolist()
    for number in range(60):
        x, y = rng.uniform(0, 40), rng.uniform(0, 25)
        width, height = rng.uniform(2, 60 - x), rng.uniform(2, 40 - y)
        item = box_object(
            annotation_id=int(500 - number),
            image_id=image_ids[int(rng.integers(11))],
            category_id=int(rng.choice([1, 3, 18, 90])),
            bbox=(np.floor(np.multiply([x, y, width, height], 100)) / 100).tolist(),
            area=round(width * height / 2, 3),
        )
        corners = rng.uniform(0, 1, (int(rng.integers(1, 3)), 6, 2)) * (width, height) + (x, y)
        item["segmentation"] = [np.round(c, 2).ravel().tolist() for c in corners]
        if item["category_id"] == 1 and number % 3:
            item["keypoints"] = [round(x, 2), round(y, 2), 2, 7, number, 1, 0, 0, 0]
        if number % 6 == 0:
            mask = rng.random((40, 60)) < number / 60
            encode = compressed_rle if number % 4 else plain_rle
            item |= {"iscrowd": 1, "segmentation": encode(mask)}
        annotations.append(item)
    images = [image_entry(image_id, f"{image_id:012d}.jpg") for image_id in image_ids]
    return write_coco(tmp_path_factory.mktemp("coco"), annotations, images)


@pytest.mark.filterwarnings("error::UserWarning")
def test_everything_equals_pycocotools(random_files, capsys):
    folder, path = random_files
    dataset = pickle.loads(pickle.dumps(CocoDetection(folder, path, masks=True, keypoints=True)))
    oracle = COCO(str(path))
    assert dataset.image_ids == sorted(oracle.getImgIds())
    assert list(dataset.category_ids) == sorted(oracle.getCatIds())
    assert dataset.classes == tuple(oracle.cats[i]["name"] for i in dataset.category_ids)
    assert dataset.report.num_objects == len(oracle.getAnnIds()) == 60
    assert dataset.keypoint_names == ("nose", "left_eye", "right_eye")
    for index, image_id in enumerate(dataset.image_ids):
        assert dataset.index_of(image_id) == index
        image, target = dataset[index]
        items = oracle.loadAnns(oracle.getAnnIds(imgIds=[image_id]))
        assert dataset.names[index] == oracle.imgs[image_id]["file_name"]
        assert dataset.image_path(index) == folder / dataset.names[index]
        photo = np.asarray(Image.open(folder / dataset.names[index])).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - photo).max() <= 2
        boxes = np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ids = [dataset.category_ids.index(item["category_id"]) + 1 for item in items]
        masks = [oracle.annToMask(item) for item in items]
        keypoints = [item.get("keypoints", [0] * 9) for item in items]
        expected = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(ids, dtype=torch.int64),
            "iscrowd": torch.tensor([item["iscrowd"] for item in items], dtype=torch.int64),
            "area": torch.tensor([item["area"] for item in items], dtype=torch.float32),
            "keypoints": torch.tensor(keypoints, dtype=torch.float32).reshape(-1, 3, 3),
            "masks": torch.tensor(np.array(masks, np.uint8).reshape(-1, 40, 60)),
        }
        assert target.pop("image_id") == image_id
        assert target.keys() == expected.keys()
        for key, value in expected.items():
            assert (target[key].dtype, target[key].shape) == (value.dtype, value.shape)
            assert torch.equal(target[key], value)
            target[key].fill_(77)  # a copy
            assert torch.equal(dataset.target(index)[key], value)
    bare = CocoDetection(folder, path).target(-1)
    assert bare.keys() == {*expected, "image_id"} - {"masks", "keypoints"}
    for missing in (-1, 1001):
        with pytest.raises(ValueError, match=rf"has the id {missing}"):
            dataset.index_of(missing)
    with pytest.raises(IndexError, match="index 12 is out of range for 12"):
        dataset[12]


def test_outlines_are_bounded(tmp_path):
    """pycocotools keeps every fifth of a pixel of every edge: 2 GB for 20 points far apart."""
    polygon = [0, 0, 4e5, 0, 4e5, 2e5]  # by hand: 4e5 + 2e5 + 4e5
    arguments = write_coco(tmp_path, [box_object(segmentation=[polygon])])
    assert len(CocoDetection(*arguments, masks=True)) == 1
    arguments = write_coco(tmp_path, [box_object(segmentation=[[0, 0, 4e5 + 1, 0, 4e5 + 1, 2e5]])])
    with pytest.raises(ValueError, match="1000002 pixels"):
        CocoDetection(*arguments, masks=True)


def test_crowds_and_empty_images_can_be_dropped(tmp_path):
    crowds = [box_object(2, 1, iscrowd=1), box_object(3, 2, iscrowd=1)]
    annotations = [box_object(1, 1), *crowds, box_object(4, 4)]
    images = [image_entry(i, f"{i}.jpg") for i in (4, 3, 2, 1)]
    arguments = write_coco(tmp_path, annotations, images)
    for options, objects, *counts in (
        ({}, {1: 2, 2: 1, 3: 0, 4: 1}, 2, 0, 0, 1),
        ({"crowd": "drop"}, {1: 1, 2: 0, 3: 0, 4: 1}, 0, 2, 0, 2),
        ({"empty": "drop"}, {1: 2, 2: 1, 4: 1}, 2, 0, 1, 0),
        ({"crowd": "drop", "empty": "drop"}, {1: 1, 4: 1}, 0, 2, 2, 0),
    ):
        dataset = CocoDetection(*arguments, **options)
        found = {t["image_id"]: len(t["boxes"]) for t in map(dataset.target, range(len(dataset)))}
        assert found == objects
        report = dataset.report
        assert (report.num_images, report.num_objects) == (len(objects), sum(objects.values()))
        assert counts == [report.num_crowd, report.num_crowd_dropped, report.num_images_dropped,
                          report.num_empty_images]  # fmt: skip
    (tmp_path / "images" / "3.jpg").unlink()
    assert CocoDetection(*arguments, **options).image_ids == [1, 4]  # the missing one is left out
    with pytest.raises(ValueError, match=r"instances\.json: no image has an object left"):
        CocoDetection(*write_coco(tmp_path, crowds, images), **options)
    with pytest.raises(ValueError, match=r"crowd.*True"):
        CocoDetection(*arguments, crowd=True)


def test_classes_choose_and_order_the_labels(tmp_path):
    annotations = [box_object(k, category_id=c) for k, c in enumerate((1, 3, 18, 90, 3), 1)]
    annotations[0]["segmentation"] = [[1, 2, 3]]  # broken, but not read
    arguments = write_coco(tmp_path, annotations)
    dataset = CocoDetection(
        *arguments, classes=["dog", "car"], masks=True, transforms=lambda i, t: (i / 255, t)
    )
    image, target = dataset[0]
    assert image.max() <= 1
    assert target["labels"].tolist() == [2, 1, 2]
    assert dataset.classes == ("dog", "car")
    assert dataset.category_ids == (18, 3)
    for classes, named in ((["dog", "cow"], "'cow'"), ("dog", "classes"), (["dog"] * 2, "classes")):
        with pytest.raises(ValueError, match=named):
            CocoDetection(*arguments, classes=classes)


# The categories of the objects; classes with their ids, and labels. Two that both have objects are
# two classes, as pycocotools scores them, under the names that `score_predictions` gives them.
ONE = {"person": 1, "dog": 18, "toothbrush": 90, "car": 91}
BOTH = {"dog (0)": 0, "person": 1, "dog (18)": 18, "toothbrush": 90, "car": 91}


@pytest.mark.parametrize(
    ("used", "classes", "labels"),
    # Without an object of any, as in a small split, the class stays where it is elsewhere.
    [
        ((18, 91, 18), ONE, [2, 4, 2]),
        ((), ONE, []),
        ((0, 91), ONE | {"dog": 0}, [1, 4]),
        ((18, 91, 0), BOTH, [3, 5, 1]),
    ],
)
def test_categories_of_one_name(tmp_path, used, classes, labels):
    """As Roboflow exports: a super-category with id 0, named like one of the classes."""
    categories = [{"id": 0, "name": "dog"}, *CATEGORIES, {"id": 91, "name": "car"}]
    annotations = [box_object(k, category_id=c) for k, c in enumerate(used, 1)]
    arguments = write_coco(tmp_path, annotations, categories=categories)
    with warnings.catch_warnings(record=True) as caught:
        dataset = CocoDetection(*arguments)
    assert [warning.filename for warning in caught] == [__file__] * (classes is BOTH)
    assert all("s.json" in str(w.message) and "dog (0), dog (18)" in str(w.message) for w in caught)
    # The same classes of another split, in which one of the two has no object.
    split = write_coco(tmp_path / "val", annotations[:1], categories=categories)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = [CocoDetection(*f, classes=dataset.classes) for f in (arguments, split)]
    for data, found in zip((dataset, *chosen), (labels, labels, labels[:1]), strict=True):
        assert dict(zip(data.classes, data.category_ids, strict=True)) == classes
        assert data.target(0)["labels"].tolist() == found
    with pytest.raises(ValueError, match=r"twice.*'car', 'car \(91\)'"):
        CocoDetection(*arguments, classes=["car", "car (91)"])
    if classes is BOTH:
        with pytest.raises(ValueError, match=r"'dog'; known are .*dog \(18\)"):
            CocoDetection(*arguments, classes=["dog"])


# As files are written by pandas, by exports that take names for ids, by both; in their order.
IDS = {
    "floats": ([20.0, 7.0, 9], [7, 9, 20]),
    "digits": (["000042", "7", "000005"], ["000005", "000042", "7"]),
    "names": (["img_2", "img_10", "ä"], ["img_10", "img_2", "ä"]),
    "both": (["1", 1, -5.0], [-5, 1, "1"]),
}


@pytest.mark.parametrize(("ids", "image_ids"), IDS.values(), ids=IDS)
def test_ids_of_images(tmp_path, ids, image_ids):
    images = [image_entry(image_id, f"{k}.jpg") for k, image_id in enumerate(ids)]
    annotations = [box_object(f"#{k}", image_id, 3.0) for k, image_id in enumerate(ids)]
    annotations += [box_object(77.0, ids[1], 18)]
    categories = [entry | {"id": float(entry["id"])} for entry in CATEGORIES]
    arguments = write_coco(tmp_path, annotations, images, categories)
    dataset = CocoDetection(*arguments)
    assert repr(dataset.image_ids) == repr(image_ids)  # 1.0 and 1 are equal
    assert repr(dataset.category_ids) == "(1, 3, 18, 90)"
    for index, image_id in enumerate(image_ids):
        target = dataset.target(index)
        assert target["image_id"] == image_id
        assert dataset.names[index] == f"{ids.index(image_id)}.jpg"
        assert target["labels"].tolist() == [2, 3][: 1 + (image_id == ids[1])]
        assert dataset.index_of(image_id) == index
    with pytest.raises(ValueError, match=r"has the id '42'"):
        dataset.index_of("42")


@pytest.mark.filterwarnings("ignore:.*LVIS")
def test_names_as_windows_and_lvis_write_them(tmp_path):
    """A file whose very name has a backslash, as some programs unpack archives, is read too."""
    url = "http://images.cocodataset.org/train2017/b.png"
    entries = [
        image_entry(1, "images\\sub\\a.png"),
        image_entry(2, "images\\b.png"),
        {"id": 3, "coco_url": url, "neg_category_ids": [1], "not_exhaustive_category_ids": []},
        image_entry(4, "c.png", coco_url=url),
    ]
    folder, path = write_coco(tmp_path, [])
    content = {"images": entries, "annotations": [], "categories": CATEGORIES}
    path.write_text(json.dumps(content))
    there = ["images/sub/a.png", "images\\b.png", "train2017/b.png", "c.png"]
    for number, name in enumerate(there):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (number, 0, 0)).save(folder / name)
    with pytest.warns(UserWarning, match=r"s\.json.*LVIS") as caught:
        dataset = CocoDetection(folder, path)
    assert [warning.filename for warning in caught] == [__file__]
    assert dataset.names == there
    assert [int(image[0].max()) for image, _ in dataset] == [0, 1, 2, 3]
    (folder / there[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"sub/a\.png"):
        CocoDetection(folder, path)


def test_boxes_are_clipped_and_those_without_area_dropped_or_all_kept(tmp_path):
    # As written, clipped if anything is left, and kept.
    boxes = {
        21: ([-5, -5, 20, 20], [0, 0, 15, 15], [-5, -5, 15, 15]),
        # beyond by less than float32 can tell
        22: ([50, 30, 10.000001, 10.000001], [50, 30, 60, 40], [50, 30, 60, 40]),
        23: ([10, 10, 0, 5], None, [10, 10, 10, 15]),
        24: ([10, 10, 5, -5], None, [10, 10, 15, 10]),
        25: ([60, 10, 5, 5], None, [60, 10, 65, 15]),  # outside
        26: ([10, 10, 1e-7, 5], None, [10, 10, 10, 15]),  # float32 has no such width here
        27: ([0, 0, 1e300, 40], [0, 0, 60, 40], None),
    }
    annotations = [box_object(number, bbox=box) for number, (box, *_) in boxes.items()]
    arguments = write_coco(tmp_path, annotations)
    with pytest.warns(UserWarning, match="boxes were clipped") as caught:
        dataset = CocoDetection(*arguments, masks=True)
    assert [warning.filename for warning in caught] == [__file__]
    for told in ("2 of 7", "annotation 21 of image 1", "4 of 7", "annotation 23 of image 1"):
        assert told in str(caught[0].message)
    target = dataset[0][1]
    assert target["boxes"].tolist() == [clipped for _, clipped, _ in boxes.values() if clipped]
    assert {len(column) for key, column in target.items() if key != "image_id"} == {3}
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (3, 2, 4)
    with pytest.raises(ValueError, match=r"annotation 27 of .*1e\+300"):
        CocoDetection(*arguments, clip=False)
    annotations[3] |= {"area": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dataset = CocoDetection(*write_coco(tmp_path, annotations[:-1]), clip=False, masks=True)
    target, report = dataset[0][1], dataset.report
    assert target["boxes"].tolist() == [kept for *_, kept in boxes.values() if kept]
    assert target["area"].tolist() == [100.5] * 3 + [0] + [100.5] * 2
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (6, 0, 0)


def test_sizes_come_from_the_file_or_else_from_the_image(tmp_path):
    entries = [{"id": 1, "file_name": "a.png"}, image_entry(2, "b.png", height=0)]
    folder, path = write_coco(tmp_path, [box_object()], entries)
    assert [CocoDetection(folder, path).image_size(i) for i in range(2)] == [(40, 60)] * 2
    path.write_text(path.read_text(), encoding="utf-8-sig")  # with a byte order mark
    (folder / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"b\.png"):
        CocoDetection(folder, path)
    folder, path = write_coco(tmp_path, [box_object()])
    dataset = CocoDetection(folder, path)
    for orientation in (6, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 60)).save(folder / "a.jpg", exif=exif)
        with pytest.raises(
            ValueError, match=r"a\.jpg: .* 40 x 60 .*s\.json says 60 x 40"
        ) as caught:
            dataset[0]
        assert ("EXIF" in str(caught.value)) == (orientation == 6)
    (folder / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"sample 0: .*a\.jpg"):
        dataset[0]
    assert len(dataset.target(0)["boxes"]) == 1  # needs no image


def test_keypoints_that_change_places_in_a_mirrored_image(tmp_path):
    # The order that torchvision's reference training code writes out for its flip.
    parts = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    person = ["nose", *(f"{side}_{part}" for part in parts for side in ("left", "right"))]
    reference = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    others = ["Right wing", "bright", "left_only", "Left wing"]
    for names, expected in ((person, reference), (others, (3, 1, 2, 0))):
        categories = [{"id": 1, "name": "a", "keypoints": names}]
        dataset = CocoDetection(*write_coco(tmp_path, [], categories=categories), keypoints=True)
        assert dataset.keypoint_flip == expected


def test_pickled_it_is_hardly_larger_than_the_numbers(tmp_path):
    """Python objects would cost a multiple of the numbers; workers would copy them all."""
    rng = random.Random(0)
    outlines = [[[rng.uniform(0, 40) for _ in range(40)]] for _ in range(2000)]
    annotations = [box_object(k, segmentation=outline) for k, outline in enumerate(outlines)]
    dataset = CocoDetection(*write_coco(tmp_path, annotations), masks=True)
    numbers = 2000 * (40 * 8 + 4 * 4 + 8 + 8 + 4 + 8)
    assert len(pickle.dumps(dataset)) < 1.05 * numbers + 4000
