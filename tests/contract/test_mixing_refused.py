"""What mixers refuse, with an error that names which sample, the key, the row and the value."""

from __future__ import annotations

import re
from math import inf, nan

import numpy as np
import pytest
import torch
from mixing_oracle import make_image, make_target
from PIL import Image
from torch import tensor

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, cutmix, mixup
from detmix.mixing import Cut, MixParams, blend

IMAGE, TARGET = FINE = make_image(6, 6), make_target(2)
MIX = DetectionCutMix()
NAN_BOX = tensor([[0.0, 0, 1, 1], [0, nan, 1, 1]])


def mix(sample_a=FINE, sample_b=FINE, how=0.5, **settings):
    """Mix, by a ratio or with a rectangle."""
    mixer = mixup if isinstance(how, float) else cutmix
    return mixer(*sample_a, *sample_b, how, **settings)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"boxes": NAN_BOX}, r"'boxes'\[1\].*nan"),
        ({"boxes": torch.zeros(2, 5)}, r"'boxes'.*\(2, 5\)"),
        # such as of a data set of torchvision that nobody has wrapped
        ({"boxes": None, "labels": None, "annotation": [1, 2]}, "'boxes'.*annotation"),
        ({"box_weights": torch.ones(2, 1)}, r"'box_weights'.*\(2, 1\)"),
        ({"box_weights": [[1.0], [1.0]]}, "'box_weights'.*list"),
        ({"box_weights": tensor([1, -0.5])}, r"'box_weights'\[1\].*-0.5"),
        ({"box_weights": tensor([1, inf])}, r"'box_weights'\[1\].*inf"),
        ({"labels": torch.ones(1)}, r"'labels'.* 2 .*\(1,\)"),
        ({"labels": tensor(1)}, r"'labels'.* 2 .*\(\)"),
        ({"difficult": np.zeros(2)}, r"'difficult'.*ndarray"),
        ({"masks": torch.zeros(2, 6, 5)}, r"'masks'.*\(2, 6, 6\).*\(2, 6, 5\)"),
        ({"masks": [1, 2]}, r"'masks'.*\(2, 6, 6\)"),
        ({"area": torch.ones(3)}, r"'area'.* 2 .*\(3,\)"),
        ({"name": "dog"}, r"'name'.* 2 .*str"),
    ],
)
def test_targets(changes, names):
    """Of the keys that need not be carried, those that are declared."""
    bad, keys = (IMAGE, TARGET | changes), changes.keys() - {"annotation"}
    for how in (0.5, (0, 0, 5, 5)):
        with pytest.raises(ValueError, match=f"sample a.*{names}"):
            mix(sample_a=bad, how=how, keys=keys)
        with pytest.raises(ValueError, match=f"sample b.*{names}"):
            mix(sample_b=bad, how=how, keys=keys)
    batch = [FINE, FINE, (IMAGE, bad[1] | {"image_id": 77})]
    for mixer in (DetectionMixUp(p=0.0, keys=keys), RandomChoice([DetectionCutMix(keys=keys)])):
        with pytest.raises(ValueError, match=rf"sample 2 .*77.*{names}"):
            mixer(batch)


@pytest.mark.parametrize(
    ("sample", "got"),
    [
        ({"image": IMAGE, "target": TARGET}, "dict of length 2"),
        ((*FINE, "a.jpg"), "tuple of length 3"),
        (IMAGE, "a tensor"),
        (None, "None"),
    ],
)
def test_what_is_no_sample(sample, got):
    for call in (DetectionMixUp(), lambda s: DetectionCutMix().transform(s, [None] * len(s))):
        for batch in ([sample, FINE], [FINE, sample], [FINE, FINE, sample]):
            number = next(i for i, part in enumerate(batch) if part is sample)
            with pytest.raises(ValueError, match=rf"sample {number} .*\(image, target\).*{got}"):
                call(batch)
    with pytest.raises(ValueError, match=rf"sample 1 .*\(image, target\).*{got}"):
        MixedDataset([FINE, sample], DetectionMixUp(p=1.0), seed=1)[0]


@pytest.mark.parametrize("how", [0.5, (0, 0, 5, 5)], ids=["mixup", "cutmix"])
@pytest.mark.parametrize(
    ("image", "names"),
    [
        (IMAGE.float(), "torch.uint8 .*torch.float32"),
        (IMAGE[:1], "3 .*1"),
        (IMAGE.to("meta"), "cpu .*meta"),
        (IMAGE[0], r"sample b.*\(6, 6\)"),
        (IMAGE.numpy(), "sample b"),
        (Image.new("RGB", (6, 6)), r"sample b.*v2\.ToImage\(\)"),
    ],
)
def test_images(image, names, how):
    with pytest.raises(ValueError, match=names):
        mix(sample_b=(image, TARGET), how=how)
    with pytest.raises(ValueError, match=r"sample b.*None"):
        mix(sample_b=(IMAGE, None), how=how)


