"""Pretrained classifiers under a detector: loaded completely, or refused by name."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor
from weight_files import (
    DOWNLOAD,
    assert_equal_tensors,
    pretraining_checkpoint,
    random_resnet,
    statistics,
)

from detmix.detectors import (
    BackboneConfig,
    ClassifierConfig,
    DetectorConfig,
    build_backbone,
    build_classifier,
    build_detector,
    load_backbone_weights,
)

IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
OWN = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
HEAD = ("fc.weight", "fc.bias")


def backbone(path, name="resnet18", **settings):
    return build_backbone(BackboneConfig(name, str(path), fpn_channels=8, **settings))


def detector(path, name="resnet18", options=None, load_weights=True, **settings):
    config = DetectorConfig(min_size=64, max_size=64, head_dim=8, options=options or {})
    body = BackboneConfig(name, str(path), fpn_channels=8, **settings)
    return build_detector(config, body, 3, load_weights=load_weights)


def body_keys(state):
    return [key for key in state if not key.startswith("fc.")]


@pytest.fixture(scope="module")
def resnet18():
    return random_resnet("resnet18")


@pytest.fixture(scope="module")
def saved18(resnet18, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.mark.parametrize(("norm", "count"), [("auto", 100), ("sync", 120)])
def test_body_computes_what_the_classifier_does(resnet18, saved18, caplog, norm, count):
    with caplog.at_level(logging.INFO, "detmix"):
        model = detector(saved18, norm=norm).eval()
    assert f"{saved18}: {count} of {count} tensors of resnet18 loaded; left out: fc" in caplog.text
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        expected = create_feature_extractor(resnet18, layers).eval()(images)
        found = model.backbone.body(images)
    for level in layers.values():
        scale = expected[level].std()
        torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-4 * scale)
    assert statistics(model) == IMAGENET


def with_prefix(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


LAYOUTS = {
    "plain": dict,
    # As train.py of the official CutMix repository saves it, of a DataParallel.
    "state_dict": lambda state: {
        **{"epoch": 300, "arch": "resnet", "best_err1": 21.4, "best_err5": 5.92},
        **{"state_dict": with_prefix("module.", state), "optimizer": {"state": {0: {}}}},
    },
    "model": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    "of torchvision's script": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.3},
    "module.": lambda state: with_prefix("module.", state),
    "_orig_mod.module.": lambda state: {"state_dict": with_prefix("_orig_mod.module.", state)},
    "module._orig_mod.": lambda state: {"model": with_prefix("module._orig_mod.", state)},
    "without counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "without a head": lambda state: {key: state[key] for key in body_keys(state)},
    "head of 7 classes": lambda state: state | {"fc.weight": torch.ones(7, 512)},
    "half precision": lambda state: {k: v.half() if v.dim() else v for k, v in state.items()},
}
WRITERS = {
    "zip": torch.save,
    "tar": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": save_file,
}


class TestFiles:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, resnet18, path, layout):
        torch.save(LAYOUTS[layout](resnet18.state_dict()), path)
        model = torchvision.models.resnet18()
        start = {key: value.clone() for key, value in model.state_dict().items()}
        report = load_backbone_weights(model, path)
        found, expected = model.state_dict(), resnet18.state_dict()
        if layout == "half precision":
            expected = {k: v.half().float() if v.dim() else v for k, v in expected.items()}
        counters = [key for key in found if "num_batches" in key]
        loaded = [k for k in body_keys(found) if layout != "without counters" or k not in counters]
        assert report.loaded == tuple(loaded)
        assert len(loaded) == assert_equal_tensors(found, expected, loaded)
        assert_equal_tensors(found, start, [key for key in found if key not in loaded])
        assert report.new == HEAD
        assert report.left_out == (() if layout == "without a head" else HEAD)
        assert f"{path}: {len(loaded)} of 120 tensors" in str(report)
        assert [list(report.mean), list(report.std)] == IMAGENET

    @pytest.mark.parametrize("writer", WRITERS)
    def test_formats(self, resnet18, tmp_path, monkeypatch, writer):
        monkeypatch.setenv("HOME", str(tmp_path))
        path = tmp_path / f"weights.{writer}"
        WRITERS[writer](resnet18.state_dict(), path)
        found = backbone(f"~/{path.name}", levels=(2, 3)).body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            backbone(path)

    def test_group_norm(self, path, saved18):
        model = build_classifier(ClassifierConfig("resnet18", norm="group"), 4)
        torch.save(model.state_dict(), path)
        body = backbone(path, norm="group").body
        assert_equal_tensors(body.state_dict(), model.state_dict(), body.state_dict())
        for file, norm, told in ((path, "auto", "must be group"), (saved18, "group", "frozen")):
            with pytest.raises(ValueError, match=rf"bn1\.running_mean.*norm .*{told}"):
                backbone(file, norm=norm)

    def test_body_of_torchvision(self, resnet18, saved18):
        settings = {"backbone_name": "resnet18", "weights": None, "returned_layers": [1, 2]}
        body = resnet_fpn_backbone(**settings).body
        report = load_backbone_weights(body, str(saved18))
        found = body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        assert report.loaded == tuple(k for k in resnet18.state_dict() if k in found)
        assert (report.left_out, report.new, report.absent) == (HEAD, (), ("layer3", "layer4"))

    def test_what_a_pretraining_notes_beside_its_weights(self, resnet18, path):
        """Averaged weights, mean and deviation; these with the data in format 1."""
        average, mean = random_resnet("resnet18", seed=1).state_dict(), [0.1, 0.2, 0.3]
        torch.save(pretraining_checkpoint(resnet18, ema=average, data=OWN), path)
        model = detector(path, options={"image_mean": mean})
        found = model.backbone.body.state_dict()
        assert_equal_tensors(found, average, found)
        assert statistics(model) == [mean, OWN["std"]]
        noted = {"normalization": {"image_mean": mean, "image_std": OWN["mean"]}}
        for notes, expected in (
            ({"data": OWN}, [OWN["mean"], OWN["std"]]),
            ({"data": OWN, **noted}, [mean, OWN["mean"]]),
            ({"data": {"mean": [], "std": "x"}}, IMAGENET),
        ):
            torch.save(pretraining_checkpoint(resnet18, **notes), path)
            assert statistics(detector(path)) == expected
        path.unlink()
        assert statistics(detector(path, load_weights=False)) == IMAGENET


class TestTorchvisionNames:
    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"])
    def test_loads(self, resnet18, monkeypatch, name):
        asked = []

        def download(url, **options):
            asked.append((url, options["weights_only"], options["check_hash"]))
            return resnet18.state_dict()

        monkeypatch.setattr(DOWNLOAD, download)
        model = detector(name)
        found = model.backbone.body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        assert asked == [(torchvision.models.ResNet18_Weights.DEFAULT.url, True, True)]
        assert statistics(model) == IMAGENET
        empty = detector(name, load_weights=False)
        assert (repr(empty), len(asked)) == (repr(model), 1)

    def test_full_names_only_into_a_module(self, resnet18, monkeypatch):
        monkeypatch.setattr(DOWNLOAD, lambda url, **_: resnet18.state_dict())
        model = torchvision.models.resnet18()
        report = load_backbone_weights(model, "ResNet18_Weights.IMAGENET1K_V1")
        assert report.loaded == tuple(body_keys(resnet18.state_dict()))
        with pytest.raises(ValueError, match=r"ResNet50_Weights\.IMAGENET1K_V2.*'IMAGENET1K_V2'"):
            load_backbone_weights(model, "IMAGENET1K_V2")

    @pytest.mark.parametrize(
        "error",
        [
            URLError("no route to host"),
            RuntimeError('invalid hash value (expected "f37072fd", got "00")'),
            pickle.UnpicklingError("set weights_only=False"),
        ],
    )
    def test_broken_download(self, monkeypatch, error):
        monkeypatch.setattr(DOWNLOAD, Mock(side_effect=error))
        with pytest.raises(ConnectionError, match=r"IMAGENET1K_V1 of resnet18 .*backbone\.weights"):
            backbone("IMAGENET1K_V1")


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "stem", "told"),
        [
            (lambda _: [torch.zeros(3)], "standard", "list"),
            (lambda _: {}, "standard", "nothing"),
            (lambda _: {"epoch": 3, "state_dict": {"a": 3}}, "standard", "epoch, state_dict"),
            (lambda _: {i: torch.zeros(1) for i in range(9)}, "standard", "0, 1, 2"),
            (lambda _: nn.Linear(2, 2), "standard", r"torch\.nn\.modules\.linear\.Linear"),
            (lambda m: m.state_dict(), "small", r"conv1\.weight.*64, 3, 7, 7.*stem"),
            (lambda m: pretraining_checkpoint(m, stem="small"), "standard", r"stem=small$"),
            (lambda m: pretraining_checkpoint(m), "small", r"backbone\.stem=standard$"),
            (
                lambda m: pretraining_checkpoint(m, name="timm:resnet34d"),
                "standard",
                r"set backbone\.name=timm:resnet34d$",
            ),
            (lambda _: {"rpn.a": torch.zeros(1)}, "standard", r"set detector\.weights"),
        ],
    )
    def test_content(self, resnet18, path, content, stem, told):
        torch.save(content(resnet18), path)
        with pytest.raises(ValueError, match=f"{path} .*{told}"):
            backbone(path, stem=stem)

    @pytest.mark.parametrize(
        ("new", "value", "message"),
        [
            (None, None, r"missing: layer3\.1\.bn2\.bias$"),
            ("layer3.1.norm2.bias", torch.ones(256), r"missing: .*unexpected: layer3\.1\.norm2\."),
            # A prefix of some keys only is none.
            ("module.layer3.1.bn2.bias", torch.ones(256), r"unexpected: module\.layer3\."),
            ("layer3.1.bn2.bias", torch.ones(9), r"layer3\.1\.bn2\.bias: .*\[9\].*\[256\]"),
            ("layer3.1.bn2.bias", torch.ones(256).cfloat(), r"layer3\.1\.bn2\.bias .*complex"),
            ("layer3.1.bn2.bias", torch.ones(256).int(), r"layer3\.1\.bn2\.bias"),
        ],
    )
    def test_one_key_wrong_leaves_the_module_as_it_was(self, resnet18, path, new, value, message):
        state = resnet18.state_dict()
        del state["layer3.1.bn2.bias"]
        torch.save(state if new is None else {**state, new: value}, path)
        model = torchvision.models.resnet18()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"{path} .*{message}"):
            load_backbone_weights(model, path)
        assert_equal_tensors(model.state_dict(), before, before)

    @pytest.mark.parametrize(
        ("source", "error", "told"),
        [
            ("cutmix.pth", FileNotFoundError, "cutmix.pth"),
            ("runs/pretrain/best", FileNotFoundError, "runs/pretrain/best"),
            (Path(__file__).parent, FileNotFoundError, "folder"),
            ("IMAGENET9", ValueError, "resnet18 .*IMAGENET1K_V1, timm:NAME .*'IMAGENET9'"),
            ("ResNet50_Weights.IMAGENET1K_V2", ValueError, "of resnet18 .*IMAGENET1K_V1"),
        ],
    )
    def test_no_file_and_no_name(self, source, error, told):
        with pytest.raises(error, match=rf"backbone\.weights.*{told}"):
            backbone(source)

    def test_whole_models(self):
        model = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
        for module in (model, model.backbone):
            with pytest.raises(TypeError, match=rf"{type(module).__name__}: .*\.body"):
                load_backbone_weights(module, "x.pth")
