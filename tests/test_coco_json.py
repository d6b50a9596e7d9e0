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
    def test_a_difficult_object_has_no_labelled_keypoints(self, tmp_path):
        predictions, targets = full_case(num_images=6)
        for target in targets:
            target["difficult"] = np.arange(len(target["labels"])) % 2 == 0
        _, truth_file = evaluator_of(predictions, targets, iou_types=IOU_TYPES).save(tmp_path)
        annotations = json.loads(truth_file.read_text())["annotations"]
        difficult = [entry for entry in annotations if entry.get("difficult")]
        assert {entry["num_keypoints"] for entry in difficult} == {0}
        assert any(v > 0 for entry in difficult for v in entry["keypoints"][2::3])  # kept

    def test_float32_survives(self, tmp_path):
        rng = np.random.default_rng(0)
        low = rng.uniform(0, 1000, (500, 2)).astype(np.float32)
        high = low + np.exp(rng.uniform(-9, 7, (500, 2))).astype(np.float32)
        scores = rng.random(500).astype(np.float32)
        boxes = np.concatenate([low, high], axis=1)
        prediction = {"boxes": boxes, "labels": np.ones(500, int), "scores": scores}
        target = {"boxes": boxes[:0], "labels": np.ones(0, int), "image_id": 4}
        evaluator = COCOEvaluator(["cat"])
        evaluator.update([prediction], [target])
        saved = json.loads(evaluator.save(tmp_path)[0].read_text())
        x, y, width, height = np.array([entry["bbox"] for entry in saved]).T
        read = np.stack([x, y, x + width, y + height], axis=1).astype(np.float32)
        np.testing.assert_array_equal(read, boxes)
        read_scores = np.array([entry["score"] for entry in saved], dtype=np.float32)
        np.testing.assert_array_equal(read_scores, scores)

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
    def test_no_prediction_at_all_scores_0(self, tmp_path, iou_type):
        files = foreign_files(tmp_path, iou_type, change=lambda _, results: results.clear())
        result = score_predictions(*files, iou_type=iou_type)
        assert (result.ap, result.ar) == (0.0, 0.0)
        assert sum(result.num_objects.values()) > 0

    def test_annotation_with_id_0_is_matched_like_any_other(self, tmp_path):
        expected = score_predictions(*foreign_files(tmp_path)).as_dict()

        def from_zero(ground_truth, _):
            for number, entry in enumerate(ground_truth["annotations"]):
                entry["id"] = number

        assert score_predictions(*foreign_files(tmp_path, change=from_zero)).as_dict() == expected

    def test_masks_have_their_own_area_where_a_box_is_there_too(self, tmp_path):
        predictions, targets = full_case(seed=3)
        ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
        files = (
            write_json(tmp_path / "p.json", results),
            write_json(tmp_path / "gt.json", ground_truth),
        )
        for iou_type in ("segm", "keypoints"):
            result = score_predictions(*files, iou_type=iou_type)
            stats, _ = by_hand(ground_truth, only(results, iou_type), iou_type)
            got = [getattr(result, name) for name in stats]
            np.testing.assert_array_equal(got, list(stats.values()))

    @pytest.mark.parametrize("iou_type", IOU_TYPES)
    def test_optional_keys_may_be_absent(self, tmp_path, iou_type):
        def complete(ground_truth, _):
            for entry in ground_truth["annotations"]:
                entry["iscrowd"] = 0
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
                if isinstance(entry["segmentation"], dict):
                    entry["segmentation"] = box_polygon(entry["bbox"])
                if iou_type == "segm":
                    rle = coco_mask.frPyObjects(entry["segmentation"], 60, 80)
                    entry["area"] = float(coco_mask.area(coco_mask.merge(rle)))

        def bare(ground_truth, _):
            complete(ground_truth, _)
            for entry in ground_truth["annotations"]:
                for key in ("iscrowd", "area", "id", "num_keypoints"):
                    del entry[key]

        expected, got = (
            score_predictions(*foreign_files(tmp_path, iou_type, change), iou_type=iou_type)
            for change in (complete, bare)
        )
        assert got.as_dict() == expected.as_dict()

    def test_categories_of_one_name_are_told_apart(self, tmp_path):
        def rename(ground_truth, _):
            for category in ground_truth["categories"][:2]:
                category["name"] = "pet"

        result = score_predictions(*foreign_files(tmp_path, change=rename))
        assert result.classes == ("pet (90)", "pet (7)", "cow")
        assert set(result.ap_by_class) == set(result.classes)

    def test_unknown_choices(self, tmp_path):
        files = foreign_files(tmp_path)
        with pytest.raises(ValueError, match="iou_type is 'box', expected one of bbox"):
            score_predictions(*files, iou_type="box")
        with pytest.raises(ValueError, match="backend is 'numpy', expected one of auto, pyco"):
            score_predictions(*files, backend="numpy")
        with pytest.raises(ValueError, match="2 keypoint_sigmas for 17 keypoints"):
            score_predictions(
                *foreign_files(tmp_path, "keypoints"),
                iou_type="keypoints",
                keypoint_sigmas=[0.1, 0.1],
            )


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
    return predictions, targets


