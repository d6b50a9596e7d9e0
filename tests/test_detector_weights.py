"""Whole detectors that start from trained ones, with a new head for other classes."""

from __future__ import annotations

import logging

import pytest
import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d
from weight_files import assert_equal_tensors, random_resnet, shake

from detmix.detectors import BackboneConfig, DetectorConfig, build_backbone, build_detector
from detmix.detectors.detector_weights import load_detector_weights

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
        if "fpn." in key:
            key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
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
            patch.setattr("torchvision.models._api.load_state_dict_from_url", download)
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

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
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

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
        with pytest.raises(ConnectionError, match=r"COCO_V1 of .*no route.*detector\.weights=null"):
            build_detector(DetectorConfig(weights="COCO_V1"), BackboneConfig(), 3)


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
            load_detector_weights(ours, str(path), "resnet18")
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
