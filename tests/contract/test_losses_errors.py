"""What detectors with `weight_losses` refuse: by the name, place and value of what is wrong."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from builders import CLASSES, FASTEST, WEIGHTS, batch, build, with_known_features
from torch import nn

from detmix import weight_losses

MASK, KEYPOINT = "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"
KINDS = (*FASTEST, "fcos_resnet50_fpn", "retinanet_resnet50_fpn")  # of losses


@cache
def weighted(name):
    return weight_losses(with_known_features(build(name)))


def check_refused(name, key, value, told, error=ValueError):
    """Put a value in place of the second target's, or leave it out, and read what is said."""
    images, targets = batch("objects", WEIGHTS)
    targets[1][key] = value
    if value is None:
        del targets[1][key]
    with pytest.raises(error) as refused:
        weighted(name)(images, targets)
    missing = [part for part in (f"'{key}'", "target 1", *told) if part not in str(refused.value)]
    assert not missing, refused.value


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("box_weights", torch.ones(2), ("(3,)", "(2,)")),
        ("box_weights", torch.tensor([1, 1, -0.5]), ("-0.5", "box 2")),
        ("box_weights", torch.tensor([1, torch.nan, 1]), ("nan", "box 1")),
        ("box_weights", torch.tensor([torch.inf, 1, 1]), ("inf", "box 0")),
        ("boxes", torch.tensor([[1, 1, 30, 33], [5, 50, 34, torch.nan]] * 2)[:3], ("nan", "box 1")),
        ("labels", torch.tensor([1, 2, CLASSES]), (f"1..{CLASSES - 1}", f"{CLASSES}", "box 2")),
        ("labels", torch.tensor([0, 2, 3]), ("0", "box 0")),
        ("labels", torch.tensor([1, -1, 3]), ("-1", "box 1")),
    ],
)
def test_bad_objects_are_named(name, key, value, told):
    check_refused(name, key, value, told)


@pytest.mark.parametrize(
    ("name", "value", "told", "error"),
    [
        (MASK, None, (), ValueError),
        (MASK, torch.ones(2, 96, 64), ("(3,", "(2,"), ValueError),
        (KEYPOINT, None, (), ValueError),
        (KEYPOINT, torch.ones(2, 3, 3), ("3", "(2, 3, 3)"), ValueError),
        (KEYPOINT, torch.ones(3, 3, 2), ("(3, 3, 2)",), ValueError),
        (KEYPOINT, torch.ones(3, 4, 3), ("3", "4"), ValueError),
        (KEYPOINT, torch.ones(3, 3, 3).double(), ("float64",), TypeError),
    ],
)
def test_bad_masks_and_keypoints_are_named(name, value, told, error):
    check_refused(name, "masks" if name == MASK else "keypoints", value, told, error)


@pytest.mark.parametrize(("name", "value"), [("background_weight", -1.5), ("normalizer", "mean")])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"(?=.*{name})(?=.*{value})"):
        weight_losses(weighted(FASTEST[0]), **{name: value})


@pytest.mark.parametrize(
    ("name", "part"),
    [(FASTEST[0], "roi_heads"), ("retinanet_resnet50_fpn", "head.regression_head")],
)
def test_unknown_parts_are_named_and_the_model_left_alone(name, part):
    model = build(name)
    known = model.get_submodule(part)
    known.__class__ = type("Own", (type(known),), {})
    types = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="Own"):
        weight_losses(model)
    assert [type(module) for module in model.modules()] == types


def test_other_models_are_named():
    with pytest.raises(TypeError, match="Linear"):
        weight_losses(nn.Linear(1, 1))
