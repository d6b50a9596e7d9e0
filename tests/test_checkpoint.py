"""Checkpoints are written whole or not at all, and read without running code."""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from detmix.training import load_checkpoint, save_checkpoint
from detmix.training.checkpoint import (
    FORMAT,
    LAST,
    PREVIOUS,
    temporary_path,
    write_atomically,
)
from detmix.training.resume import changed_options, load_newest
from detmix.training.run_folder import RunFolder

STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)},
    "config": {"optim": {"lr": 0.1, "clip_norm": None}, "data": {"classes": ["a", "b"]}},
    "classes": ["a", "b"],
    "position": {"step": 7, "best": None, "due": True},
}
PLAIN = {name: value for name, value in STATE.items() if name != "model"}


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


class TestSaving:
    def test_round_trip(self, path):
        save_checkpoint(path, STATE)
        for loaded in (load_checkpoint(path), load_checkpoint(str(path))):
            torch.testing.assert_close(loaded.pop("model"), STATE["model"], rtol=0, atol=0)
            assert loaded == {"format": FORMAT, **PLAIN}
        assert torch.load(path, weights_only=True).keys() == {"format", *STATE}

    def test_replaces_and_leaves_no_other_file(self, path):
        save_checkpoint(path, {**STATE, "position": {}})
        save_checkpoint(path, STATE)
        assert load_checkpoint(path)["position"] == STATE["position"]
        assert os.listdir(path.parent) == ["last.pt"]

    def test_a_write_that_fails_changes_nothing(self, path):
        save_checkpoint(path, STATE)
        before = path.read_bytes()
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            save_checkpoint(path, {**STATE, "bad": lambda: None})
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["last.pt"]

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


class TestNewest:
    """The last checkpoint that is whole is found, whatever happened to the ones after it."""

    @pytest.fixture
    def run_dir(self, tmp_path):
        for step in (1, 2, 3):
            state = {**STATE, "position": {"step": step}}
            save_checkpoint(tmp_path / LAST, state, keep=tmp_path / PREVIOUS)
        return tmp_path

    def test_whole(self, run_dir):
        assert sorted(os.listdir(run_dir)) == [LAST, PREVIOUS]
        newest = load_newest(run_dir, {})
        assert (newest.path, newest.problem) == (run_dir / LAST, None)
        assert newest.state["position"] == {"step": 3}

    def test_none(self, tmp_path):
        assert load_newest(tmp_path, {}) is None
        assert load_newest(tmp_path / "missing", {}) is None

    @pytest.mark.parametrize("change", ["missing", "empty", "half", "flipped", "garbage"])
    def test_the_one_before(self, run_dir, change):
        damage(run_dir / LAST, change)
        newest = load_newest(run_dir, {})
        assert newest.path == run_dir / PREVIOUS
        assert str(run_dir / LAST) in newest.problem
        assert newest.state["position"] == {"step": 2}

    def test_both_broken(self, run_dir):
        damage(run_dir / LAST, "half")
        damage(run_dir / PREVIOUS, "flipped")
        with pytest.raises(ValueError, match=f"{run_dir} cannot .*{LAST} is .*{PREVIOUS} is bro"):
            load_newest(run_dir, {})

    def test_a_newer_format_is_not_passed_over(self, run_dir):
        torch.save({**STATE, "format": FORMAT + 1}, run_dir / LAST)
        with pytest.raises(ValueError, match=f"{LAST} has checkpoint format"):
            load_newest(run_dir, {})


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        return path.unlink()
    if how == "flipped":
        data[data.index(STATE["model"]["weight"].numpy().tobytes()) + 6] ^= 1
    if how == "half":
        data = data[: len(data) // 2]
    return path.write_bytes({"empty": b"", "garbage": b"not a checkpoint"}.get(how, data))


class TestBadFiles:
    def test_missing(self, path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint {path}"):
            load_checkpoint(path)
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            load_checkpoint(path.parent)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_truncated(self, path, share):
        save_checkpoint(path, STATE)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=str(path)):
            load_checkpoint(path)

    @pytest.mark.parametrize(
        "data",
        [b"", b"not a checkpoint at all", b"PK\x03\x04", bytes(range(256)) * 8, b"\x80\x02}q\x00."],
    )
    def test_garbage(self, path, data):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=str(path)):
            load_checkpoint(path)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("most", [1, 50])
    def test_flipped_bits_are_noticed_or_change_nothing(self, path, most):
        save_checkpoint(path, STATE)
        data = path.read_bytes()
        rng = random.Random(most)
        refused = 0
        for _ in range(300):
            broken = bytearray(data)
            for _ in range(rng.randint(1, most)):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            try:
                loaded = load_checkpoint(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
                refused += 1
            else:
                torch.testing.assert_close(loaded.pop("model"), STATE["model"], rtol=0, atol=0)
                assert loaded == {"format": FORMAT, **PLAIN}
        assert refused > 150

    def test_a_flipped_bit_of_a_tensor_which_torch_does_not_notice(self, path):
        save_checkpoint(path, STATE)
        data = bytearray(path.read_bytes())
        place = data.index(STATE["model"]["weight"].numpy().tobytes())
        data[place + 6] ^= 1
        path.write_bytes(data)
        torch.load(path, weights_only=True)
        with pytest.raises(ValueError, match=f"{path} is broken: the checksum of .*data/0"):
            load_checkpoint(path)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
    def test_code_is_not_run(self, path, tmp_path, save):
        touched = tmp_path / "touched"
        bad = {"format": FORMAT, **STATE, "model": Malicious(touched)}
        save(bad, path)
        with pytest.raises(ValueError, match=f"(?s){path}.*weights_only=True"):
            load_checkpoint(path)
        assert not touched.exists()
        torch.load(path, weights_only=False) if save is torch.save else pickle.loads(
            path.read_bytes()
        )
        assert touched.exists(), "it would have made the file"

    @pytest.mark.parametrize(
        ("content", "lacks"),
        [
            ({"weight": torch.zeros(2)}, "classes, config, format, model"),
            ({"model": {}, "epoch": 3, "config": {}, "classes": []}, "format"),
            ([1, 2], "classes, config, format, model"),
            (torch.zeros(3), "classes, config, format, model"),
        ],
    )
    def test_foreign(self, path, content, lacks):
        torch.save(content, path)
        message = f"{path} is not a checkpoint of detmix: it lacks {lacks}"
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)

    @pytest.mark.parametrize("number", [FORMAT + 1, "2", None])
    def test_newer_format(self, path, number):
        torch.save({**STATE, "format": number}, path)
        with pytest.raises(ValueError, match=f"{path} has checkpoint format {number}, .*{FORMAT}"):
            load_checkpoint(path)


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
