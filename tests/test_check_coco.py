"""Checking data in the COCO format tells what training and evaluation would refuse, and no more."""

from __future__ import annotations

import json
import re
import warnings

import pytest

from detmix.data import CocoDetection, check_coco, write_shapes_coco
from detmix.training import TrainConfig, parse_args
from detmix.training.datasets import (
    check_keypoints,
    check_same_keypoints,
    note_data,
    open_dataset,
)

FILES = {
    "train": ("train2017", "annotations/instances_train2017.json"),
    "test": ("val2017", "annotations/instances_val2017.json"),
}


@pytest.fixture
def root(tmp_path):
    return write_shapes_coco(tmp_path / "coco", num_train=8, num_test=4, image_size=64)


@pytest.fixture
def edit(root):
    """Return a function that changes an annotation file."""

    def edit(subset, change):
        path = root / FILES[subset][1]
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def check(root, **options):
    subsets = {name: (root / folder, root / path) for name, (folder, path) in FILES.items()}
    return check_coco(subsets, **options)


def problems(found):
    return [(problem.kind, problem.subset) for problem in found.problems]


def train_and_evaluate(root, *options):
    """Open the data as a training does, and read all of it."""
    args = ["--data.format=coco", f"--data.root={root}", *options]
    config = parse_args(TrainConfig, args)
    train = open_dataset(config, train=True)
    noted = note_data(config, train)
    test = open_dataset(noted, train=False)
    check_keypoints(noted, test, train=False)
    check_same_keypoints(train, test)
    return [dataset[index] for dataset in (train, test) for index in range(len(dataset))]


def lack_a_category(content):
    first = content["categories"].pop(0)["id"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != first]


def reverse_keypoints(content):
    for category in content["categories"]:
        category["keypoints"].reverse()


def far_away(content):
    content["annotations"][0]["bbox"] = [1e39, 1, 5, 5]


def infinite(content):
    content["annotations"][0]["bbox"] = [1e308, 1, 1e308, 5]


@pytest.mark.parametrize(
    ("change", "options", "kinds", "message"),
    [
        (lack_a_category, {}, [("unknown class", "test")], "there is no category"),
        (reverse_keypoints, {"keypoints": True}, [("unusable list", "test")], "not those to train"),
        (far_away, {}, [("unusable annotation", "test")], "too large for float32"),
        (infinite, {}, [("unusable annotation", "test")], "too large for float32"),
        (
            lambda content: None,
            {"keypoints": True, "num_keypoints": 17},
            [("unusable list", "train"), ("unusable list", "test")],
            "names 4 keypoints for each object",
        ),
    ],
)
def test_what_training_refuses(root, edit, change, options, kinds, message):
    edit("test", change)
    arguments = ["--detector.name=keypointrcnn"] if "keypoints" in options else []
    arguments += [f"--data.num_keypoints={n}" for n in [options.get("num_keypoints")] if n]
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(root, *arguments)
    found = check(root, **options)
    assert problems(found) == kinds
    assert message in found.problems[0].message


def test_what_only_evaluation_knows_is_worth_a_look(root, edit):
    def add(content):
        content["categories"] += [{"id": 98, "name": "mule"}, {"id": 99, "name": "unicorn"}]
        content["annotations"].append(content["annotations"][0] | {"id": 9999, "category_id": 99})

    edit("test", add)
    train_and_evaluate(root)
    found = check(root)
    assert found.is_clean, found
    (note,) = (note for note in found.notes if note.kind == "class that is not trained")
    assert "category 99 ('unicorn') with 1 objects" in note.message
    names = CocoDetection(root / FILES["train"][0], root / FILES["train"][1]).classes
    assert not {n.kind for n in check(root, classes=names).notes} & {"class that is not trained"}


@pytest.mark.parametrize("part", ["annotations", "images"])
@pytest.mark.parametrize("how", ["twice", "missing"])
def test_one_bad_id_hides_nothing(root, edit, part, how):
    def change_id(content):
        items = content[part]
        last = items[-1]["id"]
        content["annotations"] = [
            item for item in content["annotations"] if part != "images" or item["image_id"] != last
        ]
        if how == "twice":
            items[-1]["id"] = items[0]["id"]
        else:
            del items[-1]["id"]

    def change_more(content):
        content["annotations"][5]["bbox"] = [1, 2]
        content["images"][0]["width"] += 1

    edit("train", change_id)
    message = "the id is there twice" if how == "twice" else "(from 0): id must be an integer"
    for on_error in ("raise", "skip"):  # a fault of the file: who knows whose objects these are
        with pytest.raises(ValueError, match=re.escape(message)):
            CocoDetection(root / FILES["train"][0], root / FILES["train"][1], on_error=on_error)
    edit("train", change_more)
    found = check(root)
    kinds = ["another size", "unusable annotation", "unusable annotation"]
    assert sorted(problems(found)) == [(kind, "train") for kind in kinds]
    assert message in found.problems[0].message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../x.jpg", "name that leads outside"),
        ("/x", "name that leads outside"),
        ("a\0", "name that leads outside"),
        (None, "unusable annotation"),
        ("", "unusable annotation"),
    ],
)
def test_an_image_with_a_bad_name_is_told_once(root, edit, name, kind):
    edit("train", lambda content: content["images"][1].update(file_name=name))
    found = check(root)
    assert problems(found) == [(kind, "train")]
    assert "file_name" in found.problems[0].message
    assert found.num_images["train"] == 7


def test_counts_are_those_of_the_data_set(root, edit):
    """Of what is used: training leaves boxes without area out, evaluation keeps them."""

    def change(content):
        for item in content["annotations"][::3]:
            item["bbox"] = [500, 500, 3, 3]
        for item in content["annotations"][1::3]:
            item["iscrowd"] = 1
        last = content["images"][-1]["id"]
        for item in content["annotations"]:
            if item["image_id"] == last:
                item["bbox"] = [5, 5, -3, 3]

    for subset, (folder, path) in FILES.items():
        edit(subset, change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rules = {"clip": True, "crowd": "drop"} if subset == "train" else {"clip": False}
            report = CocoDetection(root / folder, root / path, **rules).report
        found = check(root)
        assert found.num_objects[subset] == report.num_objects
        empty = [n for n in found.notes if (n.kind, n.subset) == ("image without objects", subset)]
        assert len(empty) == report.num_empty_images
        assert (report.num_empty_images > 0) == (subset == "train")
