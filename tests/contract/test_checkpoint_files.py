"""Checkpoints are written whole or not at all, read whole or refused, and stay readable."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from fuzz import limits
from tiny import SETTINGS as TINY
from torchvision.ops import FrozenBatchNorm2d

from detmix.detectors import build_detector
from detmix.files import temporary_path, write_atomically
from detmix.training import TrainConfig, load_checkpoint, load_detector, parse_args, save_checkpoint

# Frozen batch norm alone has an epsilon of its own.
SETTINGS = TINY | {"backbone": TINY["backbone"] | {"norm": "frozen"}}
CLASSES = SETTINGS["data"]["classes"]
CONV = "backbone.body.conv1.weight"
STATE = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)},
    "config": {"optim": {"lr": 0.1, "clip_norm": None}, "data": {"classes": ["a", "b"]}},
    "classes": ["a", "b"],
    "normalization": {"image_mean": [0.5, 0.4, 0.3], "norm_eps": None},
    "position": {"step": 7, "best": None, "due": True},
}


@pytest.fixture
def path(tmp_path):
    """Return where a whole checkpoint lies."""
    save_checkpoint(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def assert_is_state(loaded):
    torch.testing.assert_close(loaded.pop("model"), STATE["model"], rtol=0, atol=0)
    assert isinstance(loaded.pop("format"), int)
    assert loaded == {key: value for key, value in STATE.items() if key != "model"}


class TestSaving:
    def test_round_trip(self, path):
        for loaded in (load_checkpoint(str(path)), torch.load(path, weights_only=True)):
            assert_is_state(loaded)

    @pytest.mark.parametrize("size", [6, 600_000])
    def test_a_write_that_ends_half_way(self, path, size):
        """By an interruption, a value that cannot be saved or a full disk, as ``/dev/full`` is."""

        def write(file):
            file.write(b"new, but not wh")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, write)
        with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
            save_checkpoint(path, {**STATE, "bad": lambda: None})
        temporary_path(path).symlink_to("/dev/full")
        with pytest.raises(OSError, match=f"{path}.*No space left on device"):
            save_checkpoint(path, {**STATE, "more": torch.zeros(size)}, keep=path.parent / "kept")
        assert_is_state(load_checkpoint(path))
        assert os.listdir(path.parent) == ["last.pt"]


class Address:
    """Pickled, an array of an object that lies where it says."""

    def __reduce__(self):
        return np.ndarray, ((1,), "O", b"\x10" * 8)


NUMPY = {
    "best": np.float64(23.4),
    "name": np.str_("à"),
    "matrix": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "of objects": np.array(["a", None]),
    "of any object": Address(),
    "by number": {np.int64(3): np.zeros((0, 4), ">f4")},
}
# As NumPy 1 and 2 call what makes them.
CORES = (b"numpy.core.multiarray", b"numpy._core.multiarray")


def flipped(data):
    """Flip a bit of a tensor, of which torch does not notice anything."""
    place = data.index(STATE["model"]["weight"].numpy().tobytes()) + 6
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def compressed(data):
    """Pack it as torch does not: what fills the memory may have few bytes."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as good,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in good.namelist():
            bomb.writestr(name, good.read(name))
    return file.getvalue()


class TestNumpy:
    """Its numbers and arrays lie beside what is read, in files of older training code."""

    @pytest.mark.parametrize("core", CORES)
    def test_is_passed_over(self, path, core):
        content = load_checkpoint(path) | {"more": NUMPY}
        torch.save(content, path, _use_new_zipfile_serialization=False)
        written = path.read_bytes()
        path.write_bytes(written.replace(CORES[0], core).replace(CORES[1], core))
        before = set(torch.serialization.get_safe_globals())
        loaded = load_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before
        assert not any(isinstance(each, np.ndarray) for each in loaded.pop("more").values())
        assert_is_state(loaded)

    def test_is_read_where_the_process_allows_it(self, path):
        """As torch advises."""
        save_checkpoint(path, STATE | {"more": NUMPY["matrix"]})
        allowed = [np.ndarray, np.dtype, type(np.dtype(int)), NUMPY["matrix"].__reduce__()[0]]
        with torch.serialization.safe_globals(allowed):
            loaded = load_checkpoint(path)
        np.testing.assert_array_equal(loaded.pop("more"), NUMPY["matrix"])
        assert_is_state(loaded)


