"""``tools/check_data.py``: all that cannot be used is printed, and a shell can tell."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from detmix.data import SHAPE_CLASSES, write_shapes, write_shapes_coco
from detmix.training.console import run_tool

CLEAN = "0 boxes clipped, 0 without area dropped; 0 images left out"


@pytest.fixture
def run(capsys):
    main = runpy.run_path(str(Path(__file__).parents[1] / "tools/check_data.py"))["main"]

    def run(*args):
        try:
            code = run_tool(main, [str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_devkit(run, tmp_path):
    """More than a warning would name, of both sets; a box is changed, and its image stays."""
    folder = write_shapes(tmp_path, num_train=6, num_test=4, image_size=64) / "VOC2007"
    args = [f"--data.root={tmp_path}", f"--data.classes={json.dumps(SHAPE_CLASSES)}"]
    names = [f"{number:06d}" for number in range(1, 11)]  # the last four are to test on
    xml = [folder / f"Annotations/{name}.xml" for name in names]
    counts = [path.read_text().count("<object>") for path in xml]
    assert run(*args) == (
        0,
        f"train: 6 images with {sum(counts[:6])} objects; {CLEAN}\n"
        f"test: 4 images with {sum(counts[6:])} objects; {CLEAN}\n",
        "",
    )
    (folder / f"JPEGImages/{names[0]}.jpg").unlink()
    for index in (1, 2, 3, 4, 7):
        xml[index].write_text("<annotation>")
    xml[6].write_text(re.sub("<xmax>.*?<", "<xmax>65<", xml[6].read_text(), count=1))
    with pytest.warns(UserWarning, match=f"1 of . boxes were clipped: .*{names[6]}.xml") as caught:
        code, out, err = run(*args)
    assert (code, err) == (1, "")
    assert not any("left out" in str(warning.message) for warning in caught)
    malformed = "  unusable annotation: .*{}.xml: not well-formed XML.*"
    expected = [
        "train: 1 images with .*; 5 images left out",
        f"  missing file: .*{names[0]}.jpg: there is no such .*file",
        *(malformed.format(name) for name in names[1:5]),
        "test: 3 images with .*; 1 boxes clipped, .*; 1 images left out",
        malformed.format(names[7]),
    ]
    for pattern, line in zip(expected, out.splitlines(), strict=True):
        assert re.fullmatch(pattern, line)


def reverse_keypoints(coco):
    for category in coco["categories"]:
        category["keypoints"].reverse()


@pytest.mark.parametrize(
    ("change", "split", "code", "message"),
    [
        (lambda coco: None, "val", 0, f"test: 2 images with .*; {CLEAN}"),
        (lambda coco: coco["annotations"][0].update(keypoints=[]), "train", 1, "must be a list"),
        (lambda coco: coco["categories"].clear(), "val", 2, "categories"),
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
