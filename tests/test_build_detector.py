"""Detectors built from a configuration, against the ones torchvision builds."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from detmix.detectors import BackboneConfig, DetectorConfig, build_backbone, build_detector

NORMS = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": nn.GroupNorm,
}


def shapes_of(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def make_fast(model):
    """Shrink images and proposals; the settings themselves are compared elsewhere."""
    model.transform.min_size = (128,)
    model.rpn._post_nms_top_n = {"training": 60, "testing": 60}
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 32


def trained(module):
    return {name for name, value in module.named_parameters() if value.requires_grad}


class TestDefaults:
    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls):
        torch.manual_seed(0)
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21)
        return theirs, build_detector(DetectorConfig(), BackboneConfig(), 21)

    def test_state_dict_is_torchvisions(self, pair):
        theirs, ours = pair
        assert isinstance(ours, FasterRCNN)
        assert list(shapes_of(ours).items()) == list(shapes_of(theirs).items())
        assert trained(ours) == trained(theirs)
        assert ours.training

    def test_predictions_are_torchvisions(self, pair):
        theirs, ours = pair
        ours.load_state_dict(theirs.state_dict())
        images = [torch.rand(3, 60, 80), torch.rand(3, 90, 50)]
        for model in pair:
            make_fast(model.eval())
            model.roi_heads.score_thresh = 0.0
        with torch.inference_mode():
            expected, found = theirs(images), ours(images)
        assert all(len(e["boxes"]) > 10 for e in expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_settings_are_torchvisions(self, pair):
        # The text of these parts holds all their settings; their modules are compared above.
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21)
        ours = build_detector(DetectorConfig(), BackboneConfig(), 21)
        assert repr(ours) == repr(theirs)
        plain = (int, float, str, bool, tuple, dict, list)
        for name, part in theirs.named_modules():
            mine = vars(ours.get_submodule(name))
            for key in vars(part).keys() - vars(nn.Module()).keys():
                if isinstance(vars(part)[key], plain):
                    assert repr(mine[key]) == repr(vars(part)[key]), f"{name}.{key}"

    def test_losses_are_torchvisions_too(self, pair):
        theirs, ours = pair
        targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([3])}]
        losses = []
        ours.load_state_dict(theirs.state_dict())
        for model in pair:
            make_fast(model.train())
            torch.manual_seed(1)
            losses.append(model([torch.ones(3, 60, 60) * 0.3], targets))
        torch.testing.assert_close(*losses, rtol=0, atol=0)


class TestBackbone:
    @pytest.mark.parametrize("norm", NORMS)
    def test_norm(self, norm):
        body = build_backbone(BackboneConfig("resnet18", norm=norm)).body
        kinds = {type(m) for m in body.modules() if "Norm" in type(m).__name__}
        assert kinds == {NORMS[norm]}

    @pytest.mark.parametrize(("weights", "kind"), [(None, "batch"), ("IMAGENET1K_V1", "frozen")])
    def test_norm_auto(self, weights, kind):
        config = BackboneConfig("resnet18", weights)
        model = build_backbone(config, load_weights=False)
        assert any(isinstance(module, NORMS[kind]) for module in model.modules())
        explicit = build_backbone(BackboneConfig("resnet18", norm=kind))
        assert shapes_of(model) == shapes_of(explicit)

    @pytest.mark.parametrize("layers", range(6))
    @pytest.mark.parametrize("norm", ["frozen", "batch"])
    def test_trainable_layers_are_torchvisions(self, layers, norm):
        theirs = resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            norm_layer=NORMS[norm],
            trainable_layers=layers,
        )
        ours = build_backbone(BackboneConfig("resnet18", norm=norm, trainable_layers=layers))
        assert trained(ours) == trained(theirs)

    @pytest.mark.parametrize(("weights", "layers"), [(None, 5), ("IMAGENET1K_V1", 3)])
    def test_trainable_layers_by_default(self, weights, layers):
        ours = build_backbone(BackboneConfig("resnet18", weights), load_weights=False)
        explicit = BackboneConfig("resnet18", weights, trainable_layers=layers)
        assert trained(ours) == trained(build_backbone(explicit, load_weights=False))

    @pytest.mark.parametrize("name", ["resnet34", "resnext50_32x4d"])
    @pytest.mark.parametrize("levels", [(3,), (4, 2)])
    def test_levels_and_channels(self, name, levels):
        config = BackboneConfig(name, fpn_channels=8, levels=levels)
        with torch.inference_mode():
            features = build_backbone(config).eval()(torch.rand(1, 3, 64, 64))
        strides = [2 ** (stage + 1) for stage in sorted(levels)]
        sizes = [64 // stride for stride in (*strides, strides[-1] * 2)]
        assert [tuple(f.shape) for f in features.values()] == [(1, 8, s, s) for s in sizes]

    def test_small_stem(self):
        config = BackboneConfig("resnet18", fpn_channels=8, levels=(2, 4), stem="small")
        with torch.inference_mode():
            features = build_backbone(config).eval()(torch.rand(1, 3, 32, 64))
        shapes = [(1, 8, 32 // stride, 64 // stride) for stride in (2, 8, 16)]
        assert [tuple(feature.shape) for feature in features.values()] == shapes

    def test_without_loading_the_architecture_is_the_same(self, monkeypatch):
        import torchvision

        def fake_download(url, **_):
            torch.manual_seed(5)
            return torchvision.models.resnet18().state_dict()

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fake_download)
        config = BackboneConfig("resnet18", "IMAGENET1K_V1", fpn_channels=8)
        loaded = build_backbone(config)
        assert shapes_of(loaded) == shapes_of(build_backbone(config, load_weights=False))
        assert trained(loaded) == trained(build_backbone(config, load_weights=False))
        expected = fake_download("")
        assert torch.equal(loaded.body.conv1.weight, expected["conv1.weight"])

    @pytest.mark.parametrize("name", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"])
    @pytest.mark.parametrize("error", [URLError("no route to host"), TimeoutError("timed out")])
    def test_weights_that_cannot_be_downloaded(self, monkeypatch, name, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
        with pytest.raises(ConnectionError, match=r"IMAGENET1K_V1 of resnet18 .*(route|timed out)"):
            build_backbone(BackboneConfig("resnet18", name))


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "resnet19"}, "backbone.name must be one of .*resnet50.*, got 'resnet19'"),
            ({"name": "vgg16"}, "backbone.name must be one of"),
            ({"norm": "layer"}, "backbone.norm must be one of .*, got 'layer'"),
            ({"norm": "group", "weights": "DEFAULT"}, "backbone.norm=group does not fit"),
            ({"stem": "tiny"}, "backbone.stem must be one of standard, small, got 'tiny'"),
            ({"name": "timm:resnet18", "stem": "small"}, "for torchvision's ResNets only"),
            ({"trainable_layers": 7}, r"backbone.trainable_layers must be in 0\.\.5 .*, got 7"),
            ({"trainable_layers": -1}, r"backbone.trainable_layers must be in 0\.\.5 .*, got -1"),
            ({"levels": ()}, r"backbone.levels must be .*, got \(\)"),
            ({"levels": (0, 1)}, r"backbone.levels must be .*, got \(0, 1\)"),
            ({"levels": (2, 2, 3)}, r"backbone.levels must be different .*, got \(2, 2, 3\)"),
            ({"fpn_channels": 0}, "backbone.fpn_channels must be positive, got 0"),
        ],
    )
    def test_backbone(self, settings, message):
        with pytest.raises(ValueError, match=message):
            BackboneConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"head_dim": 0}, "detector.head_dim must be positive, got 0"),
            ({"min_size": -1}, "detector.min_size must be positive, got -1"),
            ({"anchor_sizes": ()}, r"detector.anchor_sizes must be positive numbers, got \(\)"),
            ({"aspect_ratios": (1.0, 0.0)}, "detector.aspect_ratios must be positive numbers"),
            ({"options": {"box_nms": 0.5}}, "detector.options.box_nms is not an option"),
            ({"options": {"num_classes": 3}}, "detector.options.num_classes is not an option"),
            ({"options": {"box_head": None}}, "detector.options.box_head is not .*box_nms_thresh"),
        ],
    )
    def test_detector(self, settings, message):
        with pytest.raises(ValueError, match=message):
            DetectorConfig(**settings)

    @pytest.mark.parametrize("sizes", [(32, 64, 128, 256), (8, 16, 32, 64, 128, 256)])
    def test_one_anchor_size_for_each_level(self, sizes):
        with pytest.raises(ValueError, match=r"detector\.anchor_sizes must have 5 entries"):
            build_detector(DetectorConfig(anchor_sizes=sizes), BackboneConfig(), 3)

    def test_unknown_weights(self):
        with pytest.raises(ValueError, match=r"weights of resnet18 must be one of .*'IMAGENET9'"):
            build_backbone(BackboneConfig("resnet18", "IMAGENET9"))


def test_options_reach_the_detector():
    options = {"rpn_post_nms_top_n_train": 17, "box_score_thresh": 0.25}
    config = DetectorConfig(
        min_size=96, max_size=120, anchor_sizes=(16, 32), head_dim=24, options=options,
        roi_sampling_ratio=3, aspect_ratios=(1.0, 3.0),
    )  # fmt: skip
    model = build_detector(config, BackboneConfig("resnet18", fpn_channels=8, levels=(3,)), 4)
    assert model.rpn._pre_nms_top_n["training"] == 2000
    assert model.rpn._post_nms_top_n["training"] == 17
    assert model.roi_heads.score_thresh == 0.25
    assert (model.transform.min_size, model.transform.max_size) == ((96,), 120)
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (4, 24)
    assert model.roi_heads.box_roi_pool.sampling_ratio == 3
    assert model.rpn.anchor_generator.num_anchors_per_location() == [2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_boxes_come_in_float32_out_of_bf16(training):
    """In bfloat16 a coordinate beyond 256 would be rounded to even pixels."""
    torch.manual_seed(0)
    model = build_detector(
        DetectorConfig(min_size=64, max_size=64, anchor_sizes=(32, 64), head_dim=8),
        BackboneConfig("resnet18", levels=(4,)),
        3,
    )
    make_fast(model)
    model.transform.min_size = (64,)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.train(training)([torch.rand(3, 64, 64)], [target])
    values = outputs if training else outputs[0]
    floats = {k: v.dtype for k, v in values.items() if v.is_floating_point()}
    assert len(floats) == (4 if training else 2)
    assert set(floats.values()) == {torch.float32}
