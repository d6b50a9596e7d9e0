"""The families of detectors on the configured backbone."""

from __future__ import annotations

import pytest
import torch
from test_build_by_name import FEW, anchor_generator, on_meta, structure
from torchvision.models import detection, get_model

from detmix import weight_losses
from detmix.detectors import (
    BackboneConfig,
    DetectorConfig,
    build_detector,
    takes_backbone,
    target_keys,
)
from detmix.detectors.names import option_names
from detmix.training.config import TrainConfig
from detmix.training.parse import parse_args

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
    @pytest.fixture(
        scope="class", params=[("maskrcnn", 91), ("keypointrcnn", 2)], ids=lambda param: param[0]
    )
    @classmethod
    def pair(cls, request):
        name, num_classes = request.param
        options = {key: value for key, value in FEW.items() if key in option_names(name)}
        torch.manual_seed(0)
        theirs = get_model(f"{name}_resnet50_fpn", weights=None, weights_backbone=None, **options)
        config = DetectorConfig(name, options=options)
        ours = on_meta(lambda: build_detector(config, BackboneConfig(), num_classes))
        ours = ours.to_empty(device="cpu")
        return theirs, ours

    def test_structure(self, pair):
        theirs, ours = pair
        assert structure(ours) == structure(theirs)

    def test_predictions(self, pair):
        theirs, ours = pair
        ours.load_state_dict(theirs.state_dict())
        torch.manual_seed(1)
        images = [torch.rand(3, 60, 80)]
        for model in pair:
            model.transform.min_size = (96,)
        with torch.inference_mode():
            expected, found = (model.eval()(images) for model in pair)
        assert len(expected[0]["boxes"]) > 3
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["retinanet", "fcos"])
    def test_settings_of_one_stage(self, name):
        """All but the pyramid, which has one coarser level instead of two, is torchvision's."""
        levels = BackboneConfig(levels=(2, 3, 4))
        ours = structure(on_meta(lambda: build_detector(DetectorConfig(name), levels, 91)))
        theirs = structure(
            on_meta(lambda: get_model(f"{name}_resnet50_fpn", weights=None, weights_backbone=None))
        )
        of_head = [
            [entry for entry in each["shapes"] if entry[0].startswith("head.")]
            for each in (ours, theirs)
        ]
        assert of_head[0] == of_head[1]
        ours, theirs = ours["settings"], theirs["settings"]
        differ = {key for key in theirs if ours.get(key) != theirs[key]}
        assert {key for key in differ if not key.startswith("backbone.")} == {
            "anchor_generator.sizes",
            "anchor_generator.aspect_ratios",
            "anchor_generator.cell_anchors",
        }


