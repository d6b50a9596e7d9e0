"""Detectors by the names of torchvision's builders, against what these build themselves."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchvision.models import detection, get_model, get_model_weights, list_models
from torchvision.ops import FrozenBatchNorm2d
from weight_files import assert_equal_tensors, pretraining_checkpoint, random_resnet, shake

from detmix.detectors import BackboneConfig, DetectorConfig, build_detector
from detmix.detectors.names import FAMILIES, backbone_weights, option_defaults, option_names
from detmix.training.config import TrainConfig
from detmix.training.parse import parse_args

BUILDERS = list_models(module=detection)
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"
# Few proposals and detections: what is compared is the same, and quick.
FEW = {
    **dict.fromkeys(("score_thresh", "box_score_thresh"), 0.0),
    **dict.fromkeys(("rpn_post_nms_top_n_test", "topk_candidates"), 30),
    **dict.fromkeys(("box_detections_per_img", "detections_per_img"), 10),
}
SSDLITE = "ssdlite320_mobilenet_v3_large"
FIXED_SIZE = {"ssd300_vgg16": 300, SSDLITE: 320}


def sizes_of(name):
    return {} if name in FIXED_SIZE else {"min_size": 96, "max_size": 128}


def options_of(name):
    return {key: value for key, value in FEW.items() if key in option_names(name)}


def on_meta(build):
    """Build without any memory: what has no values is not compared by value."""
    with torch.device("meta"):
        return build()


def structure(model):
    """Return what two models of one architecture have in common."""
    return {
        "parts": repr(model),
        "shapes": [(key, value.shape) for key, value in model.state_dict().items()],
        "trained": [name for name, value in model.named_parameters() if value.requires_grad],
        "training": {module.training for module in model.modules()},
        "settings": plain_settings(model),
    }


def plain_settings(model):
    plain = (int, float, str, bool, tuple, dict, list)
    of_modules = vars(nn.Module()).keys()
    return {
        f"{name}.{key}": repr(value)
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if key not in of_modules and isinstance(value, plain)
    }


def anchor_generator(model):
    return model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator


def image_for(name):
    size = FIXED_SIZE.get(name)
    torch.manual_seed(3)
    # Not resized by any of them, so that boxes are what was decoded.
    return torch.rand(3, size or 96, size or 128)


@pytest.fixture(scope="module", params=BUILDERS)
def pair(request):
    """Return a builder's name, torchvision's own detector and ours, from the same seed."""
    name = request.param
    options = options_of(name)

    settings = {"weights": None, "weights_backbone": None, "num_classes": 5}
    torch.manual_seed(0)
    theirs = get_model(name, **settings, **sizes_of(name), **options)
    torch.manual_seed(0)
    config = DetectorConfig(name, **sizes_of(name), options=options)
    return name, theirs, build_detector(config, BackboneConfig(), 5)


class TestEveryBuilder:
    def test_state_dict_is_torchvisions(self, pair):
        _, theirs, ours = pair
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert assert_equal_tensors(ours.state_dict(), theirs.state_dict(), theirs.state_dict())
        assert structure(ours) == structure(theirs)

    def test_predictions_are_torchvisions(self, pair):
        name, theirs, ours = pair
        images = [image_for(name)]
        with torch.inference_mode():
            expected, found = theirs.eval()(images), ours.eval()(images)
        assert len(expected[0]["boxes"]) > 3
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_boxes_are_decoded_in_float32_under_autocast(self, pair):
        name, _, ours = pair
        anchors = []
        handle = anchor_generator(ours).register_forward_hook(
            lambda module, inputs, outputs: anchors.append(outputs)
        )
        with torch.inference_mode():
            ours.eval()([image_for(name)])
            with torch.autocast("cpu", torch.bfloat16):
                found = ours([image_for(name)])[0]
        handle.remove()
        torch.testing.assert_close(*anchors, rtol=0, atol=0)
        assert len(found["boxes"]) > 3
        for key, values in found.items():
            if values.is_floating_point():
                assert values.dtype == torch.float32, key
                assert not torch.equal(values.bfloat16().float(), values), key


class TestPretrained:
    """The architecture is that of torchvision's builder when it starts from weights."""

    def theirs(self, name, monkeypatch, state, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(DOWNLOAD, lambda url, **_: state)
            return get_model(name, **settings)

    @pytest.mark.parametrize(
        ("name", "member"), [(name, each) for name in BUILDERS for each in get_model_weights(name)]
    )
    def test_from_a_whole_detector(self, name, member, monkeypatch):
        num_classes = len(member.meta["categories"])
        with torch.device("meta"):
            plain = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
            theirs = self.theirs(name, monkeypatch, plain.state_dict(), weights=member)
            config = DetectorConfig(name, weights=str(member))
            ours = build_detector(config, BackboneConfig(), num_classes, load_weights=False)
        assert structure(ours) == structure(theirs)

    @pytest.mark.parametrize(
        ("name", "layers"),
        [
            *((name, None) for name in BUILDERS if name != SSDLITE),
            *(("retinanet_resnet50_fpn", layers) for layers in (0, 2, 5)),
            *(("fasterrcnn_mobilenet_v3_large_fpn", layers) for layers in (0, 4, 6)),
            *(("ssd300_vgg16", layers) for layers in (0, 3, 5)),
        ],
    )
    def test_from_a_backbone(self, name, layers, monkeypatch):
        member = backbone_weights(name)[-1]
        backbone = BackboneConfig(weights=member.name, trainable_layers=layers)
        with torch.device("meta"):
            network = type(member).__name__.removesuffix("_Weights").lower()
            state = get_model(network, weights=None).state_dict()
            settings = {"weights_backbone": member, "trainable_backbone_layers": layers}
            theirs = self.theirs(name, monkeypatch, state, num_classes=4, **settings)
            ours = build_detector(DetectorConfig(name), backbone, 4, load_weights=False)
        assert structure(ours) == structure(theirs)

    def test_named_backbone_of_a_mobilenet(self, monkeypatch):
        name = "fasterrcnn_mobilenet_v3_large_fpn"
        state = shake(get_model("mobilenet_v3_large", weights=None)).state_dict()
        theirs = self.theirs(name, monkeypatch, state, weights_backbone="IMAGENET1K_V2")
        monkeypatch.setattr(DOWNLOAD, lambda url, **_: state)
        ours = build_detector(DetectorConfig(name), BackboneConfig(weights="DEFAULT"), 5)
        keys = [key for key in ours.state_dict() if key.startswith("backbone.body.")]
        assert assert_equal_tensors(ours.state_dict(), theirs.state_dict(), keys) > 200

    def test_file_for_a_resnet(self, tmp_path):
        resnet = random_resnet("resnet50")
        path = tmp_path / "best.pt"
        data = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
        torch.save(pretraining_checkpoint(resnet, name="resnet50", data=data), path)
        config = DetectorConfig("retinanet_resnet50_fpn")
        ours = build_detector(config, BackboneConfig(weights=str(path), norm_eps=1e-3), 4)
        body = ours.backbone.body.state_dict()
        assert assert_equal_tensors(body, resnet.state_dict(), body) > 200
        assert (ours.transform.image_mean, ours.transform.image_std) == tuple(data.values())
        assert {m.eps for m in ours.modules() if isinstance(m, FrozenBatchNorm2d)} == {1e-3}


class TestSettings:
    def build(self, name, num_classes=4, num_keypoints=17, **settings):
        config = DetectorConfig(name, **settings)
        more = {"num_classes": num_classes, "num_keypoints": num_keypoints}
        return on_meta(lambda: build_detector(config, BackboneConfig(), **more))

    @pytest.mark.parametrize("name", BUILDERS)
    def test_every_option_reaches_the_class(self, name):
        lists = {
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "bbox_reg_weights": [1.0, 2.0, 3.0, 4.0],
        }
        defaults = option_defaults(name)
        values = {key: 37 if isinstance(value, int) else 0.37 for key, value in defaults.items()}
        options = values | {key: value for key, value in lists.items() if key in values}
        before, after = self.build(name), self.build(name, options=options)
        assert after.transform.image_mean == lists["image_mean"]
        assert after.transform.image_std == lists["image_std"]
        settings = plain_settings(before), plain_settings(after)
        changed = {key for key in settings[0] if settings[0][key] != settings[1][key]}
        assert len(changed) >= (8 if "rcnn" in name else 4)
        assert list(after.state_dict()) == list(before.state_dict())

    @pytest.mark.parametrize(
        ("name", "ratios", "per_location"),
        [
            *((f"{kind}rcnn_resnet50_fpn", (1.0, 3.0), 2) for kind in ("faster", "mask")),
            ("retinanet_resnet50_fpn", (1.0,), 3),
            ("fcos_resnet50_fpn", None, 1),
            # Their heads are the builders' own, made for three ratios.
            ("maskrcnn_resnet50_fpn_v2", (0.3, 1.0, 3.0), 3),
            ("retinanet_resnet50_fpn_v2", (0.3, 1.0, 3.0), 9),
        ],
    )
    def test_anchors(self, name, ratios, per_location):
        model = self.build(name, anchor_sizes=(8, 16, 32, 64, 128), aspect_ratios=ratios)
        generator = anchor_generator(model)
        assert [sizes[0] for sizes in generator.sizes] == [8, 16, 32, 64, 128]
        assert generator.aspect_ratios == (ratios or (1.0,),) * 5
        assert generator.num_anchors_per_location() == [per_location] * 5
        if "rcnn" in name:
            assert model.rpn.head.cls_logits.out_channels == per_location
        elif "retinanet" in name:
            assert model.head.classification_head.cls_logits.out_channels == per_location * 4

    def test_anchors_of_retinanet_are_torchvisions(self):
        model = self.build("retinanet_resnet50_fpn", anchor_sizes=(16, 32, 64, 128, 256))
        theirs = detection.retinanet._default_anchorgen()
        # Torchvision's start at 32: ours lack the last of them, and have one finer.
        assert model.anchor_generator.sizes == ((16, 20, 25), *theirs.sizes[:-1])

    def test_keypoints(self):
        ours = self.build("keypointrcnn_resnet50_fpn", 2, num_keypoints=5)
        assert ours.roi_heads.keypoint_predictor.kps_score_lowres.out_channels == 5


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "backbone", "message"),
        [
            ("fcos_resnet50_fpn", {"name": "resnet18"}, r"backbone\.name='resnet18'"),
            ("ssd300_vgg16", {"levels": (2, 3)}, r"backbone\.levels=\(2, 3\)"),
            (SSDLITE, {"weights": "DEFAULT"}, "--detector.weights COCO_V1"),
            ("ssd300_vgg16", {"weights": "a.pth"}, "IMAGENET1K_FEATURES .*'a.pth'"),
            ("fcos_resnet50_fpn", {"weights": "V9"}, r"weights of resnet50 .*'V9'"),
            (
                "fcos_resnet50_fpn",
                {"weights": "DEFAULT", "trainable_layers": 6},
                r"trainable_layers of fcos_resnet50_fpn .*0\.\.5, got 6",
            ),
            ("ssd300_vgg16", {"trainable_layers": 3}, r"trainable_layers=3 of ssd300_vgg16"),
        ],
    )
    def test_backbone(self, name, backbone, message):
        with pytest.raises(ValueError, match=message):
            build_detector(DetectorConfig(name), BackboneConfig(**backbone), 4)

    @pytest.mark.parametrize(
        ("name", "setting", "value"),
        [
            ("fcos_resnet50_fpn", "anchor_sizes", (8, 16)),
            ("fcos_resnet50_fpn", "anchor_sizes", (8, 32, 64, 128, 512)),  # gaps between levels
            ("retinanet_resnet50_fpn_v2", "aspect_ratios", (1.0,)),
        ],
    )
    def test_anchors(self, name, setting, value):
        with pytest.raises(ValueError, match=rf"{setting}.* {name}.*{re.escape(str(value))}"):
            build_detector(DetectorConfig(name, **{setting: value}), BackboneConfig(), 4)

    @pytest.mark.parametrize(
        ("name", "settings", "fields"),
        [
            (
                SSDLITE,
                "{backbone: {name: resnet18, norm: batch, trainable_layers: 4, levels: [2, 3]}}",
                ("backbone.name", "backbone.norm", "backbone.trainable_layers", "backbone.levels"),
            ),
            (
                "retinanet",
                "{detector: {roi_sampling_ratio: 1, head_dim: 8, options: {rpn_nms_thresh: 0.5}}}",
                ("detector.roi_sampling_ratio", "detector.head_dim", "detector.options.rpn_nms"),
            ),
        ],
    )
    def test_all_is_named_and_resetting_it_is_enough(self, name, settings, fields):
        def build(args):
            config = parse_args(TrainConfig, args)
            on_meta(lambda: build_detector(config.detector, config.backbone, 4))

        args = ["--config", settings, "--detector.name", name]
        with pytest.raises(ValueError, match="; to reset: ") as caught:
            build(args)
        text, reset = str(caught.value).split("; to reset: ")
        assert all(field in text for field in fields)
        build([*args, *reset.split()])


@pytest.mark.parametrize("name", [*FAMILIES, *BUILDERS])
def test_every_option_takes_its_default_and_its_like_alone(name):
    for option, default in option_defaults(name).items():
        if default is None:
            length = 4 if option == "bbox_reg_weights" else 3
            right = [[0.5] * length, (1,) * length]
            wrong = [0.5, [0.5] * (length + 1), ["0.5"] * length, [True] * length, "0.5"]
        elif isinstance(default, int):
            right, wrong = [1, 50], [0, -1, 50.0, 0.5, True, "50", None, [50]]
        else:
            right, wrong = [0, 1, 0.25], [True, "abc", "0.25", None, [0.25], float("nan")]
        for value in (default, *right):
            assert DetectorConfig(name, options={option: value}).options == {option: value}
        for value in wrong:
            message = rf"^detector\.options\.{option} must be .*{re.escape(repr(value))}$"
            with pytest.raises(ValueError, match=message):
                DetectorConfig(name, options={option: value})