@pytest.mark.parametrize("points", [[[5.0, 5, 2]] * 2, torch.ones(2, 51), torch.ones(2, 17, 4)])
def test_keypoints_that_cannot_be_cut(points):
    sample = IMAGE, TARGET | {"keypoints": points}
    with pytest.raises(ValueError, match="'keypoints'"):
        mix(sample, sample, how=(0, 0, 5, 5))


RATIOS, SHARES = (-0.1, 1.0001, nan, inf), (-0.1, 1.5, nan)
RECTANGLES = ((0, 0, 7, 5), (0, 0, 5, 7), (-1, 0, 5, 5), (5, 0, 4, 5), (0, 5, 5, 4))
RECTANGLES += ((0, 0, 5), (0, 0, 1.5, 5))
FILLS = (-1, 256, 255.9, nan, (0, 0, 300), (1, 2), (1, 2, 3, 4))
CHANCES = ((1,), (1, 2, 3), (0, 0), (-1, 2), (nan, 1), (inf, 1))


@pytest.mark.parametrize(
    ("name", "values", "call"),
    [  # the name of an argument, values that are refused, and how to pass one
        ("lam", RATIOS, lambda lam: mix(how=lam)),
        (
            "lam",
            RATIOS,
            lambda lam: DetectionMixUp().transform([FINE] * 2, [MixParams(1, lam)] * 2),
        ),
        ("lam", RATIOS, lambda lam: Cut(lam, 0.0, 0.0).rectangle((20, 30))),
        ("x", (1.0, -0.1), lambda x: Cut(0.5, x, 0.0).rectangle((20, 30))),
        ("y", (1.0, -0.1), lambda y: Cut(0.5, 0.0, y).rectangle((20, 30))),
        ("rectangle", RECTANGLES, lambda rectangle: mix(how=rectangle)),
        ("fill", FILLS, lambda fill: blend(IMAGE, make_image(4, 4), 0.5, fill)),
        ("fill", FILLS, lambda fill: blend(IMAGE, IMAGE, 0.5, fill)),
        ("min_visibility", SHARES, lambda share: DetectionCutMix(min_visibility=share)),
        ("min_visibility", SHARES, lambda share: mix(how=(0, 0, 1, 1), min_visibility=share)),
        ("probabilities", CHANCES, lambda p: RandomChoice([DetectionMixUp()] * 2, p)),
        ("epoch", [-1], DetectionMixUp().set_epoch),
        ("p", SHARES, lambda p: DetectionMixUp(p=p)),
        ("alpha", (0, -1.0, inf, nan), lambda alpha: DetectionCutMix(alpha=alpha)),
        ("off_epochs", (-1, 3), lambda off: DetectionMixUp(off_epochs=off)),  # 3 of how many?
        ("off_epochs", (20, 21), lambda off: DetectionCutMix(off_epochs=off, epochs=20)),
        ("epochs", [0], lambda epochs: DetectionMixUp(epochs=epochs)),
        ("DetectionMixer", ["Identity"], lambda _: RandomChoice([torch.nn.Identity()])),
        ("mixers", ["none"], lambda _: RandomChoice([])),
        ("targets", [2], lambda _: DetectionMixUp()([IMAGE] * 3, [TARGET] * 2)),
        ("targets", ["tensor"], lambda _: DetectionMixUp()(IMAGE[None])),
        ("keys", ["area"], lambda keys: DetectionMixUp(keys=keys)),
        ("keys", ["area"], lambda keys: RandomChoice([DetectionMixUp(keys=[keys]), MIX])),
        ("target_getter", [dict], lambda g: RandomChoice([MIX, DetectionMixUp(target_getter=g)])),
        ("keys", ["area"], lambda keys: mix(keys=keys)),
        ("keys", ["area"], lambda keys: mix(how=(0, 0, 1, 1), keys=keys)),
        ("params", [2], lambda _: DetectionMixUp().transform([FINE] * 2, [None])),
        ("seeds", [2], lambda _: DetectionMixUp().make_params(2, seeds=[7])),
    ],
)
def test_arguments(name, values, call):
    for value in values:
        told = f"(?=.*{name})(?=.*{re.escape(str(value))})"
        with pytest.raises(TypeError if value == "Identity" else ValueError, match=told):
            call(value)


@pytest.mark.parametrize(("index", "p"), [(1, 0.0), (1, 1.0), (0, 1.0)])
def test_a_data_set_names_the_sample(index, p):
    mixed = MixedDataset([FINE, (IMAGE, TARGET | {"boxes": NAN_BOX})], DetectionMixUp(p=p), seed=1)
    with pytest.raises(ValueError, match=r"sample 1.*'boxes'\[1\].*nan"):
        mixed[index]
    other = MixedDataset([FINE, (IMAGE.float(), TARGET)], DetectionMixUp(p=1.0), seed=1)
    with pytest.raises(ValueError, match=r"sample 0 .*sample 1.*dtype"):
        other[0]
    for out_of_range in (2, -3):
        with pytest.raises(IndexError, match=rf"{out_of_range} .*2"):
            mixed[out_of_range]
