"""Writing fails without harm, and what has changed since is found; the rest is in the contract."""

from __future__ import annotations

import errno
import os
import resource
import threading
from contextlib import contextmanager

import pytest
import torch

from detmix.files import temporary_path, write_atomically
from detmix.training import load_checkpoint, save_checkpoint
from detmix.training.checkpoint import changed_options
from detmix.training.run_folder import RunFolder

STATE = {"model": {"weight": torch.arange(6.0)}, "config": {}, "classes": ["a"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


class TestSaving:
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    def test_a_write_that_is_interrupted_half_way(self, path, error):
        path.write_bytes(b"old")

        def write(file):
            file.write(b"new, but not wh")
            raise error

        with pytest.raises(type(error)):
            write_atomically(path, write)
        assert path.read_bytes() == b"old"
        assert os.listdir(path.parent) == ["last.pt"]


class TestFullDisk:
    """``/dev/full`` takes nothing, as a full disk."""

    pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")

    @pytest.mark.parametrize("size", [6, 600_000])
    def test_names_the_file_and_keeps_the_one_before(self, path, size):
        save_checkpoint(path, STATE)
        before = path.read_bytes()
        temporary_path(path).symlink_to("/dev/full")
        message = f"{path} could not be written: No space left on device"
        with pytest.raises(OSError, match=message) as caught:
            save_checkpoint(path, {**STATE, "more": torch.zeros(size)}, keep=path.parent / "kept")
        assert caught.value.errno == errno.ENOSPC
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["last.pt"]

    def test_of_the_metrics(self, tmp_path):
        with RunFolder(tmp_path / "run", {}) as folder:
            folder.metrics.symlink_to("/dev/full")
            with pytest.raises(OSError, match=f"{folder.metrics} could not be written: No space"):
                folder.log("train", 1, 0.1, {"loss": 1.0})

    def test_of_tensorboard(self, tmp_path, monkeypatch):
        """Its own thread meets the error, which must neither be lost nor have the run hang."""
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        folder = RunFolder(tmp_path / "run", {})
        folder.metrics.symlink_to("/dev/null")
        folder.log("train", 1, 0.1, {"loss": 1.0})

        def go_on():
            for step in range(2, 1000):
                folder.log("train", step, 0.1, {"loss": 1.0})
            folder.close()

        with limited_file_size(1000), pytest.raises(OSError, match="tensorboard could not be writ"):
            go_on()


@contextmanager
def limited_file_size(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_changed_options():
    before = {"seed": 0, "run_dir": "a", "old": 1, "optim": {"lr": 0.1, "name": "sgd"}, "loss": {}}
    now = {"seed": 1, "run_dir": "b", "new": 1, "optim": {"lr": 0.2, "name": "sgd"}, "loss": None}
    assert changed_options(before, now) == {
        "loss": ({}, None),
        "optim.lr": (0.1, 0.2),
        "seed": (0, 1),
    }


def test_changed_options_of_the_detector():
    before = {"detector": {"name": "fcos", "options": {}}}
    now = {"detector": {"name": "fcos", "options": {"nms_thresh": 0.5}}}
    assert changed_options(before, now) == {"detector.options": ({}, {"nms_thresh": 0.5})}


@pytest.mark.parametrize("tail", [None, True, False])
def test_an_option_of_an_earlier_version(tmp_path, tail):
    path = tmp_path / "last.pt"
    save_checkpoint(
        path, {**STATE, "format": 1, "config": {"backbone": {"name": "a", "reduced_tail": tail}}}
    )
    if tail is False:
        with pytest.raises(ValueError, match=r"last\.pt .*backbone\.reduced_tail=False"):
            load_checkpoint(path)
    else:
        assert load_checkpoint(path)["config"] == {"backbone": {"name": "a"}}
