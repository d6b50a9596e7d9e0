"""Pretrained classifiers under a detector: loaded completely, or refused by name."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor
from weight_files import (
    assert_equal_tensors,
    official_checkpoint,
    pretraining_checkpoint,
    random_resnet,
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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_DETECTOR = DetectorConfig(min_size=64, max_size=64, anchor_sizes=(16, 32), head_dim=8)


def backbone(path, name="resnet18", **settings):
    return build_backbone(BackboneConfig(name, str(path), fpn_channels=8, **settings))


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


class TestOfficialCutMix:
    """The checkpoints of the official CutMix repository, with every key of a ResNet-50."""

    @pytest.fixture(scope="class")
    @classmethod
    def resnet50(cls):
        return random_resnet("resnet50").eval()

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, resnet50, tmp_path_factory):
        path = tmp_path_factory.mktemp("cutmix") / "model_best.pth.tar"
        torch.save(official_checkpoint(resnet50), path)
        return path

    @pytest.mark.parametrize(("norm", "count"), [("frozen", 265), ("batch", 318)])
    def test_loads_completely(self, resnet50, saved, caplog, norm, count):
        with caplog.at_level(logging.INFO, "detmix"):
            pyramid = backbone(saved, "resnet50", norm=norm)
        expected, found = resnet50.state_dict(), pyramid.body.state_dict()
        assert all(key.startswith("module.") for key in torch.load(saved)["state_dict"])
        assert assert_equal_tensors(found, expected, found) == count
        if norm == "batch":
            assert list(found) == body_keys(expected)
        assert [record.getMessage() for record in caplog.records] == [
            f"backbone.weights={saved}: {count} of {count} tensors of resnet50 loaded; left out: "
            "fc.weight, fc.bias (the classifier head)"
        ]

    @pytest.mark.parametrize("norm", ["auto", "batch", "sync"])
    def test_features_are_torchvisions(self, resnet50, saved, norm):
        detector = build_detector(
            DetectorConfig(min_size=64, max_size=96, head_dim=8),
            BackboneConfig(weights=str(saved), norm=norm),
            21,
        )
        layers = {f"layer{i + 1}": str(i) for i in range(4)}
        images = torch.rand(2, 3, 64, 96)
        with torch.inference_mode():
            expected = create_feature_extractor(resnet50, layers)(images)
            found = detector.eval().backbone.body(images)
        for level in layers.values():
            scale = expected[level].std()
            torch.testing.assert_close(found[level], expected[level], rtol=1e-4, atol=1e-4 * scale)
        assert detector.transform.image_mean == list(IMAGENET_MEAN)
        assert detector.transform.image_std == list(IMAGENET_STD)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("remove", "does not fit resnet50: missing: layer3.4.conv2.weight$"),
            (
                "rename",
                "missing: layer3.4.conv2.weight; unexpected: layer3.4.convolution2.weight$",
            ),
            (
                "reshape",
                r"of another shape: layer3.4.conv2.weight \(256, 256, 1, 1\), "
                r"expected \(256, 256, 3, 3\)$",
            ),
        ],
    )
    def test_one_key_wrong(self, resnet50, path, change, message):
        content = official_checkpoint(resnet50)
        state, key = content["state_dict"], "module.layer3.4.conv2.weight"
        value = state.pop(key)
        if change == "rename":
            state["module.layer3.4.convolution2.weight"] = value
        elif change == "reshape":
            state[key] = value[..., :1, :1].clone()
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"backbone.weights={path} .*{message}"):
            backbone(path, "resnet50")


class TestLayouts:
    """One ResNet-18 in every file layout there is."""

    LAYOUTS = {  # noqa: RUF012
        "plain": dict,
        "plain ordered": OrderedDict,
        "state_dict": lambda state: {"epoch": 3, "state_dict": state},
        "model": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.3},
        "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
        "_orig_mod.module.": lambda state: {
            "state_dict": {f"_orig_mod.module.{key}": value for key, value in state.items()}
        },
        "module._orig_mod.": lambda state: {
            "model": {f"module._orig_mod.{key}": value for key, value in state.items()}
        },
        "without counters": lambda state: {
            key: value for key, value in state.items() if "num_batches" not in key
        },
    }

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_loads(self, resnet18, path, layout):
        torch.save(self.LAYOUTS[layout](resnet18.state_dict()), path)
        found = backbone(path, norm="batch").body.state_dict()
        keys = [key for key in found if "num_batches" not in key]
        assert assert_equal_tensors(found, resnet18.state_dict(), keys) == 100

    def test_old_format(self, resnet18, path):
        torch.save(resnet18.state_dict(), path, _use_new_zipfile_serialization=False)
        found = backbone(path).body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)

    def test_half_precision(self, resnet18, path):
        halves = {k: v.half() if v.dim() else v for k, v in resnet18.state_dict().items()}
        torch.save(halves, path)
        found = backbone(path).body.state_dict()
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert torch.equal(found["conv1.weight"], halves["conv1.weight"].float())

    @pytest.mark.parametrize("num_classes", [1000, 200, None])
    def test_head_is_left_out_and_said(self, path, caplog, num_classes):
        state = random_resnet(num_classes=num_classes or 10).state_dict()
        if num_classes is None:
            state = {key: state[key] for key in body_keys(state)}
        torch.save(state, path)
        with caplog.at_level(logging.INFO, "detmix"):
            found = backbone(path).body.state_dict()
        assert_equal_tensors(found, state, found)
        said = "; left out: fc.weight, fc.bias (the classifier head)"
        assert caplog.messages[0].endswith(said if num_classes else "resnet18 loaded")

    @pytest.mark.parametrize("levels", [(1,), (2, 3)])
    def test_levels_take_their_part_of_a_whole_file(self, resnet18, saved18, levels):
        found = backbone(saved18, levels=levels).body.state_dict()
        assert not any(key.startswith("layer4") for key in found)
        assert_equal_tensors(found, resnet18.state_dict(), found)

    def test_home_folder(self, resnet18, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        torch.save(resnet18.state_dict(), tmp_path / "home.pth")
        found = backbone("~/home.pth").body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)


class TestPretraining:
    """Checkpoints as ``tools/pretrain.py`` writes them."""

    STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}  # noqa: RUF012

    def test_averaged_weights_are_preferred(self, resnet18, path):
        average = random_resnet("resnet18", seed=1)
        for ema, expected in ((None, resnet18), (average.state_dict(), average)):
            torch.save(pretraining_checkpoint(resnet18, ema=ema), path)
            found = backbone(path).body.state_dict()
            assert_equal_tensors(found, expected.state_dict(), found)

    def test_small_stem(self, path):
        model = build_classifier(ClassifierConfig("resnet18", stem="small"), 7).eval()
        torch.save(pretraining_checkpoint(model, stem="small"), path)
        images = torch.rand(1, 3, 32, 32)
        with torch.inference_mode():
            features = backbone(path, stem="small", norm="batch").eval().body(images)
            expected = model.bn1(model.conv1(images)).relu()
            for i in range(4):
                expected = getattr(model, f"layer{i + 1}")(expected)
                torch.testing.assert_close(features[str(i)], expected, rtol=0, atol=0)
                assert expected.shape[-1] == 32 // 2**i

    @pytest.mark.parametrize(
        ("trained", "settings", "message"),
        [
            (("resnet18", "small"), {}, "stem=small, got .*stem=standard: set backbone.stem=small"),
            (
                ("resnet34", "standard"),
                {},
                "name=resnet34, got backbone.name=resnet18: set backbone.name=resnet34",
            ),
            (
                ("timm:resnet34d", "small"),
                {},
                "set backbone.name=timm:resnet34d and backbone.stem=small",
            ),
            (("resnet18", "standard"), {"stem": "small"}, "set backbone.stem=standard"),
        ],
    )
    def test_another_network(self, resnet18, path, trained, settings, message):
        name, stem = trained
        torch.save(pretraining_checkpoint(resnet18, name=name, stem=stem), path)
        with pytest.raises(ValueError, match=f"{path} was trained with .*{message}"):
            backbone(path, **settings)

    def test_mean_and_deviation_follow(self, resnet18, path):
        torch.save(pretraining_checkpoint(resnet18, data=self.STATISTICS), path)
        config = BackboneConfig("resnet18", str(path), levels=(4,), fpn_channels=8)

        def statistics(options=None, **load):
            detector = DetectorConfig(
                min_size=64, max_size=64, anchor_sizes=(16, 32), head_dim=8, options=options or {}
            )
            transform = build_detector(detector, config, 3, **load).transform
            return transform.image_mean, transform.image_std

        assert statistics() == ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1])
        mean = [0.1, 0.2, 0.3]
        assert statistics({"image_mean": mean}) == (mean, [0.3, 0.2, 0.1])
        assert statistics({"image_mean": mean, "image_std": mean}) == (mean, mean)
        path.unlink()
        assert statistics(load_weights=False) == (list(IMAGENET_MEAN), list(IMAGENET_STD))


class TestNorm:
    @pytest.mark.parametrize(
        ("norm", "kind"),
        [
            ("auto", torchvision.ops.FrozenBatchNorm2d),
            ("frozen", torchvision.ops.FrozenBatchNorm2d),
            ("batch", nn.BatchNorm2d),
            ("sync", nn.SyncBatchNorm),
        ],
    )
    def test_batch_norm(self, resnet18, saved18, norm, kind):
        body = backbone(saved18, norm=norm).body
        assert {type(m) for m in body.modules() if "Norm" in type(m).__name__} == {kind}
        assert_equal_tensors(body.state_dict(), resnet18.state_dict(), body.state_dict())

    def test_group_norm(self, path):
        model = build_classifier(ClassifierConfig("resnet18", norm="group"), 4)
        torch.save(model.state_dict(), path)
        body = backbone(path, norm="group").body
        assert_equal_tensors(body.state_dict(), model.state_dict(), body.state_dict())
        for norm in ("auto", "batch"):
            with pytest.raises(ValueError, match=r"running_mean.* and 32 more\. .*must be group"):
                backbone(path, norm=norm)

    def test_group_norm_from_batch_norm(self, saved18):
        with pytest.raises(ValueError, match=r"unexpected: bn1.running_mean.*norm must be frozen"):
            backbone(saved18, norm="group")

    @pytest.mark.parametrize(("trainable", "frozen"), [(None, 2), (4, 1)])
    def test_trainable_layers(self, saved18, trainable, frozen):
        theirs = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5 - frozen
        )
        ours = backbone(saved18, trainable_layers=trainable)
        assert [n for n, p in ours.body.named_parameters() if p.requires_grad] == [
            n for n, p in theirs.body.named_parameters() if p.requires_grad
        ]


class TestBadFiles:
    def test_arguments_of_a_training_script_are_harmless(self, resnet18, path):
        content = {"model": resnet18.state_dict(), "args": argparse.Namespace(lr=0.1, epochs=90)}
        torch.save(content, path)
        found = backbone(path).body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_torchscript(self, path):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
        with pytest.raises(ValueError, match=f"{path} is a TorchScript archive") as caught:
            backbone(path)
        assert "False" not in str(caught.value)

    def test_safetensors(self, resnet18, path):
        path = path.with_suffix(".safetensors")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            backbone(path)
        save_file(resnet18.state_dict(), path)
        found = backbone(path).body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(ValueError, match=rf"{path} is broken"):
            backbone(path)

    @pytest.mark.parametrize(
        "config", [{"model": None}, {"data": None}, {"data": {"mean": "x"}}, {"data": {"mean": []}}]
    )
    def test_strange_configurations_count_as_none(self, resnet18, path, config):
        content = {"format": 1, "model": resnet18.state_dict(), "config": config, "classes": []}
        torch.save(content, path)
        report = load_backbone_weights(torchvision.models.resnet18(), path)
        assert report.mean == (0.485, 0.456, 0.406)

    def test_a_body_saved_as_backbone_is_no_detector(self, resnet18, path):
        torch.save({f"backbone.{k}": v for k, v in resnet18.state_dict().items()}, path)
        with pytest.raises(ValueError, match=r"unexpected: backbone\.conv1\.weight"):
            backbone(path)

    def test_whole_pickled_module(self, resnet18, path):
        torch.save(resnet18, path)
        with pytest.raises(ValueError, match=r"refers to torchvision\.models\.resnet\.ResNet, .*"):
            backbone(path)

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ([torch.zeros(3)], "found <class 'list'>"),
            ({}, "found a dict of nothing"),
            ({"epoch": 3, "lr": 0.1}, "found a dict of epoch, lr"),
            ({"state_dict": {"a": 3}}, "found a dict of state_dict"),
            ({i: torch.zeros(1) for i in range(9)}, "dict of 0, 1, 2, 3, 4, 5, 6, 7 and more"),
        ],
    )
    def test_no_weights(self, path, content, found):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"{path} holds no state dict: .*{found}"):
            backbone(path)

    def test_many_wrong_keys_are_cut_short(self, resnet18, path):
        torch.save({"a": torch.zeros(1), **resnet18.layer1.state_dict()}, path)
        with pytest.raises(ValueError, match=r"missing: conv1\.weight, .* and 92 more; unexpected"):
            backbone(path)

    def test_some_prefixed_keys_are_not_stripped(self, resnet18, path):
        state = resnet18.state_dict()
        state["module.conv1.weight"] = state.pop("conv1.weight")
        torch.save(state, path)
        message = r"missing: conv1\.weight; unexpected: module\.conv1\.weight"
        with pytest.raises(ValueError, match=message):
            backbone(path)

    def test_a_detector(self, path):
        model = build_detector(
            SMALL_DETECTOR, BackboneConfig("resnet18", levels=(4,), fpn_channels=8), 3
        )
        torch.save(model.state_dict(), path)
        with pytest.raises(ValueError, match=r"whole detector, .*set detector\.weights instead"):
            backbone(path)

    def test_wrong_stem_of_a_plain_file(self, saved18):
        with pytest.raises(ValueError, match=r"conv1\.weight \(64, 3, 7, 7\).*stem must be"):
            backbone(saved18, stem="small")


class TestPaths:
    @pytest.mark.parametrize("source", ["cutmix.pth", "runs/pretrain/best", "x.pth.tar", "a.pt"])
    def test_missing_file(self, source):
        with pytest.raises(FileNotFoundError, match=f"there is no file {source}"):
            backbone(source)

    def test_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is a folder, .*best\.pt"):
            backbone(tmp_path)

    def test_unknown_name(self):
        message = "one of IMAGENET1K_V1, timm:NAME or a file, got 'IMAGENET9', and there is no such"
        with pytest.raises(ValueError, match=f"backbone.weights of resnet18 must be {message}"):
            backbone("IMAGENET9")

    def test_names_of_another_resnet(self):
        with pytest.raises(ValueError, match="of resnet18 must be one of IMAGENET1K_V1"):
            backbone("ResNet50_Weights.IMAGENET1K_V2")

    def test_nothing_is_opened_without_loading(self):
        for source in ("gone.pth", "IMAGENET1K_V1", "timm:resnet18.a1_in1k"):
            config = BackboneConfig("resnet18", source, fpn_channels=8)
            body = build_backbone(config, load_weights=False).body
            assert isinstance(body.bn1, torchvision.ops.FrozenBatchNorm2d)


class TestTorchvisionNames:
    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"])
    def test_loads(self, resnet18, monkeypatch, name):
        asked = []

        def download(url, **options):
            asked.append((url, options["weights_only"], options["check_hash"]))
            return resnet18.state_dict()

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
        config = BackboneConfig("resnet18", name, fpn_channels=8, levels=(4,))
        model = build_detector(SMALL_DETECTOR, config, 3)
        found = model.backbone.body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        assert asked == [(torchvision.models.ResNet18_Weights.DEFAULT.url, True, True)]
        assert model.transform.image_mean == list(IMAGENET_MEAN)

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (RuntimeError('invalid hash value (expected "f37072fd", got "00")'), "invalid hash"),
            (pickle.UnpicklingError("set weights_only=False"), "more than tensors"),
        ],
    )
    def test_broken_download(self, monkeypatch, error, said):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
        with pytest.raises(ConnectionError, match=f"of resnet18 .*{said}.*backbone.weights=null"):
            backbone("IMAGENET1K_V1")

    @pytest.mark.parametrize("setting", [{"norm": "group"}, {"stem": "small"}])
    def test_what_does_not_fit(self, setting):
        with pytest.raises(ValueError, match=r"does not fit weights='IMAGENET1K_V1'"):
            BackboneConfig("resnet18", "IMAGENET1K_V1", **setting)


class TestOwnLoop:
    """`load_backbone_weights` on models that were built without detmix."""

    def test_resnet(self, resnet18, path):
        torch.save(pretraining_checkpoint(resnet18, data=TestPretraining.STATISTICS), path)
        model = torchvision.models.resnet18(num_classes=1000)
        head = model.fc.weight.clone()
        report = load_backbone_weights(model, path)
        expected = resnet18.state_dict()
        assert_equal_tensors(model.state_dict(), expected, body_keys(expected))
        assert torch.equal(model.fc.weight, head)
        assert report.loaded == tuple(body_keys(expected))
        assert report.left_out == report.new == ("fc.weight", "fc.bias")
        assert (report.mean, report.std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
        assert str(report).startswith(f"source={path}: 120 of 120 tensors of ResNet loaded")

    @pytest.mark.parametrize("norm", [torchvision.ops.FrozenBatchNorm2d, nn.BatchNorm2d])
    @pytest.mark.parametrize("layers", [[1, 2, 3, 4], [1, 2]])
    def test_body(self, resnet18, path, norm, layers):
        torch.save(official_checkpoint(resnet18), path)
        body = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=norm, returned_layers=layers
        ).body
        report = load_backbone_weights(body, str(path))
        found = body.state_dict()
        assert_equal_tensors(found, resnet18.state_dict(), found)
        assert report.loaded == tuple(k for k in resnet18.state_dict() if k in found)
        assert report.left_out == ("fc.weight", "fc.bias")
        assert report.absent == (() if len(layers) == 4 else ("layer3", "layer4"))
        assert f"{len(found)} of {len(found)} tensors" in str(report)

    def test_counters_may_be_missing_and_that_is_said(self, resnet18, path):
        state = {k: v for k, v in resnet18.state_dict().items() if "num_batches" not in k}
        torch.save(state, path)
        report = load_backbone_weights(torchvision.models.resnet18(), path)
        assert (len(report.loaded), report.total) == (100, 120)
        assert "100 of 120 tensors of ResNet loaded (the rest are counters" in str(report)

    def test_refused_leaves_the_module_as_it_was(self, resnet18, path):
        state = resnet18.state_dict()
        del state["layer4.1.bn2.weight"]
        torch.save(state, path)
        model = torchvision.models.resnet18()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"missing: layer4\.1\.bn2\.weight$"):
            load_backbone_weights(model, path)
        assert_equal_tensors(model.state_dict(), before, before)

    def test_whole_detector(self):
        model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        with pytest.raises(TypeError, match=r"got FasterRCNN: .*model\.backbone\.body"):
            load_backbone_weights(model, "x.pth")
        other = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        with pytest.raises(TypeError, match=r"got RetinaNet: .*model\.backbone\.body"):
            load_backbone_weights(other, "x.pth")
        with pytest.raises(TypeError, match=r"got BackboneWithFPN: "):
            load_backbone_weights(model.backbone, "x.pth")

    def test_full_names_only(self, resnet18, monkeypatch):
        monkeypatch.setattr(
            "torchvision.models._api.load_state_dict_from_url",
            lambda url, **_: resnet18.state_dict(),
        )
        model = torchvision.models.resnet18()
        load_backbone_weights(model, "ResNet18_Weights.IMAGENET1K_V1")
        expected = resnet18.state_dict()
        assert_equal_tensors(model.state_dict(), expected, body_keys(expected))
        message = r"must be one of .*ResNet50_Weights\.IMAGENET1K_V2.*, got 'IMAGENET1K_V2'"
        with pytest.raises(ValueError, match=message):
            load_backbone_weights(model, "IMAGENET1K_V2")

    def test_missing_path(self):
        with pytest.raises(FileNotFoundError, match="there is no file nothing"):
            load_backbone_weights(torchvision.models.resnet18(), Path("nothing"))
