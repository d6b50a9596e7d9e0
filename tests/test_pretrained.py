"""Networks that start from trained ones: loaded completely, or refused by name."""

from __future__ import annotations

import argparse
import logging
import pickle
from pathlib import Path
from unittest.mock import Mock, call
from urllib.error import URLError

import pytest
import torch
from builders import (
    DOWNLOAD,
    NO_WEIGHTS,
    assert_equal_tensors,
    epsilons,
    pretraining_checkpoint,
    random_resnet,
    shake,
    statistics,
    trained,
)
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights, get_model, get_model_weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detmix.detectors import (
    BackboneConfig,
    DetectorConfig,
    build_backbone,
    build_detector,
    load_backbone_weights,
)

IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
MEAN, OWN_MEAN, OWN_STD = [0.1, 0.2, 0.3], [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]
SAFELY = {"check_hash": True, "map_location": "cpu", "weights_only": True}
HEAD = ("fc.weight", "fc.bias")
KEY = "layer3.1.bn2.bias"


def backbone(path, **settings):
    return build_backbone(BackboneConfig("resnet18", str(path), fpn_channels=8, **settings))


def detector(name="fasterrcnn", num_classes=21, whole=None, keypoints=17, **settings):
    """Build a narrow one; settings of the detector are those of its options."""
    options = {key: settings.pop(key) for key in ("image_mean", "image_std") if key in settings}
    roi = {"head_dim": 8} if "rcnn" in name else {}
    ratios = settings.pop("aspect_ratios", None)
    config = DetectorConfig(name, 64, 64, None, ratios, options=options, weights=whole, **roi)
    body = BackboneConfig(**{"name": "resnet18", "levels": (4,), "fpn_channels": 32} | settings)
    return build_detector(config, body, num_classes, num_keypoints=keypoints)


def without(text, state):
    return {key: value for key, value in state.items() if text not in key}


def with_prefix(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def with_key(key, value=None):
    """Return a function that gives a model's state with another entry in the place of `KEY`."""
    value = torch.ones(256) if value is None else value
    return lambda model: {**without(KEY, model.state_dict()), key: value}


@pytest.fixture(scope="module")
def resnet18():
    return random_resnet("resnet18")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pth")


LAYOUTS = {
    # As the official CutMix repository saves it, of a DataParallel; torchvision adds arguments.
    "state_dict": lambda state: {
        **{"epoch": 300, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {0: {}}}},
        "state_dict": with_prefix("module.", state),
    },
    "_orig_mod.module.": lambda state: {
        "model_state_dict": with_prefix("_orig_mod.module.", state)
    },
    "module._orig_mod.": lambda state: {"model": with_prefix("module._orig_mod.", state)},
    "without counters": lambda state: without("num_batches", state),
    "without a head": lambda state: without("fc.", state),
    "head of 7 classes": lambda state: state | {"fc.weight": torch.ones(7, 512)},
    "half precision": lambda state: {k: v.half() if v.dim() else v for k, v in state.items()},
}
WRITERS = {
    "zip": torch.save,
    "tar": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": save_file,
}


