"""Saved predictions and ground truth, and scoring files that anybody may have written."""

import copy
import json
import math

import numpy as np
import pytest
from coco_oracle import (
    CATEGORY_IDS,
    CLASSES,
    IOU_TYPES,
    add_keypoints,
    add_masks,
    as_entries,
    box_polygon,
    by_hand,
    evaluator_of,
    foreign_files,
    full_case,
    only,
    random_case,
    write_json,
)
from PIL import Image
from pycocotools import mask as coco_mask

from detmix.data import CocoDetection
from detmix.evaluation import COCOEvaluator, score_predictions

# ------------------------------------------------------------------------------------------ saving


class TestSave:
    def test_size_is_the_masks_or_else_the_original(self, tmp_path):
        box = np.array([[0, 0, 4, 4]], np.float32)
        nothing = {"boxes": box[:0], "labels": np.ones(0, int), "scores": np.ones(0)}
        target = {"boxes": box, "labels": np.ones(1, int), "orig_size": np.array([30, 40])}
        masked = {**target, "masks": np.ones((1, 6, 8), np.uint8), "image_id": 1}
        evaluator = COCOEvaluator(["cat"], iou_types=["segm"])
        empty = {**target, "boxes": box[:0], "labels": np.ones(0, int), "image_id": 2}
        unknown = {"boxes": box[:0], "labels": np.ones(0, int), "image_id": 3}
        evaluator.update([nothing] * 3, [masked, empty, unknown])
        images = json.loads(evaluator.save(tmp_path)[1].read_text())["images"]
        assert images == [
            {"id": 1, "height": 6, "width": 8},
            {"id": 2, "height": 30, "width": 40},
            {"id": 3},
        ]

    def test_a_failed_write_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        evaluator = evaluator_of(*full_case(num_images=2), iou_types=IOU_TYPES)
        paths = evaluator.save(tmp_path)
        before = [path.read_bytes() for path in paths]
        evaluator.update(*full_case(seed=1, num_images=3))

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            evaluator.save(tmp_path)
        assert [path.read_bytes() for path in paths] == before
        assert sorted(tmp_path.iterdir()) == sorted(paths)


# ---------------------------------------------------------------------------- files of other people


class TestScore:
    @pytest.mark.parametrize("iou_type", IOU_TYPES)
    def test_annotations_need_no_ids(self, tmp_path, iou_type):
        """And 0 is one like any other."""
        expected = score_predictions(*foreign_files(tmp_path, iou_type), iou_type=iou_type)

        def from_zero(ground_truth, _):
            for number, entry in enumerate(ground_truth["annotations"]):
                entry["id"] = number

        def without(ground_truth, _):
            for entry in ground_truth["annotations"]:
                del entry["id"]

        for change in (from_zero, without):
            files = foreign_files(tmp_path, iou_type, change)
            assert score_predictions(*files, iou_type=iou_type).as_dict() == expected.as_dict()

    def test_categories_of_one_name_are_told_apart(self, tmp_path):
        def rename(ground_truth, _):
            for category in ground_truth["categories"][:2]:
                category["name"] = "pet"

        result = score_predictions(*foreign_files(tmp_path, change=rename))
        assert result.classes == ("pet (90)", "pet (7)", "cow")
        assert set(result.ap_by_class) == set(result.classes)


# ------------------------------------------------- files that data sets and evaluation share

POINT_NAMES = [f"point {k}" for k in range(17)]


def data_files(tmp_path, iou_type, change=None):
    """Images with objects as the file of `foreign_files` has them, some beyond their image."""
    predictions, targets = random_case(4, 20, limit=60.0, grid=0.25, levels=12)
    for records in (predictions, targets):  # float32 holds quarters, sums and products exactly
        for record in records[1::4]:
            record["boxes"][:, ::2] += 90  # outside an image 80 pixels wide
        for record in records[2::4]:
            record["boxes"] -= 20
    add_masks(predictions, targets)
    add_keypoints(predictions, targets, noise=0.5)
    ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
    for category in ground_truth["categories"]:
        category["keypoints"] = POINT_NAMES
    for image in ground_truth["images"]:
        image["file_name"] = f"{image['id']}.png"
        Image.new("L", (80, 60)).save(tmp_path / image["file_name"])
    if change is not None:
        change(ground_truth)
    write_json(tmp_path / "p.json", only(results, iou_type))
    write_json(tmp_path / "gt.json", ground_truth)