@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_unclipped_targets_are_scored_as_the_file(tmp_path, iou_type, backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    predictions, targets = data_files(tmp_path, iou_type)
    annotations = tmp_path / "gt.json"
    dataset = CocoDetection(tmp_path, annotations, clip=False, masks=True, keypoints=True)
    found = {t["image_id"]: p for p, t in zip(predictions, targets, strict=True)}
    evaluator = COCOEvaluator(
        dataset.classes, category_ids=dataset.category_ids, iou_types=[iou_type], backend=backend
    )
    label_of = {name: label for label, name in enumerate(dataset.classes, start=1)}
    for index, image_id in enumerate(dataset.image_ids):
        names = [CLASSES[label - 1] for label in found[image_id]["labels"]]
        labels = np.array([label_of[name] for name in names], dtype=np.int64)
        evaluator.update([found[image_id] | {"labels": labels}], [dataset.target(index)])
    result = evaluator.compute()
    saved, _ = evaluator.save(tmp_path / "saved")
    again = score_predictions(saved, annotations, iou_type=iou_type, backend=backend).as_dict()
    of_evaluator = result.as_dict()
    for key in ("classes", "ap_by_class", "ap50_by_class", "num_objects", "num_detections"):
        sort = sorted if key == "classes" else dict
        assert sort(again.pop(key)) == sort(of_evaluator.pop(key))
    if backend == "pycocotools":
        assert again == of_evaluator
        results = json.loads((tmp_path / "p.json").read_text())
        stats, by_class = by_hand(json.loads(annotations.read_text()), results, iou_type)
        np.testing.assert_array_equal([getattr(result, k) for k in stats], list(stats.values()))
        for name, category in zip(dataset.classes, dataset.category_ids, strict=True):
            pair = result.ap_by_class[name], result.ap50_by_class[name]
            np.testing.assert_array_equal(pair, by_class[category])
    else:
        assert again == pytest.approx(of_evaluator, abs=1e-12)
    assert 0.05 < result.ap < 0.95


def test_clipped_targets_are_not(tmp_path):
    data_files(tmp_path, "bbox")
    with pytest.warns(UserWarning, match=r"boxes were clipped.* boxes were dropped"):
        clipped = CocoDetection(tmp_path, tmp_path / "gt.json")
    assert clipped.report.num_clipped > 5 < clipped.report.num_without_area


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


def sides(kind):
    def change(ground_truth):
        for image in ground_truth["images"]:
            image |= {"height": kind(60), "width": kind(80)}

    return change


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
    "float sides": (sides(float), lambda _: sides(int)),
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
            (
                '{"a": 1}',
                r"p\.json: is {'a': 1}, expected predictions in COCO's results format: a l",
            ),
            ("PK\x03\x04 a checkpoint", r"p\.json: not JSON: .*expected predictions in COCO's res"),
            ("[" * 200_000, r"p\.json: not JSON: .*expected predictions"),
            ("[3]", r"p\.json, predictions\[0\]: is 3, expected an object"),
        ],
    )
    def test_predictions_that_are_none(self, tmp_path, text, message):
        predictions, annotations = foreign_files(tmp_path)
        predictions.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            score_predictions(predictions, annotations)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"image_id": ...}, r"has no 'image_id', only \['bbox', 'category_id', 'score'\]"),
            ({"category_id": ...}, r"has no 'category_id', only"),
            ({"bbox": ...}, r"has no 'bbox', only .*'bbox' needs it"),
            ({"score": ...}, r"score is None, expected a number"),
            ({"score": math.nan}, r"score is nan, expected a number"),
            (
                {"image_id": 100_000},
                r"image_id is 100000, expected one of the annotation file's 25",
            ),
            ({"image_id": "3"}, r"image_id is '3', expected one of"),
            ({"category_id": 1}, r"category_id is 1, expected one of .* such as \[7, 31, 90\]"),
            ({"bbox": [1, 2, 3]}, r"bbox is \[1, 2, 3\], expected \[x, y, width, height\]"),
            ({"bbox": [1, 2, math.nan, 3]}, r"bbox is \[1, 2, nan, 3\], expected"),
            ({"bbox": [1, 2, -3, 3]}, r"bbox is \[1, 2, -3, 3\], expected .* of 0 or more"),
            ({"bbox": [1, 2, "3", 3]}, r"bbox is \[1, 2, '3', 3\], expected"),
        ],
    )
    def test_a_prediction(self, tmp_path, values, message):
        def change(_, results):
            results[3] = replaced(results[3], **values)

        with pytest.raises(ValueError, match=r"p\.json, predictions\[3\]: " + message):
            score_predictions(*foreign_files(tmp_path, change=change))

    def test_zero_sides_are_allowed(self, tmp_path):
        def change(_, results):
            results[3] = replaced(results[3], bbox=[1, 2, 0, 3])

        assert score_predictions(*foreign_files(tmp_path, change=change)).ap > 0

    @pytest.mark.parametrize(
        ("iou_type", "values", "message"),
        [
            ("segm", {"segmentation": ...}, r"has no 'segmentation', only .*'segm' needs it"),
            ("segm", {"segmentation": [[1, 1, 2, 2, 3, 1]]}, r"expected compressed run lengths"),
            (
                "segm",
                {"segmentation": {"size": [60, 80], "counts": [4800]}},
                r"expected compressed run lengths",
            ),
            (
                "segm",
                {"segmentation": {"size": [9, 9], "counts": "11"}},
                r"segmentation has size \[9, 9\], expected that of the image, \[60, 80\]",
            ),
            ("keypoints", {"keypoints": ...}, r"has no 'keypoints', only"),
            ("keypoints", {"keypoints": [1, 2]}, r"keypoints have 2 numbers, expected .*\(51\)"),
            ("keypoints", {"keypoints": [math.inf] * 51}, r"keypoints are \[inf, .*finite"),
        ],
    )
    def test_masks_and_keypoints(self, tmp_path, iou_type, values, message):
        def change(_, results):
            results[3] = replaced(results[3], **values)

        files = foreign_files(tmp_path, iou_type, change)
        with pytest.raises(ValueError, match=r"p\.json, predictions\[3\]: .*" + message):
            score_predictions(*files, iou_type=iou_type)

    def test_boxes_alone_cannot_be_scored_as_masks(self, tmp_path):
        files = foreign_files(tmp_path)
        with pytest.raises(ValueError, match=r"p\.json, predictions\[0\]: has no 'segmentation'"):
            score_predictions(*files, iou_type="segm")

    @pytest.mark.parametrize(
        ("part", "values", "message"),
        [
            ("annotations", {"bbox": ...}, r"annotations\[1\]: has no 'bbox'"),
            (
                "annotations",
                {"bbox": [0, 0, "1", 1]},
                r"annotations\[1\]: bbox is \[0, 0, '1', 1\]",
            ),
            ("annotations", {"bbox": [0, 0, 10**400, 1]}, r"annotations\[1\]: bbox is \[0, 0, 10"),
            ("annotations", {"image_id": -5}, r"annotations\[1\]: image_id is -5"),
            ("annotations", {"category_id": 3}, r"annotations\[1\]: category_id is 3"),
            ("annotations", {"area": "big"}, r"annotations\[1\]: area is 'big', expected a number"),
            ("annotations", {"iscrowd": 2}, r"annotations\[1\]: iscrowd is 2, expected 0 or 1"),
            ("images", {"id": ...}, r"images\[1\]: id is None, expected an int"),
            ("categories", {"id": 90}, r"categories\[1\]: id 90 occurs twice, expected once"),
            ("categories", {"name": 5}, r"categories\[1\]: name is 5, expected a str"),
        ],
    )
    def test_an_annotation_file(self, tmp_path, part, values, message):
        def change(ground_truth, _):
            ground_truth[part][1] = replaced(ground_truth[part][1], **values)

        with pytest.raises(ValueError, match=r"gt\.json, " + message):
            score_predictions(*foreign_files(tmp_path, change=change))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"segmentation": []}, r"segmentation is \[\], expected polygons or run lengths"),
            ({"segmentation": [[1, 2, 3, 4]]}, r"segmentation is .*expected polygons"),
            ({"segmentation": {"size": [60, 80]}}, r"segmentation is .*expected polygons"),
            ({"segmentation": {"size": [80, 60], "counts": [4800]}}, r"has size \[80, 60\], exp"),
            ({"segmentation": [[1, 1, 2e9, 1, 2, 2]]}, r"has the coordinate 2000000000\.0"),
        ],
    )
    def test_an_annotated_mask(self, tmp_path, values, message):
        def change(ground_truth, _):
            ground_truth["annotations"][1] |= values

        files = foreign_files(tmp_path, "segm", change)
        with pytest.raises(ValueError, match=r"gt\.json, annotations\[1\]: .*" + message):
            score_predictions(*files, iou_type="segm")

    def test_masks_need_the_images_sizes(self, tmp_path):
        def change(ground_truth, _):
            for image in ground_truth["images"]:
                del image["width"]

        files = foreign_files(tmp_path, "segm", change)
        with pytest.raises(ValueError, match=r"annotations\[0\]: .* are \[60, None\], for 'segm'"):
            score_predictions(*files, iou_type="segm")

    def test_annotations_that_are_none(self, tmp_path):
        predictions, annotations = foreign_files(tmp_path)
        with pytest.raises(ValueError, match=r"p\.json: is \[.*expected an object with images"):
            score_predictions(predictions, predictions)
        write_json(annotations, {"images": [], "annotations": []})
        with pytest.raises(ValueError, match=r"gt\.json: categories is None, expected a list"):
            score_predictions(predictions, annotations)

    def test_keypoints_that_nobody_has(self, tmp_path):
        def change(ground_truth, _):
            for entry in ground_truth["annotations"]:
                del entry["keypoints"]

        files = foreign_files(tmp_path, "keypoints", change)
        with pytest.raises(ValueError, match=r"gt\.json, annotations\[0\]: has no 'keypoints', on"):
            score_predictions(*files, iou_type="keypoints")

    def test_folders(self, tmp_path):
        predictions, annotations = foreign_files(tmp_path)
        with pytest.raises(ValueError, match="is a folder, expected predictions in COCO's results"):
            score_predictions(tmp_path, annotations)
        with pytest.raises(ValueError, match="is a folder, expected annotations in COCO's format"):
            score_predictions(predictions, tmp_path)

    def test_no_such_file(self, tmp_path):
        predictions, annotations = foreign_files(tmp_path)
        for files in ((tmp_path / "none.json", annotations), (predictions, tmp_path / "none.json")):
            with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such file"):
                score_predictions(*files)
