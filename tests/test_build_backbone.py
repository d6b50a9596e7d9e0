"""Backbones and classifiers built from a configuration, against the ones torchvision builds."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from weight_files import norms_of, trained

from detmix.detectors import (
    BackboneConfig,
    ClassifierConfig,
    build_backbone,
    build_classifier,
)

NORMS = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": nn.GroupNorm,
}


def backbone(name="resnet18", **settings):
    return build_backbone(BackboneConfig(name, **settings), load_weights=False)


class TestBackbone:
    @pytest.mark.parametrize("norm", NORMS)
    def test_norm(self, norm):
        assert norms_of(backbone(norm=norm).body) == {NORMS[norm]}
        if norm != "frozen":
            assert norms_of(build_classifier(ClassifierConfig("resnet18", norm=norm), 3)) == {
                NORMS[norm]
            }

    @pytest.mark.parametrize(
        ("weights", "norm", "layers"), [(None, "batch", 5), ("IMAGENET1K_V1", "frozen", 3)]
    )
    def test_norm_and_trained_layers_by_default(self, weights, norm, layers):
        ours = backbone(weights=weights)
        explicit = backbone(norm=norm, trainable_layers=layers)
        assert repr(ours) == repr(explicit)
        assert trained(ours) == trained(explicit)

    @pytest.mark.parametrize("layers", range(6))
    def test_trained_layers_are_torchvisions(self, layers):
        settings = {"norm_layer": nn.BatchNorm2d, "trainable_layers": layers}
        theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **settings)
        assert trained(backbone(norm="batch", trainable_layers=layers)) == trained(theirs)

    @pytest.mark.parametrize(
        ("name", "levels", "stem", "strides"),
        [
            ("resnet34", (3,), "standard", (16, 32)),
            ("resnext50_32x4d", (4, 2), "standard", (8, 32, 64)),
            ("resnet18", (2, 4), "small", (2, 8, 16)),
        ],
    )
    def test_levels_and_channels(self, name, levels, stem, strides):
        model = backbone(name, fpn_channels=8, levels=levels, stem=stem).eval()
        with torch.inference_mode():
            features = model(torch.rand(1, 3, 64, 128))
        shapes = [(1, 8, 64 // stride, 128 // stride) for stride in strides]
        assert [tuple(feature.shape) for feature in features.values()] == shapes


class TestClassifier:
    @pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
    def test_is_torchvisions(self, name):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=13)
        ours = build_classifier(ClassifierConfig(name), 13)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        images = torch.rand(2, 3, 64, 48)
        with torch.inference_mode():
            assert torch.equal(ours.eval()(images), theirs.eval()(images))

    def test_small_stem(self):
        """Its first convolution starts as all of torchvision's.

        Kaiming's deviation by fan out, sqrt(2 / (64 · 3 · 3)); three standard errors are 5 %.
        """
        torch.manual_seed(0)
        stems = ("standard", "small")
        models = [build_classifier(ClassifierConfig("resnet18", stem), 5) for stem in stems]
        shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
        assert shapes[1] == {**shapes[0], "conv1.weight": (64, 3, 3, 3)}
        small, strides = models[1], []
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
            getattr(small, name).register_forward_hook(
                lambda _, __, out: strides.append(32 // out.shape[-2])
            )
        assert small(torch.rand(2, 3, 32, 64)).shape == (2, 5)
        assert strides == [1, 1, 2, 4, 8]
        assert small.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.06)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet19"}, r"\.name .*resnet50.*'resnet19'"),
        ({"norm": "layer"}, r"\.norm .*'layer'"),
        ({"norm": "group", "weights": "DEFAULT"}, r".*'DEFAULT' .*backbone\.norm=group"),
        ({"name": "timm:resnet18", "stem": "small"}, ".*'timm:resnet18'"),
        ({"weights": ""}, r"\.weights .*''"),
        ({"norm_eps": -0.1}, r"\.norm_eps .*-0\.1"),
        ({"trainable_layers": 6}, r"\.trainable_layers .*0\.\.5.*got 6"),
        ({"trainable_layers": 7}, r"\.trainable_layers .*0\.\.5.*got 7"),
        ({"levels": ()}, r"\.levels .*\(\)"),
        ({"levels": (0, 1)}, r"\.levels .*\(0, 1\)"),
        ({"levels": (2, 2, 3)}, r"\.levels .*\(2, 2, 3\)"),
        ({"fpn_channels": 0}, r"\.fpn_channels .*got 0"),
    ],
)
def test_refused_backbones(settings, message):
    with pytest.raises(ValueError, match=f"^backbone{message}"):
        backbone(**settings)


@pytest.mark.parametrize(
    ("settings", "num_classes", "message"),
    [
        ({"name": "vgg16"}, 3, r"model\.name .*resnet50.*'vgg16'"),
        ({"stem": "tiny"}, 3, r"model\.stem .*'tiny'"),
        ({"norm": "frozen"}, 3, r"model\.norm .*'frozen'"),
        ({"name": "timm:resnet18", "stem": "small"}, 3, "'timm:resnet18'"),
        ({}, 0, "num_classes must be positive, got 0"),
    ],
)
def test_refused_classifiers(settings, num_classes, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(ClassifierConfig(**settings), num_classes)
