"""Checkpoints are written whole or not at all, read whole or refused, and stay readable."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile

import pytest
import torch
import torchvision
from fuzz import limits
from tiny import SETTINGS

from detmix.detectors import build_detector, load_backbone_weights
from detmix.training import (
    TrainConfig,
    load_checkpoint,
    load_detector,
    parse_args,
    save_checkpoint,
)

FORMAT = 2
CLASSES = SETTINGS["data"]["classes"]
STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)},
    "config": {"optim": {"lr": 0.1, "clip_norm": None}, "data": {"classes": ["a", "b"]}},
    "classes": ["a", "b"],
    "normalization": {"image_mean": [0.5, 0.4, 0.3], "norm_eps": None},
    "position": {"step": 7, "best": None, "due": True},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def assert_is_state(loaded):
    torch.testing.assert_close(loaded.pop("model"), STATE["model"], rtol=0, atol=0)
    assert loaded == {"format": FORMAT, **{k: v for k, v in STATE.items() if k != "model"}}


class TestSaving:
    def test_round_trip(self, path):
        save_checkpoint(path, STATE)
        for loaded in (load_checkpoint(path), load_checkpoint(str(path))):
            assert_is_state(loaded)
        assert_is_state(torch.load(path, weights_only=True))

    def test_replaces_and_leaves_no_other_file(self, path):
        save_checkpoint(path, {**STATE, "position": {}})
        save_checkpoint(path, STATE)
        assert_is_state(load_checkpoint(path))
        assert os.listdir(path.parent) == ["last.pt"]

    def test_a_write_that_fails_changes_nothing(self, path):
        save_checkpoint(path, STATE)
        before = path.read_bytes()
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            save_checkpoint(path, {**STATE, "bad": lambda: None})
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["last.pt"]


class TestBroken:
    def test_missing(self, path):
        for missing in (path, path.parent):
            with pytest.raises(FileNotFoundError, match=str(missing)):
                load_checkpoint(missing)

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
        for _ in range(200):
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
                assert_is_state(loaded)
        assert refused > 100

    def test_a_flipped_bit_of_a_tensor_which_torch_does_not_notice(self, path):
        save_checkpoint(path, STATE)
        data = bytearray(path.read_bytes())
        place = data.index(STATE["model"]["weight"].numpy().tobytes())
        data[place + 6] ^= 1
        path.write_bytes(data)
        torch.load(path, weights_only=True)
        with pytest.raises(ValueError, match=str(path)):
            load_checkpoint(path)

    def test_compressed_to_fill_the_memory(self, tmp_path):
        torch.save({"a": torch.zeros(2**24, dtype=torch.uint8)}, tmp_path / "a.pt")
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as good,
            zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
        ):
            for name in good.namelist():
                bomb.writestr(name, good.read(name))
        assert (tmp_path / "b.pt").stat().st_size < 2**16
        assert torch.load(tmp_path / "b.pt", weights_only=True)["a"].nbytes == 2**24
        for load in (load_checkpoint, read_body):
            with pytest.raises(ValueError, match=r"b\.pt"):
                load(tmp_path / "b.pt")


def read_body(path):
    load_backbone_weights(torchvision.models.resnet18(), path)


class TestForeign:
    @pytest.mark.parametrize(
        ("content", "lacks"),
        [
            ({"weight": torch.zeros(2)}, "classes, config, format, model"),
            ({"model": {}, "epoch": 3, "config": {}, "classes": []}, "format"),
            ([1, 2], "classes, config, format, model"),
            (torch.zeros(3), "classes, config, format, model"),
        ],
    )
    def test_another_content(self, path, content, lacks):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"{path}.*{lacks}"):
            load_checkpoint(path)

    @pytest.mark.parametrize("number", [FORMAT + 1, "2", None])
    def test_a_newer_format(self, path, number):
        torch.save({**STATE, "format": number}, path)
        with pytest.raises(ValueError, match=f"{path}.*{number}"):
            load_checkpoint(path)


@pytest.fixture(scope="module")
def model():
    """Return the detector that `SETTINGS` ask for."""
    config = parse_args(TrainConfig, ["--config", json.dumps(SETTINGS)])
    torch.manual_seed(0)
    return build_detector(config.detector, config.backbone, 1 + len(CLASSES)).eval()


def shifted(state):
    return {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}


class TestFormat1:
    """Checkpoints of the first format are read."""

    @pytest.mark.parametrize("averaged", [False, True])
    @pytest.mark.parametrize("save", [torch.save, save_checkpoint])
    def test_predictions_are_those_of_the_weights(self, path, model, averaged, save):
        """Of the averaged ones where there are some."""
        weights, state = model.state_dict(), {"config": SETTINGS, "classes": CLASSES}
        state |= {"model": shifted(weights), "ema": weights} if averaged else {"model": weights}
        save(*((path, state) if save is save_checkpoint else (state | {"format": 1}, path)))
        loaded, config = load_detector(path, ["--data.eval_batch_size=3"])
        assert (list(config.data.class_names), config.data.eval_batch_size) == (CLASSES, 3)
        assert not loaded.training
        images = [torch.rand(3, 64, 48), torch.rand(3, 40, 64)]
        with torch.inference_mode():
            pairs = list(zip(loaded(images), model(images), strict=True))
        for found, expected in pairs:
            assert len(expected["boxes"]) > 0
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"config": None}, "config"),
            ({"config": [1]}, "config"),
            ({"config": {}}, ""),
            ({"classes": 5}, "classes"),
            ({"classes": [5, None]}, "classes"),
            ({"format": [1]}, "format"),
            ({"classes": ["a"]}, "classes a"),
            ({"model": torch.zeros(2)}, "model"),
            ({"model": {5: torch.zeros(2)}}, ""),
            ({"ema": 5}, ""),
            ({"ema": torch.zeros(2)}, ""),
            ({"config": SETTINGS | {"detector": {"anchor_sizes": [1]}}}, "anchor_sizes"),
            ({"config": SETTINGS | {"detector": {"head_dim": 2**62}}}, ""),
            ({"config": SETTINGS | {"detector": {"head_dim": 200_000}}}, ""),  # 160 GB
            ({"config": SETTINGS | {"optim": {"lr": 10**400}}}, ""),
        ],
    )
    def test_other_content_is_refused(self, path, model, change, named):
        state = {"format": 1, "model": model.state_dict(), "config": SETTINGS, "classes": CLASSES}
        torch.save(state | change, path)
        with limits(), pytest.raises(ValueError, match=f"(?s){named}") as caught:
            load_detector(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("kind", ["complex", "integer", "missing", "unexpected"])
    def test_other_weights_are_refused(self, path, model, kind):
        weights, name = model.state_dict(), "backbone.body.conv1.weight"
        if kind == "missing":
            del weights[name]
        elif kind == "unexpected":
            weights["x"] = torch.zeros(1)
        else:
            weights[name] = weights[name].to({"complex": torch.cfloat, "integer": torch.int}[kind])
        save_checkpoint(path, {"model": weights, "config": SETTINGS, "classes": CLASSES})
        named = "x" if kind == "unexpected" else name
        with pytest.raises(ValueError, match=rf"(?s){path}.*{named}"):
            load_detector(path)
