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
    as_entries,
    box_polygon,
    by_hand,
    check_by_hand,
    evaluator_of,
    foreign_files,
    full_case,
    only,
    write_json,
)
from PIL import Image
from pycocotools import mask as coco_mask

from detmix.data import CocoDetection
from detmix.evaluation import COCOEvaluator, score_predictions

# ------------------------------------------------------------------------------------------ saving


def test_size_is_the_masks_or_else_the_original(tmp_path):
    nothing = {"boxes": np.zeros((0, 4), np.float32), "labels": np.ones(0, int)}
    masked = {"boxes": np.array([[0, 0, 4, 4]], np.float32), "labels": np.ones(1, int)}
    masked |= {"masks": np.ones((1, 6, 8), np.uint8)}
    evaluator = COCOEvaluator(["cat"], iou_types=["segm"])
    targets = [part | {"orig_size": np.array([30, 40])} for part in (masked, nothing)] + [nothing]
    targets = [target | {"image_id": number} for number, target in enumerate(targets, 1)]
    evaluator.update([nothing | {"scores": np.ones(0)}] * 3, targets)
    images = json.loads(evaluator.save(tmp_path)[1].read_text())["images"]
    sizes = [{"height": 6, "width": 8}, {"height": 30, "width": 40}, {}]
    assert images == [{"id": number} | size for number, size in enumerate(sizes, 1)]


def test_scored_with_the_same_sigmas(tmp_path):
    options = {"keypoint_sigmas": np.linspace(0.01, 0.2, 17).tolist(), "backend": "pycocotools"}
    evaluator = evaluator_of(*full_case(), iou_types=["keypoints"], **options)
    paths, expected = evaluator.save(tmp_path), evaluator.compute().as_dict()
    assert score_predictions(*paths, iou_type="keypoints", **options).as_dict() == expected
    assert score_predictions(*paths, iou_type="keypoints").ap != expected["ap"]
    for sigmas, message in (
        ([0.1, 0.2], "2 keypoint_sigmas for 17 keypoints"),
        *(([0.1] * 16 + [x], f"keypoint_sigmas .*{x}") for x in (0, -1, math.nan, math.inf)),
    ):
        with pytest.raises(ValueError, match=message):
            score_predictions(*paths, iou_type="keypoints", keypoint_sigmas=sigmas)


