"""The commands that fetch Pascal VOC and write the shapes: complete, incomplete, interrupted."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torchvision
from data_files import DOG, SIZE, make_devkit

from detmix.training.console import run_tool

TOOLS = Path(__file__).parents[1] / "tools"
COUNTS = {("2007", "trainval"): 3, ("2007", "test"): 2, ("2012", "trainval"): 4}


@pytest.fixture
def voc(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command and returns its code, output and errors."""
    main = runpy.run_path(str(TOOLS / "prepare_voc.py"))["main"]
    parts = {part: (name, COUNTS[part]) for part, (name, _) in main.__globals__["PARTS"].items()}
    monkeypatch.setitem(main.__globals__, "PARTS", parts)

    def run(*args):
        try:
            code = run_tool(main, ["--root", str(tmp_path), *args])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def unpack(root, year, image_set, download=True):
    """Write what an archive would bring: the test images come along with those of training."""
    assert download
    train = COUNTS[year, "trainval"]
    names = [f"{number:06d}" for number in range(train + 2)]
    devkit, xml = Path(root) / "VOCdevkit", {name: SIZE + DOG for name in names}
    make_devkit(devkit, xml, split="\n".join(names[:train]), year=year)
    (devkit / f"VOC{year}/ImageSets/Main/test.txt").write_text("\n".join(names[train:]))


def test_downloads_then_finds_everything_there(voc, monkeypatch, tmp_path):
    calls = []

    def fetch(root, year, image_set, download):
        calls.append((year, image_set))
        if len(calls) == 1:
            raise KeyboardInterrupt
        unpack(root, year, image_set, download)

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fetch)
    arguments = ("--years", "2007", "2012", "2007")
    assert voc(*arguments)[0] == 130
    code, out, _ = voc(*arguments)
    assert code == 0
    assert calls[1:] == [("2007", "trainval"), ("2012", "trainval")]  # test came with trainval
    assert "VOC2012 trainval: 4 images, 4 objects, 0 of them difficult\n" in out
    assert f"voc0712_fasterrcnn_resnet50.yaml --data.root {tmp_path / 'VOCdevkit'}" in out
    assert voc(*arguments)[0] == 0
    assert len(calls) == 3


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
    parts = runpy.run_path(str(TOOLS / "prepare_voc.py"))["PARTS"]
    assert {name for name, _ in parts.values()} <= known


@pytest.mark.parametrize(("kind", "folder"), [("coco", "val2017"), ("voc", "VOC2007")])
def test_shapes_in_both_layouts_and_nothing_else_is_overwritten(tmp_path, capsys, kind, folder):
    main = runpy.run_path(str(TOOLS / "prepare_shapes.py"))["main"]
    options = ["--root", str(tmp_path / "a"), f"--format={kind}", "--num_train=3", "--num_test=2"]
    assert run_tool(main, [*options, "--seed=5"]) == 0
    assert capsys.readouterr() == (f"shapes data: {tmp_path / 'a'} (3 + 2 images)\n", "")
    assert len(list((tmp_path / "a").rglob("*.jpg"))) == 5
    assert (tmp_path / "a" / folder).is_dir()
    assert run_tool(main, options) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'a'}")