class TestRefused:
    def test_missing(self, tmp_path):
        for missing in (tmp_path / "last.pt", tmp_path):
            with pytest.raises(FileNotFoundError, match=str(missing)):
                load_checkpoint(missing)

    @pytest.mark.parametrize("broken", [flipped, compressed])
    def test_broken(self, path, broken):
        path.write_bytes(broken(path.read_bytes()))
        with pytest.raises(ValueError, match=str(path)):
            load_checkpoint(path)

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ({"weight": torch.zeros(2)}, "format: .*model: .*config: .*classes: "),
            ([1, 2], r"\[1, 2\]"),
            (STATE | {"format": 1000}, "1000"),
            (STATE | {"format": "2"}, "format.*2"),
            (STATE | {"config": [1]}, "config"),
            (STATE | {"classes": ["a", None]}, r"classes\.1"),
        ],
    )
    def test_another_content_or_a_newer_format(self, path, content, named):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"{path}.*{named}"):
            load_checkpoint(path)

    def test_an_option_of_an_earlier_version(self, path):
        for tail in (None, False):
            config = {"backbone": {"name": "resnet18", "reduced_tail": tail}, "detector": {}}
            torch.save({**STATE, "format": 1, "config": config}, path)
            if tail is None:
                assert load_checkpoint(path)["config"]["backbone"] == {"name": "resnet18"}
        with pytest.raises(ValueError, match=r"last\.pt.* backbone\.reduced_tail is no option"):
            load_detector(path)

    def test_a_schedule_that_was_constant(self, path):
        """Which is no longer called multistep where it names no epochs."""
        for milestones, name in (([], "constant"), ([3], "multistep")):
            schedule = {"name": "multistep", "milestones": milestones}
            torch.save({**STATE, "format": 2, "config": {"schedule": schedule}}, path)
            assert load_checkpoint(path)["config"]["schedule"] == {**schedule, "name": name}


@pytest.fixture(scope="module")
def model():
    """Return the detector that `SETTINGS` ask for."""
    config = parse_args(TrainConfig, ["--config", json.dumps(SETTINGS)])
    torch.manual_seed(0)
    return build_detector(config.detector, config.backbone, 1 + len(CLASSES)).eval()


class TestDetectors:
    """Those of format 1 are read, which has what a model normalises with in its configuration."""

    @pytest.mark.parametrize("first", [False, True])
    def test_predictions_are_those_of_the_weights(self, path, model, first):
        """Of the averaged ones where there are some, as in the second file."""
        weights, state = model.state_dict(), {"config": SETTINGS, "classes": CLASSES}
        oracle = copy.deepcopy(model)
        if first:
            mean, std, eps = [0.5, 0.25, 0.0], [0.5, 1.0, 0.25], 0.0625
            oracle.transform.image_mean, oracle.transform.image_std = mean, std
            norms = [m for m in oracle.modules() if isinstance(m, FrozenBatchNorm2d)]
            for norm in norms:
                norm.eps = eps
            config = copy.deepcopy(SETTINGS)
            config["detector"]["options"] |= {"image_mean": mean, "image_std": std}
            config["backbone"]["norm_eps"] = eps
            torch.save({**state, "model": weights, "config": config, "format": 1}, path)
        else:
            other = {k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}
            save_checkpoint(path, {**state, "model": other, "ema": weights})
        loaded, config = load_detector(path, ["--data.eval_batch_size=3"])
        assert (list(config.data.class_names), config.data.eval_batch_size) == (CLASSES, 3)
        assert not loaded.training
        images = [torch.rand(3, 64, 48), torch.rand(3, 40, 64)]
        with torch.inference_mode():
            found, expected = loaded(images), oracle(images)
        assert all(len(of_image["boxes"]) > 0 for of_image in expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"config": {}}, ""),
            ({"classes": ["a"]}, "classes a"),
            ({"model": {5: torch.zeros(2)}}, ""),
            ({"ema": 5}, ""),
            ({"config": SETTINGS | {"detector": {"anchor_sizes": [1]}}}, "anchor_sizes"),
            ({"config": SETTINGS | {"detector": {"head_dim": 200_000}}}, ""),  # 160 GB
            ({CONV: None}, CONV),
            ({"unexpected": torch.float}, "unexpected"),
        ],
    )
    def test_other_content_or_weights_are_refused(self, path, model, change, named):
        weights = model.state_dict()
        for name in change.keys() - {"config", "classes", "model", "ema"}:
            tensor = weights.pop(name, torch.zeros(1))
            weights |= {} if change[name] is None else {name: tensor.to(change[name])}
        state = {"format": 1, "model": weights, "config": SETTINGS, "classes": CLASSES}
        torch.save({**state, **change}, path)
        with limits(), pytest.raises(ValueError, match=f"(?s){named}") as caught:
            load_detector(path)
        assert str(path) in str(caught.value)
