"""Which targets the losses take: what torchvision computes, with its own numbers bit for bit.

Labels also of whole dtypes that some of its heads refuse, or get wrong. All else that
it refuses is refused by target, key and value; the oracle is the same detector without weights.
Nothing is sampled before.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from builders import (
    CLASSES,
    FAMILIES,
    assert_identical,
    batch,
    losses_of,
    small,
    step,
    twin,
    with_known_features,
)
from torch import nan, nn, tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from detmix import weight_losses

FASTER, MASK, KEYPOINT, *ONE_STAGE = FAMILIES
ALL, NONE = (FASTER, *ONE_STAGE), "none"
REFUSED = [
    (ALL, "box_weights", torch.ones(2), "(3,)", "(2,)"),
    (ALL, "box_weights", tensor([1, 1, -0.5]), "-0.5", "[2]"),
    (ALL, "box_weights", tensor([1, nan, 1]), "nan", "[1]"),
    (ALL, "boxes", tensor([[1, 1, 30, 33], [5, 50, 34, nan], [1, 1, 30, 33]]), "nan", "[1]"),
    (ALL, "labels", tensor([1, 2, CLASSES]), f"1..{CLASSES - 1}", f"{CLASSES}", "[2]"),
    (ALL, "labels", tensor([0, 2, 3]), "0", "[0]"),
    (ALL, "labels", None),
    ([FASTER], "boxes", (tensor([1, 1, 9, 9]).expand(3, 4).bfloat16()), "bfloat16"),
    ([MASK], "masks", None),
    ([MASK], "masks", torch.ones(2, 96, 64), "(3, H, W)", "(2,"),
    ([MASK], "masks", 255 * torch.eye(96, 64).expand(3, -1, -1), "0, 255", "[0]", "masks > 0"),
    ([MASK], "masks", 1 - 2 * torch.ones(3, 96, 64), "0 or 1", "255"),  # torchvision makes bytes
    ([MASK], "masks", tensor([0, 1, 2])[:, None, None].expand(3, 96, 64), "2", "[2]"),
    ([MASK], "masks", torch.ones(1, 96, 64), "(0, H, W)", "(1,", NONE),
    (ALL, "labels", tensor([1]), "(0,)", "(1,)", NONE),
    ([KEYPOINT], "keypoints", None),
    ([KEYPOINT], "keypoints", torch.ones(3, 3, 2), "(3, J, 3)", "(3, 3, 2)"),
    ([KEYPOINT], "keypoints", torch.ones(3, 3, 3).double(), "float64"),
    ([KEYPOINT], "keypoints", torch.ones(1, 3, 3), "(0, J, 3)", "(1,", NONE),
]


# What labels become in one image or both, and is as int64, ...
DTYPES = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# ... in one image, by what an error tells of them, ...
SHAPES = {
    "torch.float32": lambda labels: labels.float(),
    "(3, 1)": lambda labels: labels[:, None],
    "(0,)": lambda labels: labels[:0],
    "(6,)": lambda labels: labels.repeat(2),
    "-1": lambda labels: -labels,
    "list": lambda labels: labels.tolist(),
}
# ... and of none.
OF_NONE = {
    "torch.float32": lambda labels: labels.float(),
    "(0, 2)": lambda labels: labels.new_zeros(0, 2),
    "(1, 0)": lambda labels: labels[None],
}


@cache
def plain(name):
    """Torchvision's, of which only the heads compute; tests change copies of it."""
    return with_known_features(small(name))


@cache
def weighted(name):
    return weight_losses(twin(plain(name)))


