"""Classifiers built from a configuration, against the ones torchvision builds."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from detmix.detectors import ClassifierConfig, build_classifier


def shapes_of(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


class TestStandard:
    @pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
    def test_is_torchvisions(self, name):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=13)
        ours = build_classifier(ClassifierConfig(name), 13)
        assert shapes_of(ours) == shapes_of(theirs)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        images = torch.rand(2, 3, 64, 48)
        with torch.inference_mode():
            assert torch.equal(ours.eval()(images), theirs.eval()(images))

    @pytest.mark.parametrize(
        ("norm", "kind"),
        [("batch", nn.BatchNorm2d), ("sync", nn.SyncBatchNorm), ("group", nn.GroupNorm)],
    )
    def test_norm(self, norm, kind):
        model = build_classifier(ClassifierConfig("resnet18", norm=norm), 3)
        norms = [m for m in model.modules() if "Norm" in type(m).__name__]
        assert len(norms) == 20
        assert {type(m) for m in norms} == {kind}


class TestSmallStem:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        torch.manual_seed(0)
        return build_classifier(ClassifierConfig("resnet18", stem="small"), 5)

    def test_strides(self, model):
        sizes = {}
        for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
            getattr(model, name).register_forward_hook(
                lambda _module, _inputs, output, name=name: sizes.update({name: output.shape[-2:]})
            )
        assert model(torch.rand(2, 3, 32, 64)).shape == (2, 5)
        strides = {name: (32 // size[0], 64 // size[1]) for name, size in sizes.items()}
        expected = {"conv1": 1, "layer1": 1, "layer2": 2, "layer3": 4, "layer4": 8}
        assert strides == {name: (stride, stride) for name, stride in expected.items()}

    def test_only_the_first_convolution_differs(self, model):
        standard = shapes_of(build_classifier(ClassifierConfig("resnet18"), 5))
        small = shapes_of(model)
        assert small.keys() == standard.keys()
        assert {k for k in small if small[k] != standard[k]} == {"conv1.weight"}
        assert small["conv1.weight"] == (64, 3, 3, 3)

    def test_starts_as_torchvisions_convolutions(self, model):
        """Kaiming's deviation by fan out, sqrt(2 / (64 · 3 · 3)); three standard errors are 5 %."""
        assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.06)


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "resnet19"}, r"model\.name must be one of .*resnet50.*, got 'resnet19'"),
            ({"name": "vgg16"}, r"model\.name must be one of .*timm:ARCH, got 'vgg16'"),
            ({"stem": "tiny"}, r"model\.stem must be one of standard, small, got 'tiny'"),
            ({"norm": "frozen"}, r"model\.norm must be one of batch, sync, group, got 'frozen'"),
            ({"name": "timm:resnet18", "stem": "small"}, "torchvision's ResNets only"),
            ({"name": "timm:resnet18", "norm": "group"}, "torchvision's ResNets only"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            ClassifierConfig(**settings)

    @pytest.mark.parametrize("number", [0, -3])
    def test_number_of_classes(self, number):
        with pytest.raises(ValueError, match=f"num_classes must be positive, got {number}"):
            build_classifier(ClassifierConfig("resnet18"), number)
