"""Detectors from a configuration, by families and by name, against those of torchvision."""

from __future__ import annotations

import inspect
import re
from unittest.mock import Mock

import pytest
import torch
from builders import (
    DOWNLOAD,
    FAMILIES,
    FASTEST,
    NAMES,
    NO_WEIGHTS,
    assert_equal_tensors,
    assert_identical,
    epsilons,
    on_meta,
    plain_settings,
    pretraining_checkpoint,
    random_resnet,
    shake,
    statistics,
    structure,
)
from torchvision.models import get_model, get_model_weights

from detmix.detectors import (
    BackboneConfig,
    DetectorConfig,
    build_detector,
    takes_backbone,
    target_keys,
)
from detmix.training.config import TrainConfig
from detmix.training.parse import parse_args

MOBILENET, SSDLITE = FASTEST
CONFIGURED = FAMILIES[:5]  # on the configured backbone
# What may start from a trained detector of torchvision, and whose builder that has.
STARTED = {**{name: name for name in NAMES}, **{n: f"{n}_resnet50_fpn" for n in CONFIGURED[:3]}}
FIXED_SIZE = {"ssd300_vgg16": 300, SSDLITE: 320}


def build(name, num_classes=4, num_keypoints=17, backbone=None, load_weights=True, **settings):
    config, body = DetectorConfig(name, **settings), BackboneConfig(**(backbone or {}))
    keys = {"num_keypoints": num_keypoints, "load_weights": load_weights}
    return build_detector(config, body, num_classes, **keys)


def anchor_generator(model):
    return getattr(model, "rpn", model).anchor_generator


