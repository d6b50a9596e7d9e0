"""Classifiers, alone or under a feature pyramid, against those of torchvision and timm."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from builders import (
    assert_equal_tensors,
    epsilons,
    on_meta,
    pretraining_checkpoint,
    shake,
    structure,
)
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detmix.detectors import (
    BackboneConfig,
    ClassifierConfig,
    DetectorConfig,
    build_backbone,
    build_classifier,
    build_detector,
    load_backbone_weights,
)

# One with a ResNet's names, one with fused normalization and activation, one with LayerNorm.
RESNET, MOBILENET, CONVNEXT = "timm:resnet10t", "timm:mobilenetv3_small_050", "timm:convnext_atto"
RESNET_WEIGHTS, MOBILENET_WEIGHTS = f"{RESNET}.c3_in1k", f"{MOBILENET}.lamb_in1k"
SMALL_DETECTOR = DetectorConfig(min_size=64, max_size=64, anchor_sizes=(16, 32), head_dim=8)


def backbone(name="resnet18", weights=None, load=False, **settings):
    weights = None if weights is None else str(weights)
    config = BackboneConfig(name, weights, **{"fpn_channels": 8} | settings)
    return build_backbone(config, load_weights=load)


def frozen_parts(body):
    """Return which direct parts of a network have a frozen parameter."""
    parameters = getattr(body, "model", body).named_parameters()
    return {name.partition(".")[0] for name, value in parameters if not value.requires_grad}


@pytest.mark.parametrize(
    ("name", "norm", "kind"),
    [
        ("resnet18", "frozen", "FrozenBatchNorm2d"),
        ("resnet18", "batch", "BatchNorm2d"),
        ("resnet18", "sync", "SyncBatchNorm"),
        ("resnet18", "group", "GroupNorm"),
        (RESNET, "sync", "SyncBatchNorm"),
        (MOBILENET, "frozen", "FrozenBatchNormAct2d"),
    ],
)
def test_norm(name, norm, kind):
    models = [backbone(name, norm=norm, norm_eps=1e-3).body]
    assert epsilons(models[0]) == ({1e-3} if kind == "FrozenBatchNorm2d" else set())
    if norm != "frozen":
        models.append(build_classifier(ClassifierConfig(name, norm=norm), 3))
    for model in models:
        parts = {type(part).__name__ for part in model.modules()}
        assert {part for part in parts if "Norm" in part} == {kind}


@pytest.mark.parametrize(
    ("name", "weights", "norm", "layers"),
    [
        ("resnet18", None, "batch", 5),
        ("resnet18", "IMAGENET1K_V1", "frozen", 3),
        (RESNET, RESNET_WEIGHTS, "frozen", 3),
        (MOBILENET, MOBILENET_WEIGHTS, "frozen", 5),
    ],
)
def test_norm_and_trained_layers_by_default(name, weights, norm, layers):
    explicit = backbone(name, norm=norm, trainable_layers=layers)
    assert structure(backbone(name, weights)) == structure(explicit)


@pytest.mark.parametrize("name", ["resnet18", RESNET])
@pytest.mark.parametrize("layers", range(6))
def test_trained_layers_are_torchvisions(name, layers):
    settings = {"norm_layer": nn.BatchNorm2d, "trainable_layers": layers}
    theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **settings)
    ours = backbone(name, norm="batch", trainable_layers=layers)
    assert frozen_parts(ours.body) == frozen_parts(theirs.body)


def test_others_are_trained_as_a_whole_or_not():
    still = backbone(MOBILENET, trainable_layers=0).body
    assert not any(value.requires_grad for value in still.parameters())


@pytest.mark.parametrize(
    ("name", "levels", "stem", "strides"),
    [
        ("resnet34", (3,), "standard", (16, 32)),
        ("resnext50_32x4d", (4, 2), "standard", (8, 32, 64)),
        ("resnet18", (2, 4), "small", (2, 8, 16)),
    ],
)
def test_levels_and_channels(name, levels, stem, strides):
    model = backbone(name, levels=levels, stem=stem).eval()
    with torch.inference_mode():
        features = model(torch.rand(1, 3, 64, 128))
    shapes = [(1, 8, 64 // stride, 128 // stride) for stride in strides]
    assert [tuple(feature.shape) for feature in features.values()] == shapes


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_classifier_is_torchvisions(name):
    theirs = get_model(name, weights=None, num_classes=13)
    assert structure(build_classifier(ClassifierConfig(name), 13)) == structure(theirs)


def test_small_stem():
    """Its first convolution starts as all of torchvision's.

    Kaiming's deviation by fan out, sqrt(2 / (64 · 3 · 3)); three standard errors are 5 %.
    """
    torch.manual_seed(0)
    small = build_classifier(ClassifierConfig("resnet18", "small"), 5)
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    expected = get_model("resnet18", num_classes=5).state_dict()
    assert shapes == {**{k: v.shape for k, v in expected.items()}, "conv1.weight": (64, 3, 3, 3)}
    assert small(torch.rand(2, 3, 32, 64)).shape == (2, 5)
    assert small.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.06)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("backbone", {"name": "resnet19"}, r"\.name .*resnet50.*'resnet19'"),
        ("backbone", {"norm": "group", "weights": "DEFAULT"}, ".*'DEFAULT' .*backbone.norm=group"),
        ("backbone", {"name": "timm:resnet18", "stem": "small"}, ".*'timm:resnet18'"),
        ("backbone", {"weights": ""}, r"\.weights .*''"),
        ("backbone", {"norm_eps": -0.1}, r"\.norm_eps .*-0\.1"),
        ("backbone", {"trainable_layers": 6}, r"\.trainable_layers .*0\.\.5.*got 6"),
        ("backbone", {"trainable_layers": 7}, r"\.trainable_layers .*0\.\.5.*got 7"),
        ("backbone", {"levels": (0, 1)}, r"\.levels .*\(0, 1\)"),
        ("backbone", {"levels": (2, 2, 3)}, r"\.levels .*\(2, 2, 3\)"),
        ("backbone", {"fpn_channels": 0}, r"\.fpn_channels .*got 0"),
        ("model", {"name": "vgg16"}, r"\.name .*resnet50.*'vgg16'"),
        ("model", {"stem": "tiny"}, r"\.stem .*'tiny'"),
        ("model", {"norm": "frozen"}, r"\.norm .*'frozen'"),
        ("num_classes", {}, " must be positive, got 0"),
        ("backbone", {"weights": "timm:resnet18.none"}, r"\.weights: .*'resnet18\.none'.*a1_"),
        ("backbone", {"weights": "timm:resnet1"}, r"\.weights: .*'resnet1'.*resnet18"),
        ("backbone", {"weights": "timm:resnet50_mlp"}, r"\.weights: .*no pre.*resnet50_mlp"),
        ("backbone", {"name": MOBILENET, "trainable_layers": 3}, r".*0, 5 or null.*got 3"),
        # A transformer takes images of one size only.
        ("backbone", {"name": "timm:vit_tiny_patch16_224"}, r"\.name.*vit_tiny_patch16_224"),
    ],
)
def test_refused(section, settings, message):
    def build():
        if section != "backbone":
            return build_classifier(ClassifierConfig(**settings), 0)
        return backbone(**settings, load="timm" in settings.get("weights", ""))

    with pytest.raises(ValueError, match=f"^{section}{message}"):
        build()


class TestTimm:
    @pytest.mark.parametrize(
        ("name", "levels"),
        [(RESNET, (3, 2)), *((name, (1, 2, 3, 4)) for name in (RESNET, MOBILENET, CONVNEXT))],
    )
    def test_features_are_timms(self, name, levels, tmp_path):
        path, images = tmp_path / "best.pt", torch.rand(1, 3, 64, 128)
        model = shake(build_classifier(ClassifierConfig(name), 4))
        assert model.eval()(images).shape == (1, 4)
        torch.save(pretraining_checkpoint(model, name=name), path)
        head = model.pretrained_cfg["classifier"]
        assert load_backbone_weights(model, path).left_out == (f"{head}.weight", f"{head}.bias")
        pyramid = backbone(name, path, load=True, levels=levels).eval()
        settings = {"features_only": True, "feature_cls": "getter"}
        reference = timm.create_model(name.removeprefix("timm:"), **settings).eval()
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

    def test_every_parameter_is_trained(self):
        """What comes after the last level is dropped."""
        config = BackboneConfig(RESNET, fpn_channels=8, levels=(2,))
        model = build_detector(SMALL_DETECTOR, config, 3)
        target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
        sum(model([torch.rand(3, 64, 64)], [target]).values()).backward()
        assert not {n for n, p in model.named_parameters() if p.grad is None}

    def test_the_last_of_two_stages_with_one_stride(self):
        """csatv2's stem has the stride of its first stage."""
        body = on_meta(lambda: backbone("timm:csatv2", levels=(2,))).body
        assert any("stages.0." in name for name, _ in body.named_parameters())

    @pytest.mark.parametrize("name", ["resnet18", "timm:resnet18"])
    def test_pretrained(self, monkeypatch, name):
        """With random numbers in place of the download."""
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

    def test_weights_of_another_network_with_the_same_keys(self, monkeypatch):
        """resnetaa50 has resnet50's keys and shapes, and pools otherwise."""
        monkeypatch.setattr(timm.models, "is_model_pretrained", lambda _: True)
        with pytest.raises(ValueError, match=r"of resnet50: set backbone\.name=timm:resnetaa50"):
            backbone("resnet50", "timm:resnetaa50.a1h_in1k", load=True)


def test_timm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^model\.name: .*pip install 'timm>=1\.0\.26'"):
        build_classifier(ClassifierConfig(RESNET), 3)
