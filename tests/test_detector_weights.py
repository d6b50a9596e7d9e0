"""Whole detectors that start from trained ones, with a new head for other classes."""

from __future__ import annotations

import logging

import pytest
import torch
from torchvision.models import get_model, get_model_weights
from weight_files import (
    DOWNLOAD,
    assert_equal_tensors,
    epsilons,
    random_resnet,
    shake,
    statistics,
    trained,
)

from detmix.detectors import BackboneConfig, DetectorConfig, build_backbone, build_detector

BACKBONE = {"name": "resnet18", "levels": (4,), "fpn_channels": 32}
ONE_RATIO = {"aspect_ratios": (1.0,)}
OWN = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1]}
BUILDERS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
RANDOM = {"weights": None, "weights_backbone": None}


def small(name="fasterrcnn", num_classes=21, weights=None, keypoints=17, detector=None, **backbone):
    settings = {"min_size": 64, "max_size": 64, **(detector or {})}
    if "rcnn" in name:
        settings["head_dim"] = 8
    config = DetectorConfig(name, **settings, weights=weights and str(weights))
    body = BackboneConfig(**BACKBONE | backbone)
    return build_detector(config, body, num_classes, num_keypoints=keypoints)


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


class TestTorchvisions:
    """Torchvision's COCO weights, with a download of random numbers in their place."""

    @pytest.mark.parametrize(
        ("name", "builder"),
        [
            ("maskrcnn", "maskrcnn_resnet50_fpn"),
            ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn"),
            ("ssdlite320_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"),
        ],
    )
    def test_all_but_the_head_is_torchvisions(self, name, builder, monkeypatch, tmp_path):
        state = shake(get_model(builder, **RANDOM)).state_dict()
        if "resnet50" in builder:  # the files have these, and no counters: their norm was frozen
            state = old_keys({k: v for k, v in state.items() if "num_batches" not in k})
        asked = []

        def download(url, **options):
            asked.append((url, options.get("weights_only")))
            return dict(state)

        monkeypatch.setattr(DOWNLOAD, download)
        member = get_model_weights(builder).COCO_V1
        theirs = get_model(builder, weights=member)
        path = tmp_path / member.url.rpartition("/")[2]
        torch.save(state, path)
        for weights in ("COCO_V1", str(path)):
            ours = build_detector(DetectorConfig(name, weights=weights), BackboneConfig(), 4)
            found, expected = ours.state_dict(), theirs.state_dict()
            same = [key for key in found if found[key].shape == expected[key].shape]
            assert assert_equal_tensors(found, expected, same) > 0.9 * len(found)
            assert epsilons(ours) == epsilons(theirs)
            assert trained(ours) == trained(theirs)
            assert statistics(ours) == statistics(theirs)
        assert asked[1:] == [(member.url, True)]

    @pytest.mark.parametrize("name", ["maskrcnn", "keypointrcnn", *BUILDERS])
    def test_what_is_new(self, name, monkeypatch, caplog):
        """What depends on the classes is what differs in shape."""
        builder = name if "_" in name else f"{name}_resnet50_fpn"
        with torch.device("meta"):
            state = get_model(builder, **RANDOM).state_dict()
            other = get_model(builder, **RANDOM, num_classes=7).state_dict()
        values = {key: torch.zeros((), dtype=v.dtype).expand(v.shape) for key, v in state.items()}
        monkeypatch.setattr(DOWNLOAD, lambda url, **_: values)
        with caplog.at_level(logging.INFO, "detmix"):
            ours = build_detector(DetectorConfig(name, weights="DEFAULT"), BackboneConfig(), 7)
        expected = [key for key in state if state[key].shape != other[key].shape]
        found = ours.state_dict()
        assert {k for k, v in found.items() if v.shape != state[k].shape} == {*expected}
        assert not any(found[key].any() for key in found if key not in expected)
        assert f"left out: {', '.join(expected)} (the head of " in caplog.text
        assert f" {2 if 'keypoint' in name else 91} classes, which is new for 7" in caplog.text


