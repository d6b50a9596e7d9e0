"""Whole detectors that start from trained ones, with a new head for other classes."""

from __future__ import annotations

import logging
from types import MappingProxyType

import pytest
import torch
from torchvision.models import detection, get_model, get_model_weights, list_models
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d
from weight_files import assert_equal_tensors, random_resnet, shake

from detmix.detectors import BackboneConfig, DetectorConfig, build_backbone, build_detector
from detmix.detectors.new_head import load_detector_weights, named_epsilon

BUILDERS = list_models(module=detection)
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"
HEAD = "roi_heads.box_predictor."
COCO = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = {"min_size": 64, "max_size": 64, "anchor_sizes": (16, 32), "head_dim": 8}
BACKBONE = {"name": "resnet18", "levels": (4,), "fpn_channels": 8}


def epsilons(model):
    return {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)}


def trained(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


def old_keys(state):
    """Return a state dict as torchvision wrote it before 0.13."""
    renamed = {}
    for key, value in state.items():
        if "fpn.inner" in key or "fpn.layer" in key:
            key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        for index in range(4):
            key = key.replace(f"_head.conv.{index}.0.", f"_head.conv.{2 * index}.")
            key = key.replace(f"mask_head.{index}.0.", f"mask_head.mask_fcn{index + 1}.")
        renamed[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert renamed.keys() != state.keys()
    return renamed


class TestCoco:
    """Torchvision's COCO weights, with a download of random numbers in their place."""

    @pytest.fixture(scope="class")
    @classmethod
    def state(cls):
        torch.manual_seed(0)
        model = shake(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91))
        # Torchvision's file holds no counters: it is from a model with frozen batch norm.
        return {k: v for k, v in model.state_dict().items() if "num_batches" not in k}

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, state):
        """Return torchvision's own detector from these weights, and ours for three classes."""
        asked = []

        def download(url, **options):
            asked.append((url, options.get("weights_only")))
            return old_keys(state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DOWNLOAD, download)
            theirs = fasterrcnn_resnet50_fpn(weights=COCO)
            ours = build_detector(DetectorConfig(weights="COCO_V1"), BackboneConfig(), 4)
        assert asked[1] == (COCO.url, True)
        return theirs, ours

    def test_all_but_the_head_is_loaded(self, pair, state):
        theirs, ours = (model.state_dict() for model in pair)
        keys = [key for key in state if not key.startswith(HEAD)]
        assert_equal_tensors(ours, state, keys)
        assert_equal_tensors(theirs, state, state)
        assert {key for key in ours if key not in keys} == {
            f"{HEAD}{name}" for name in ("cls_score.weight", "cls_score.bias")
        } | {f"{HEAD}{name}" for name in ("bbox_pred.weight", "bbox_pred.bias")}
        assert ours[f"{HEAD}cls_score.weight"].shape == (4, 1024)
        assert ours[f"{HEAD}bbox_pred.weight"].shape == (16, 1024)

    def test_behaves_as_torchvisions(self, pair):
        theirs, ours = pair
        assert epsilons(ours) == epsilons(theirs) == {0.0}
        assert trained(ours) == trained(theirs)
        assert ours.transform.image_mean == theirs.transform.image_mean == IMAGENET_MEAN
        assert ours.transform.image_std == theirs.transform.image_std == IMAGENET_STD
        image = torch.rand(1, 3, 64, 96)
        outputs = []
        with torch.inference_mode():
            for model in (theirs.eval(), ours.eval()):
                features = model.backbone(image)
                objectness, deltas = model.rpn.head(list(features.values()))
                pooled = features["0"][:, :, :7, :7]
                outputs.append([*features.values(), *objectness, *deltas])
                outputs[-1].append(model.roi_heads.box_head(pooled))
        for expected, found in zip(*outputs, strict=True):
            assert expected.std() > 0
            assert torch.equal(found, expected)

    def test_without_loading_only_the_tensors_differ(self, pair, monkeypatch):
        def fail(*_, **__):
            raise AssertionError("nothing should be downloaded")

        monkeypatch.setattr(DOWNLOAD, fail)
        ours = pair[1]
        config = DetectorConfig(weights="FasterRCNN_ResNet50_FPN_Weights.COCO_V1")
        empty = build_detector(config, BackboneConfig(), 4, load_weights=False)
        assert epsilons(empty) == {0.0}
        assert trained(empty) == trained(ours)
        empty.load_state_dict(ours.state_dict())
        assert repr(empty) == repr(ours)

    def test_a_file_under_torchvisions_name(self, state, tmp_path):
        path = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
        torch.save(old_keys(state), path)
        ours = build_detector(DetectorConfig(weights=str(path)), BackboneConfig(), 4)
        assert epsilons(ours) == {0.0}
        keys = [key for key in state if not key.startswith(HEAD)]
        assert_equal_tensors(ours.state_dict(), state, keys)

    @pytest.mark.parametrize(
        "settings", [{"name": "resnet18"}, {"norm": "group"}, {"stem": "small"}]
    )
    def test_other_backbones(self, settings):
        config = BackboneConfig(**settings)
        with pytest.raises(
            ValueError, match=r"detector\.weights=DEFAULT is for backbone.*resnet50"
        ):
            build_detector(DetectorConfig(weights="DEFAULT"), config, 3)

    @pytest.mark.parametrize("error", [OSError("no route to host"), TimeoutError("no route")])
    def test_offline(self, monkeypatch, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(DOWNLOAD, fail)
        with pytest.raises(ConnectionError, match=r"COCO_V1 of .*no route.*detector\.weights=null"):
            build_detector(DetectorConfig(weights="COCO_V1"), BackboneConfig(), 3)


class TestBuilders:
    """Torchvision's builders: all is loaded but what depends on the classes."""

    @pytest.mark.parametrize(
        ("name", "builder"),
        [
            *((name, name) for name in BUILDERS),
            *((name, f"{name}_resnet50_fpn") for name in ("maskrcnn", "keypointrcnn")),
        ],
    )
    def test_what_is_new(self, name, builder, monkeypatch):
        """No tensor has a value here: what depends on the classes is what differs in shape."""
        settings = {"weights": None, "weights_backbone": None}
        with torch.device("meta"):
            state = get_model(builder, **settings).state_dict()
            other = get_model(builder, **settings, num_classes=7).state_dict()
            monkeypatch.setattr(DOWNLOAD, lambda url, **_: state)
            ours = build_detector(
                DetectorConfig(name, weights="DEFAULT"), BackboneConfig(), 7, load_weights=False
            )
            report = load_detector_weights(ours, "DEFAULT", name)
        expected = {key for key in state if state[key].shape != other[key].shape}
        assert set(report.new) == set(report.left_out) == expected
        assert {*report.loaded, *report.new} == ours.state_dict().keys()
        coco = 2 if "keypoint" in name else 91
        assert report.head == (
            f"the head of {coco} classes, which is new for 7, background included"
        )

    @pytest.mark.parametrize(
        "name",
        [
            *("maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"),
            "ssdlite320_mobilenet_v3_large",
        ],
    )
    def test_values_are_torchvisions(self, name, monkeypatch, caplog):
        model = shake(get_model(name, weights=None, weights_backbone=None))
        state = model.state_dict()
        if "resnet50" in name:
            state = old_keys(state)
        monkeypatch.setattr(DOWNLOAD, lambda url, **_: dict(state))
        theirs = get_model(name, weights="DEFAULT")
        with caplog.at_level(logging.INFO, "detmix"):
            ours = build_detector(DetectorConfig(name, weights="COCO_V1"), BackboneConfig(), 4)
        found, expected = ours.state_dict(), theirs.state_dict()
        same = [key for key in found if found[key].shape == expected[key].shape]
        assert assert_equal_tensors(found, expected, same) > 0.9 * len(found)
        assert epsilons(ours) == epsilons(theirs)
        assert trained(ours) == trained(theirs)
        assert ours.transform.image_mean == theirs.transform.image_mean
        assert ours.transform.image_std == theirs.transform.image_std
        assert caplog.messages[0].startswith(f"detector.weights=COCO_V1: {len(same)} of ")

    @pytest.mark.parametrize(
        ("name", "member"), [(name, each) for name in BUILDERS for each in get_model_weights(name)]
    )
    def test_epsilon_by_the_name_of_the_file(self, name, member):
        path = f"weights/{member.url.rpartition('/')[2]}"
        v1 = member.name == "COCO_V1" and name.endswith("resnet50_fpn")
        assert named_epsilon(path, name) == (0.0 if v1 and "fcos" not in name else None)
        assert named_epsilon(str(member), name) == named_epsilon(path, name)

    def test_a_family_from_torchvisions_file(self, tmp_path):
        """Mask R-CNN on the default backbone is torchvision's."""
        theirs = get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None)
        path = tmp_path / "mask.pth"
        torch.save(shake(theirs).state_dict(), path)
        config = DetectorConfig("maskrcnn", weights=str(path))
        ours = build_detector(config, BackboneConfig(), 91).state_dict()
        kept = [key for key in ours if "box_predictor" not in key and "fcn_logits" not in key]
        assert assert_equal_tensors(ours, theirs.state_dict(), kept) == len(ours) - 6


