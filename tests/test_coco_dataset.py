"""Reading data in the COCO format: against pycocotools, torchvision and hand-made files."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision.datasets import wrap_dataset_for_transforms_v2

from detmix.data import CocoDetection
from detmix.data.coco.masks import SegmentationBlock, pack_segmentation
from detmix.data.coco.table import mirrored_order

CATEGORIES = [
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"]},
    {"id": 90, "name": "toothbrush"},
    {"id": 3, "name": "car"},
]
NAMES = ("person", "car", "dog", "toothbrush")  # by their ids
TRIANGLE = [[11.0, 6.0, 30.0, 6.5, 12.5, 20.25]]
POINTS = [12, 7, 2, 15.5, 8, 1, 0, 0, 0]


def box_object(annotation_id=1, image_id=1, category_id=1, bbox=(11, 6, 19.5, 14.25), **fields):
    fields = {"iscrowd": 0, "area": 100.5, "segmentation": TRIANGLE} | fields
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        **fields,
    }


def image_entry(image_id=1, name="a.jpg", **fields):
    return {"id": image_id, "file_name": name, "width": 60, "height": 40, **fields}


def write_coco(root: Path, annotations, images=None, categories=CATEGORIES, files=None, **fields):
    """Write the JSON and 60 x 40 images; return the arguments that a data set takes."""
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    images = [image_entry()] if images is None else images
    names = [entry["file_name"] for entry in images] if files is None else files
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(folder / name)
    path = root / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content | fields))
    return folder, path


def random_file(root: Path, num_images: int = 12):
    """Write images with random objects: one or two polygons, crowds as RLE of both kinds."""
    rng = np.random.default_rng(3)
    annotations = []
    image_ids = rng.permutation(1000)[:num_images].tolist()
    for number in range(60):
        x, y = rng.uniform(0, 40), rng.uniform(0, 25)
        width, height = rng.uniform(2, 60 - x), rng.uniform(2, 40 - y)
        item = box_object(
            annotation_id=int(500 - number),
            image_id=image_ids[int(rng.integers(num_images - 1))],  # the last has none
            category_id=int(rng.choice([1, 3, 18, 90])),
            bbox=np.round([x, y, width, height], 2).tolist(),
        )
        corners = rng.uniform(0, 1, (int(rng.integers(1, 3)), 6, 2)) * (width, height) + (x, y)
        item["segmentation"] = [np.round(c, 2).ravel().tolist() for c in corners]
        if number % 6 == 0:
            mask = rng.random((40, 60)) < 0.3
            item |= {"iscrowd": 1, "segmentation": plain_rle(mask)}
        item["area"] = round(width * height / 2, 3)
        annotations.append(item)
    images = [image_entry(image_id, f"{image_id:012d}.jpg") for image_id in image_ids]
    return write_coco(root, annotations, images)


def plain_rle(mask) -> dict:
    """Return an uncompressed RLE, made the slow way."""
    counts, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed_rle(mask) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_sample_follows_the_contract(tmp_path):
    person = box_object(keypoints=POINTS, num_keypoints=2)
    crowd = box_object(2, category_id=90, iscrowd=1, bbox=[0, 0, 60, 40])
    del crowd["area"]
    images = [image_entry(7, "b.jpg"), image_entry()]
    dataset = CocoDetection(
        *write_coco(tmp_path, [crowd, person], images), masks=True, keypoints=True
    )
    image, target = dataset[0]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 40, 60))
    shapes = {key: (v.dtype, tuple(v.shape)) for key, v in target.items() if key != "image_id"}
    assert shapes == {
        "boxes": (torch.float32, (2, 4)),
        "labels": (torch.int64, (2,)),
        "iscrowd": (torch.int64, (2,)),
        "area": (torch.float32, (2,)),
        "masks": (torch.uint8, (2, 40, 60)),
        "keypoints": (torch.float32, (2, 3, 3)),
    }
    assert target["boxes"].tolist() == [[0, 0, 60, 40], [11, 6, 30.5, 20.25]]
    assert target["labels"].tolist() == [4, 1]
    assert target["iscrowd"].tolist() == [1, 0]
    assert target["area"].tolist() == [2400.0, 100.5]
    assert target["keypoints"][0].eq(0).all()
    assert target["keypoints"][1].ravel().tolist() == POINTS
    assert (target["image_id"], type(target["image_id"])) == (1, int)
    empty = dataset[-1][1]
    assert {key: tuple(v.shape) for key, v in empty.items() if key != "image_id"} == {
        key: (0, *shape[1:]) for key, (_, shape) in shapes.items()
    }
    assert {key: v.dtype for key, v in empty.items() if key != "image_id"} == {
        key: dtype for key, (dtype, _) in shapes.items()
    }
    assert dataset.classes == NAMES
    assert dataset.category_ids == (1, 3, 18, 90)
    assert dataset.image_ids == [1, 7]
    assert dataset.names == ["a.jpg", "b.jpg"]
    assert dataset.image_path(1) == tmp_path / "images" / "b.jpg"
    assert dataset.image_size(1) == (40, 60)
    assert dataset.keypoint_names == ("nose", "left_eye", "right_eye")
    assert dataset.keypoint_flip == (0, 2, 1)
    with pytest.raises(IndexError, match="index 2 is out of range for 2 images"):
        dataset[2]


def test_without_masks_and_keypoints_there_are_none(tmp_path):
    dataset = CocoDetection(*write_coco(tmp_path, [box_object(keypoints=POINTS)]))
    assert set(dataset[0][1]) == {"boxes", "labels", "iscrowd", "area", "image_id"}
    assert dataset.keypoint_names == dataset.keypoint_flip == ()


def test_everything_equals_pycocotools(tmp_path, capsys):
    folder, path = random_file(tmp_path)
    dataset = CocoDetection(folder, path, masks=True)
    oracle = COCO(str(path))
    assert dataset.image_ids == sorted(oracle.getImgIds())
    assert list(dataset.category_ids) == sorted(oracle.getCatIds())
    assert dataset.report.num_objects == len(oracle.getAnnIds()) == 60
    for index, image_id in enumerate(dataset.image_ids):
        target = dataset.target(index)
        items = oracle.loadAnns(oracle.getAnnIds(imgIds=[image_id]))
        assert target["image_id"] == image_id
        assert dataset.names[index] == oracle.imgs[image_id]["file_name"]
        ids = [dataset.category_ids[label - 1] for label in target["labels"]]
        assert ids == [item["category_id"] for item in items]
        names = [oracle.cats[item["category_id"]]["name"] for item in items]
        assert [dataset.classes[label - 1] for label in target["labels"]] == names
        boxes = np.array([item["bbox"] for item in items]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(target["boxes"].numpy(), boxes.astype(np.float32))
        assert target["iscrowd"].tolist() == [item["iscrowd"] for item in items]
        area = torch.tensor([item["area"] for item in items], dtype=torch.float32)
        assert torch.equal(target["area"], area)
        masks = [oracle.annToMask(item) for item in items]
        assert np.array_equal(target["masks"].numpy(), np.array(masks).reshape(-1, 40, 60))
        assert target["masks"].is_contiguous()


def test_everything_equals_torchvisions_wrapper(tmp_path, capsys):
    folder, path = random_file(tmp_path)
    dataset = CocoDetection(folder, path, masks=True)
    reader = torchvision.datasets.CocoDetection(str(folder), str(path))
    wrapped = wrap_dataset_for_transforms_v2(
        reader, target_keys=("boxes", "labels", "masks", "iscrowd", "area", "image_id")
    )
    assert len(dataset) == len(wrapped)
    to_label = {category_id: k for k, category_id in enumerate(dataset.category_ids, 1)}
    for index in range(len(dataset)):
        image, target = dataset[index]
        photo, expected = wrapped[index]
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(photo).astype(int)).max() <= 2
        assert target["image_id"] == expected["image_id"]
        if "boxes" not in expected:  # torchvision gives an image without objects nothing else
            assert len(target["boxes"]) == 0
            continue
        # torchvision adds the width in float32
        torch.testing.assert_close(target["boxes"], expected["boxes"].as_subclass(torch.Tensor))
        assert target["labels"].tolist() == [to_label[k] for k in expected["labels"].tolist()]
        assert torch.equal(target["masks"], expected["masks"].as_subclass(torch.Tensor))
        assert target["iscrowd"].tolist() == list(expected["iscrowd"])
        torch.testing.assert_close(target["area"], torch.tensor(expected["area"]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3), st.randoms(), st.floats(0, 1))
def test_masks_survive_packing(height, width, num, rng, share):
    masks = np.array([rng.random() < share for _ in range(num * height * width)], dtype=np.uint8)
    masks = masks.reshape(num, height, width)
    packed = [
        pack_segmentation(plain_rle(mask) if rng.random() < 0.5 else compressed_rle(mask))
        for mask in masks
    ]
    block = SegmentationBlock(packed)
    assert np.array_equal(block.decode(0, num, (height, width)).numpy(), masks)
    first = rng.randint(0, num)
    assert np.array_equal(block.decode(first, num, (height, width)).numpy(), masks[first:])


def test_a_polygon_of_two_points_counts_for_nothing(tmp_path):
    both = box_object(2, segmentation=[[1, 1, 9, 9], *TRIANGLE])
    target = CocoDetection(*write_coco(tmp_path, [box_object(), both]), masks=True).target(0)
    assert target["masks"].sum() > 100
    assert torch.equal(target["masks"][0], target["masks"][1])


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_images_of_all_kinds_become_rgb(tmp_path, mode):
    name = "a.jpg" if mode in ("L", "CMYK") else "deep/er/a.png"
    folder, path = write_coco(tmp_path, [box_object()], [image_entry(name=name)])
    noise = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(folder / name)
    image = CocoDetection(folder, path)[0][0]
    expected = np.asarray(Image.open(folder / name).convert("RGB")).astype(int)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 2


def test_exif_orientation_is_not_applied(tmp_path):
    folder, path = write_coco(tmp_path, [box_object()])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    Image.open(folder / "a.jpg").copy().save(folder / "a.jpg", exif=exif)
    assert CocoDetection(folder, path)[0][0].shape == (3, 40, 60)


def test_crowds_and_empty_images_can_be_dropped(tmp_path):
    annotations = [
        box_object(1, 1),
        box_object(2, 1, iscrowd=1),
        box_object(3, 2, iscrowd=1),
        box_object(4, 4, category_id=3, bbox=[1, 2, 3, 4]),
    ]
    images = [image_entry(i, f"{i}.jpg") for i in (4, 3, 2, 1)]
    arguments = write_coco(tmp_path, annotations, images)
    kept = CocoDetection(*arguments)
    assert (kept.report.num_images, kept.report.num_objects, kept.report.num_crowd) == (4, 4, 2)
    assert (kept.report.num_empty_images, kept.report.num_crowd_dropped) == (1, 0)
    no_crowd = CocoDetection(*arguments, crowd="drop")
    assert [len(no_crowd.target(i)["boxes"]) for i in range(4)] == [1, 0, 0, 1]
    report = no_crowd.report
    assert (report.num_objects, report.num_crowd, report.num_crowd_dropped) == (2, 0, 2)
    filled = CocoDetection(*arguments, crowd="drop", empty="drop", masks=True)
    assert filled.image_ids == [1, 4]
    assert filled.names == ["1.jpg", "4.jpg"]
    assert filled[1][1]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert filled[1][1]["labels"].tolist() == [2]
    assert (filled.report.num_images, filled.report.num_images_dropped) == (2, 2)
    assert filled.report.num_empty_images == 0
    assert CocoDetection(*arguments, empty="drop").image_ids == [1, 2, 4]
    for name in ("crowd", "empty"):
        with pytest.raises(ValueError, match=rf'{name} must be "keep" or "drop", got True'):
            CocoDetection(*arguments, **{name: True})


def test_no_image_left_is_an_error(tmp_path):
    arguments = write_coco(tmp_path, [box_object(iscrowd=1)])
    with pytest.raises(ValueError, match=r"instances\.json: no image has an object left"):
        CocoDetection(*arguments, crowd="drop", empty="drop")


def test_index_of_is_the_inverse_of_image_ids(tmp_path):
    dataset = CocoDetection(*random_file(tmp_path))
    assert [dataset.index_of(i) for i in dataset.image_ids] == list(range(len(dataset)))
    for missing in (-1, 1001, next(i for i in range(1000) if i not in dataset.image_ids)):
        with pytest.raises(ValueError, match=rf"has the id {missing}"):
            dataset.index_of(missing)


def test_classes_choose_and_order_the_labels(tmp_path):
    annotations = [box_object(k, category_id=c) for k, c in enumerate((1, 3, 18, 90, 3), 1)]
    annotations[0]["segmentation"] = [[1, 2, 3]]  # broken, but not read
    arguments = write_coco(tmp_path, annotations)
    dataset = CocoDetection(*arguments, classes=["dog", "car"], masks=True)
    assert dataset.target(0)["labels"].tolist() == [2, 1, 2]
    assert dataset.classes == ("dog", "car")
    assert dataset.category_ids == (18, 3)
    with pytest.raises(ValueError, match=r"no category 'cow'; known are person, car, dog, tooth"):
        CocoDetection(*arguments, classes=["dog", "cow"])
    for classes in ((), "dog", ("dog", "dog")):
        with pytest.raises(ValueError, match="sequence of different names"):
            CocoDetection(*arguments, classes=classes)


def test_of_categories_of_one_name_the_one_with_objects_counts(tmp_path):
    # As Roboflow exports: a super-category with id 0, named like one of the classes.
    categories = [{"id": 0, "name": "dog"}, *CATEGORIES, {"id": 91, "name": "car"}]
    annotations = [box_object(k, category_id=c) for k, c in enumerate((18, 91, 18), 1)]
    arguments = write_coco(tmp_path, annotations, categories=categories)
    dataset = CocoDetection(*arguments)
    assert (dataset.classes, dataset.category_ids) == (
        ("person", "dog", "toothbrush", "car"),
        (1, 18, 90, 91),
    )
    assert dataset.target(0)["labels"].tolist() == [2, 4, 2]
    chosen = CocoDetection(*arguments, classes=["car", "dog"])
    assert chosen.category_ids == (91, 18)
    assert chosen.target(0)["labels"].tolist() == [2, 1, 2]
    # Without an object of any, as in a small split, the class stays where it is elsewhere.
    empty = CocoDetection(*write_coco(tmp_path, [], categories=categories))
    assert (empty.classes, empty.category_ids) == (dataset.classes, dataset.category_ids)
    both = [*annotations, box_object(9, category_id=0)]
    arguments = write_coco(tmp_path, both, categories=categories)
    with pytest.raises(ValueError, match=r"s\.json: the categories 0 and 18 are all named 'dog'"):
        CocoDetection(*arguments)
    assert CocoDetection(*arguments, classes=["car"]).target(0)["labels"].tolist() == [1]


def test_unclipped_boxes_are_the_files(tmp_path):
    boxes = [[-5, -5, 20, 20], [10, 10, 0, 5], [70, 10, 5, 5], [10, 10, 5, 5], [10, 10, 5, -5]]
    annotations = [box_object(number, bbox=box) for number, box in enumerate(boxes)]
    del annotations[4]["area"]
    arguments = write_coco(tmp_path, annotations)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = CocoDetection(*arguments, clip=False, masks=True)
    target = dataset[0][1]
    expected = [[-5, -5, 15, 15], [10, 10, 10, 15], [70, 10, 75, 15], [10, 10, 15, 15]]
    assert target["boxes"].tolist() == [*expected, [10, 10, 15, 10]]
    assert target["area"].tolist() == [100.5] * 4 + [0]
    assert {len(column) for key, column in target.items() if key != "image_id"} == {5}
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (5, 0, 0)
    arguments = write_coco(tmp_path, [box_object(), box_object(7, bbox=[0, 0, 1e300, 40])])
    with pytest.raises(ValueError, match=r"annotation 7 of .*1e\+300.* too large for float32"):
        CocoDetection(*arguments, clip=False)


def test_boxes_are_clipped_and_those_without_area_dropped(tmp_path):
    boxes = {
        21: [-5, -5, 20, 20],  # clipped
        22: [50, 30, 10.000001, 10.000001],  # beyond by less than float32 can tell
        23: [10, 10, 0, 5],
        24: [10, 10, 5, -5],
        25: [60, 10, 5, 5],  # outside
        26: [10, 10, 1e-7, 5],  # float32 has no such width here
        27: [0, 0, 1e300, 40],
    }
    annotations = [box_object(number, bbox=box) for number, box in boxes.items()]
    arguments = write_coco(tmp_path, annotations)
    with pytest.warns(UserWarning, match="boxes were clipped") as caught:
        dataset = CocoDetection(*arguments, masks=True)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "2 of 7 boxes were clipped" in message
    assert "annotation 21 of image 1 (a.jpg), bbox = -5, -5, 20, 20 in 60 x 40" in message
    assert "4 of 7 boxes were dropped" in message
    assert "annotation 23 of image 1 (a.jpg), bbox = 10, 10, 0, 5 in" in message
    assert caught[0].filename == __file__
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[0, 0, 15, 15], [50, 30, 60, 40], [0, 0, 60, 40]]
    assert {len(column) for key, column in target.items() if key != "image_id"} == {3}
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (3, 2, 4)


def test_good_boxes_bring_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoDetection(*write_coco(tmp_path, [box_object(bbox=[0, 0, 60, 40])]))


def test_missing_sizes_are_read_from_the_image(tmp_path):
    entries = [
        {"id": 1, "file_name": "a.png"},
        image_entry(2, "b.png", height=0),
        image_entry(3, "c.png", width=None),
    ]
    folder, path = write_coco(tmp_path, [box_object()], entries)
    assert [CocoDetection(folder, path).image_size(i) for i in range(3)] == [(40, 60)] * 3
    (folder / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"b\.png: the image's size cannot be read"):
        CocoDetection(folder, path)
    (folder / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png: there is no such file"):
        CocoDetection(folder, path)


def test_wrong_images_are_named_on_access(tmp_path):
    folder, path = write_coco(tmp_path, [box_object()])
    dataset = CocoDetection(folder, path)
    Image.new("RGB", (40, 60)).save(folder / "a.jpg")
    swapped = r"a\.jpg: the image is 40 x 60 .*s\.json says 60 x 40; .* EXIF orientation, .* not"
    with pytest.raises(ValueError, match=swapped):
        dataset[0]
    Image.new("RGB", (40, 61)).save(folder / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: the image is 40 x 61 .*s\.json says 60 x 40$"):
        dataset[0]
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sample 0: .*a\.jpg: not an image: the file is empty"):
        dataset[0]
    (folder / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"sample 0: .*a\.jpg: there is no such file"):
        dataset[0]
    assert len(dataset.target(0)["boxes"]) == 1  # needs no image


def test_missing_files_are_named(tmp_path):
    images = [image_entry(k, name) for k, name in enumerate(("a.jpg", "x/b.jpg", "x/./b.jpg"))]
    folder, path = write_coco(tmp_path, [], images)
    assert len(CocoDetection(folder, path)) == 3
    (folder / "x/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"x/b\.jpg: .*\(2 of 3 listed images are missing"):
        CocoDetection(folder, path)
    (folder / "x").rmdir()
    with pytest.raises(FileNotFoundError, match=r"x/b\.jpg: there is no such file"):
        CocoDetection(folder, path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder of images"):
        CocoDetection(tmp_path / "nowhere", path)
    with pytest.raises(FileNotFoundError, match=r"no\.json: there is no such annotation file"):
        CocoDetection(folder, tmp_path / "no.json")
    with pytest.raises(ValueError, match=r"images: is a folder, expected the JSON file of annot"):
        CocoDetection(folder, folder)


FILES = {
    "not json": ('{"images": [', r"not readable as JSON: .*line 1"),
    "binary": (b"\xff\xd8\xff\x00", "not readable as JSON"),
    "empty": ("", "not readable as JSON"),
    "deep": ("[" * 200_000, "not readable as JSON"),
    "predictions": (
        '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
        r"expected an object with images.*got a list \(a file of predictions\?\)",
    ),
    "number": ("7", "got a number"),
    "captions": (
        json.dumps({"images": [image_entry()], "annotations": [{"id": 1, "caption": "A dog."}]}),
        'expected a list "categories", got nothing; .* this one has images, annotations',
    ),
    "no images": ('{"images": [], "annotations": [], "categories": []}', '"images" is empty'),
    "not a list": ('{"images": {}, "annotations": []}', 'list "images", got an object'),
    "not objects": ('{"images": [5]}', 'item 0 of "images" must be an object, got 5'),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_kind_are_refused(tmp_path, name):
    folder, path = write_coco(tmp_path, [])
    content, message = FILES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"(?s)instances\.json: .*({message})"):
        CocoDetection(folder, path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    folder, path = write_coco(tmp_path, [box_object()])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(CocoDetection(folder, path)) == 1


NAN, INF = float("nan"), float("inf")
ANNOTATIONS = {
    "image": ({"image_id": 9}, "image_id must be one of the file's, got 9"),
    "image type": ({"image_id": "1"}, "image_id must be one of the file's, got '1'"),
    "image bool": ({"image_id": True}, "image_id must be one of the file's, got True"),
    "category": ({"category_id": 2}, "category_id must be one of the file's, got 2"),
    "caption": ({"category_id": None, "caption": "A"}, r"category_id.*\(is this a captions"),
    "short box": ({"bbox": [1, 2, 3]}, r"bbox must be 4 finite numbers .*got \[1, 2, 3\]"),
    "no box": ({"bbox": None}, "bbox must be 4 finite numbers .*got None"),
    "text box": ({"bbox": [1, 2, "3", 4]}, "bbox must be 4 finite numbers"),
    "bool box": ({"bbox": [1, 2, True, 4]}, "bbox must be 4 finite numbers"),
    "nan box": ({"bbox": [1, 2, NAN, 4]}, "bbox must be 4 finite numbers .*nan"),
    "inf box": ({"bbox": [1, 2, INF, 4]}, "bbox must be 4 finite numbers .*inf"),
    "long box": ({"bbox": [1, 2, 10**400, 4]}, "bbox must be 4 finite numbers"),
    "area": ({"area": NAN}, "area must be a finite number .*got nan"),
    "negative area": ({"area": -1}, "area must be a finite number .*got -1"),
    "iscrowd": ({"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_broken_annotations_are_named(tmp_path, name):
    fields, message = ANNOTATIONS[name]
    arguments = write_coco(tmp_path, [box_object(), box_object(5) | fields])
    with pytest.raises(ValueError, match=rf"instances\.json, annotation 5: {message}"):
        CocoDetection(*arguments)


SEGMENTATIONS = {
    "missing": (None, "segmentation is missing or empty, and masks=True needs it"),
    "empty": ([], "segmentation is missing or empty"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "polygon 0 .*even number of coordinates .* got 7"),
    "second": ([*TRIANGLE, [1, 2, 3, 4, 5, 6, 7]], "polygon 1 of the segmentation"),
    "line": ([[1, 2, 3, 4]], "no polygon .* has three points or more"),
    "nan": ([[1, 2, 3, 4, NAN, 6]], "polygon 0 .* has the coordinate nan"),
    "nan first": ([[NAN, 2, 3, 4, 5, 6]], "polygon 0 .* has the coordinate nan"),
    "huge": ([[1, 2, 3, -1e9, 5, 6]], "polygon 0 .* has the coordinate -1000000000.0"),
    "text": ([["1", 2, 3, 4, 5, 6]], "polygon 0 .* must be a list of numbers"),
    "flat": ([1, 2, 3, 4, 5, 6], "polygon 0 .* must be a list of numbers, got 1"),
    "kind": ("abc", "must be a list of polygons or an RLE"),
    "size": (plain_rle(np.eye(60, 40)), r"size \(height, width\) is \(60, 40\), .* is 40 x 60"),
    "no size": ({"counts": [2400]}, "RLE's size must be height and width in .*, got None"),
    "float size": ({"size": [40.0, 60], "counts": [2400]}, "RLE's size must be"),
    "few counts": ({"size": [40, 60], "counts": [5, 7]}, "counts cover 12 pixels, .* 2400 pixels"),
    "negative": ({"size": [40, 60], "counts": [2401, -1]}, "counts must be whole numbers"),
    "cut": (
        {"size": [40, 60], "counts": compressed_rle(np.eye(40, 60))["counts"][:-2]},
        "counts cover .* pixels, but its size is 40 x 60|not a compressed RLE",
    ),
    "no counts": ({"size": [40, 60]}, "counts must be a list or a string, got None"),
    "characters": ({"size": [40, 60], "counts": "\x7f"}, "not a compressed RLE"),
    "text counts": ({"size": [40, 60], "counts": ["a", 3]}, "must be whole numbers.* got 'a'"),
    "surrogate": ({"size": [40, 60], "counts": "\ud800"}, "not a compressed RLE"),
    "huge size": ({"size": [2**20, 2**20], "counts": [2**40]}, "RLE's size must be"),
    "unfinished": ({"size": [40, 60], "counts": "PP"}, "not a compressed RLE, got 'PP'"),
    "long": ({"size": [40, 60], "counts": "o" * 30 + "0"}, "not a compressed RLE"),
}


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_broken_segmentations_are_named(tmp_path, name):
    value, message = SEGMENTATIONS[name]
    arguments = write_coco(tmp_path, [box_object(), box_object(5, segmentation=value)])
    with pytest.raises(ValueError, match=rf"annotation 5 of image 1 \(a\.jpg\): .*{message}"):
        CocoDetection(*arguments, masks=True)
    assert len(CocoDetection(*arguments).target(0)["boxes"]) == 2  # not asked for, not read


KEYPOINTS = {
    "short": (POINTS[:6], "3 x 3 = 9 numbers, got 6 numbers"),
    "kind": ("abc", "3 x 3 = 9 numbers, got 'abc'"),
    "nan": ([NAN, *POINTS[1:]], "keypoints must be finite numbers, got nan"),
    "text": (["1", *POINTS[1:]], "keypoints must be finite numbers, got '1'"),
    "visibility": ([1, 2, 3, *POINTS[3:]], "visibility must be 0, 1 or 2, got 3"),
}


@pytest.mark.parametrize("name", KEYPOINTS)
def test_broken_keypoints_are_named(tmp_path, name):
    value, message = KEYPOINTS[name]
    arguments = write_coco(tmp_path, [box_object(5, keypoints=value)])
    with pytest.raises(ValueError, match=rf"annotation 5 of image 1 .*{message}"):
        CocoDetection(*arguments, keypoints=True)


def test_categories_must_agree_on_keypoints(tmp_path):
    nose = {"id": 4, "name": "cat", "keypoints": ["nose"]}
    arguments = write_coco(tmp_path, [box_object(category_id=4)], categories=[*CATEGORIES, nose])
    with pytest.raises(ValueError, match=r"'cat' has 1 keypoints \(nose\), but 'person' has 3"):
        CocoDetection(*arguments, keypoints=True)
    with pytest.raises(ValueError, match=r"instances\.json: .*no category names keypoints"):
        CocoDetection(*arguments, keypoints=True, classes=["dog"])
    cat = CocoDetection(*arguments, keypoints=True, classes=["cat", "dog"])
    assert cat.keypoint_names == ("nose",)
    assert cat.target(0)["keypoints"].tolist() == [[[0, 0, 0]]]


def test_mirrored_order_of_cocos_person():
    # The order that torchvision's reference training code writes out for its flip.
    names = ["nose"] + [
        f"{side}_{part}"
        for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ]
    expected = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert mirrored_order(names) == expected
    assert mirrored_order(["Right wing", "bright", "left_only", "Left wing"]) == (3, 1, 2, 0)
    assert mirrored_order(()) == ()


OTHER_FIELDS = {
    "image ids": ({"images": [image_entry(), image_entry()]}, "image 1: the id is there twice"),
    "text id": ({"images": [image_entry("1")]}, "image number 0 .* integer, got '1'"),
    "float id": ({"images": [image_entry(1.0)]}, "image number 0 .* integer, got 1.0"),
    "large id": ({"images": [image_entry(2**63)]}, "image number 0 .* integer, got 92"),
    "no id": ({"images": [{"file_name": "a.jpg"}]}, "id must be an integer, got none"),
    "no name": ({"images": [{"id": 1}]}, "image 1: expected a file_name, got None"),
    "width": ({"images": [image_entry(width=-3)]}, "image 1: width .* whole pixels, got -3"),
    "height": ({"images": [image_entry(height=1.5)]}, "image 1: height .* whole pixels, got 1.5"),
    "nan": ({"images": [image_entry(height=NAN)]}, "image 1: height .* got nan"),
    "absolute": ({"images": [image_entry(name="/etc/a.jpg")]}, "leads out of the images' folder"),
    "parent": ({"images": [image_entry(name="a/../../b.jpg")]}, "leads out of .*'a/../../b.jpg'"),
    "annotations": ({"annotations": [box_object()] * 2}, "annotation 1: the id is there twice"),
    "annotation id": ({"annotations": [box_object(None)]}, "annotation number 0 .* got None"),
    "same name": (
        {
            "categories": [*CATEGORIES, {"id": 91, "name": "dog"}],
            "annotations": [box_object(1, category_id=91), box_object(2, category_id=18)],
        },
        "the categories 18 and 91 are all named 'dog' and have annotations; expected one",
    ),
    "category ids": ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "category 18: the id is there"),
    "category name": ({"categories": [{"id": 1}]}, "category 1: expected a name, got None"),
    "category points": (
        {"categories": [{"id": 1, "name": "a", "keypoints": 3}]},
        "category 1: keypoints must be a list of names, got 3",
    ),
    "categories": ({"categories": []}, 'list "categories" is empty'),
}


@pytest.mark.parametrize("name", OTHER_FIELDS)
def test_broken_images_and_categories_are_named(tmp_path, name):
    fields, message = OTHER_FIELDS[name]
    arguments = write_coco(tmp_path, **{"annotations": [box_object()]} | fields, files=["a.jpg"])
    with pytest.raises(ValueError, match=rf"instances\.json.*{message}"):
        CocoDetection(*arguments)


def test_targets_are_copies(tmp_path):
    arguments = write_coco(tmp_path, [box_object(keypoints=POINTS)])
    dataset = CocoDetection(*arguments, masks=True, keypoints=True)
    before = dataset.target(0)
    for key, value in dataset.target(0).items():
        if key != "image_id":
            value.fill_(77)
    after = dataset.target(0)
    assert all(torch.equal(after[k], before[k]) for k in before if k != "image_id")


def test_transforms_are_called(tmp_path):
    dataset = CocoDetection(*write_coco(tmp_path, []), transforms=lambda i, t: (i.float() / 255, t))
    assert dataset[0][0].max() <= 1
    assert "boxes" in dataset.target(0)


def _collate(batch):
    return [target for _, target in batch]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_workers_give_the_same_samples(tmp_path):
    dataset = CocoDetection(*random_file(tmp_path, 4), masks=True)
    loader = DataLoader(
        dataset, 2, num_workers=1, collate_fn=_collate, multiprocessing_context="fork"
    )
    targets = [target for batch in loader for target in batch]
    assert [t["image_id"] for t in targets] == dataset.image_ids
    for index, target in enumerate(targets):
        assert torch.equal(target["masks"], dataset.target(index)["masks"])


def test_pickle(tmp_path):
    dataset = CocoDetection(*random_file(tmp_path), masks=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3][0], dataset[3][0])
    assert torch.equal(copy[3][1]["masks"], dataset[3][1]["masks"])
    assert copy.report == dataset.report


def test_what_is_held_is_not_made_of_python_objects(tmp_path):
    """Pickled, Python objects cost a multiple of the numbers; workers would copy them all."""
    rng = random.Random(0)
    annotations = [
        box_object(k, segmentation=[[rng.uniform(0, 40) for _ in range(40)]])
        for k in range(1, 2001)
    ]
    dataset = CocoDetection(*write_coco(tmp_path, annotations), masks=True)
    containers = [v for v in vars(dataset).values() if isinstance(v, (list, tuple, dict))]
    assert max(map(len, containers)) <= 4
    numbers = 2000 * (40 * 8 + 4 * 4 + 8 + 8 + 4 + 8)
    assert len(pickle.dumps(dataset)) < 1.05 * numbers + 4000