class TestClassifiers:
    """Under a detector, or alone."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, resnet18, path, layout):
        torch.save(LAYOUTS[layout](resnet18.state_dict()), path)
        model = get_model("resnet18")
        start = {key: value.clone() for key, value in model.state_dict().items()}
        report = load_backbone_weights(model, path)
        loaded = without("fc.", without("num_batches" if "counters" in layout else "x", start))
        expected = start | {key: resnet18.state_dict()[key] for key in loaded}
        for key, value in model.state_dict().items():
            assert torch.equal(value.half(), expected[key].half()), key
        assert report.loaded == tuple(loaded)
        assert report.new == HEAD
        assert report.left_out == (() if layout == "without a head" else HEAD)
        assert f"{path}: {len(report.loaded)} of 120 tensors" in str(report)
        assert [list(report.mean), list(report.std)] == IMAGENET

    @pytest.mark.parametrize("writer", WRITERS)
    def test_formats(self, resnet18, tmp_path, monkeypatch, writer):
        monkeypatch.setenv("HOME", str(tmp_path))
        path = tmp_path / f"weights.{writer}"
        WRITERS[writer](resnet18.state_dict(), path)
        found = backbone(f"~/{path.name}", levels=(2, 3)).body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)

    def test_body_of_torchvision_stays_as_it_was_where_weights_do_not_fit(self, resnet18, path):
        torch.save(resnet18.state_dict(), path)
        settings = {"backbone_name": "resnet18", "weights": None, "returned_layers": [2, 3]}
        pyramid = resnet_fpn_backbone(**settings)
        report = load_backbone_weights(pyramid.body, path)
        torch.save(with_key(KEY, torch.ones(9))(random_resnet(seed=1)), path)
        with pytest.raises(ValueError, match=KEY):
            load_backbone_weights(pyramid.body, path)
        found = pyramid.body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        assert report.loaded == tuple(k for k in resnet18.state_dict() if k in found)
        assert (report.left_out, report.new, report.absent) == (HEAD, (), ("layer4",))
        for module in (pyramid, detector()):
            with pytest.raises(TypeError, match=rf"{type(module).__name__}: .*\.body"):
                load_backbone_weights(module, path)

    def test_what_a_pretraining_notes_beside_its_weights(self, resnet18, path):
        """Averaged weights, mean and deviation; these with the data in format 1."""
        average, data = random_resnet("resnet18", seed=1), {"mean": OWN_MEAN, "std": OWN_STD}
        noted = {"image_mean": MEAN, "image_std": OWN_MEAN}
        for notes, options, expected in (
            ({"data": data}, {}, [OWN_MEAN, OWN_STD]),
            ({"data": data}, {"image_mean": MEAN}, [MEAN, OWN_STD]),
            ({"data": data, "normalization": noted}, {}, [MEAN, OWN_MEAN]),
            ({"data": {"mean": [], "std": "x"}}, {}, IMAGENET),
        ):
            saved = pretraining_checkpoint(resnet18, ema=average.state_dict(), **notes)
            torch.save(saved, path)
            model = detector(weights=path, **options)
            assert statistics(model) == expected
            found = model.backbone.body.state_dict()
            assert_equal_tensors(found, average.state_dict(), found)

    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"])
    def test_names_of_torchvision(self, resnet18, monkeypatch, name):
        load = Mock(return_value=resnet18.state_dict())
        monkeypatch.setattr(DOWNLOAD, load)
        model = detector(weights=name)
        found = without("num_batches", model.backbone.body.state_dict())
        assert_equal_tensors(found, resnet18.state_dict(), found)
        load.assert_called_once_with(ResNet18_Weights.DEFAULT.url, **SAFELY)
        assert statistics(model) == IMAGENET
        plain = get_model("resnet18")
        if name.startswith("ResNet18"):  # the others do not tell the network
            assert {*found} <= {*load_backbone_weights(plain, name).loaded}
        else:
            with pytest.raises(ValueError, match=f"ResNet50_Weights.IMAGENET1K_V2.*'{name}'"):
                load_backbone_weights(plain, name)

    @pytest.mark.parametrize(
        ("weights", "error", "kind"),
        [
            ("IMAGENET1K_V1", URLError("no route to host"), ConnectionError),
            ("IMAGENET1K_V1", pickle.UnpicklingError("Unsupported global"), ConnectionError),
            ("timm:resnet18.a1_in1k", pickle.UnpicklingError("Unsupported global"), ValueError),
            # What the hub's client raises is no OSError in all versions.
            ("timm:resnet18.a1_in1k", LookupError("no route to host"), ConnectionError),
        ],
    )
    def test_broken_download(self, monkeypatch, weights, error, kind):
        for place in (DOWNLOAD, "timm.models._builder.load_pretrained"):
            monkeypatch.setattr(place, Mock(side_effect=error))
        with pytest.raises(kind, match=rf"(?=.*{weights}).*backbone\.weights"):
            backbone(weights)

    @pytest.mark.parametrize(
        ("content", "settings", "told"),
        [
            (lambda _: [torch.zeros(3)], {}, "list"),
            (lambda _: {"epoch": 3, "state_dict": {"a": 3}}, {}, "epoch, state_dict"),
            (lambda _: {i: torch.zeros(1) for i in range(9)}, {}, "0, 1, 2"),
            (lambda _: {"rpn.a": torch.zeros(1)}, {}, r"set detector\.weights"),
            (lambda m: pretraining_checkpoint(m), {"stem": "small"}, r"backbone\.stem=standard$"),
            (lambda m: pretraining_checkpoint(m, name="timm:a"), {}, "name=timm:a$"),
            (lambda m: m.state_dict(), {"stem": "small"}, r"conv1\.weight.*64, 3, 7, 7.*stem"),
            (lambda m: m.state_dict(), {"norm": "group"}, r"bn1\.running_mean.*norm .*frozen"),
            (lambda m: without("running", m.state_dict()), {}, r"bn1\.running_mean.*norm .*group"),
            (lambda m: without(KEY, m.state_dict()), {}, f"missing: {KEY}$"),
            (with_key("layer3.1.norm2.bias"), {}, f"missing: {KEY}; unexpected: layer3.1.norm2."),
            # A prefix of some keys only is none.
            (with_key(f"module.{KEY}"), {}, f"unexpected: module.{KEY}"),
            (with_key(KEY, torch.ones(9)), {}, rf"{KEY}: .*\[9\].*\[256\]"),
            (with_key(KEY, torch.ones(256).cfloat()), {}, f"{KEY} .*complex"),
            (with_key(KEY, torch.ones(256).int()), {}, KEY),
        ],
    )
    def test_another_content(self, resnet18, path, content, settings, told):
        torch.save(content(resnet18), path)
        with pytest.raises(ValueError, match=f"{path} .*{told}"):
            backbone(path, **settings)

    @pytest.mark.parametrize(
        ("source", "error", "told"),
        [
            ("cutmix.pth", FileNotFoundError, "cutmix.pth"),
            ("runs/pretrain/best", FileNotFoundError, "runs/pretrain/best"),
            (Path(__file__).parent, FileNotFoundError, "folder"),
            ("ResNet50_Weights.IMAGENET1K_V2", ValueError, "of resnet18 .*V1, timm:NAME .*K_V2'"),
        ],
    )
    def test_no_file_and_no_name(self, source, error, told):
        with pytest.raises(error, match=rf"backbone\.weights.*{told}"):
            backbone(source)


def old_keys(state):
    """Return a state dict as torchvision wrote it before 0.13."""
    renamed = {}
    for key, value in state.items():
        if "fpn.inner" in key or "fpn.layer" in key:
            key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        for index in range(4):
            key = key.replace(f"_head.conv.{index}.0.", f"_head.conv.{2 * index}.")
            key = key.replace(f"mask_head.{index}.0.", f"mask_head.mask_fcn{index + 1}.")
        renamed[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert renamed.keys() != state.keys()
    return renamed


class TestWholeDetectors:
    """All but the head, which is new: of torchvision, or from what an own training saved."""

    @pytest.mark.parametrize(
        ("name", "is_file"),
        [
            ("maskrcnn", True),
            ("keypointrcnn", False),
            ("retinanet_resnet50_fpn", False),
            ("retinanet_resnet50_fpn_v2", True),
            ("ssd300_vgg16", False),
            ("ssdlite320_mobilenet_v3_large", False),
        ],
    )
    def test_all_but_what_differs_in_shape_is_torchvisions(
        self, name, is_file, monkeypatch, tmp_path, caplog
    ):
        """What depends on the classes does."""
        caplog.set_level(logging.INFO, "detmix")
        builder = name if "_" in name else f"{name}_resnet50_fpn"
        state = shake(get_model(builder, **NO_WEIGHTS)).state_dict()
        if builder.endswith("resnet50_fpn"):
            # The files have these, and no counters: their norm was frozen.
            state = old_keys(without("num_batches", state))
        load, member = Mock(return_value=state), next(iter(get_model_weights(builder)))
        monkeypatch.setattr(DOWNLOAD, load)
        theirs, weights = get_model(builder, weights=member), member.name
        if is_file:
            weights = str(tmp_path / member.url.rpartition("/")[2])
            torch.save(state, weights)
        ours = build_detector(DetectorConfig(name, weights=weights), BackboneConfig(), 7)
        found, expected = ours.state_dict(), theirs.state_dict()
        new = [key for key in expected if found[key].shape != expected[key].shape]
        assert found.keys() == expected.keys()
        assert_equal_tensors(found, expected, found.keys() - {*new})
        for told in (epsilons, trained, statistics):
            assert told(ours) == told(theirs)
        assert load.call_args_list[1:] == ([] if is_file else [call(member.url, **SAFELY)])
        assert f"left out: {', '.join(new)} (the head of " in caplog.text
        assert f" {2 if 'keypoint' in name else 91} classes, which is new for 7" in caplog.text

    @pytest.mark.parametrize(
        ("name", "num_classes", "keypoints", "new"),
        [
            # It is new even if the number of classes is the same: they may be others.
            ("fasterrcnn", 21, 17, "box_predictor"),
            ("fcos", 6, 17, "cls_logits"),
            ("keypointrcnn", 6, 17, "box_predictor"),
            ("keypointrcnn", 21, 5, "_predictor"),
        ],
    )
    def test_files(self, name, num_classes, keypoints, new, path, caplog):
        caplog.set_level(logging.INFO, "detmix")
        old = shake(detector(name, norm="batch")).state_dict()
        torch.save(old, path)
        ours = detector(name, num_classes, path, keypoints)
        assert epsilons(ours) == {1e-5}
        found = ours.state_dict()
        kept = without(new, found)
        assert_equal_tensors(found, old, kept)
        assert not any(torch.equal(found[key], old[key]) for key in found if key not in kept)
        assert f"{path}: {len(kept)} of {len(kept)} tensors" in caplog.text
        assert f"21 classes, which is new for {num_classes}, background" in caplog.text

    @pytest.mark.parametrize("since", [1, 2])
    def test_what_a_training_notes_beside_its_weights(self, path, since, caplog):
        """Averaged weights, mean, deviation and epsilon; these in the configuration at first."""
        noted = {"image_mean": OWN_MEAN, "image_std": OWN_STD}
        saved = {"config": {"detector": {"options": noted}, "backbone": {"norm_eps": 0.0}}}
        if since == 2:
            saved = {"config": {"detector": {}}, "normalization": {**noted, "norm_eps": 0.0}}
        states = [shake(detector(norm="batch"), seed).state_dict() for seed in (0, 1)]
        saved |= {"format": 1, "classes": ["a"], "model": states[0], "ema": states[1]}
        torch.save(saved, path)
        ours = detector(whole=path)
        found = without("num_batches", without("box_predictor", ours.state_dict()))
        assert_equal_tensors(found, states[1], found)
        assert statistics(ours) == [OWN_MEAN, OWN_STD]
        assert epsilons(ours) == {0.0}
        assert "but the weights" not in caplog.text
        ours = detector(whole=path, norm="frozen", norm_eps=1e-3, image_std=[1.0, 1.0, 1.0])
        assert statistics(ours) == [OWN_MEAN, [1.0, 1.0, 1.0]]
        assert epsilons(ours) == {1e-3}
        for differs in ("image_std is [1.0, 1.0, 1.0]", "norm_eps is 0.001"):
            assert f"{differs}, but the weights were trained with" in caplog.text
        assert "image_mean is" not in caplog.text

    @pytest.mark.parametrize(
        ("make", "name", "message"),
        [
            # The number of anchors is none of classes.
            (lambda: detector("retinanet", aspect_ratios=(1.0,)), "retinanet", "bbox_reg"),
            (random_resnet, "fasterrcnn", r"no detector.*set backbone\.weights"),
        ],
    )
    def test_another_network(self, path, make, name, message):
        torch.save(make().state_dict(), path)
        with pytest.raises(ValueError, match=message):
            detector(name, whole=path)
