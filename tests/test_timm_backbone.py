"""Classifiers of timm under a detector, and its weights in torchvision's ResNets."""

from __future__ import annotations

import pickle
import sys
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from weight_files import assert_equal_tensors, norms_of, on_meta, pretraining_checkpoint, shake

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


def frozen(module):
    return {name for name, value in module.named_parameters() if not value.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "levels"),
    [(ARCHITECTURES[0], (3, 2)), *((name, (1, 2, 3, 4)) for name in ARCHITECTURES)],
)
def test_features_are_timms(architecture, levels, tmp_path):
    path, images = tmp_path / "best.pt", torch.rand(1, 3, 64, 128)
    model = shake(build_classifier(ClassifierConfig(f"timm:{architecture}"), 4))
    assert model.eval()(images).shape == (1, 4)
    torch.save(pretraining_checkpoint(model, name=f"timm:{architecture}"), path)
    pyramid = build_backbone(timm_config(architecture, path, levels=levels)).eval()
    reference = timm.create_model(architecture, features_only=True, feature_cls="getter").eval()
    own = reference.model.state_dict()
    reference.model.load_state_dict({key: model.state_dict()[key] for key in own})
    with torch.inference_mode():
        by_stride = {64 // feature.shape[-2]: feature for feature in reference(images)}
        found, maps = pyramid.body(images), pyramid(images)
    strides = [2 ** (level + 1) for level in sorted(levels)]
    for feature, stride in zip(found.values(), strides, strict=True):
        scale = by_stride[stride].std()
        assert scale > 0
        torch.testing.assert_close(feature, by_stride[stride], rtol=1e-4, atol=1e-4 * scale)
    shapes = [(1, 8, 64 // stride, 128 // stride) for stride in (*strides, strides[-1] * 2)]
    assert [tuple(level.shape) for level in maps.values()] == shapes


def test_every_parameter_is_trained():
    """What comes after the last level is dropped."""
    torch.manual_seed(0)
    model = build_detector(SMALL_DETECTOR, timm_config("resnet10t", levels=(2,)), 3)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
    assert not {n for n, p in model.named_parameters() if p.grad is None}


def test_the_last_of_two_stages_with_one_stride():
    """csatv2's stem has the stride of its first stage."""
    body = on_meta(lambda: build_backbone(timm_config("csatv2", levels=(2,)))).body
    assert any("stages.0." in name for name, _ in body.named_parameters())


@pytest.mark.parametrize(
    ("architecture", "weights", "norm", "kind"),
    [
        ("resnet10t", None, "auto", nn.BatchNorm2d),
        ("resnet10t", "timm:resnet10t.c3_in1k", "auto", FrozenBatchNorm2d),
        ("resnet10t", None, "sync", nn.SyncBatchNorm),
        ("mobilenetv3_small_050", None, "frozen", FrozenBatchNormAct2d),
    ],
)
def test_norm(architecture, weights, norm, kind):
    config = timm_config(architecture, weights, norm=norm)
    assert norms_of(build_backbone(config, load_weights=False).body) == {kind}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (4, ("conv1", "bn1")),
        (3, ("conv1", "bn1", "layer1")),
        (None, ("conv1", "bn1", "layer1")),
        (1, ("conv1", "bn1", "layer1", "layer2", "layer3")),
    ],
)
def test_frozen_parts_of_a_resnet(layers, expected):
    settings = {"weights": "timm:resnet10t.c3_in1k", "norm": "batch", "trainable_layers": layers}
    body = build_backbone(timm_config("resnet10t", **settings), load_weights=False).body
    assert {name.split(".")[1] for name in frozen(body)} == set(expected)


def test_others_are_trained_as_a_whole_or_not():
    name = "mobilenetv3_small_050"
    settings = {"weights": f"timm:{name}.lamb_in1k", "norm": "batch"}
    assert not frozen(build_backbone(timm_config(name, **settings), load_weights=False).body)
    still = build_backbone(timm_config(name, trainable_layers=0)).body
    assert frozen(still) == {n for n, _ in still.named_parameters()}
    with pytest.raises(ValueError, match=rf"layers of timm:{name} .*0, 5 or null.*got 3"):
        build_backbone(timm_config(name, trainable_layers=3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_but_the_head_must_be_there(architecture, tmp_path):
    model, path = timm.create_model(architecture), tmp_path / "state.pt"
    state, head = model.state_dict(), model.pretrained_cfg["classifier"]
    torch.save(state, path)
    report = load_backbone_weights(model, path)
    assert report.left_out == report.new == (f"{head}.weight", f"{head}.bias")
    key = next(key for key in reversed(state) if head not in key and "num_batches" not in key)
    del state[key]
    torch.save(state, path)
    # Though it is of a level that the detector does not use.
    with pytest.raises(ValueError, match=f"missing: {key}"):
        build_backbone(timm_config(architecture, path, levels=(2,)))


class TestPretrained:
    """``timm:NAME`` weights, with random numbers in place of the download."""

    @pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
    def test_into_a_body(self, monkeypatch, name):
        model, create = shake(timm.create_model("resnet18")), timm.create_model

        def fake(name, pretrained=False, **options):
            made = create(name, **options)
            if pretrained:
                assert name == "resnet18.a1_in1k"
                made.load_state_dict(model.state_dict())
                made.pretrained_cfg = made.pretrained_cfg | {"mean": (0.5,) * 3, "std": (0.2,) * 3}
            return made

        monkeypatch.setattr(timm, "create_model", fake)
        config = BackboneConfig(name, "timm:resnet18.a1_in1k", fpn_channels=8, levels=(4,))
        detector = build_detector(SMALL_DETECTOR, config, 3)
        found = getattr(detector.backbone.body, "model", detector.backbone.body).state_dict()
        assert assert_equal_tensors(found, model.state_dict(), found) == 100
        assert detector.transform.image_mean == [0.5, 0.5, 0.5]
        assert detector.transform.image_std == [0.2, 0.2, 0.2]

    def test_of_another_network_with_the_same_keys(self, monkeypatch):
        """resnetaa50 has resnet50's keys and shapes, and pools otherwise."""
        monkeypatch.setattr(timm.models, "is_model_pretrained", lambda _: True)
        with pytest.raises(ValueError, match=r"of resnet50: set backbone\.name=timm:resnetaa50"):
            build_backbone(BackboneConfig("resnet50", "timm:resnetaa50.a1h_in1k"))

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (pickle.UnpicklingError("Unsupported global"), ValueError),
            # What the hub's client raises is no OSError in all versions.
            (LookupError("no route to host"), ConnectionError),
        ],
    )
    def test_broken_download(self, monkeypatch, error, kind):
        monkeypatch.setattr("timm.models._builder.load_pretrained", Mock(side_effect=error))
        with pytest.raises(kind, match=r"timm:resnet18\.a1_in1k"):
            build_backbone(BackboneConfig("resnet18", "timm:resnet18.a1_in1k"))


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "weights", "message"),
        [
            ("resnet18", "timm:resnet18.none", r"weights: .*'resnet18\.none'.*a1_in1k"),
            ("resnet18", "timm:resnet1", "weights: .*'resnet1'.*resnet18"),
            ("resnet18", "timm:resnet50_mlp", "weights: .*resnet50_mlp"),
            ("timm:nothing", None, "name.*nothing"),
            # A transformer takes images of one size only.
            ("timm:vit_tiny_patch16_224", None, "name.*vit_tiny_patch16_224"),
        ],
    )
    def test_unknown(self, name, weights, message):
        with pytest.raises(ValueError, match=rf"^backbone\.{message}"):
            build_backbone(BackboneConfig(name, weights))

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        builds = {
            "model.name": lambda: build_classifier(ClassifierConfig("timm:resnet18"), 3),
            "backbone.name": lambda: build_backbone(timm_config("resnet18")),
            "backbone.weights": lambda: build_backbone(BackboneConfig("resnet18", "timm:resnet18")),
        }
        for setting, build in builds.items():
            with pytest.raises(ValueError, match=rf"^{setting}: .*pip install 'timm>=1\.0\.26'"):
                build()