def each(**values):
    """Set values of all annotations that are no crowds; ``...`` takes a key out."""

    def change(ground_truth):
        for number, entry in enumerate(ground_truth["annotations"]):
            if not entry["iscrowd"]:
                made = {k: v(entry, number) if callable(v) else v for k, v in values.items()}
                entry |= made
                for key in [key for key, value in made.items() if value is ...]:
                    del entry[key]

    return change


def square(entry, _):
    return box_polygon(entry["bbox"])


def without_keypoints(value, filled):
    def change(ground_truth):
        ground_truth["categories"][0]["keypoints"] = []
        for entry in ground_truth["annotations"]:
            if entry["category_id"] == CATEGORY_IDS[0]:
                entry |= {"keypoints": [0] * 51, "num_keypoints": 0}
                if not filled:
                    del entry["num_keypoints"], entry["keypoints"]
                    entry |= value

    return change


def own_area(iou_type):
    def area(entry, _):
        rle = entry["segmentation"]
        return (
            float(coco_mask.area(rle))
            if iou_type == "segm"
            else entry["bbox"][2] * entry["bbox"][3]
        )

    return each(area=area)


def negative_side(entry, number):
    x, y, width, height = entry["bbox"]
    return [x, y, -width if number % 3 else width, height]


def super_category(ground_truth):
    ground_truth["categories"].insert(0, {"id": 0, "name": CLASSES[0]})


# What is odd, and the same as pycocotools takes it, for each type.
ODDITIES = {
    "area null": (each(area=None), own_area),
    "no area": (each(area=...), own_area),
    "iscrowd null": (each(iscrowd=None), lambda _: each(iscrowd=0)),
    "iscrowd true": (each(iscrowd=False), lambda _: each(iscrowd=0)),
    "short polygons": (
        each(segmentation=lambda e, n: [[1, 1, 9, 9], [], *square(e, n), [2, 2]]),
        lambda _: each(segmentation=square),
    ),
    "negative sides": (each(bbox=negative_side), lambda _: each(bbox=negative_side)),
    "without keypoints": (without_keypoints({}, False), lambda _: without_keypoints({}, True)),
    "keypoints null": (
        without_keypoints({"keypoints": None, "num_keypoints": None}, False),
        lambda _: without_keypoints({}, True),
    ),
    "num_keypoints null": (each(num_keypoints=None), lambda _: each()),
    "super-category": (super_category, lambda _: super_category),
    "annotation ids": (each(id=lambda _, n: -n), lambda _: each()),
}


@pytest.mark.filterwarnings("ignore:.* boxes were")
@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("name", ODDITIES)
def test_what_trains_can_be_scored(tmp_path, name, iou_type):
    """By the numbers that pycocotools has for the same, spelled out."""
    odd, plain = ODDITIES[name]
    data_files(tmp_path, iou_type, plain(iou_type))
    ground_truth, results = (json.loads((tmp_path / f).read_text()) for f in ("gt.json", "p.json"))
    stats, _ = by_hand(ground_truth, results, iou_type)
    data_files(tmp_path, iou_type, odd)
    options = {"iou_type": iou_type, "backend": "pycocotools"}
    result = score_predictions(tmp_path / "p.json", tmp_path / "gt.json", **options)
    np.testing.assert_array_equal([getattr(result, k) for k in stats], list(stats.values()))
    assert result.ap > 0.02
    dataset = CocoDetection(tmp_path, tmp_path / "gt.json", masks=True, keypoints=True)
    seen = dataset.report.num_objects + dataset.report.num_without_area
    assert seen == len(ground_truth["annotations"])
    assert all(len(t["boxes"]) == len(t["masks"]) for _, t in dataset)


# ------------------------------------------------------------------------------------------ errors


