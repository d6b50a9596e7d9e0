"""The families of detectors on the configured backbone."""

from __future__ import annotations

import pytest
import torch
from test_build_by_name import anchor_generator, on_meta, options_of, structure
from torchvision.models import get_model

from detmix import weight_losses
from detmix.detectors import (
    BackboneConfig,
    DetectorConfig,
    build_detector,
    takes_backbone,
    target_keys,
)

FAMILIES = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos")
SIZE = 96
NUM_KEYPOINTS = 5


def small(name, *, fpn_channels=32, levels=(2, 3, 4), num_classes=4, options=None, **settings):
    """Build a family on a narrow pyramid."""
    if "rcnn" in name:
        settings = {"roi_sampling_ratio": 1, "head_dim": 16, **settings}
        options = {
            "rpn_post_nms_top_n_train": 30,
            "box_batch_size_per_image": 16,
            **(options or {}),
        }
    torch.manual_seed(0)
    return build_detector(
        DetectorConfig(name, min_size=SIZE, max_size=SIZE, options=options or {}, **settings),
        BackboneConfig("resnet18", fpn_channels=fpn_channels, levels=levels),
        num_classes,
        num_keypoints=NUM_KEYPOINTS,
    )


def batch():
    generator = torch.Generator().manual_seed(1)
    images = list(torch.rand(2, 3, SIZE, SIZE, generator=generator))
    boxes = torch.tensor([[10.0, 12, 50, 60], [30, 20, 90, 80]])
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[0, 12:60, 10:50] = masks[1, 20:80, 30:90] = 1
    keypoints = torch.ones(2, NUM_KEYPOINTS, 3)
    keypoints[..., :2] = 35.5
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 3]),
        "box_weights": torch.tensor([0.3, 0.7]),
        "masks": masks,
        "keypoints": keypoints,
    }
    return images, [target, {key: value[:0] for key, value in target.items()}]


class TestDefaultIsTorchvisions:
    @pytest.mark.parametrize(
        ("name", "num_classes"), [("fasterrcnn", 21), ("maskrcnn", 91), ("keypointrcnn", 2)]
    )
    def test_structure_and_predictions(self, name, num_classes):
        options = options_of(name)
        settings = {"weights": None, "weights_backbone": None, "num_classes": num_classes}
        torch.manual_seed(0)
        theirs = get_model(f"{name}_resnet50_fpn", **settings, **options)
        config = DetectorConfig(name, options=options)
        ours = on_meta(lambda: build_detector(config, BackboneConfig(), num_classes))
        assert structure(ours) == structure(theirs)
        ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
        images = [torch.rand(3, 60, 80)]
        for model in (theirs, ours):
            model.transform.min_size = (96,)
        with torch.inference_mode():
            expected, found = (model.eval()(images) for model in (theirs, ours))
        assert len(expected[0]["boxes"]) > 3
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["retinanet", "fcos"])
    def test_settings_of_one_stage(self, name):
        """All but the pyramid, which has one coarser level instead of two, is torchvision's."""
        config, backbone = DetectorConfig(name), BackboneConfig(levels=(2, 3, 4))
        ours = structure(on_meta(lambda: build_detector(config, backbone, 91)))
        theirs = structure(
            on_meta(lambda: get_model(f"{name}_resnet50_fpn", weights=None, weights_backbone=None))
        )
        heads = [[e for e in each["shapes"] if e[0].startswith("head.")] for each in (ours, theirs)]
        assert heads[0] == heads[1]
        ours, theirs = ours["settings"], theirs["settings"]
        differ = {key for key in theirs if ours.get(key) != theirs[key]}
        assert {key.partition(".")[0] for key in differ} == {"backbone", "anchor_generator"}


class TestAnchors:
    @pytest.mark.parametrize(
        ("name", "levels", "stem", "sizes"),
        [
            ("fasterrcnn", (1, 2, 3, 4), "standard", (32, 64, 128, 256, 512)),
            ("maskrcnn", (2, 3, 4), "standard", (64, 128, 256, 512)),
            ("keypointrcnn", (4, 2), "small", (16, 64, 128)),
            ("retinanet", (2, 3, 4), "standard", (32, 64, 128, 256)),
            ("fcos", (2, 3, 4), "standard", (8, 16, 32, 64)),
            ("fcos", (1, 2), "small", (1, 2, 4)),
        ],
    )
    def test_sizes_by_default(self, name, levels, stem, sizes):
        backbone = BackboneConfig("resnet18", fpn_channels=32, levels=levels, stem=stem)
        model = on_meta(lambda: build_detector(DetectorConfig(name), backbone, 3))
        assert tuple(each[0] for each in anchor_generator(model).sizes) == sizes

    def test_locations_of_fcos_are_a_stride_apart(self):
        """So each size is the stride of its level, as its ranges of regression suppose."""
        model = small("fcos").eval()
        model.transform.min_size, model.transform.max_size = (128,), 128  # whole maps at all levels
        found = {}
        model.anchor_generator.register_forward_hook(
            lambda module, inputs, outputs: found.update(anchors=outputs[0], maps=inputs[1])
        )
        with torch.inference_mode():
            model([torch.rand(3, 128, 128)])
        sizes = [each.shape[-2] * each.shape[-1] for each in found["maps"]]
        for anchors in found["anchors"].split(sizes):
            first, second = anchors[:2]
            assert second[0] - first[0] == first[2] - first[0]

    @pytest.mark.parametrize("name", FAMILIES)
    def test_settings(self, name):
        ratios = {} if name == "fcos" else {"aspect_ratios": (1.0, 3.0)}
        generator = anchor_generator(small(name, anchor_sizes=(8, 16, 32, 64), **ratios))
        assert [each[0] for each in generator.sizes] == [8, 16, 32, 64]
        per_location = {"fcos": 1, "retinanet": 6}.get(name, 2)
        assert generator.num_anchors_per_location() == [per_location] * 4