# ------------------------------------------------- files that data sets and evaluation share


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Images, objects with masks and keypoints, predictions."""
    predictions, targets = full_case(4, 20)
    add_keypoints(predictions, targets, noise=0.5)
    ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
    folder = tmp_path_factory.mktemp("images")
    for category in ground_truth["categories"]:
        category["keypoints"] = [f"point {k}" for k in range(17)]
    for image in ground_truth["images"]:
        image["file_name"] = f"{image['id']}.png"
        Image.new("L", (80, 60)).save(folder / image["file_name"])
    return folder, ground_truth, results


def each(**values):
    """Set values of all annotations that are no crowds; ``...`` takes a key out."""

    def change(ground_truth):
        for number, entry in enumerate(ground_truth["annotations"]):
            for key, value in {} if entry["iscrowd"] else values.items():
                entry[key] = value(entry, number) if callable(value) else value
                if entry[key] is ...:
                    del entry[key]

    return change


def square(entry, _):
    return box_polygon(entry["bbox"])


def own_area(iou_type):
    if iou_type == "segm":
        return lambda entry, _: float(coco_mask.area(entry["segmentation"]))
    return lambda entry, _: max(entry["bbox"][2], 0) * max(entry["bbox"][3], 0)


def negative_side(entry, number):
    x, y, width, height = entry["bbox"]
    return [x, y, -width if number % 3 else width, height]


def first_without_keypoints(**values):
    def change(ground_truth):
        ground_truth["categories"][0]["keypoints"] = []
        for entry in ground_truth["annotations"]:
            if entry["category_id"] == CATEGORY_IDS[0]:
                del entry["num_keypoints"], entry["keypoints"]
                entry |= values

    return change


def super_category(ground_truth):
    ground_truth["categories"].insert(0, {"id": 0, "name": CLASSES[0]})


def lvis(ground_truth):
    for image in ground_truth["images"]:
        image |= {"neg_category_ids": [7], "not_exhaustive_category_ids": []}


def float_ids(ground_truth):
    """As pandas writes a column in which some values were missing."""
    for key in ("id", "image_id", "category_id"):
        for part in ground_truth.values():
            for entry in part:
                entry |= {key: float(entry[key])} if key in entry else {}


UNLABELLED = first_without_keypoints(keypoints=[0] * 51, num_keypoints=0)
NOT_AS_LABELLED = each(num_keypoints=lambda entry, number: number % 2 * entry["num_keypoints"])
# What is odd, and the same as pycocotools takes it, for each type.
ODDITIES = {
    "no area": (
        each(area=lambda _, number: None if number % 2 else ...), lambda t: each(area=own_area(t)),
    ),
    "iscrowd null": (each(iscrowd=None), lambda _: each()),
    "short polygons": (
        each(segmentation=lambda e, n: [[1, 1, 9, 9], [], *square(e, n), [2, 2]]),
        lambda _: each(segmentation=square),
    ),
    "negative sides, no area": (
        each(bbox=negative_side, area=...), lambda t: each(bbox=negative_side, area=own_area(t)),
    ),
    "without keypoints": (first_without_keypoints(), lambda _: UNLABELLED),
    "no num_keypoints of some": (NOT_AS_LABELLED, lambda _: NOT_AS_LABELLED),
    "super-category": (super_category, lambda _: super_category),
    "LVIS": (lvis, lambda _: each()),
    "float ids": (float_ids, lambda _: float_ids),
    "annotation ids": (each(id=lambda _, number: -number), lambda _: each()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* boxes were", "ignore:.*LVIS")
@pytest.mark.parametrize("name", ODDITIES)
def test_what_trains_can_be_scored(tmp_path, name, content):
    """By the numbers that pycocotools has for the same, spelled out."""
    odd, plain = ODDITIES[name]
    folder, ground_truth, results = content
    changed = copy.deepcopy(ground_truth)
    odd(changed)
    path = write_json(tmp_path / "gt.json", changed)
    for iou_type in IOU_TYPES:
        found = only(results, iou_type)
        expected = copy.deepcopy(ground_truth)
        plain(iou_type)(expected)
        stats, _ = by_hand(expected, found, iou_type)
        predictions = write_json(tmp_path / "p.json", found)
        result = score_predictions(predictions, path, iou_type=iou_type, backend="pycocotools")
        np.testing.assert_array_equal([getattr(result, k) for k in stats], list(stats.values()))
        assert result.ap > 0.02
    dataset = CocoDetection(folder, path, masks=True, keypoints=True)
    seen = dataset.report.num_objects + dataset.report.num_without_area
    assert seen == len(ground_truth["annotations"])
    assert all(len(t["boxes"]) == len(t["masks"]) for _, t in dataset)


def test_scoring_needs_no_ids_of_annotations_and_no_names_of_images(tmp_path):
    """And categories of one name are told apart."""
    expected = score_predictions(*foreign_files(tmp_path)).as_dict()

    def change(ground_truth, _):
        for entry in ground_truth["annotations"]:
            del entry["id"]
        for category, name in zip(
            ground_truth["categories"], ("pet", "pet", "pet (7)"), strict=True
        ):
            category["name"] = name
        ground_truth["images"][0]["file_name"] = "https://h/a.jpg"
        ground_truth["images"][1]["file_name"] = "/data/upload/1/a.jpg"

    result = score_predictions(*foreign_files(tmp_path, change=change))
    assert result.classes == ("pet (90)", "pet (7) (7)", "pet (7) (31)")
    assert [*result.ap_by_class.values()][:2] == [*expected["ap_by_class"].values()][:2]
    assert result.ap == expected["ap"]


def test_predicted_polygons_are_as_their_run_lengths(tmp_path):
    def change(_, results):
        for number, entry in enumerate(results):
            polygons = box_polygon([number % 40, number % 30, 9 + number % 17, 20.5])
            rle = coco_mask.merge(coco_mask.frPyObjects(polygons, 60, 80))
            as_runs = {"size": [60, 80], "counts": rle["counts"].decode()}
            entry["segmentation"] = polygons if folder == "polygons" else as_runs

    found = []
    for folder in ("polygons", "runs"):
        (tmp_path / folder).mkdir()
        files = foreign_files(tmp_path / folder, "segm", change)
        found.append(score_predictions(*files, iou_type="segm").as_dict())
    assert found[0] == found[1]
    assert found[0]["ap50"] > 0


def named(image_id):
    """Names whose order is another than that of the numbers."""
    return f"{image_id:04d}" if image_id % 2 else f"img {image_id}"


def shifted(number):
    """Of 64 bits: the faster backend would round it."""
    return number + 2**62


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
@pytest.mark.parametrize("iou_type", IOU_TYPES)
@pytest.mark.parametrize("change", [named, shifted])
def test_ids_of_images(tmp_path, change, iou_type, backend):
    """As pycocotools takes them, which are saved; names are told apart from numbers."""
    predictions, targets = full_case(2)
    for target in targets:
        target["image_id"] = change(target["image_id"])
    ids = [*map(shifted, CATEGORY_IDS)]
    content = as_entries(predictions, targets, ids, CLASSES)
    truth, results = (write_json(tmp_path / f"{k}.json", part) for k, part in enumerate(content))
    options = {"iou_types": IOU_TYPES, "backend": backend, "category_ids": ids}
    evaluator = evaluator_of(predictions, targets, **options)
    saved, _ = evaluator.save(tmp_path)
    options = {"iou_type": iou_type, "backend": backend}
    scored = [score_predictions(path, truth, **options) for path in (results, saved)]
    for result in (evaluator.compute(iou_type), *scored):
        check_by_hand(result, *content, iou_type, atol=0 if backend == "pycocotools" else 1e-12)
    assert result.ap > 0.02
    entry = content[1][0]
    other = (
        int(entry["image_id"].removeprefix("img ")) if change is named else str(entry["image_id"])
    )
    write_json(results, [entry | {"image_id": other}])
    with pytest.raises(ValueError, match=rf"predictions\[0\]: image_id .*got {other!r}"):
        score_predictions(results, truth, **options)


# ------------------------------------------------------------------------------------------ errors

SMALL = {"size": [9, 9], "counts": [81]}
# Runs of 4900 and -100: `rleToString` of pycocotools, by hand.
NEGATIVE = {"size": [60, 80], "counts": "Ti4lL"}
# Of the second entry. What the data set's reader refuses besides is in test_data_errors.py, broken
# run lengths in contract/test_result_files.py.
ENTRIES = [
    ("predictions", "bbox", {"score": math.nan}, "score .*nan"),
    ("predictions", "bbox", {"image_id": "3"}, "image_id .*'3'"),
    ("predictions", "bbox", {"bbox": [1, 2, -3, 3]}, r"bbox .*\[1, 2, -3, 3\]"),
    ("predictions", "segm", {"segmentation": ...}, "segmentation"),
    ("predictions", "segm", {"segmentation": SMALL}, "9 x 9.* 60 x 80"),
    ("predictions", "segm", {"segmentation": NEGATIVE}, "negative run"),
    ("predictions", "keypoints", {"keypoints": ...}, "keypoints"),
    ("predictions", "keypoints", {"keypoints": [1, 2]}, "keypoints .*51.* 2 "),
    ("predictions", "keypoints", {"keypoints": [math.inf] * 51}, "keypoints .*inf"),
    *(("predictions", "bbox", {"category_id": x}, f"category_id .*{x!r}") for x in ("7", 7.5, 8)),
    ("predictions", "bbox", {"bbox": [0, 0, 1e200, 1e200]}, r"bbox .*1e\+200"),
    ("annotations", "bbox", {"difficult": 2}, "difficult .*2"),
    *(
        ("annotations", "keypoints", {"num_keypoints": x}, f"num_keypoints .*{x!r}")
        for x in ("x", -1, 0.5, True)
    ),
    *(("annotations", t, {"area": -0.5}, "area .*-0.5") for t in IOU_TYPES),
    ("annotations", "bbox", {"bbox": [0, 0, 1e200, 1e200]}, r"bbox .*1e\+200"),
    ("annotations", "bbox", {"bbox": [1e308, 0, 1e308, 1], "area": None}, r"bbox .*1e\+308"),
]


@pytest.mark.parametrize(("part", "iou_type", "values", "named"), ENTRIES)
def test_an_error_names_file_entry_and_value(tmp_path, part, iou_type, values, named):
    def change(ground_truth, results):
        entry = (results if part == "predictions" else ground_truth[part])[1]
        entry |= values
        for key in [key for key, value in entry.items() if value is ...]:
            del entry[key]

    name = {"predictions": "p", "annotations": "gt"}[part]
    files = foreign_files(tmp_path, iou_type, change)
    with pytest.raises(ValueError, match=rf"{name}\.json.*{part}\[1\]: .*{named}"):
        score_predictions(*files, iou_type=iou_type)


@pytest.mark.parametrize("text", ["[{", "[3]"])
def test_predictions_of_another_kind(tmp_path, text):
    """Others, and a folder, are in test_data_errors.py: the reader is the same."""
    predictions, annotations = foreign_files(tmp_path)
    predictions.write_text(text)
    with pytest.raises(ValueError, match=r"p\.json"):
        score_predictions(predictions, annotations)