def refusal(name, data):
    """The error, after which no random number has been drawn but by the transform of the images."""
    model = weighted(name)
    torch.manual_seed(7)
    model.transform(*batch())
    state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)) as refused:
        losses_of(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    return refused.value


@pytest.mark.parametrize("name", [FASTER, MASK, *ONE_STAGE])
@pytest.mark.parametrize(
    ("images_with", "changed", "change"),
    [("objects", changed, dtype) for changed in ((1,), (0, 1)) for dtype in DTYPES]
    + [(kind, (0,), change) for kind in ("half", "none") for change in OF_NONE.values()],
)
def test_labels_are_as_int64_ones(name, images_with, changed, change):
    images, targets = batch(images_with)
    for target in targets if change is torch.bool else ():
        target["labels"].fill_(1)
    expected = step(plain(name), (images, targets))
    for index in changed:
        labels = targets[index]["labels"]
        targets[index]["labels"] = labels.to(change) if change in DTYPES else change(labels)
    assert_identical(step(weighted(name), (images, targets)), expected)


@pytest.mark.parametrize("name", [FASTER, MASK, *ONE_STAGE])
@pytest.mark.parametrize("told", SHAPES)
def test_other_labels_are_refused(name, told):
    images, targets = batch()
    targets[1]["labels"] = SHAPES[told](targets[1]["labels"])
    error = str(refusal(name, (images, targets)))
    assert "'labels'" in error
    assert "target 1" in error
    assert told in error


@pytest.mark.parametrize(
    ("name", "key", "value", "told"),
    [(name, key, value, told) for names, key, value, *told in REFUSED for name in names],
)
def test_targets_are_named(name, key, value, told):
    """The second target has another value, or None for none at all."""
    images, targets = batch(NONE if NONE in told else "objects")
    targets[1][key] = value
    if value is None:
        del targets[1][key]
    error = refusal(name, (images, targets))
    assert type(error) is (TypeError if {"bfloat16", "float64"} & {*told} else ValueError)
    expected = {f"'{key}'", "target 1", *told} - {NONE}
    assert not [part for part in expected if part not in str(error)], error


TAKEN_BRANCHES = [
    (KEYPOINT, "keypoints", lambda _: torch.zeros(17, 0, 3), False),  # as in torchvision's test
    (KEYPOINT, "keypoints", lambda _: torch.zeros(0, 3), False),
    (KEYPOINT, "keypoints", lambda keypoints: keypoints * tensor([1, 1, 0]), True),  # none visible
    (MASK, "masks", lambda _: torch.zeros(0, 60, 75, dtype=torch.uint8), False),
    (MASK, "masks", lambda _: torch.zeros(0, 1, 60, 75), False),
    (MASK, "masks", lambda masks: masks.bool(), True),
    (MASK, "masks", lambda masks: masks.long(), True),
    (MASK, "masks", lambda masks: masks * 0.7, True),
]


@pytest.mark.parametrize(("name", "key", "change", "of_objects"), TAKEN_BRANCHES)
@pytest.mark.parametrize("kind", ["objects", "half", "none"])
def test_masks_and_keypoints_equal_torchvision_s(name, key, change, of_objects, kind):
    """Images are not resized, which would make bytes of masks."""
    model, (images, targets) = twin(small(name)), batch(kind)
    model.transform._skip_resize = True
    for target in targets:
        if of_objects or len(target["boxes"]) == 0:
            target[key] = change(target[key])
    expected = step(model, (images, targets))
    assert_identical(step(weight_losses(model), (images, targets)), expected)


def test_keypoints_of_another_number_are_named():
    images, targets = batch()
    targets[1]["keypoints"] = torch.ones(3, 4, 3)
    with pytest.raises(ValueError, match=r"target 1: 'keypoints' .*3.*4"):
        weighted(KEYPOINT)(images, targets)


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_one_half_of_an_r_cnn_trains_alone(part):
    """Labels count for the RoI heads only, and they are checked without an RPN that trains."""
    models, (images, targets) = (twin(plain(FASTER)), twin(weighted(FASTER))), batch()
    for model in models:
        model.get_submodule(part).eval()
    if part == "roi_heads":
        targets[0]["labels"] = tensor([0, 0])
    expected, found = (losses_of(model, (images, targets)) for model in models)
    assert len(expected) == 2
    assert_identical(found, expected)
    targets[1] |= {"labels": tensor([1, 2, CLASSES]), "box_weights": tensor([-1.0, 1, 1])}
    for key in ("box_weights", "labels")[: 1 + (part == "rpn")]:
        with pytest.raises(ValueError, match=f"target 1: .*'{key}'"):
            losses_of(models[1], (images, targets))
        del targets[1][key]


@pytest.mark.parametrize("replaced", ["predictor", "predictor that tells nothing", "heads"])
def test_the_classes_of_what_was_replaced_count(replaced):
    """In that model only, not in the one that it was copied from."""
    model, (images, targets) = twin(weighted(FASTER)), batch()
    predictor = FastRCNNPredictor(32, CLASSES + 1)
    if replaced == "heads":
        model.roi_heads = copy.deepcopy(model.roi_heads)
        weight_losses(model)
    is_known = replaced != "predictor that tells nothing"
    model.roi_heads.box_predictor = predictor if is_known else nn.Sequential(predictor)
    targets[1]["labels"] = tensor([1, 2, CLASSES])
    assert all(loss > 0 for loss in losses_of(model, (images, targets)).values())
    refusal(FASTER, (images, targets))
    targets[1]["labels"] = tensor([1, 2, CLASSES + 1])
    with pytest.raises(ValueError, match=rf"target 1: 'labels'.*1\.\.{CLASSES} .*{CLASSES + 1}"):
        losses_of(model, (images, targets))
