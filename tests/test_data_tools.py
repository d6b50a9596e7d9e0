"""The commands that fetch Pascal VOC, write the shapes and print which images cannot be used."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torchvision
from data_files import DOG, SIZE, dog, make_devkit

from detmix.data import SHAPE_CLASSES, write_shapes, write_shapes_coco
from detmix.training.console import run_tool

COUNTS = {("2007", "trainval"): 3, ("2007", "test"): 2, ("2012", "trainval"): 4}
CLEAN = "0 boxes clipped, 0 without area dropped; 0 images left out"


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns its code, output and errors."""

    def run(main, *args):
        try:
            code = run_tool(main, [str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def main_of(name):
    return import_module(f"detmix.commands.{name}").main


@pytest.fixture
def voc(tmp_path, monkeypatch, run):
    """Return `run` for the command that fetches an archive of fewer images."""
    main = main_of("prepare_voc")
    parts = {part: (name, COUNTS[part]) for part, (name, _) in main.__globals__["PARTS"].items()}
    monkeypatch.setitem(main.__globals__, "PARTS", parts)
    return lambda *args: run(main, "--root", tmp_path, *args)


def unpack(root, year, image_set, download=True):
    """Write what an archive would bring: the test images come along with those of training."""
    assert download
    train = COUNTS[year, "trainval"]
    names = [f"{number:06d}" for number in range(train + 2)]
    devkit, xml = Path(root) / "VOCdevkit", {name: SIZE + DOG for name in names}
    make_devkit(devkit, xml, split="\n".join(names[:train]), year=year)
    (devkit / f"VOC{year}/ImageSets/Main/test.txt").write_text("\n".join(names[train:]))


def test_downloads_then_finds_everything_there(voc, monkeypatch, tmp_path):
    fetch = mock.Mock(side_effect=[KeyboardInterrupt])
    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fetch)
    arguments = ("--years", "2007", "2012", "2007")
    assert voc(*arguments)[0] == 130
    fetch.side_effect = unpack
    for num_calls in (3, 3):  # the test images came with those of training
        code, out, _ = voc(*arguments)
        assert (code, fetch.call_count) == (0, num_calls)
        assert "VOC2012 trainval: 4 images, 4 objects, 0 of them difficult\n" in out
        assert f"--config voc0712_fasterrcnn_resnet50 --data.root {tmp_path / 'VOCdevkit'}" in out


def test_check_only_downloads_nothing_and_tells_what_lacks(voc, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets, "VOCDetection", None)
    assert voc("--check-only")[0] == 1
    unpack(tmp_path, "2007", "trainval")
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("000004\n")
    code, out, err = voc("--check-only")
    assert code == 1
    assert "VOC2007 test: 1 images, expected 2" in err
    assert "complete" not in out


def test_without_a_network_it_says_what_to_do(voc, monkeypatch, tmp_path):
    """Really torchvision: the archive fails its checksum and no proxy answers."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    (tmp_path / "VOCtrainval_06-Nov-2007.tar").write_bytes(b"not an archive")
    code, _, err = voc()
    assert code == 2
    assert "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar" in err
    assert str(tmp_path) in err


def test_archive_names_are_torchvisions():
    known = {entry["filename"] for entry in torchvision.datasets.voc.DATASET_YEAR_DICT.values()}
    parts = main_of("prepare_voc").__globals__["PARTS"]
    assert {name for name, _ in parts.values()} <= known


@pytest.mark.parametrize(("kind", "folder"), [("coco", "val2017"), ("voc", "VOC2007")])
def test_shapes_in_both_layouts_and_nothing_else_is_overwritten(tmp_path, run, kind, folder):
    main, root = main_of("prepare_shapes"), tmp_path / "a"
    options = ["--root", root, f"--format={kind}", "--num_train=3", "--num_test=2"]
    assert run(main, *options, "--seed=5") == (0, f"shapes data: {root} (3 + 2 images)\n", "")
    assert len(list(root.rglob("*.jpg"))) == 5
    assert (root / folder).is_dir()
    code, _, err = run(main, *options)
    assert (code, err.startswith(f"error: {root}")) == (2, True)


def test_what_cannot_be_used_of_a_devkit(run, tmp_path):
    """More than a warning would name, of both sets; a box is changed, and its image stays."""
    folder = write_shapes(tmp_path, num_train=6, num_test=4, image_size=64) / "VOC2007"
    classes = f"--data.classes={json.dumps(SHAPE_CLASSES)}"
    names = [f"{number:06d}" for number in range(1, 11)]  # the last four are to test on
    xml = [folder / f"Annotations/{name}.xml" for name in names]
    (folder / f"JPEGImages/{names[0]}.jpg").unlink()
    for index in (1, 2, 3, 4, 7):
        xml[index].write_text("<annotation>")
    xml[6].write_text(re.sub("<xmax>.*?<", "<xmax>65<", xml[6].read_text(), count=1))
    with pytest.warns(UserWarning, match=f"1 of . boxes were clipped: .*{names[6]}.xml") as caught:
        code, out, err = run(main_of("check"), f"--data.root={tmp_path}", classes)
    assert (code, err) == (1, "")
    assert not any("left out" in str(warning.message) for warning in caught)
    malformed = "  unusable annotation: .*{}.xml: not well-formed XML.*"
    expected = [
        "train: 1 images with . objects; 0 boxes clipped, .*; 5 images left out",
        "  corners: 0 boxes begin below 1, 0 end at .*; 1-inclusive fits best, .* 1-inclusive",
        f"  missing file: .*{names[0]}.jpg: there is no such file",
        *(malformed.format(name) for name in names[1:5]),
        "test: 3 images with .*; 1 boxes clipped, .*; 1 images left out",
        "  corners: 0 boxes begin below 1, 0 end at .* 1 beyond; .* data.corners is 1-inclusive",
        malformed.format(names[7]),
    ]
    for pattern, line in zip(expected, out.splitlines(), strict=True):
        assert re.fullmatch(pattern, line)


def test_which_corners_fit(run, tmp_path):
    """Of each split; the first was written 0-exclusive, the second 1-exclusive."""
    body = SIZE + dog(0, 0, 60, 40) + dog(7, 0, 30, 20)
    root = make_devkit(tmp_path, {"a": body, "b": SIZE + dog(1, 1, 61, 41)}, split="a")
    (root / "VOC2007/ImageSets/Main/test.txt").write_text("b")
    with pytest.warns(UserWarning, match="1 of 1 boxes were clipped.*1-exclusive fits best"):
        _, out, _ = run(main_of("check"), f"--data.root={root}", "--data.corners=0-exclusive")
    assert re.findall(r"(\d+) boxes clipped", out) == ["0", "1"]
    line = r"(\d+) boxes begin below 1, (\d+) end at .*, (\d+) beyond; (\S+) fits best, (.*)"
    numbers = (("2", "1", "0", "0-exclusive"), ("0", "0", "1", "1-exclusive"))
    assert re.findall(line, out) == [(*found, "data.corners is 0-exclusive") for found in numbers]


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
def test_what_cannot_be_used_of_coco(run, tmp_path, change, split, code, message):
    root = write_shapes_coco(tmp_path / "coco", num_train=4, num_test=2, image_size=64)
    path = root / f"annotations/instances_{split}2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    args = ("--data.format=coco", f"--data.root={root}", "--detector.name=keypointrcnn")
    found, out, err = run(main_of("check"), *args)
    assert found == code, err
    assert re.search(message, err if code == 2 else out)
    assert err.startswith("error: ") == (code == 2)