class TestKeypoints:
    """A narrow Keypoint R-CNN."""

    def build(self, num_keypoints, weights=None, num_classes=2):
        config = DetectorConfig("keypointrcnn", **SMALL, weights=weights)
        return build_detector(
            config,
            BackboneConfig(**BACKBONE, norm="batch"),
            num_classes,
            num_keypoints=num_keypoints,
        )

    @pytest.mark.parametrize("num_keypoints", [5, 17])
    def test_predictor_is_new_for_another_number(self, tmp_path, caplog, num_keypoints):
        path = tmp_path / "best.pt"
        old = shake(self.build(17))
        torch.save(old.state_dict(), path)
        with caplog.at_level(logging.INFO, "detmix"):
            new = self.build(num_keypoints, str(path)).state_dict()
        own = [key for key in new if "keypoint_predictor" in key]
        rest = [key for key in new if HEAD not in key and key not in own]
        assert assert_equal_tensors(new, old.state_dict(), rest)
        if num_keypoints == 17:
            assert assert_equal_tensors(new, old.state_dict(), own) == 2
            assert "keypoints" not in caplog.text
        else:
            assert new[own[0]].shape == (16, 5, 4, 4)
            assert caplog.text.rstrip().endswith("; that of 17 keypoints, which is new for 5)")

    def test_another_family(self, tmp_path):
        path = tmp_path / "best.pt"
        torch.save(self.build(17).state_dict(), path)
        config = DetectorConfig(**SMALL, weights=str(path))
        with pytest.raises(ValueError, match=r"Faster R-CNN on resnet18: unexpected: .*keypoint"):
            build_detector(config, BackboneConfig(**BACKBONE, norm="batch"), 2)


