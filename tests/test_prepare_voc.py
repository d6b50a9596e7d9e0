"""The command that fetches Pascal VOC: complete, incomplete, without a network, interrupted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torchvision

from detmix.data import write_shapes

TOOL = Path(__file__).parents[1] / "tools" / "prepare_voc.py"


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_voc", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    official = {("2007", "trainval"): 3, ("2007", "test"): 2, ("2012", "trainval"): 4}
    monkeypatch.setattr(module, "IMAGES", official)
    return module


@pytest.fixture
def voc_names(monkeypatch):
    """Let the shapes pass for VOC classes, so that small devkits can be made."""
    names = ("dog", "cat", "cow", "horse", "sheep")
    monkeypatch.setattr("detmix.data.shapes.SHAPE_CLASSES", names)
    table = dict(zip(names, ("circle", "cross", "square", "star", "triangle"), strict=True))
    draw_mask = sys.modules["detmix.data.shapes"]._draw_mask
    monkeypatch.setattr(
        "detmix.data.shapes._draw_mask",
        lambda rng, name, *rest: draw_mask(rng, table[name], *rest),
    )


@pytest.fixture
def server(monkeypatch, voc_names):
    """Stand in for torchvision's data set: unpacks a small devkit and notes the calls."""
    calls = []

    def fetch(root, year, image_set, download):
        assert download
        calls.append((year, image_set))
        number = {"2007": 3, "2012": 4}[year]
        write_shapes(Path(root) / "VOCdevkit", number, 2, 64, year=year)

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fetch)
    return calls


def test_downloads_then_finds_everything_there(tool, server, tmp_path, capsys):
    arguments = ["--root", str(tmp_path / "data"), "--years", "2007", "2012", "2007"]
    assert tool.main(arguments) == 0
    assert server == [("2007", "trainval"), ("2012", "trainval")]  # test came with trainval
    output = capsys.readouterr().out
    assert "VOC2012 trainval       4         4" in output
    assert "voc0712_fasterrcnn_resnet50.yaml" in output
    assert f"--data.root {tmp_path / 'data' / 'VOCdevkit'}" in output
    assert tool.main(arguments) == 0
    assert len(server) == 2


def test_wrong_counts_are_told(tool, voc_names, tmp_path, capsys):
    write_shapes(tmp_path / "VOCdevkit", 3, 1, 64)
    assert tool.main(["--root", str(tmp_path), "--check-only"]) == 1
    streams = capsys.readouterr()
    assert "VOC2007 trainval       3         3" in streams.out
    assert "VOC2007 test: 1 images, expected 2" in streams.err
    assert "complete" not in streams.out


def test_check_only_downloads_nothing(tool, server, tmp_path, capsys):
    assert tool.main(["--root", str(tmp_path), "--check-only"]) == 1
    assert server == []
    assert "holds no VOC2007" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [URLError("no route"), TimeoutError("timed out"), RuntimeError("File not found")]
)
def test_without_a_network_it_says_what_to_do(tool, monkeypatch, tmp_path, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", fail)
    assert tool.main(["--root", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar" in message
    assert str(tmp_path) in message
    assert "http" not in message


def test_a_broken_archive_in_the_root_is_no_traceback(tmp_path):
    """Really torchvision: the archive fails its checksum and no proxy answers."""
    (tmp_path / "VOCtrainval_06-Nov-2007.tar").write_bytes(b"not an archive")
    dead = "http://127.0.0.1:9"
    environment = {**os.environ, "http_proxy": dead, "https_proxy": dead, "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 1
    assert "could not be downloaded or unpacked" in done.stderr
    assert "Traceback" not in done.stderr


def test_interruption(tool, monkeypatch, tmp_path, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", interrupt)
    assert tool.main(["--root", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_unknown_year(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--years", "2031"])
    assert stop.value.code == 2
    assert "'2031'" in capsys.readouterr().err


def test_archive_names_are_torchvisions(tool):
    known = {entry["filename"] for entry in torchvision.datasets.voc.DATASET_YEAR_DICT.values()}
    assert set(tool.ARCHIVES.values()) <= known
