"""What mixers refuse, with an error that names which sample, the key, the row and the value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mixing_oracle import make_image, make_target
from torch import tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from detmix import (
    DetectionCutMix,
    DetectionMixUp,
    MixedDataset,
    RandomChoice,
    cutmix,
    mixup,
)
from detmix.mixing import Cut, MixParams, blend

FINE = make_image(6, 6), make_target(2)
ROTATED = [  # from torchvision 0.23 on
    BoundingBoxes(torch.ones(2, 5), format=kind, canvas_size=(6, 6))
    for kind in ("CXCYWHR",)
    if hasattr(BoundingBoxFormat, kind)
]


def mix(sample_a=FINE, sample_b=FINE, how=0.5, **settings):
    """Mix, by a ratio or with a rectangle."""
    mixer = mixup if isinstance(how, float) else cutmix
    return mixer(*sample_a, *sample_b, how, **settings)


@pytest.mark.parametrize("how", [0.5, (0, 0, 5, 5)])
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"boxes": tensor([[0.0, 0, 1, 1], [0, math.nan, 1, 1]])}, r"'boxes'\[1\].*nan"),
        ({"boxes": tensor([[0.0, 0, math.inf, 1], [0, 0, 1, 1]])}, r"'boxes'\[0\].*inf"),
        ({"boxes": torch.zeros(2, 5)}, r"'boxes'.*\(2, 5\)"),
        *(({"boxes": boxes}, r"'boxes'.*CXCYWHR.*\(2, 5\)") for boxes in ROTATED),
        ({"boxes": None}, "'boxes'.*labels"),
        ({"box_weights": torch.ones(3)}, r"'box_weights'.* 2 .*\(3,\)"),
        ({"box_weights": torch.ones(2, 1)}, r"'box_weights'.*\(2, 1\)"),
        ({"box_weights": tensor([1, -0.5])}, r"'box_weights'\[1\].*-0.5"),
        ({"box_weights": tensor([math.nan, 1])}, r"'box_weights'\[0\].*nan"),
        ({"box_weights": tensor([1, math.inf])}, r"'box_weights'\[1\].*inf"),
        ({"labels": torch.ones(1)}, r"'labels'.* 2 .*\(1,\)"),
        ({"labels": tensor(1)}, r"'labels'.* 2 .*\(\)"),
        ({"difficult": np.zeros(2)}, r"'difficult'.*ndarray"),
        ({"masks": torch.zeros(2, 6, 5)}, r"'masks'.*\(2, 6, 6\).*\(2, 6, 5\)"),
        ({"masks": [1, 2]}, r"'masks'.*\(2, 6, 6\)"),
    ],
)
def test_targets(changes, names, how):
    bad = make_image(6, 6), make_target(2) | changes
    with pytest.raises(ValueError, match=f"sample a.*{names}"):
        mix(sample_a=bad, how=how)
    with pytest.raises(ValueError, match=f"sample b.*{names}"):
        mix(sample_b=bad, how=how)
    with pytest.raises(ValueError, match=rf"sample 2 .*77.*{names}"):
        DetectionMixUp(p=0.0)([FINE, FINE, (bad[0], bad[1] | {"image_id": 77})])


@pytest.mark.parametrize("key", ["labels", "masks", "area", "bbox", "bboxes", "annotation"])
def test_objects_without_boxes(key):
    """Such as of a data set of torchvision that nobody has wrapped."""
    with pytest.raises(ValueError, match=f"'boxes'.*{key}"):
        mix((make_image(4, 4), {"image_id": 3, key: [1, 2]}))


@pytest.mark.parametrize("how", [0.5, (0, 0, 5, 5)])
@pytest.mark.parametrize(
    ("image", "names"),
    [
        (torch.zeros(3, 6, 6), "torch.uint8 .*torch.float32"),
        (torch.zeros(1, 6, 6, dtype=torch.uint8), "3 .*1"),
        (torch.zeros(3, 6, 6, dtype=torch.uint8, device="meta"), "cpu .*meta"),
        (torch.zeros(6, 6, dtype=torch.uint8), r"sample b.*\(6, 6\)"),
        (np.zeros((3, 6, 6), np.uint8), "sample b"),
    ],
)
def test_images(image, names, how):
    with pytest.raises(ValueError, match=names):
        mix(sample_b=(image, make_target(2)), how=how)


def test_a_target_that_is_no_dict():
    with pytest.raises(ValueError, match=r"sample b.*None"):
        mix(sample_b=(make_image(4, 4), None))


@pytest.mark.parametrize("mixer", [DetectionMixUp(p=1.0), DetectionCutMix(p=1.0)])
def test_a_pair_that_does_not_match_is_named(mixer):
    bads = [(FINE[0].float(), FINE[1]), (FINE[0], FINE[1] | {"own": [1, 2]})]
    for bad in bads[: 1 + isinstance(mixer, DetectionMixUp)]:  # CutMix may hide the objects
        with pytest.raises(ValueError, match=r"sample \d .*sample \d "):
            mixer([FINE, bad])


@pytest.mark.parametrize("lam", [-0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_ratios(lam):
    for call in (
        lambda: mix(how=lam),
        lambda: DetectionMixUp().transform([FINE] * 2, [MixParams(1, lam), None]),
        lambda: Cut(lam, 0.0, 0.0).rectangle((20, 30)),
    ):
        with pytest.raises(ValueError, match=f"lam.*{lam}"):
            call()


@pytest.mark.parametrize("rectangle", [
    (0, 0, 7, 5), (0, 0, 5, 7), (-1, 0, 5, 5), (5, 0, 4, 5), (0, 5, 5, 4), (0, 0, 5),
    (0, 0, 1.5, 5),
])  # fmt: skip
def test_rectangles(rectangle):
    with pytest.raises(ValueError, match="rectangle"):
        mix(how=rectangle)


@pytest.mark.parametrize("centre", [(1.0, 0.0), (0.0, -0.1)])
def test_centres_of_rectangles(centre):
    with pytest.raises(ValueError, match="{}.*{}".format(*centre)):
        Cut(0.5, *centre).rectangle((20, 30))


@pytest.mark.parametrize("points", [[[5.0, 5, 2]] * 2, torch.ones(2, 51), torch.ones(2, 17, 4)])
def test_keypoints_that_cannot_be_cut(points):
    with pytest.raises(ValueError, match="'keypoints'"):
        mix((FINE[0], FINE[1] | {"keypoints": points}), how=(0, 0, 5, 5))


@pytest.mark.parametrize("fill", [-1, 256, 255.9, math.nan, (0, 0, 300), (1, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("size", [4, 6])
def test_fill(fill, size):
    with pytest.raises(ValueError, match="fill"):
        blend(make_image(4, 4), make_image(size, size), 0.5, fill)


@pytest.mark.parametrize("mixer", [DetectionMixUp, DetectionCutMix])
@pytest.mark.parametrize(
    "settings",
    [
        *({"p": p} for p in (1.5, -0.1, math.nan)),
        *({"alpha": alpha} for alpha in (0, -1.0, math.inf, math.nan)),
        {"off_epochs": -1},
        {"off_epochs": 3},  # of how many?
        {"off_epochs": 20, "epochs": 20},
        {"epochs": 0},
    ],
)
def test_settings(mixer, settings):
    key, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        mixer(**settings)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_min_visibility(share):
    for call in (DetectionCutMix, lambda **settings: mix(how=(0, 0, 1, 1), **settings)):
        with pytest.raises(ValueError, match=f"min_visibility.*{share}"):
            call(min_visibility=share)


@pytest.mark.parametrize(
    "probabilities", [(1,), (1, 2, 3), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1)]
)
def test_choices(probabilities):
    with pytest.raises(ValueError, match="probabilities"):
        RandomChoice([DetectionMixUp(), DetectionCutMix()], probabilities)
    with pytest.raises(TypeError, match="Identity"):
        RandomChoice([DetectionMixUp(), torch.nn.Identity()])
    with pytest.raises(ValueError, match="mixer"):
        RandomChoice([])


@pytest.mark.parametrize("mixer", [DetectionMixUp(), RandomChoice([DetectionMixUp()])])
def test_batches_and_epochs(mixer):
    image, target = make_image(4, 4), make_target(1)
    for arguments in (([image] * 3, [target] * 2), (torch.zeros(2, 3, 4, 4),)):
        with pytest.raises(ValueError, match="targets"):
            mixer(*arguments)
    with pytest.raises(ValueError, match="-1"):
        mixer.set_epoch(-1)


@pytest.mark.parametrize(("index", "p"), [(1, 0.0), (1, 1.0), (0, 1.0)])
def test_a_data_set_names_the_sample(index, p):
    bad = FINE[0], FINE[1] | {"boxes": tensor([[0.0, 0, 1, 1], [0, math.nan, 1, 1]])}
    mixed = MixedDataset([FINE, bad], DetectionMixUp(p=p), seed=1)
    with pytest.raises(ValueError, match=r"sample 1.*'boxes'\[1\].*nan"):
        mixed[index]
    other = MixedDataset([FINE, (FINE[0].float(), FINE[1])], DetectionMixUp(p=1.0), seed=1)
    with pytest.raises(ValueError, match=r"sample 0 .*sample 1.*dtype"):
        other[0]
    for index in (2, -3):
        with pytest.raises(IndexError, match=rf"{index} .*2"):
            mixed[index]