class TestAnchors:
    @pytest.mark.parametrize(
        ("name", "levels", "stem", "sizes"),
        [
            ("fasterrcnn", (1, 2, 3, 4), "standard", (32, 64, 128, 256, 512)),
            ("maskrcnn", (2, 3, 4), "standard", (64, 128, 256, 512)),
            ("keypointrcnn", (4, 2), "standard", (64, 256, 512)),
            ("fasterrcnn", (2, 3), "small", (16, 32, 64)),
            ("retinanet", (2, 3, 4), "standard", (32, 64, 128, 256)),
            ("retinanet", (1, 2, 3, 4), "standard", (16, 32, 64, 128, 256)),
            ("fcos", (2, 3, 4), "standard", (8, 16, 32, 64)),
            ("fcos", (1, 2), "small", (1, 2, 4)),
        ],
    )
    def test_sizes_by_default(self, name, levels, stem, sizes):
        backbone = BackboneConfig("resnet18", fpn_channels=32, levels=levels, stem=stem)
        model = on_meta(lambda: build_detector(DetectorConfig(name), backbone, 3))
        assert tuple(each[0] for each in anchor_generator(model).sizes) == sizes

    def test_retinanet_has_torchvisions_at_the_same_levels(self):
        theirs = detection.retinanet._default_anchorgen()
        ours = small("retinanet").anchor_generator
        assert ours.sizes == theirs.sizes[:4]
        assert ours.aspect_ratios == theirs.aspect_ratios[:4]

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
        extra = {"maskrcnn": {"loss_mask"}, "keypointrcnn": {"loss_keypoint"}}.get(name, set())
        rcnn = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        one_stage = {"classification", "bbox_regression"}
        one_stage |= {"bbox_ctrness"} if name == "fcos" else set()
        assert losses.keys() == (rcnn | extra if "rcnn" in name else one_stage)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
        assert all(loss.item() > 0 for loss in losses.values())

    @pytest.mark.parametrize("name", FAMILIES)
    def test_predicts_in_float32_under_autocast(self, name):
        low = "box_score_thresh" if "rcnn" in name else "score_thresh"
        model = small(name, options={low: 0.0}).eval()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = model(batch()[0])[0]
        assert {"boxes", "labels", "scores", *target_keys(name)} <= found.keys()
        assert len(found["boxes"]) > 3
        for key, values in found.items():
            if values.is_floating_point():
                assert values.dtype == torch.float32, key
                assert not torch.equal(values.bfloat16().float(), values), key

    def test_width_of_the_mask_head(self):
        heads = small("maskrcnn", fpn_channels=16).roi_heads
        assert [conv[0].out_channels for conv in heads.mask_head] == [16] * 4
        assert heads.mask_predictor.conv5_mask.out_channels == 16
        assert heads.mask_predictor.mask_fcn_logits.out_channels == 4
        assert heads.mask_roi_pool.output_size == (14, 14)
        assert heads.mask_roi_pool.sampling_ratio == 1
        assert heads.mask_roi_pool.featmap_names == ["0", "1", "2"]

    def test_width_of_the_keypoint_head(self):
        heads = small("keypointrcnn", fpn_channels=16).roi_heads
        assert [conv.out_channels for conv in list(heads.keypoint_head)[::2]] == [32] * 8
        assert heads.keypoint_predictor.kps_score_lowres.out_channels == NUM_KEYPOINTS
        assert heads.keypoint_roi_pool.sampling_ratio == 1

    def test_keypoints_of_its_number_are_predicted(self):
        model = small("keypointrcnn", options={"box_score_thresh": 0.0}).eval()
        with torch.inference_mode():
            found = model([torch.rand(3, SIZE, SIZE)])[0]
        assert found["keypoints"].shape == (len(found["boxes"]), NUM_KEYPOINTS, 3)

    @pytest.mark.parametrize("name", ["retinanet", "fcos"])
    def test_options(self, name):
        model = small(name, options={"score_thresh": 0.33, "topk_candidates": 7})
        assert (model.score_thresh, model.topk_candidates) == (0.33, 7)


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("retinanet", {"head_dim": 64}, r"head_dim does not apply to retinanet \(.*\), got 64"),
            ("retinanet", {"roi_sampling_ratio": 1}, "roi_sampling_ratio does not apply to retina"),
            ("fcos", {"roi_sampling_ratio": 1}, r"detector\.roi_sampling_ratio does not apply"),
            ("fcos", {"head_dim": 64}, r"detector\.head_dim does not apply to fcos"),
            ("fcos", {"aspect_ratios": (1.0,)}, r"detector\.aspect_ratios does not apply to fcos"),
            (
                "fcos",
                {"options": {"box_nms_thresh": 0.5}},
                "not an option of fcos; .*nms_thresh",
            ),
            (
                "retinanet",
                {"options": {"anchor_generator": 0}},
                "anchor_generator is not an",
            ),
            ("maskrcnn", {"options": {"mask_head": 0}}, "mask_head is not an option of maskrcnn"),
            ("keypointrcnn", {"options": {"num_keypoints": 3}}, "num_keypoints is not an option"),
            ("retinanet", {"min_size": 0}, r"detector\.min_size must be positive, got 0"),
        ],
    )
    def test_does_not_apply(self, name, settings, message):
        with pytest.raises(ValueError, match=message):
            DetectorConfig(name, **settings)

    def test_all_at_once(self):
        """What the message says to set is enough."""
        options = "{rpn_nms_thresh: 0.5, score_thresh: 0.1, box_batch_size_per_image: 64}"
        settings = f"{{roi_sampling_ratio: 1, head_dim: 64, min_size: {SIZE}, options: {options}}}"
        args = ["--config", f"detector: {settings}", "--detector.name", "retinanet"]
        with pytest.raises(ValueError, match="does not apply") as caught:
            parse_args(TrainConfig, args)
        text, reset = str(caught.value).split("; to reset: ")
        assert "detector.roi_sampling_ratio does not apply to retinanet" in text
        assert "; detector.head_dim does not apply to retinanet" in text
        assert (
            "; detector.options.rpn_nms_thresh, box_batch_size_per_image are not options of "
            "retinanet; there are bg_iou_thresh, "
        ) in text
        assert "min_size" not in text
        assert reset == (
            "--detector.roi_sampling_ratio null --detector.head_dim null --detector.options {}"
        )
        config = parse_args(TrainConfig, [*args, *reset.split()])
        assert config.detector == DetectorConfig("retinanet", min_size=SIZE)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_one_anchor_size_for_each_level(self, name):
        with pytest.raises(ValueError, match=r"detector\.anchor_sizes must have 4 entries"):
            small(name, anchor_sizes=(16, 32))

    def test_group_norm_of_fcos(self):
        with pytest.raises(ValueError, match=r"fpn_channels must be a multiple of 32.*got 48"):
            small("fcos", fpn_channels=48)

    @pytest.mark.parametrize("settings", [{"levels": (2, 4)}, {"anchor_sizes": (8, 16, 33, 64)}])
    def test_gap_between_the_ranges_of_fcos(self, settings):
        with pytest.raises(ValueError, match=r"must at most double .*between two levels; got"):
            small("fcos", **settings)

    def test_trainable_layers_of_a_resnet(self):
        with pytest.raises(ValueError, match=r"of resnet18 must be in 0\.\.5, got 6"):
            build_detector(DetectorConfig(), BackboneConfig("resnet18", trainable_layers=6), 3)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "keys", "on_backbone"),
        [
            ("fasterrcnn", (), True),
            ("maskrcnn", ("masks",), True),
            ("keypointrcnn", ("keypoints",), True),
            ("fcos", (), True),
            ("maskrcnn_resnet50_fpn_v2", ("masks",), False),
            ("keypointrcnn_resnet50_fpn", ("keypoints",), False),
            ("ssd300_vgg16", (), False),
        ],
    )
    def test_what_they_take(self, name, keys, on_backbone):
        assert target_keys(name) == keys
        assert takes_backbone(name) is on_backbone

    @pytest.mark.parametrize("function", [target_keys, takes_backbone])
    def test_unknown(self, function):
        with pytest.raises(ValueError, match=r"detector\.name must be one of .*'rcnn'"):
            function("rcnn")