def replaced(entry, **values):
    entry = copy.deepcopy(entry) | values
    return {key: value for key, value in entry.items() if value is not ...}


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[{", r"p\.json: not JSON: "),
            ("\x80", r"p\.json: not JSON: "),
            ('{"a": 1}', r"p\.json: is {'a': 1}"),
            ("[" * 200_000, r"p\.json: not JSON"),
            ("[3]", r"p\.json, predictions\[0\]: is 3"),
        ],
    )
    def test_predictions_that_are_none(self, tmp_path, text, message):
        predictions, annotations = foreign_files(tmp_path)
        predictions.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            score_predictions(predictions, annotations)

    @pytest.mark.parametrize(
        ("iou_type", "values", "message"),
        [
            ("bbox", {"bbox": ...}, "has no 'bbox'"),
            ("bbox", {"score": ...}, "score is None"),
            ("bbox", {"score": math.nan}, "score is nan"),
            ("bbox", {"image_id": 100_000}, "image_id is 100000"),
            ("bbox", {"image_id": "3"}, "image_id is '3'"),
            ("bbox", {"category_id": 1}, "category_id is 1"),
            ("bbox", {"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\]"),
            ("bbox", {"bbox": [1, 2, math.nan, 3]}, r"bbox is \[1, 2, nan, 3\]"),
            ("bbox", {"bbox": [1, 2, -3, 3]}, r"bbox is \[1, 2, -3, 3\]"),
            ("segm", {"segmentation": ...}, "has no 'segmentation'"),
            ("segm", {"segmentation": [[1, 1, 2, 2, 3, 1]]}, "run lengths"),
            ("segm", {"segmentation": {"size": [9, 9], "counts": "11"}}, r"size \[9, 9\]"),
            ("keypoints", {"keypoints": ...}, "has no 'keypoints'"),
            ("keypoints", {"keypoints": [1, 2]}, "keypoints have 2 numbers"),
            ("keypoints", {"keypoints": [math.inf] * 51}, r"keypoints are \[inf"),
        ],
    )
    def test_a_prediction(self, tmp_path, iou_type, values, message):
        def change(_, results):
            results[3] = replaced(results[3], **values)

        files = foreign_files(tmp_path, iou_type, change)
        with pytest.raises(ValueError, match=rf"p\.json, predictions\[3\]: .*{message}"):
            score_predictions(*files, iou_type=iou_type)

    @pytest.mark.parametrize(
        ("part", "values", "message"),
        [
            ("annotations", {"bbox": ...}, "has no 'bbox'"),
            ("annotations", {"bbox": [0, 0, 10**400, 1]}, r"bbox is \[0, 0, 10"),
            ("annotations", {"image_id": -5}, "image_id is -5"),
            ("annotations", {"category_id": 3}, "category_id is 3"),
            ("annotations", {"area": "big"}, "area is 'big'"),
            ("annotations", {"iscrowd": 2}, "iscrowd is 2"),
            ("annotations", {"segmentation": []}, r"segmentation is \[\]"),
            ("annotations", {"segmentation": [[1, 2, 3, 4]]}, "segmentation is "),
            ("annotations", {"segmentation": {"size": [8, 6], "counts": [48]}}, r"size \[8, 6\]"),
            ("annotations", {"segmentation": [[1, 1, 2e9, 1, 2, 2]]}, "the coordinate 2000000000"),
            ("images", {"id": ...}, "id is None"),
            ("categories", {"id": 90}, "id 90 occurs twice"),
            ("categories", {"name": 5}, "name is 5"),
        ],
    )
    def test_an_annotation_file(self, tmp_path, part, values, message):
        def change(ground_truth, _):
            ground_truth[part][1] = replaced(ground_truth[part][1], **values)

        iou_type = "segm" if "segmentation" in values else "bbox"
        files = foreign_files(tmp_path, iou_type, change)
        with pytest.raises(ValueError, match=rf"gt\.json, {part}\[1\]: .*{message}"):
            score_predictions(*files, iou_type=iou_type)

    def test_files_that_are_none(self, tmp_path):
        predictions, annotations = foreign_files(tmp_path)
        for files in ((tmp_path, annotations), (predictions, tmp_path)):
            with pytest.raises(ValueError, match="is a folder"):
                score_predictions(*files)
        for files in ((tmp_path / "none.json", annotations), (predictions, tmp_path / "none.json")):
            with pytest.raises(FileNotFoundError, match=r"none\.json"):
                score_predictions(*files)
        with pytest.raises(ValueError, match=r"p\.json: is \["):
            score_predictions(predictions, predictions)
