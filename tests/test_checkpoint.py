"""Checkpoints are written whole or not at all, and read without running code."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from detmix.training import load_checkpoint, save_checkpoint
from detmix.training.checkpoint import FORMAT, write_atomically

STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)},
    "config": {"optim": {"lr": 0.1, "clip_norm": None}, "data": {"classes": ["a", "b"]}},
    "classes": ["a", "b"],
    "position": {"step": 7, "best": None, "due": True},
}


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
            expected = {"format": FORMAT, **STATE}
            del expected["model"]
            assert loaded == expected
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
    def test_flipped_bytes_load_or_name_the_file(self, path):
        save_checkpoint(path, STATE)
        data = path.read_bytes()
        rng = random.Random(0)
        refused = 0
        for _ in range(300):
            broken = bytearray(data)
            for _ in range(rng.randint(1, 6)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            path.write_bytes(broken)
            try:
                load_checkpoint(path)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
                refused += 1
        assert refused > 100

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
