"""Classifiers, alone or under a feature pyramid, against those of torchvision and timm."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import timm
import torch
from builders import (
    assert_equal_tensors,
    epsilons,
    on_meta,
    pretraining_checkpoint,
    shake,
    statistics,
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
from detmix.training import PretrainConfig, TrainConfig
from detmix.training.parse import from_dict

# One with a ResNet's names, one with fused normalization and activation, one with LayerNorm.
RESNET, MOBILENET, CONVNEXT = "timm:resnet10t", "timm:mobilenetv3_small_050", "timm:convnext_atto"
RESNET_WEIGHTS, MOBILENET_WEIGHTS = f"{RESNET}.c3_in1k", f"{MOBILENET}.lamb_in1k"
CSAT, HRNET = {"name": "timm:csatv2"}, {"name": "timm:hrnet_w18_small"}
# Its images are not normalised as ImageNet's mostly are.
LITE, OTHER = "timm:tf_efficientnet_lite0", [0.1, 0.2, 0.3]
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


@pytest.mark.parametrize(
    ("name", "stem"),
    [(MOBILENET, "conv_stem|bn1"), (CONVNEXT, "stem"), ("timm:fasternet_t0", "patch_embed")],
)
@pytest.mark.parametrize("layers", range(6))
def test_trained_stages_are_timms(name, stem, layers):
    """What a map before the trained stages depends on is frozen, whatever the pyramid takes."""
    body = backbone(name, norm="batch").body.eval()
    frozen = parameters = dict(body.named_parameters())
    if layers > 3:
        frozen = {key for key in parameters if layers == 4 and re.match(rf"model\.({stem})", key)}
    elif layers:
        last = list(body(torch.rand(1, 3, 64, 64)).values())[3 - layers]
        gradients = torch.autograd.grad(last.sum(), parameters.values(), allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        frozen = {key for key, gradient in pairs if gradient is not None}
    assert bool(frozen) == (layers < 5)
    for levels in ((1, 2, 3, 4), (2,)):
        ours = backbone(name, norm="batch", trainable_layers=layers, levels=levels).body
        found = dict(ours.named_parameters())
        assert {key for key in found if not found[key].requires_grad} == {*frozen} & {*found}


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
        ("backbone", {"trainable_layers": 7}, r"\.trainable_layers .*6, got 7"),
        ("backbone", {"levels": (0, 1)}, r"\.levels\.0 .*1, got 0"),
        ("backbone", {"levels": ()}, r"\.levels .*\(\)"),
        ("backbone", {"levels": (2, 2, 3)}, r"\.levels .*\(2, 2, 3\)"),
        ("backbone", {"fpn_channels": 0}, r"\.fpn_channels .*got 0"),
        ("model", {"name": "vgg16"}, r"\.name .*resnet50.*'vgg16'"),
        ("model", {"stem": "tiny"}, r"\.stem .*'tiny'"),
        ("model", {"norm": "frozen"}, r"\.norm .*'frozen'"),
        ("num_classes", {}, " must be positive, got 0"),
        ("backbone", {"weights": "timm:resnet18.none"}, r"\.weights: .*'resnet18\.none'.*a1_"),
        ("backbone", {"weights": "timm:resnet1"}, r"\.weights: .*'resnet1'.*resnet18"),
        ("backbone", {"weights": "timm:resnet50_mlp"}, r"\.weights: .*no pre.*resnet50_mlp"),
        # It has no stage of stride 4; the stem of the other is no module.
        ("backbone", CSAT | {"trainable_layers": 3}, r"\.train.*timm:csatv2 .*got 3.* stride 4"),
        ("backbone", HRNET | {"trainable_layers": 4}, r"\.train.*timm:hrnet.*got 4.* stride 2"),
        ("backbone", {"name": MOBILENET, "trainable_layers": 6}, r"\.train.*0\.\.5.*got 6"),
        # A transformer takes images of one size only.
        ("backbone", {"name": "timm:vit_tiny_patch16_224"}, r"\.name.*vit_tiny_patch16_224"),
    ],
)
def test_refused(section, settings, message):
    def build():
        if section != "backbone":
            return build_classifier(from_dict(PretrainConfig, {"model": settings}).model, 0)
        config = from_dict(TrainConfig, {"backbone": settings}).backbone
        return build_backbone(config, load_weights="timm" in settings.get("weights", ""))

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

    @pytest.mark.parametrize("whole", [False, True])
    @pytest.mark.parametrize(
        ("notes", "options", "expected", "warned"),
        [
            (None, {}, [[0.5] * 3] * 2, False),
            (None, {"image_mean": OTHER}, [OTHER, [0.5] * 3], False),
            ({"image_mean": OTHER}, {}, [OTHER, [0.5] * 3], False),
            ({"image_mean": OTHER}, {"image_std": OTHER}, [OTHER, OTHER], False),
            ({"image_std": OTHER}, {"image_std": [0.2] * 3}, [[0.5] * 3, [0.2] * 3], True),
        ],
    )
    def test_statistics(self, whole, notes, options, expected, warned, tmp_path, caplog):
        """Of the configuration, else of the file, else of timm's record of the architecture."""
        record = timm.get_pretrained_cfg(LITE.removeprefix("timm:"))
        assert [record.mean, record.std] == [(0.5, 0.5, 0.5)] * 2
        path, settings = tmp_path / "best.pt", {"fpn_channels": 8, "levels": (4,)}
        model = build_classifier(ClassifierConfig(LITE), 3)
        if whole:
            model = build_detector(SMALL_DETECTOR, BackboneConfig(LITE, **settings), 3)
        saved = model.state_dict()
        if notes is not None:
            saved = pretraining_checkpoint(model, name=LITE, normalization=notes)
        torch.save(saved, path)
        start = str(path)
        named = replace(SMALL_DETECTOR, options=options, weights=start if whole else None)
        body = BackboneConfig(LITE, None if whole else start, **settings)
        assert statistics(build_detector(named, body, 3)) == expected
        assert ("but the weights" in caplog.text) == warned

    def test_weights_of_another_network_with_the_same_keys(self, monkeypatch):
        """resnetaa50 has resnet50's keys and shapes, and pools otherwise."""
        monkeypatch.setattr(timm.models, "is_model_pretrained", lambda _: True)
        with pytest.raises(ValueError, match=r"of resnet50: set backbone\.name=timm:resnetaa50"):
            backbone("resnet50", "timm:resnetaa50.a1h_in1k", load=True)


def test_timm_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^model\.name: .*pip install 'timm>=1\.0\.26'"):
        build_classifier(ClassifierConfig(RESNET), 3)