class TestFiles:
    """Narrow detectors, from what an own training saved."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        return shake(small(norm="batch"))

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "best.pt"

    def save(self, path, state, detector=None, backbone=None, **more):
        config = {"detector": detector or {}, "backbone": backbone or {}, "data": {"root": "data"}}
        torch.save({"format": 1, "model": state, "config": config, "classes": ["a"], **more}, path)

    @pytest.mark.parametrize(
        ("name", "num_classes", "keypoints", "new"),
        [
            ("fasterrcnn", 21, 17, "box_predictor"),
            ("retinanet", 6, 17, "cls_logits"),
            ("fcos", 21, 17, "cls_logits"),
            ("keypointrcnn", 6, 17, "box_predictor"),
            ("keypointrcnn", 21, 5, "_predictor"),
        ],
    )
    def test_all_but_the_head(self, name, num_classes, keypoints, new, path, caplog):
        """It is new even if the number of classes is the same: they may be others."""
        old = shake(small(name)).state_dict()
        torch.save(old, path)
        with caplog.at_level(logging.INFO, "detmix"):
            found = small(name, num_classes, path, keypoints=keypoints).state_dict()
        kept = [key for key in found if new not in key]
        assert_equal_tensors(found, old, kept)
        assert not any(torch.equal(found[key], old[key]) for key in found if key not in kept)
        assert f"{path}: {len(kept)} of {len(kept)} tensors" in caplog.text
        assert f"21 classes, which is new for {num_classes}, background" in caplog.text

    @pytest.mark.parametrize("norm", ["auto", "batch", "sync"])
    def test_norm(self, model, path, norm):
        """As with pretrained weights: frozen, and some layers are not trained."""
        torch.save(model.state_dict(), path)
        ours = small(weights=path, norm=norm)
        found = ours.backbone.state_dict()
        assert_equal_tensors(found, model.backbone.state_dict(), found)
        assert epsilons(ours) == ({1e-5} if norm == "auto" else set())
        explicit = small(norm=norm.replace("auto", "frozen"), trainable_layers=3)
        assert trained(ours) == trained(explicit) < trained(model)

    @pytest.mark.parametrize("since", [1, 2])
    def test_what_a_training_notes_beside_its_weights(self, model, path, since, caplog):
        """Averaged weights, mean, deviation and epsilon; these in the configuration at first."""
        average = shake(small(norm="batch"), 1)
        notes = {"detector": {"options": OWN}, "backbone": {"norm_eps": 0.0}}
        if since == 2:
            notes = {"normalization": {**OWN, "norm_eps": 0.0}, "detector": {"options": {}}}
        self.save(path, model.state_dict(), ema=average.state_dict(), **notes)
        ours = small(weights=path)
        found = ours.backbone.state_dict()
        assert_equal_tensors(found, average.backbone.state_dict(), found)
        assert statistics(ours) == list(OWN.values())
        assert epsilons(ours) == {0.0}
        assert "but the weights" not in caplog.text
        ones = {"options": {"image_std": [1.0, 1.0, 1.0]}}
        ours = small(weights=path, norm="frozen", norm_eps=1e-3, detector=ones)
        assert statistics(ours) == [OWN["image_mean"], [1.0, 1.0, 1.0]]
        assert epsilons(ours) == {1e-3}
        for differs in ("image_std is [1.0, 1.0, 1.0]", "norm_eps is 0.001"):
            assert f"{differs}, but the weights were trained with" in caplog.text
        assert "image_mean is" not in caplog.text

    def test_epsilon_without_weights(self):
        assert epsilons(build_backbone(BackboneConfig(norm="frozen", norm_eps=1e-3))) == {1e-3}

    @pytest.mark.parametrize(
        ("make", "name", "message"),
        [
            (lambda: small("keypointrcnn"), "fasterrcnn", "unexpected: .*keypoint"),
            (lambda: small(num_classes=3, fpn_channels=64), "fasterrcnn", "64, 64, 3, 3"),
            # The number of anchors is none of classes.
            (lambda: small("retinanet", detector=ONE_RATIO), "retinanet", "bbox_reg"),
            (random_resnet, "fasterrcnn", r"no detector.*set backbone\.weights"),
        ],
    )
    def test_another_network(self, path, make, name, message):
        torch.save(make().state_dict(), path)
        with pytest.raises(ValueError, match=message):
            small(name, weights=path)