@pytest.mark.parametrize("name", NAMES)
def test_a_builder_is_torchvisions(name):
    """But for its boxes under autocast: bfloat16 would round those beyond 256 to even pixels."""
    # Few proposals and detections: what is compared is the same, and quick.
    options = {"score_thresh": 0.0, "topk_candidates": 30, "detections_per_img": 10}
    if "rcnn" in name:
        options = {"rpn_post_nms_top_n_test": 30, "box_detections_per_img": 10}
        options |= {"box_score_thresh": 0.0}
    sizes = {} if name in FIXED_SIZE else {"min_size": 96, "max_size": 128}
    torch.manual_seed(0)
    theirs = get_model(name, **NO_WEIGHTS, num_classes=5, **sizes, **options).eval()
    torch.manual_seed(0)
    ours = build(name, 5, **sizes, options=options)
    assert ours.training
    assert_equal_tensors(ours.eval().state_dict(), theirs.state_dict(), theirs.state_dict())
    assert structure(ours) == structure(theirs)
    anchors, proposals = [], []
    anchor_generator(ours).register_forward_hook(lambda *call: anchors.append(call[-1]))
    if "rcnn" in name:
        ours.rpn.register_forward_hook(lambda *call: proposals.extend(call[-1][0]))
    # Not resized, so that boxes are what was decoded.
    image = torch.rand(3, FIXED_SIZE.get(name, 96), FIXED_SIZE.get(name, 128))
    with torch.inference_mode():
        found, expected = ours([image])[0], theirs([image])[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = ours([image])[0]
    assert_identical(found, expected)
    assert_identical(*anchors)
    assert found.keys() - {"keypoints_scores"} == {"boxes", "labels", "scores", *target_keys(name)}
    assert min(len(found["boxes"]), len(half["boxes"])) > 3
    assert {boxes.dtype for boxes in proposals} <= {torch.float32}
    for values in half.values():
        if values.is_floating_point():
            assert values.dtype == torch.float32
            assert not torch.equal(values.bfloat16().float(), values)


@pytest.mark.parametrize(
    ("name", "whole", "layers"),
    [
        *((name, each, None) for name in STARTED for each in get_model_weights(STARTED[name])),
        *((name, None, None) for name in STARTED if name != SSDLITE),
        *(("retinanet_resnet50_fpn", None, layers) for layers in (0, 5)),
        *(("fasterrcnn_mobilenet_v3_large_fpn", None, layers) for layers in (4, 6)),
        pytest.param("ssd300_vgg16", None, 3, marks=pytest.mark.slow),
    ],
)
def test_from_weights_it_has_the_structure_of_torchvisions(name, whole, layers, monkeypatch):
    """Those of the families stand on the configured backbone."""
    builder, num, more = STARTED[name], 4, {}
    assert target_keys(name) == target_keys(builder)
    assert takes_backbone(name) is (name in CONFIGURED)
    if whole:
        num = len(whole.meta["categories"])
        source, more = builder, {**NO_WEIGHTS, "num_classes": num}
        theirs, ours = {"weights": whole}, {"weights": str(whole)}
    else:
        source = next((n for n in ("vgg16", "mobilenet_v3_large") if n in name), "resnet50")
        weights = "IMAGENET1K_FEATURES" if source == "vgg16" else "IMAGENET1K_V1"
        theirs = {
            "weights_backbone": weights,
            "trainable_backbone_layers": layers,
            "num_classes": 4,
        }
        ours = {"backbone": {"weights": weights, "trainable_layers": layers}}
    with torch.device("meta"):
        state = get_model(source, **more).state_dict()
        monkeypatch.setattr(DOWNLOAD, Mock(side_effect=[state]))  # once: for theirs
        theirs = get_model(builder, **theirs)
        assert structure(build(name, num, load_weights=False, **ours)) == structure(theirs)


def test_named_backbone_of_a_mobilenet(monkeypatch):
    state = shake(get_model("mobilenet_v3_large")).state_dict()
    monkeypatch.setattr(DOWNLOAD, Mock(return_value=state))
    theirs = get_model(MOBILENET, weights_backbone="IMAGENET1K_V2")
    ours = build(MOBILENET, backbone={"weights": "DEFAULT"}).backbone.body.state_dict()
    assert assert_equal_tensors(ours, theirs.backbone.body.state_dict(), ours) > 200


def test_file_for_the_resnet_of_a_builder(tmp_path):
    resnet, path = random_resnet("resnet50"), tmp_path / "best.pt"
    data = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    torch.save(pretraining_checkpoint(resnet, name="resnet50", data=data), path)
    ours = build("retinanet_resnet50_fpn", backbone={"weights": str(path), "norm_eps": 1e-3})
    body = ours.backbone.body.state_dict()
    assert assert_equal_tensors(body, resnet.state_dict(), body) > 200
    assert statistics(ours) == list(data.values())
    assert epsilons(ours) == {1e-3}


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_one_stage_families(name):
    """All but the pyramid, which has one coarser level instead of two, is torchvision's."""
    ours = on_meta(lambda: build(name, 91, backbone={"levels": (2, 3, 4)}))
    theirs = on_meta(lambda: get_model(f"{name}_resnet50_fpn", **NO_WEIGHTS))
    assert structure(ours.head) == structure(theirs.head)
    assert ours.anchor_generator.sizes == theirs.anchor_generator.sizes[:4]
    ours, theirs = plain_settings(ours), plain_settings(theirs)
    differ = {key for key in theirs if ours.get(key) != theirs[key]}
    assert {key.partition(".")[0] for key in differ} == {"backbone", "anchor_generator"}


def test_settings_reach_the_parts():
    settings = {"min_size": 64, "max_size": 96, "head_dim": 24, "roi_sampling_ratio": 3}
    masks, keypoints = (
        on_meta(lambda n=name: build(n, 4, 5, {"fpn_channels": 16}, **settings))
        for name in ("maskrcnn", "keypointrcnn")
    )
    assert (masks.transform.min_size, masks.transform.max_size) == ((64,), 96)
    parts, others = masks.roi_heads, keypoints.roi_heads
    pools = (parts.box_roi_pool, parts.mask_roi_pool, others.keypoint_roi_pool)
    assert [pool.sampling_ratio for pool in pools] == [3] * 3
    assert parts.box_predictor.cls_score.weight.shape == (4, 24)
    # They are as wide as the pyramid.
    assert [conv[0].out_channels for conv in parts.mask_head] == [16] * 4
    assert parts.mask_predictor.conv5_mask.out_channels == 16
    assert [conv.out_channels for conv in list(others.keypoint_head)[::2]] == [32] * 8
    builders = on_meta(lambda: build("keypointrcnn_resnet50_fpn", 4, 5)).roi_heads
    for heads in (others, builders):
        assert heads.keypoint_predictor.kps_score_lowres.out_channels == 5


@pytest.mark.parametrize("name", ["fasterrcnn", "retinanet_resnet50_fpn", "fcos"])
def test_of_several_sizes_training_draws_one_and_evaluation_takes_the_last(name):
    transform = on_meta(lambda: build(name, min_size=(32, 64, 48), max_size=96)).transform
    seen = {is_train: set() for is_train in (True, False)}
    for is_train, sizes in seen.items():
        transform.train(is_train)
        for seed in range(20):
            torch.manual_seed(seed)
            sizes.add(transform([torch.rand(3, 40, 50)])[0].image_sizes[0][0])
    assert seen == {True: {32, 64, 48}, False: {48}}


SIZES = (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("name", "backbone", "sizes", "ratios", "per_location"),
    [
        ("maskrcnn", {"levels": (2, 3, 4)}, (64, 128, 256, 512), None, 3),
        ("keypointrcnn", {"levels": (4, 2), "stem": "small"}, (16, 64, 128), None, 3),
        ("fcos", {"levels": (1, 2), "stem": "small"}, (1, 2, 4), None, 1),
        ("fcos", {}, SIZES, None, 1),
        ("maskrcnn", {}, SIZES, (1.0, 3.0), 2),
        ("retinanet", {}, SIZES, (1.0, 3.0), 6),
        ("fasterrcnn_resnet50_fpn", {}, SIZES, (1.0, 3.0), 2),
        ("retinanet_resnet50_fpn", {}, SIZES, (1.0,), 3),
        # Its head is the builder's own, made for three ratios.
        ("retinanet_resnet50_fpn_v2", {}, SIZES, (0.3, 1.0, 3.0), 9),
    ],
)
def test_anchors(name, backbone, sizes, ratios, per_location):
    """Their sizes are by default what the pyramid has them, or as configured."""
    settings = {"anchor_sizes": SIZES, "aspect_ratios": ratios} if sizes == SIZES else {}
    model = on_meta(lambda: build(name, backbone=backbone, **settings))
    generator = anchor_generator(model)
    assert tuple(each[0] for each in generator.sizes) == sizes
    default = (1.0,) if name == "fcos" else (0.5, 1.0, 2.0)
    assert generator.aspect_ratios == (ratios or default,) * len(sizes)
    assert generator.num_anchors_per_location() == [per_location] * len(sizes)
    if "rcnn" in name:
        assert model.rpn.head.cls_logits.out_channels == per_location
    elif "retinanet" in name:
        assert model.head.classification_head.cls_logits.out_channels == per_location * 4


LISTS = {"image_mean": 3, "image_std": 3, "bbox_reg_weights": 4}  # and how long they are


@pytest.mark.parametrize("name", NAMES)
def test_options_reach_the_class(name):
    """Each number or list that the class has in its signature."""
    options = {}
    cls, others = type(on_meta(lambda: build(name))), {"num_classes", "min_size", "max_size"}
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key in LISTS:
            options[key] = [0.25 + i for i in range(LISTS[key])]
        elif isinstance(parameter.default, (int, float)) and key not in others:
            options[key] = type(parameter.default)(37.5)
    ours = on_meta(lambda: build(name, options=options))
    theirs = on_meta(lambda: get_model(name, **NO_WEIGHTS, num_classes=4, **options))
    assert plain_settings(ours) == plain_settings(theirs)


@pytest.mark.parametrize(
    ("option", "right", "wrong"),
    [
        ("image_std", (None, [0.5] * 3, (1,) * 3), (0.5, [0.5] * 4, ["0.5"] * 3, [True] * 3)),
        ("detections_per_img", (1, 50), (0, -1, 50.0, True, "50", None, [50])),
        ("nms_thresh", (0, 1, 0.25), (True, "0.25", None, [0.25], float("nan"))),
    ],
)
def test_an_option_takes_its_like_alone(option, right, wrong):
    for value in right:
        assert DetectorConfig("fcos", options={option: value}).options == {option: value}
    for value in wrong:
        message = rf"detector\.options\.{option}: .*{re.escape(repr(value))}"
        with pytest.raises(ValueError, match=message):
            DetectorConfig("fcos", options={option: value})


DEFAULT = {"weights": "DEFAULT"}


@pytest.mark.parametrize(
    ("name", "detector", "backbone", "message"),
    [
        ("rcnn", {}, {}, r"detector\.name .*'rcnn'"),
        ("fasterrcnn", {"head_dim": 0}, {}, "(?s)head_dim.*0"),
        ("fasterrcnn", {"anchor_sizes": ()}, {}, r"(?s)anchor_sizes.*\(\)"),
        ("fasterrcnn", {"aspect_ratios": (1.0, 0.0)}, {}, r"(?s)aspect_ratios.*0\.0"),
        ("fcos", {"aspect_ratios": (1.0,)}, {}, r"detector\.aspect_ratios .*fcos"),
        (
            "fcos",
            {"options": {"box_nms_thresh": 0.5}},
            {},
            "box_nms_thresh: no such option.*; fcos has .*nms_thresh",
        ),
        ("ssd300_vgg16", {"min_size": 300}, {}, r"detector\.min_size .*got 300"),
        (SSDLITE, {"min_size": (300, 320)}, {}, r"detector\.min_size .*got \(300, 320\)"),
        ("fcos", {"min_size": (300, 0)}, {}, "(?s)min_size.*greater than 0"),
        ("fcos", {"min_size": ()}, {}, "(?s)min_size.*at least 1"),
        (MOBILENET, {"anchor_sizes": (8,)}, {}, "anchor_sizes"),
        ("retinanet", {"anchor_sizes": (16, 32)}, {}, r"anchor_sizes .* 5 .*\(16, 32\)"),
        ("fcos", {}, {"fpn_channels": 48}, "fpn_channels must be a multiple of 32.*got 48"),
        # Between the ranges that two levels are responsible for.
        ("fcos", {}, {"levels": (2, 4)}, r"backbone\.levels.* double .*\(8, 32, 64\)"),
        ("retinanet_resnet50_fpn_v2", {"aspect_ratios": (1.0,)}, {}, r"ratios .*3.*\(1\.0,\)"),
        (SSDLITE, {}, DEFAULT, "--detector.weights COCO_V1"),
        ("ssd300_vgg16", {}, {"weights": "a.pth"}, "IMAGENET1K_FEATURES .*'a.pth'"),
        ("fcos_resnet50_fpn", {}, {"weights": "V9"}, r"weights of resnet50 .*'V9'"),
        ("fcos_resnet50_fpn", {}, DEFAULT | {"trainable_layers": 6}, r"fcos.*0\.\.5, got 6"),
        ("ssd300_vgg16", {}, {"trainable_layers": 3}, "trainable_layers of ssd300_vgg16 .*got 3"),
        # What cannot be started from.
        ("fasterrcnn", {"weights": "COCO_V1"}, DEFAULT, r"detector\.weights.*backbone\.weights"),
        ("fasterrcnn", {"weights": "COCO_V2"}, {}, "r.weights .*COCO_V1 .*'COCO_V2'"),
        ("fasterrcnn", {"weights": "timm:resnet50"}, {}, r"r\.weights .*timm:resnet50"),
        # Names are for the builders.
        ("fcos", {"weights": "COCO_V1"}, {}, r"r\.weights .*detector\.name=fcos_resnet50_fpn"),
        # Torchvision's trained detectors stand on its ResNet-50.
        ("fasterrcnn", DEFAULT, {"name": "resnet18"}, "r.weights=DEFAULT .*resnet50"),
        ("fasterrcnn", DEFAULT, {"norm": "group"}, "r.weights=DEFAULT .*resnet50"),
        ("fasterrcnn", DEFAULT, {"stem": "small"}, "r.weights=DEFAULT .*resnet50"),
    ],
)
def test_refused(name, detector, backbone, message):
    with pytest.raises(ValueError, match=message):
        build(name, backbone=backbone, **detector)


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
def test_all_is_named_and_resetting_it_is_enough(name, settings, fields):
    def from_args(args):
        config = parse_args(TrainConfig, args)
        on_meta(lambda: build_detector(config.detector, config.backbone, 4))

    args = ["--config", settings, "--detector.name", name]
    with pytest.raises(ValueError, match="; to reset: ") as caught:
        from_args(args)
    text, reset = str(caught.value).split("; to reset: ")
    assert all(field in text for field in fields)
    from_args([*args, *reset.split()])
