"""Networks that start from trained ones: loaded completely, or refused by name."""

from __future__ import annotations

import argparse
import logging
import pickle
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock, call
from urllib.error import URLError

import numpy as np
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
from torch.optim.swa_utils import AveragedModel
from torchvision.models import ResNet18_Weights, get_model, get_model_weights
from torchvision.models.detection import RetinaNet
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
BIAS = f"backbone.body.{KEY}"


def backbone(path, **settings):
    named = {"name": "resnet18", "weights": str(path), "fpn_channels": 8}
    return build_backbone(BackboneConfig(**named | settings))


def detector(name="fasterrcnn", num_classes=21, whole=None, keypoints=17, part=None, **settings):
    """Build a narrow one; settings of the detector are those of its options."""
    options = {key: settings.pop(key) for key in ("image_mean", "image_std") if key in settings}
    roi = {"head_dim": 8} if "rcnn" in name else {}
    ratios = settings.pop("aspect_ratios", None)
    start = {"weights": whole, "weights_prefix": part}
    config = DetectorConfig(name, 64, 64, None, ratios, options=options, **start, **roi)
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


@pytest.fixture(scope="module")
def average():
    return random_resnet("resnet18", seed=1)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pth")


def ssdlite():
    return get_model("ssdlite320_mobilenet_v3_large", **NO_WEIGHTS).state_dict()


def averaged(net):
    """Return what torch's averaged model of a network saves."""
    return AveragedModel(net, use_buffers=True).state_dict()


def moco(net, other):
    """Return a MoCo's state, of version 2: two networks, each with a head of two layers."""
    heads = dict.fromkeys(("fc.0.weight", "fc.2.weight"), torch.ones(3, 3))
    queries, keys = (without("fc.", each.state_dict()) | heads for each in (net, other))
    both = with_prefix("encoder_q.", queries) | with_prefix("encoder_k.", keys)
    return {"state_dict": with_prefix("module.", both | {"queue": torch.ones(3, 9)})}


