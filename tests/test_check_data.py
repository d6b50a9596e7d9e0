"""``tools/check_data.py``: all that cannot be used is printed, and a shell can tell."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from detmix.data import SHAPE_CLASSES, write_shapes, write_shapes_coco
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


def test_a_devkit(run, tmp_path):
    """More than a warning would name, of both sets; a box is changed, and its image stays."""
    root = write_shapes(tmp_path / "shapes", num_train=6, num_test=4, image_size=64)
    args = [f"--data.root={root}", f"--data.classes={json.dumps(SHAPE_CLASSES)}"]
    folder = root / "VOC2007"
    train, test = (
        (folder / f"ImageSets/Main/{split}.txt").read_text().split()
        for split in ("trainval", "test")
    )
    xml = {name: folder / f"Annotations/{name}.xml" for name in (*train, *test)}
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    assert out == "".join(
        f"{name}: {len(ids)} images with "
        f"{sum(xml[i].read_text().count('<object>') for i in ids)} objects; {CLEAN}\n"
        for name, ids in (("train", train), ("test", test))
    )

    (folder / f"JPEGImages/{train[0]}.jpg").unlink()
    for name in (*train[1:5], test[1]):
        xml[name].write_text("<annotation>")
    text = re.sub("<xmax>.*?<", "<xmax>65<", xml[test[0]].read_text(), count=1)
    xml[test[0]].write_text(text)
    with pytest.warns(UserWarning, match=f"1 of . boxes were clipped: .*{test[0]}.xml") as caught:
        code, out, err = run(*args)
    assert (code, err) == (1, "")
    assert not any("left out" in str(warning.message) for warning in caught)
    expected = [
        "train: 1 images with .*; 5 images left out",
        f"  missing file: .*{train[0]}.jpg: there is no such .*file",
        *(f"  unusable annotation: .*{name}.xml: not well-formed XML.*" for name in train[1:5]),
        "test: 3 images with .*; 1 boxes clipped, .*; 1 images left out",
        f"  unusable annotation: .*{test[1]}.xml: not well-formed XML.*",
    ]
    for pattern, line in zip(expected, out.splitlines(), strict=True):
        assert re.fullmatch(pattern, line)


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
