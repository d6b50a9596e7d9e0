"""Classifiers of timm under a detector, and its weights in torchvision's ResNets."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from torch import nn
from weight_files import assert_equal_tensors, pretraining_checkpoint, shake

from detmix.backbones.timm import check_timm_body
from detmix.detectors import (
    BackboneConfig,
    ClassifierConfig,
    DetectorConfig,
    build_backbone,
    build_classifier,
    build_detector,
    load_backbone_weights,
)

timm = pytest.importorskip("timm", reason="the optional library timm is not installed")
from timm.layers import FrozenBatchNormAct2d  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

# One with a ResNet's names, one with fused normalization and activation, one with LayerNorm.
ARCHITECTURES = ("resnet10t", "mobilenetv3_small_050", "convnext_atto")
SMALL_DETECTOR = DetectorConfig(min_size=64, max_size=64, anchor_sizes=(16, 32), head_dim=8)


def timm_config(architecture, weights=None, **settings):
    weights = None if weights is None else str(weights)
    return BackboneConfig(f"timm:{architecture}", weights, fpn_channels=8, **settings)


def random_timm(architecture, seed=0):
    return shake(timm.create_model(architecture, num_classes=4), seed).eval()


def frozen(module):
    return {name for name, value in module.named_parameters() if not value.requires_grad}


class TestBody:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("levels", [(1, 2, 3, 4), (3, 2)])
    def test_features_are_timms(self, architecture, levels, tmp_path):
        model = random_timm(architecture)
        path = tmp_path / "best.pt"
        torch.save(pretraining_checkpoint(model, name=f"timm:{architecture}"), path)
        pyramid = build_backbone(timm_config(architecture, path, levels=levels)).eval()
        reference = timm.create_model(architecture, features_only=True, feature_cls="getter").eval()
        own = reference.model.state_dict()
        reference.model.load_state_dict({key: model.state_dict()[key] for key in own})
        images = torch.rand(1, 3, 64, 128)
        with torch.inference_mode():
            features = reference(images)
            by_stride = {64 // feature.shape[-2]: feature for feature in features}
            found = pyramid.body(images)
            maps = pyramid(images)
        assert len(found) == len(levels)
        for (name, feature), level in zip(found.items(), sorted(levels), strict=True):
            expected = by_stride[2 ** (level + 1)]
            assert expected.std() > 0, name
            torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4 * expected.std())
        strides = [2 ** (level + 1) for level in sorted(levels)]
        strides.append(strides[-1] * 2)
        shapes = [(1, 8, 64 // stride, 128 // stride) for stride in strides]
        assert [tuple(level.shape) for level in maps.values()] == shapes

    def test_trains(self):
        torch.manual_seed(0)
        config = timm_config("resnet10t", levels=(4,))
        model = build_detector(SMALL_DETECTOR, config, 3)
        target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
        sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
        unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not unused

    def test_what_comes_after_is_dropped(self):
        names = {n for n, _ in build_backbone(timm_config("resnet18", levels=(2,))).named_modules()}
        assert "body.model.layer2" in names
        assert not any(n.startswith("body.model.layer3.") for n in names)


class TestNorm:
    @pytest.mark.parametrize(
        ("norm", "weights", "kind"),
        [
            ("auto", None, nn.BatchNorm2d),
            ("auto", "timm:resnet10t.c3_in1k", FrozenBatchNorm2d),
            ("frozen", None, FrozenBatchNorm2d),
            ("batch", None, nn.BatchNorm2d),
            ("sync", None, nn.SyncBatchNorm),
        ],
    )
    def test_plain(self, norm, weights, kind):
        config = timm_config("resnet10t", weights, norm=norm)
        body = build_backbone(config, load_weights=False).body
        assert {type(m) for m in body.modules() if "Norm" in type(m).__name__} == {kind}

    def test_fused_with_activation(self):
        body = build_backbone(timm_config("mobilenetv3_small_050", norm="frozen")).body
        kinds = {type(m) for m in body.modules() if "Norm" in type(m).__name__}
        assert kinds == {FrozenBatchNormAct2d}


class TestTrainableLayers:
    @pytest.mark.parametrize(
        ("layers", "last_frozen"), [(3, "layer1"), (None, "layer1"), (1, "layer3"), (4, "bn1")]
    )
    def test_parts_of_a_resnet(self, layers, last_frozen):
        config = timm_config(
            "resnet10t", "timm:resnet10t.c3_in1k", trainable_layers=layers, norm="batch"
        )
        model = build_backbone(config, load_weights=False).body.model
        order = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
        expected = set(order[: order.index(last_frozen) + 1])
        assert {name.partition(".")[0] for name in frozen(model)} == expected

    def test_other_architectures(self):
        name = "mobilenetv3_small_050"
        assert not frozen(build_backbone(timm_config(name)).body)
        weights = f"timm:{name}.lamb_in1k"
        start = build_backbone(timm_config(name, weights, norm="batch"), load_weights=False)
        assert not frozen(start.body)
        still = build_backbone(timm_config(name, trainable_layers=0)).body
        assert frozen(still) == {n for n, _ in still.named_parameters()}
        with pytest.raises(ValueError, match=rf"layers of timm:{name} must be 0, 5 or null.*got 3"):
            build_backbone(timm_config(name, trainable_layers=3))


class TestFiles:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_classifier_goes_into_the_body(self, architecture, tmp_path):
        path = tmp_path / "best.pt"
        model = shake(build_classifier(ClassifierConfig(f"timm:{architecture}"), 4))
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, 4)
        statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
        content = pretraining_checkpoint(model, name=f"timm:{architecture}", data=statistics)
        torch.save(content, path)
        config = timm_config(architecture, path, levels=(4,), norm="batch")
        detector = build_detector(SMALL_DETECTOR, config, 3)
        found = detector.backbone.body.model.state_dict()
        features = timm.create_model(architecture, features_only=True, feature_cls="getter")
        assert found.keys() == features.model.state_dict().keys()
        assert_equal_tensors(found, model.state_dict(), found)
        assert detector.transform.image_mean == statistics["mean"]
        head = model.pretrained_cfg["classifier"]
        report = load_backbone_weights(timm.create_model(architecture), path)
        assert report.left_out == report.new == (f"{head}.weight", f"{head}.bias")

    def test_one_key_missing(self, tmp_path):
        path = tmp_path / "best.pt"
        state = random_timm("convnext_atto").state_dict()
        del state["stages.3.blocks.0.mlp.fc1.weight"]
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"missing: stages\.3\.blocks\.0\.mlp\.fc1\.weight$"):
            build_backbone(timm_config("convnext_atto", path, levels=(1,)))


class TestPretrained:
    """``timm:NAME`` weights, with random numbers in place of the download."""

    @pytest.fixture
    def hub(self, monkeypatch):
        """Let timm find weights, and return the ones it will find."""
        model = shake(timm.create_model("resnet18", pretrained=False))

        def fake(name, pretrained=False, **options):
            made = create(name, pretrained=False, **options)
            if pretrained:
                assert name == "resnet18.a1_in1k"
                made.load_state_dict(model.state_dict())
                made.pretrained_cfg = {
                    **made.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)
                }  # fmt: skip
            return made

        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", fake)
        return model

    @pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
    def test_into_a_body(self, hub, name):
        config = BackboneConfig(name, "timm:resnet18.a1_in1k", fpn_channels=8, levels=(4,))
        model = build_detector(SMALL_DETECTOR, config, 3)
        found = getattr(model.backbone.body, "model", model.backbone.body).state_dict()
        assert len(found) == 100
        assert_equal_tensors(found, hub.state_dict(), found)
        assert model.transform.image_mean == [0.5, 0.5, 0.5]
        assert model.transform.image_std == [0.2, 0.2, 0.2]

    def test_of_another_network_with_the_same_keys(self, monkeypatch):
        """resnetaa50 has resnet50's keys and shapes, and pools otherwise."""
        monkeypatch.setattr(timm.models, "is_model_pretrained", lambda _: True)
        message = r"a1h_in1k is not of resnet50: set backbone\.name=timm:resnetaa50"
        with pytest.raises(ValueError, match=message):
            build_backbone(BackboneConfig("resnet50", "timm:resnetaa50.a1h_in1k"))

    def test_a_file_that_would_run_code(self, monkeypatch):
        def fail(*_, **__):
            raise pickle.UnpicklingError("Unsupported global")

        monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
        with pytest.raises(ValueError, match=r"timm:resnet18\.a1_in1k holds more than tensors"):
            build_backbone(BackboneConfig("resnet18", "timm:resnet18.a1_in1k"))

    def test_offline(self, monkeypatch):
        class ClientError(Exception):
            """What the hub's client raises is no OSError in all versions."""

        def fail(*_, **__):
            raise ClientError("no route to host")

        monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
        with pytest.raises(ConnectionError, match=r"timm:resnet18\.a1_in1k \(ClientError: no ro"):
            build_backbone(BackboneConfig("resnet18", "timm:resnet18.a1_in1k"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("timm:resnet18.none", r"no weights 'resnet18\.none'; of resnet18 there are .*a1_in1k"),
            ("timm:resnet1", "no architecture 'resnet1'; there are .*resnet18"),
            ("timm:regnety_002_", "no architecture"),
            ("timm:resnet50_mlp", "timm has no pretrained weights of resnet50_mlp"),
        ],
    )
    def test_unknown(self, name, message):
        with pytest.raises(ValueError, match=rf"^backbone\.weights: .*{message}"):
            build_backbone(BackboneConfig("resnet18", name))


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nothing", r"^backbone\.name: timm has no architecture 'nothing'$"),
            ("vit_tiny_patch16_224", "takes images of one size only"),
            ("swin_tiny_patch4_window7_224", "takes images of one size only"),
        ],
    )
    def test_architecture(self, name, message):
        with pytest.raises(ValueError, match=message):
            build_backbone(timm_config(name))

    def test_levels(self):
        name = "convnext_atto"
        model = timm.create_model(name)
        model.feature_info = model.feature_info[1:]
        message = (
            rf"backbone\.levels: {name} has no features of stride 4 for level 1, only of 8, 16, 32"
        )
        with pytest.raises(ValueError, match=message):
            check_timm_body(model, name, [1, 2])

    @pytest.mark.parametrize("settings", [{"stem": "small"}, {"norm": "group"}])
    def test_settings(self, settings):
        with pytest.raises(ValueError, match=r"torchvision's ResNets only.*'timm:resnet18'"):
            timm_config("resnet18", **settings)

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        message = r"need the library timm .*pip install 'timm>=1\.0\.26'"
        with pytest.raises(ValueError, match=rf"^model\.name: .*{message}"):
            build_classifier(ClassifierConfig("timm:resnet18"), 3)
        with pytest.raises(ValueError, match=rf"^backbone\.name: .*{message}"):
            build_backbone(timm_config("resnet18"))
        with pytest.raises(ValueError, match=rf"^backbone\.weights: .*{message}"):
            build_backbone(BackboneConfig("resnet18", "timm:resnet18"))