REFERENCE = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {0: {}}}}
# What a program saves of a network and of its average.
FILES = {
    # Beside tensors it has NumPy's numbers.
    "the official CutMix code": lambda net, _: {
        "best_err1": np.float64(23.4),
        "state_dict": with_prefix("module.", net.state_dict()),
    },
    "CIFAR's best known code, compiled": lambda net, _: {
        "net": with_prefix("_orig_mod.module.", net.state_dict()),
    },
    "torchvision": lambda net, mean: {
        **REFERENCE,
        "model": net.state_dict(),
        "model_ema": averaged(mean),
    },
    "torch's AveragedModel": lambda _, mean: averaged(mean),
    "timm": lambda net, mean: {
        "state_dict": net.state_dict(),
        "state_dict_ema": mean.state_dict(),
    },
    # Beside it a loss has a part of such a network.
    "Lightning": lambda net, mean: {
        "state_dict": with_prefix("loss.net.", without("layer4", mean.state_dict()))
        | with_prefix("model.", net.state_dict())
        | {"mode.weight": torch.ones(7)},
    },
    # What is a head decides nothing.
    "DINO": lambda net, mean: {
        "student": with_prefix("module.backbone.", without("fc.", net.state_dict())),
        "teacher": with_prefix("backbone.", mean.state_dict()),
    },
    "MoCo": moco,
    "mmcls": lambda net, _: {
        "meta": {"epoch": 100, "CLASSES": ("a", "b")},
        "state_dict": with_prefix("backbone.", without("fc.", net.state_dict()))
        | {"head.fc.weight": torch.ones(7, 512)},
    },
    "VISSL": lambda net, _: {
        "state": {"base_model": {"trunk": with_prefix("_blocks.", net.state_dict())}}
    },
    "detmix": lambda net, mean: pretraining_checkpoint(net, ema=mean.state_dict()),
}
# Which place is given, which is taken, what is not used and what would fit as well.
PLACES = [
    ("the official CutMix code", None, "state_dict.module", "", ""),
    ("CIFAR's best known code, compiled", None, "net._orig_mod.module", "", ""),
    ("torchvision", None, "model", "model_ema", "model_ema.module"),
    ("torchvision", "model_ema", "model_ema.module", "model_ema.n_averaged", ""),
    ("torchvision", "model_ema.module.", "model_ema.module", "", ""),
    ("torch's AveragedModel", None, "module", "n_averaged", ""),
    ("timm", None, "state_dict", "state_dict_ema", "state_dict_ema"),
    ("Lightning", None, "state_dict.model", "state_dict.loss, state_dict.mode", ""),
    ("DINO", None, "student.module.backbone", "teacher", "teacher.backbone"),
    (
        *("MoCo", None, "state_dict.module.encoder_q"),
        "state_dict.module.encoder_k, state_dict.module.queue",
        "state_dict.module.encoder_k",
    ),
    ("MoCo", "state_dict.module.encoder_k", "state_dict.module.encoder_k", "", ""),
    ("mmcls", None, "state_dict.backbone", "state_dict.head", ""),
    ("VISSL", None, "state.base_model.trunk._blocks", "", ""),
    ("detmix", None, "ema", "", ""),
    ("detmix", "model", "model", "", ""),
]
# The places that hold the average.
AVERAGES = {"model_ema.module", "module", "state_dict.module.encoder_k", "ema"}
LOOP = {}
LOOP["a"] = LOOP
LAYOUTS = {
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

    @pytest.mark.parametrize(("program", "given", "prefix", "unused", "others"), PLACES)
    def test_places(self, resnet18, average, path, program, given, prefix, unused, others, caplog):
        """What is taken and what is not used is told, and with a warning what fits as well."""
        caplog.set_level(logging.INFO, "detmix")
        torch.save(FILES[program](resnet18, average), path)
        expected = (average if prefix in AVERAGES else resnet18).state_dict()
        with pytest.warns(match=f"{path}: .*={prefix} .* {others} ") if others else nullcontext():
            body = backbone(path, weights_prefix=given).body.state_dict()
        assert_equal_tensors(body, expected, body)
        assert f" loaded from {prefix}" in caplog.text
        assert caplog.text.strip().partition("; not used: ")[2] == unused

    @pytest.mark.parametrize(
        ("prefix", "told"),
        [
            ("ema", r"weights_prefix=ema; there are: model, model_ema"),
            ("model_", r"weights_prefix=model_; .*model_ema"),
            ("model.module", r"weights_prefix=model\.module; .*: model\.conv1"),
            ("model.layer1", r"weights_prefix=model\.layer1: missing: conv1\.weight"),
        ],
    )
    def test_a_place_that_is_none(self, resnet18, path, prefix, told):
        torch.save(FILES["torchvision"](resnet18, resnet18), path)
        with pytest.raises(ValueError, match=f"{path} .*{told}"):
            load_backbone_weights(get_model("resnet18"), path, prefix)

    def test_a_place_in_what_is_no_file(self):
        for build in (lambda **s: backbone("DEFAULT", **s), lambda **s: detector(**s)):
            with pytest.raises(ValueError, match=r"weights_prefix.*'ema'"):
                build(weights_prefix="ema")
        with pytest.raises(ValueError, match=r"detector\.weights_prefix .*got ema"):
            DetectorConfig(weights_prefix="ema")

    def test_body_of_a_detector(self, path, caplog):
        caplog.set_level(logging.INFO, "detmix")
        theirs = shake(
            RetinaNet(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 91)
        ).state_dict()
        torch.save(REFERENCE | {"model": theirs}, path)
        found = with_prefix("backbone.body.", backbone(path).body.state_dict())
        assert_equal_tensors(found, theirs, found)
        for told in ("from model.backbone.body; ", "; not used: model.backbone.fpn, model.head"):
            assert told in caplog.text

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

    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", None])
    @pytest.mark.parametrize("option", ["image_mean", "image_std"])
    def test_warns_of_what_is_known(self, resnet18, path, monkeypatch, caplog, name, option):
        """A bare file tells nothing of how its images were normalised."""
        caplog.set_level(logging.INFO, "detmix")
        torch.save(resnet18.state_dict(), path)
        monkeypatch.setattr(DOWNLOAD, Mock(return_value=resnet18.state_dict()))
        detector(weights=name or path, **{option: MEAN})
        told = [record.getMessage() for record in caplog.records if "but the" in record.msg]
        assert [f"{option} is {MEAN}" in each for each in told] == ([True] if name else [])
        assumed = "assumed: image_mean {}, image_std {}".format(*IMAGENET)
        assert (assumed in caplog.text) == (name is None)

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
            (lambda _: LOOP, {}, "a dict of a$"),
            # Of another network, with a name by chance.
            (
                lambda _: {"net": {"a.bn1.bias": torch.ones(64)}},
                {},
                r"=null: .*: net\.a\.bn1\.bias",
            ),
            (lambda _: ssdlite(), {}, r"missing: conv1\.weight.*: backbone\.features\.0"),
            (
                lambda m: {"model": m.state_dict()},
                *(
                    {"name": "resnet50"},
                    r"=model: other tensors: layer1\.0.*64, 3, 3.* and 19 more$",
                ),
            ),
            (
                lambda m: pretraining_checkpoint(m) | {"config": {"backbone": {"name": "timm:a"}}},
                *({}, "name=timm:a$"),
            ),
            (lambda m: pretraining_checkpoint(m), {"stem": "small"}, r"backbone\.stem=standard$"),
            (lambda m: pretraining_checkpoint(m, name="timm:a"), {}, "name=timm:a$"),
            (lambda m: m.state_dict(), {"stem": "small"}, r"conv1\.weight.*64, 3, 7, 7.*stem"),
            (lambda m: m.state_dict(), {"norm": "group"}, r"bn1\.running_mean.*norm .*frozen"),
            (lambda m: without("running", m.state_dict()), {}, r"bn1\.running_mean.*norm .*group"),
            (lambda m: without(KEY, m.state_dict()), {}, f"missing: {KEY}$"),
            (with_key("layer3.1.norm2.bias"), {}, f"missing: {KEY}; unexpected: layer3.1.norm2."),
            # A prefix of some keys only is none.
            (with_key(f"module.{KEY}"), {}, f"unexpected: module.{KEY}"),
            (with_key(KEY, torch.ones(9)), {}, rf"{KEY} .*\[9\].*\[256\]"),
            (with_key(KEY, torch.ones(256).cfloat()), {}, f"{KEY} .*complex"),
            (with_key(KEY, torch.ones(256).int()), {}, KEY),
        ],
    )
    def test_another_content(self, resnet18, path, content, settings, told):
        torch.save(content(resnet18), path)
        with pytest.raises(ValueError, match=f"{path} .*{told}") as caught:
            backbone(path, **settings)
        assert len(str(caught.value)) < 500 + len(path)

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
            pytest.param("ssd300_vgg16", False, marks=pytest.mark.slow),
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
        assert f"left out: {', '.join(new)} (the head, " in caplog.text
        assert " new for 7 classes" in caplog.text

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
        assert f" new for {num_classes} classes" in caplog.text
        assert (f" {keypoints} keypoints" in caplog.text) == (keypoints != 17)

    @pytest.mark.parametrize(
        ("part", "prefix", "others"), [(None, "state_dict.model", 1), ("ema", "ema.module", 0)]
    )
    def test_places(self, path, part, prefix, others, caplog):
        caplog.set_level(logging.INFO, "detmix")
        states = [shake(detector(norm="batch"), seed).state_dict() for seed in (0, 1)]
        plain = with_prefix("model.", states[0]) | {"loss.a": states[0][BIAS]}
        torch.save({"state_dict": plain, "ema": with_prefix("module.", states[1])}, path)
        with pytest.warns(match=r"=state_dict\.model .* ema\.module ") if others else nullcontext():
            ours = detector(whole=path, part=part).state_dict()
        kept = without("box_predictor", without("num_b", ours))
        assert_equal_tensors(ours, states[part == "ema"], kept)
        assert f"from {prefix};" in caplog.text
        assert ("not used: state_dict.loss, ema" in caplog.text) == bool(others)

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