class TestNarrow:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_a_step_reaches_every_parameter(self, name):
        model = weight_losses(small(name), background_weight=0.5)
        torch.manual_seed(2)
        losses = model(*batch())
        assert len(losses) == {"fasterrcnn": 4, "retinanet": 2, "fcos": 3}.get(name, 5)
        sum(losses.values()).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
        assert all(0 < loss < torch.inf for loss in losses.values())

    @pytest.mark.parametrize("name", FAMILIES)
    def test_losses_and_boxes_are_float32_under_autocast(self, name):
        """In bfloat16 a coordinate beyond 256 would be rounded to even pixels."""
        low = "box_score_thresh" if "rcnn" in name else "score_thresh"
        model = small(name, options={low: 0.0})
        images, targets = batch()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            losses = model(images, targets)
            found = model.eval()(images)[0]
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert {"boxes", "labels", "scores", *target_keys(name)} <= found.keys()
        assert len(found["boxes"]) > 3
        if name == "keypointrcnn":
            assert found["keypoints"].shape == (len(found["boxes"]), NUM_KEYPOINTS, 3)
        for key, values in found.items():
            if values.is_floating_point():
                assert values.dtype == torch.float32, key
                assert not torch.equal(values.bfloat16().float(), values), key

    def test_heads_are_as_wide_as_the_pyramid(self):
        masks = small("maskrcnn", fpn_channels=16).roi_heads
        assert [conv[0].out_channels for conv in masks.mask_head] == [16] * 4
        assert masks.mask_predictor.conv5_mask.out_channels == 16
        assert masks.mask_roi_pool.sampling_ratio == 1
        keypoints = small("keypointrcnn", fpn_channels=16).roi_heads
        assert [conv.out_channels for conv in list(keypoints.keypoint_head)[::2]] == [32] * 8
        assert keypoints.keypoint_roi_pool.sampling_ratio == 1

    def test_settings_reach_the_detector(self):
        options = {"rpn_post_nms_top_n_train": 17, "box_score_thresh": 0.25}
        model = small("fasterrcnn", head_dim=24, roi_sampling_ratio=3, options=options)
        assert (model.transform.min_size, model.transform.max_size) == ((SIZE,), SIZE)
        assert model.rpn.post_nms_top_n() == 17
        assert model.roi_heads.score_thresh == 0.25
        assert model.roi_heads.box_predictor.cls_score.weight.shape == (4, 24)
        assert model.roi_heads.box_roi_pool.sampling_ratio == 3
        assert small("fcos", options={"topk_candidates": 7}).topk_candidates == 7


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("fasterrcnn", {"head_dim": 0}, r"detector\.head_dim must be positive, got 0"),
            ("fasterrcnn", {"anchor_sizes": ()}, r"detector\.anchor_sizes .*got \(\)"),
            ("fasterrcnn", {"aspect_ratios": (1.0, 0.0)}, r"aspect_ratios .*got \(1\.0, 0\.0\)"),
            ("retinanet", {"head_dim": 64}, r"head_dim .*retinanet .*got 64"),
            ("fcos", {"aspect_ratios": (1.0,)}, r"detector\.aspect_ratios .*fcos"),
            ("fcos", {"options": {"box_nms_thresh": 0.5}}, "box_nms_thresh .*fcos; .*nms_thresh"),
            ("fasterrcnn", {"options": {"num_classes": 3}}, r"detector\.options\.num_classes"),
            ("maskrcnn", {"options": {"mask_head": 0}}, "mask_head .*maskrcnn"),
            ("ssd300_vgg16", {"min_size": 300}, r"detector\.min_size .*got 300"),
            ("fasterrcnn_resnet50_fpn", {"head_dim": 64}, r"detector\.head_dim .*got 64"),
            ("fasterrcnn_mobilenet_v3_large_fpn", {"anchor_sizes": (8,)}, "anchor_sizes"),
        ],
    )
    def test_settings(self, name, settings, message):
        with pytest.raises(ValueError, match=message):
            DetectorConfig(name, **settings)

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("retinanet", {"anchor_sizes": (16, 32)}, r"anchor_sizes must have 4 .*\(16, 32\)"),
            ("fcos", {"fpn_channels": 48}, "fpn_channels must be a multiple of 32.*got 48"),
            # Between the ranges that two levels are responsible for.
            ("fcos", {"levels": (2, 4)}, "must at most double"),
            ("fcos", {"anchor_sizes": (8, 16, 33, 64)}, r"at most double .*\(8, 16, 33, 64\)"),
        ],
    )
    def test_pyramid(self, name, settings, message):
        with pytest.raises(ValueError, match=message):
            small(name, **settings)


@pytest.mark.parametrize(
    ("name", "keys", "on_backbone"),
    [
        ("fasterrcnn", (), True),
        ("maskrcnn", ("masks",), True),
        ("keypointrcnn_resnet50_fpn", ("keypoints",), False),
        ("ssd300_vgg16", (), False),
    ],
)
def test_what_they_take(name, keys, on_backbone):
    assert target_keys(name) == keys
    assert takes_backbone(name) is on_backbone


def test_unknown_name():
    for function in (target_keys, takes_backbone, DetectorConfig):
        with pytest.raises(ValueError, match=r"detector\.name .*'rcnn'"):
            function("rcnn")