class TestOneStage:
    """Narrow families, from what an own training saved."""

    BACKBONE = MappingProxyType({"name": "resnet18", "levels": (4,), "fpn_channels": 32})

    @pytest.mark.parametrize("name", ["retinanet", "fcos"])
    def test_file(self, tmp_path, caplog, name):
        path = tmp_path / "best.pt"
        backbone = BackboneConfig(**self.BACKBONE)
        old = shake(build_detector(DetectorConfig(name), backbone, 21))
        options = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
        content = {"format": 1, "model": old.state_dict(), "classes": ["a"]}
        torch.save({**content, "config": {"detector": {"options": options}}}, path)
        with caplog.at_level(logging.INFO, "detmix"):
            new = build_detector(DetectorConfig(name, weights=str(path)), backbone, 4)
        head = "head.classification_head.cls_logits."
        keys = [key for key in new.state_dict() if not key.startswith(head)]
        assert assert_equal_tensors(new.state_dict(), old.state_dict(), keys) > 50
        assert "the head of 21 classes, which is new for 4, background included" in caplog.text
        assert epsilons(new) == {1e-5}
        assert new.transform.image_mean == options["image_mean"]

    @pytest.mark.parametrize("name", ["retinanet", "fcos"])
    def test_names_are_for_the_builders(self, name):
        config = DetectorConfig(name, weights="COCO_V1")
        message = rf"of {name} must be a file, got 'COCO_V1': .*detector\.name={name}_resnet50_fpn"
        with pytest.raises(ValueError, match=message):
            build_detector(config, BackboneConfig(), 3)

    def test_neither_name_nor_file(self):
        config = DetectorConfig("fcos", weights="COCO_V9")
        with pytest.raises(ValueError, match=r"weights must be a file, got 'COCO_V9', and there"):
            build_detector(config, BackboneConfig(**self.BACKBONE), 3)

    def test_other_anchors(self, tmp_path):
        """The number of anchors is none of classes: such a file is refused."""
        path = tmp_path / "best.pt"
        backbone = BackboneConfig(**self.BACKBONE)
        old = build_detector(DetectorConfig("retinanet", aspect_ratios=(1.0,)), backbone, 3)
        torch.save(old.state_dict(), path)
        with pytest.raises(ValueError, match=r"RetinaNet on resnet18: of another .*bbox_reg"):
            build_detector(DetectorConfig("retinanet", weights=str(path)), backbone, 3)


class TestFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        config = BackboneConfig(**BACKBONE, norm="batch")
        return shake(build_detector(DetectorConfig(**SMALL), config, 21))

    def start(self, path, num_classes=6, options=None, **backbone):
        detector = DetectorConfig(**SMALL, weights=str(path), options=options or {})
        return build_detector(detector, BackboneConfig(**BACKBONE, **backbone), num_classes)

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "best.pt"

    @pytest.mark.parametrize("num_classes", [6, 21])
    def test_state_dict(self, model, path, caplog, num_classes):
        torch.save(model.state_dict(), path)
        with caplog.at_level(logging.INFO, "detmix"):
            found = self.start(path, num_classes).state_dict()
        expected = model.state_dict()
        keys = [key for key in found if not key.startswith(HEAD)]
        assert assert_equal_tensors(found, expected, keys) == len(keys)
        assert not torch.equal(found[f"{HEAD}cls_score.bias"], expected[f"{HEAD}cls_score.bias"])
        message = caplog.messages[0]
        assert message.startswith(f"detector.weights={path}: {len(keys)} of {len(keys)} tensors")
        assert message.endswith(
            f"(the head of 21 classes, which is new for {num_classes}, background included)"
        )

    @pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
    def test_norm_and_epsilon(self, model, path, norm):
        torch.save(model.state_dict(), path)
        ours = self.start(path, norm=norm)
        assert epsilons(ours) == ({1e-5} if norm == "frozen" else set())
        found = ours.backbone.state_dict()
        assert_equal_tensors(found, model.backbone.state_dict(), found)

    def test_as_pretrained_by_default(self, model, path):
        torch.save(model.state_dict(), path)
        explicit = self.start(path, norm="frozen", trainable_layers=3)
        ours = self.start(path)
        assert repr(ours) == repr(explicit)
        assert trained(ours) == trained(explicit) < trained(model)

    def test_checkpoint_of_a_training(self, model, path):
        average = shake(build_detector(DetectorConfig(**SMALL), BackboneConfig(**BACKBONE), 21), 1)
        options = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
        content = {
            "format": 1,
            "model": model.state_dict(),
            "ema": average.state_dict(),
            "config": {"detector": {"options": options}, "data": {"root": "data"}},
            "classes": [str(i) for i in range(20)],
        }
        torch.save(content, path)
        ours = self.start(path, options={"image_std": [1.0, 1.0, 1.0]})
        found = ours.backbone.state_dict()
        assert_equal_tensors(found, average.backbone.state_dict(), found)
        assert ours.transform.image_mean == [0.5, 0.4, 0.3]
        assert ours.transform.image_std == [1.0, 1.0, 1.0]

    def test_epsilon_of_a_training_that_started_from_coco(self, model, path):
        """Such a run notes it; whoever starts from that run's checkpoint has it too."""
        content = {
            "format": 1,
            "model": model.state_dict(),
            "config": {"backbone": {"norm_eps": 0.0}, "detector": {}},
            "classes": ["a"],
        }
        torch.save(content, path)
        assert epsilons(self.start(path)) == {0.0}
        kept = {**BACKBONE, "norm": "frozen", "norm_eps": 1e-3}
        ours = build_detector(DetectorConfig(**SMALL, weights=str(path)), BackboneConfig(**kept), 3)
        assert epsilons(ours) == {1e-3}

    def test_refused_leaves_the_epsilon_alone(self, model, path):
        state = {k: v for k, v in model.state_dict().items() if "cls_logits" not in k}
        content = {"format": 1, "model": state, "classes": ["a"]}
        torch.save({**content, "config": {"backbone": {"norm_eps": 0}}}, path)
        ours = build_detector(DetectorConfig(**SMALL), BackboneConfig(**BACKBONE, norm="frozen"), 3)
        with pytest.raises(ValueError, match="missing: rpn"):
            load_detector_weights(ours, str(path), "fasterrcnn")
        assert epsilons(ours) == {1e-5}

    def test_an_epsilon_that_differs_is_said(self, model, path, caplog):
        content = {"format": 1, "model": model.state_dict(), "classes": ["a"]}
        torch.save({**content, "config": {"backbone": {"norm_eps": 0}}}, path)
        config = BackboneConfig(**BACKBONE, norm="frozen", norm_eps=1e-5)
        build_detector(DetectorConfig(**SMALL, weights=str(path)), config, 3)
        assert "norm_eps is 1e-05, but the weights were trained with 0" in caplog.text

    def test_statistics_that_differ_from_the_weights_are_said(self, model, path, caplog):
        torch.save(model.state_dict(), path)
        self.start(path, options={"image_mean": [0.5, 0.5, 0.5]})
        assert "image_mean is [0.5, 0.5, 0.5], but the weights were trained with" in caplog.text
        assert "image_std" not in caplog.text

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("rpn.head.cls_logits.bias", None, r"missing: rpn\.head\.cls_logits\.bias$"),
            (
                "roi_heads.box_head.fc6.weight",
                "roi_heads.box_head.fc.weight",
                r"missing: .*\.fc6\.weight; unexpected: roi_heads\.box_head\.fc\.weight$",
            ),
        ],
    )
    def test_refused_by_name(self, model, path, old, new, message):
        state = model.state_dict()
        value = state.pop(old)
        if new:
            state[new] = value
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"does not fit Faster R-CNN on resnet18: {message}"):
            self.start(path)

    def test_another_head_width(self, path):
        wide = build_detector(
            DetectorConfig(**{**SMALL, "head_dim": 9}), BackboneConfig(**BACKBONE), 3
        )
        torch.save(wide.state_dict(), path)
        with pytest.raises(ValueError, match=r"fc6\.weight \(9, 392\), expected \(8, 392\)"):
            self.start(path)

    def test_a_classifier(self, path):
        torch.save(random_resnet().state_dict(), path)
        with pytest.raises(ValueError, match=r"holds no detector.*set backbone\.weights instead"):
            self.start(path)


