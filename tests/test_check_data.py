"""``tools/check_data.py``: all that cannot be used is printed, and a shell can tell."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from detmix.data import SHAPE_CLASSES, VOCDetection, write_shapes, write_shapes_coco
from detmix.training.console import run_tool

TOOL = Path(__file__).parents[1] / "tools/check_data.py"
CLEAN = "0 boxes clipped, 0 without area dropped; 0 images left out"


@pytest.fixture
def run(capsys):
    main = runpy.run_path(str(TOOL))["main"]

    def run(*args):
        try:
            code = run_tool(main, [str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def voc(tmp_path):
    root = write_shapes(tmp_path / "shapes", num_train=6, num_test=4, image_size=64)
    return root, [f"--data.root={root}", f"--data.classes={json.dumps(SHAPE_CLASSES)}"]


def test_good_data(run, voc):
    root, args = voc
    counts = [
        VOCDetection(root, [("2007", split)], classes=SHAPE_CLASSES).report.num_objects
        for split in ("trainval", "test")
    ]
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    assert out == "".join(
        f"{name}: {images} images with {objects} objects; {CLEAN}\n"
        for name, images, objects in zip(("train", "test"), (6, 4), counts, strict=True)
    )


def test_bad_data(run, voc):
    """More than a warning would name, of both sets; a box is changed, and its image stays."""
    root, args = voc
    folder = root / "VOC2007"
    train, test = (
        (folder / f"ImageSets/Main/{split}.txt").read_text().split()
        for split in ("trainval", "test")
    )
    (folder / f"JPEGImages/{train[0]}.jpg").unlink()
    for name in (*train[1:5], test[1]):
        (folder / f"Annotations/{name}.xml").write_text("<annotation>")
    path = folder / f"Annotations/{test[0]}.xml"
    path.write_text(re.sub("<xmax>.*?<", "<xmax>65<", path.read_text(), count=1))
    with pytest.warns(UserWarning, match=f"1 of . boxes were clipped: .*{test[0]}.xml") as caught:
        code, out, err = run(*args)
    assert (code, err) == (1, "")
    assert not any("left out" in str(warning.message) for warning in caught)
    lines = out.splitlines()
    assert re.fullmatch("train: 1 images with .*; 5 images left out", lines[0])
    assert re.fullmatch(f"  missing file: .*{train[0]}.jpg: there is no such .*file", lines[1])
    for name, line in zip(train[1:5], lines[2:6], strict=True):
        assert re.match(f"  unusable annotation: .*{name}.xml: not well-formed XML", line)
    assert re.fullmatch("test: 3 images with .*; 1 boxes clipped, .*; 1 images left out", lines[6])
    assert re.match(f"  unusable annotation: .*{test[1]}.xml: not well-formed XML", lines[7])


def write_twice(coco):
    coco["annotations"][0]["id"] = coco["annotations"][1]["id"]


def lack_a_category(coco):
    first = coco["categories"].pop(0)["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["category_id"] != first]


def reverse_keypoints(coco):
    for category in coco["categories"]:
        category["keypoints"].reverse()


@pytest.mark.parametrize(
    ("change", "split", "code", "message"),
    [
        (lambda coco: None, "val", 0, f"test: 2 images with .*; {CLEAN}"),
        (lambda coco: coco["images"][0].update(width=1), "val", 1, "unusable image: .*says 1 x"),
        (lambda coco: coco["annotations"][0].update(keypoints=[]), "train", 1, "must be a list"),
        (write_twice, "train", 2, "annotation 2: the id is there twice"),
        (lack_a_category, "val", 2, "there is no category"),
        (reverse_keypoints, "val", 2, "to evaluate, .*, are not those to train"),
    ],
)
def test_coco(run, tmp_path, change, split, code, message):
    root = write_shapes_coco(tmp_path / "coco", num_train=4, num_test=2, image_size=64)
    path = root / f"annotations/instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    args = ("--data.format=coco", f"--data.root={root}", "--detector.name=keypointrcnn")
    found, out, err = run(*args)
    assert found == code, err
    assert re.search(message, err if code == 2 else out)
    assert err.startswith("error: ") == (code == 2)