class TestErrors:
    def test_two_starts(self):
        detector = DetectorConfig(weights="COCO_V1")
        with pytest.raises(ValueError, match=r"either detector\.weights or backbone\.weights"):
            build_detector(detector, BackboneConfig(weights="IMAGENET1K_V2"), 3)

    @pytest.mark.parametrize("name", ["COCO_V2", "ResNet50_Weights.IMAGENET1K_V1"])
    def test_unknown_name(self, name):
        with pytest.raises(ValueError, match=rf"must be one of COCO_V1 or a file, got '{name}'"):
            build_detector(DetectorConfig(weights=name), BackboneConfig(), 3)

    def test_missing_file(self):
        with pytest.raises(FileNotFoundError, match=r"detector\.weights: there is no file a/b\.pt"):
            build_detector(DetectorConfig(weights="a/b.pt"), BackboneConfig(), 3)


def test_epsilon_of_a_backbone_alone():
    backbone = build_backbone(BackboneConfig(**BACKBONE, norm="frozen", norm_eps=1e-3))
    assert epsilons(backbone) == {1e-3}


@pytest.mark.parametrize("value", [0.5, [0.5, 0.5], ["a", "b", "c"]])
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_statistics_are_three_numbers(name, value):
    with pytest.raises(ValueError, match=rf"detector\.options\.{name} must be three numbers"):
        DetectorConfig(options={name: value})
