"""Mixing two samples: pixels, objects with their weights, and whatever else a target holds.

Mixup blends A and B on the canvas of both; CutMix pastes a rectangle of B into A.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from mixing_oracle import (
    DEVICES,
    FORMATS,
    TOLERANCE,
    assert_pixels,
    assert_same_target,
    expected_pixels,
    make_boxes,
    make_image,
    make_target,
    on,
    seeded,
)
from torch import tensor
from torchvision.tv_tensors import BoundingBoxes

from detmix import cutmix, mixup
from detmix.mixing import blend, box_weights, union

SIZES = ((20, 30), (24, 26))  # height and width of A and of B
CANVAS = {"mixup": (24, 30), "cutmix": (20, 30)}
LAM = 0.25
BOXES = ([[1, 2, 11, 12], [0, 5, 13, 20]], [[14, 0, 26, 12], [13, 6, 18, 20], [15, 3, 19, 9]])
# With A's objects beside it and B's within, it leaves all of them whole.
APART = (13, 0, 26, 20)
# of the one box of an image of 20 x 30 or 24 x 26
NOT_OF_THE_BOXES = [
    ("area", torch.ones(2)),
    ("area", None),
    ("masks", None),
    ("iscrowd", [0, 0]),
    ("difficult", np.zeros(1)),
    ("masks", torch.ones(3, 20, 30)),
    ("masks", torch.ones(1, 19, 30)),
    ("masks", [torch.ones(20, 30)]),
    ("keypoints", torch.ones(2, 17, 3)),
]
LAMS = [0.0, 1.0, 0.5, 0.3, 1e-12, 1e-3, 1 - 1e-3, math.nextafter(1.0, 0.0)]


def make_sample(side, kind=None, rows=None, **extra):
    size, rows = SIZES[side], BOXES[side] if rows is None else rows
    labels = torch.arange(len(rows)) + 10 * side + 1
    target = {"boxes": make_boxes(rows, size, kind), "labels": labels, "image_id": side}
    return make_image(*size, seed=side), {**target, **extra}


def mix(name, sample_a, sample_b, rectangle=APART, **settings):
    if name == "mixup":
        return mixup(*sample_a, *sample_b, LAM, **settings)
    return cutmix(*sample_a, *sample_b, rectangle, min_visibility=0.0, **settings)


class TestPixels:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("lam", LAMS)
    def test_blend_is_the_formula_on_images_of_any_sizes(self, device, dtype, lam):
        fills = (0, 114, (7, 0, 255)) if dtype == torch.uint8 else (0, 0.5, (0.25, 0, 1))
        for fill in fills:
            for size_b in ((11, 17), (17, 11), (9, 23), (30, 40)):
                a = make_image(11, 17, dtype, seed=1, device=device)
                b = make_image(*size_b, dtype, seed=2, device=device)
                mixed = blend(a, b, lam, fill)
                assert_pixels(mixed, a, b, lam, fill)
                assert torch.equal(mixup(a, {}, b, {}, lam, fill)[0], mixed)
                if lam in (0, 1) and size_b == (11, 17):
                    assert torch.equal(mixed, a if lam else b)

    def test_any_order_in_memory_and_number_of_channels(self):
        a, b = make_image(40, 60, seed=1), make_image(64, 64, seed=2)
        last, b_last = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (a, b))
        pairs = [(last, b), (b, last), (last, last.flip(1)), (a.flip(2)[:, ::2], b[:, 3:, 5:50])]
        pairs += [(make_image(5, 9, channels=n), make_image(7, 3, channels=n)) for n in (1, 4)]
        for pair in pairs:
            assert_pixels(blend(*pair, 0.8, 9), *pair, 0.8, 9)
        # what comes channels last, as from a decoder, stays so
        assert blend(last, b_last, 0.3).permute(1, 2, 0).is_contiguous()
        assert cutmix(last, {}, b, {}, (0, 0, 5, 5))[0].stride() == last.stride()

    @pytest.mark.parametrize("lam", [0.5, 0.25, 0.1, 2 / 3, 0.9])
    def test_uint8_is_rounded_to_nearest_without_a_bias(self, lam):
        values = torch.arange(256, dtype=torch.uint8)
        a, b = (x.reshape(1, 256, 256) for x in (values.repeat(256), values.repeat_interleave(256)))
        mixed = blend(a, b, lam)
        assert_pixels(mixed, a, b, lam)
        error = mixed.double().numpy() - expected_pixels(a, b, lam, 0)
        # Rounding ties up would be +0.25 at λ = 0.5 and +0.05 at 0.9, truncation -0.25 and more.
        assert abs(error.mean()) < 2e-2
        corner = blend(make_image(2, 4), make_image(4, 2), lam, (123.68, 116.28, 103.53))[:, -1, -1]
        assert corner.tolist() == [124, 116, 104]


@pytest.mark.parametrize("name", CANVAS)
class TestTargets:
    def rich_sample(self, side):
        """A sample with all kinds of keys, its objects in their part of CutMix's image."""
        count, (x1, y1, x2, y2) = len(BOXES[side]), ((0, 0, 13, 20), APART)[side]
        generator = seeded(side)
        masks = torch.zeros(count, *SIZES[side], dtype=torch.bool)
        masks[:, y1:y2, x1:x2] = torch.rand(count, 20, 13, generator=generator) > 0.5
        points = torch.rand(count, 17, 3, generator=generator) * 12 + tensor([x1, y1, 1])
        numbers = torch.arange(count) + side
        return make_sample(
            side,
            box_weights=torch.linspace(0.5, 1, count),
            difficult=numbers % 2,
            iscrowd=[int(number) % 2 for number in numbers],
            masks=masks,
            keypoints=points,
            pose=torch.rand(count, 2, 2, generator=generator),
            size=tensor(SIZES[side]),  # of the image, with as many entries as A has objects
            path=f"{side}.jpg",
            **({"more": 1} if side else {}),
        )

    @pytest.mark.parametrize("device", DEVICES)
    def test_keys_of_objects_are_joined_and_keys_of_the_image_are_a_s(self, name, device):
        (_, a), (_, b) = pair = [on(device, self.rich_sample(side)) for side in (0, 1)]
        image, mixed = mix(name, *pair, keys=["pose"])
        assert image.shape == (3, *CANVAS[name])
        pixels = mix(name, *map(self.rich_sample, (0, 1)), keys=["pose"])[0]
        torch.testing.assert_close(image.cpu(), pixels, rtol=0, atol=int(name == "mixup"))
        ratio = {"mixup": (LAM, 1 - LAM), "cutmix": (1, 1)}[name]
        masks = torch.zeros(5, 24, 30, dtype=torch.bool, device=device)
        masks[:2, :20, :30], masks[2:, :24, :26] = a["masks"], b["masks"]
        expected = {**a, "masks": masks[:, : CANVAS[name][0]]}
        for key in ("boxes", "labels", "difficult", "keypoints", "pose"):
            expected[key] = torch.cat([a[key], b[key]])
        expected["iscrowd"] = a["iscrowd"] + b["iscrowd"]
        weights = [part["box_weights"] * r for part, r in zip((a, b), ratio, strict=True)]
        assert_same_target(mixed, {**expected, "box_weights": torch.cat(weights)})

    @pytest.mark.parametrize("kind", FORMATS)
    def test_boxes_that_are_not_clipped_keep_every_bit(self, name, kind):
        # converting there and back would round some of these
        rows = torch.rand(200, 4, generator=seeded(0)) * 3 + 15
        rows[:, 2:] += 4 * (kind == "XYXY")
        image, target = make_sample(0, rows=BOXES[0][:1] * 200)
        target["boxes"] = BoundingBoxes(rows, format=kind, canvas_size=SIZES[0])
        for b in (make_sample(1, rows=[]), make_sample(1, kind)):
            _, mixed = mix(name, (image, target), b, (0, 0, 1, 1))
            assert torch.equal(mixed["boxes"].as_subclass(torch.Tensor)[:200], rows)

    def test_what_a_target_does_not_say_of_its_objects(self, name):
        ones = [torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.uint8), [1, 1, 1]]
        for key in ("difficult", "iscrowd"):
            for values in ones:
                _, mixed = mix(name, make_sample(0), make_sample(1, **{key: values}))
                assert list(mixed[key]) == [0, 0, 1, 1, 1]
                assert isinstance(values, list) or mixed[key].dtype == values.dtype

    @pytest.mark.parametrize(("key", "value"), NOT_OF_THE_BOXES)
    @pytest.mark.parametrize("side", [0, 1])
    def test_a_known_key_that_does_not_fit_the_boxes_is_left_out(self, name, side, key, value):
        """As v1's `RandomIoUCrop` leaves them; of both targets, lest one of them lacks it."""
        fine = {"masks": torch.ones(1, *SIZES[1 - side]), "area": [9], "iscrowd": [0]}
        samples = [make_sample(i, rows=BOXES[i][:1], **fine) for i in (0, 1)]
        samples[1 - side][1].update(fine)
        samples[side][1].update({"masks": torch.ones(1, *SIZES[side]), key: value})
        with pytest.warns(UserWarning, match=f"^'{key}': left out") as told:
            _, mixed = mix(name, *samples)
        assert len(told) == 1
        assert mixed.keys() >= fine.keys() - {key}
        assert key not in mixed
        assert len(mixed["boxes"]) == len(mixed["area" if key != "area" else "iscrowd"]) == 2
        named = "one target" if value is None else f"sample {'ab'[side]}"
        with pytest.raises(ValueError, match=f"{named}.*'{key}'"):
            mix(name, *samples, keys=[key])

    @pytest.mark.parametrize("counts", [(1, 1), (2, 2), (2, 3), (1, 3), (2, 1), (0, 1)])
    def test_an_undeclared_key_is_the_image_s_whatever_its_length(self, name, counts):
        """And a warning names one that might be the objects'."""
        rows = [(BOXES[0] + BOXES[1])[:count] for count in counts]
        for values in (([7], [8]), (tensor([20, 30]), tensor([24, 26])), (["a"] * 3, ["b"] * 3)):
            pair = [make_sample(i, rows=rows[i], own=values[i]) for i in (0, 1)]
            is_unclear = counts == (len(values[0]), len(values[1]))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                assert mix(name, *pair)[1]["own"] is values[0]
            assert ["'own': kept" in str(warning.message) for warning in told] == [
                True
            ] * is_unclear
        names = [[f"{i}-{row}" for row in range(counts[i])] for i in (0, 1)]
        pair = [make_sample(i, rows=rows[i], own=names[i]) for i in (0, 1)]
        mixed = mix(name, *pair, (0, 0, 26, 20), keys={"own"})[1]
        assert mixed["own"] == (names[0] if name == "mixup" else []) + names[1]
        if counts != (0, 1):  # where there is nothing to have it
            del pair[0][1]["own"]
            with pytest.raises(ValueError, match="'own'"):
                mix(name, *pair, keys=["own"])


@pytest.mark.parametrize(
    "empty",
    [
        {"labels": tensor([])},
        {"labels": torch.zeros(0, dtype=torch.float64), "iscrowd": tensor([])},
        {"labels": torch.zeros(0, dtype=torch.int64), "keypoints": torch.zeros(17, 0, 3)},
        {"labels": tensor([]), "masks": torch.zeros(0, 7, 7), "keypoints": torch.zeros(0)},
        {"labels": tensor([]), "masks": tensor([]), "area": tensor([])},
    ],
)
@pytest.mark.parametrize("other", ["as empty", "with objects"])
@pytest.mark.parametrize("name", CANVAS)
def test_images_without_objects_in_whatever_shape_they_come(name, empty, other):
    a = make_image(20, 30), {"boxes": torch.zeros(0, 4), **empty}
    rows = {"masks": torch.ones(3, 24, 26), "keypoints": torch.ones(3, 17, 3)}
    rows |= {"area": torch.ones(3), "iscrowd": torch.zeros(3, dtype=torch.int64)}
    b = (
        a
        if other == "as empty"
        else make_sample(1, **{key: rows[key] for key in rows & empty.keys()})
    )
    for pair in ((a, b), (b, a)):
        _, mixed = mix(name, *pair, (0, 0, 26, 20))
        assert mixed["labels"].dtype == torch.int64
        count = 0 if b is a or (name == "cutmix" and pair[0] is b) else 3
        assert {len(mixed[key]) for key in {"boxes", "box_weights", *empty}} == {count}
        if "masks" in empty:
            assert mixed["masks"].shape[1:] == CANVAS[name] or pair[0] is b


def test_functions_on_their_own():
    a = make_target(1, masks=torch.ones(1, 2, 3, dtype=torch.uint8))
    b = make_target(1, masks=torch.ones(1, 4, 1, dtype=torch.uint8), box_weights=[0.5])
    joined = union(a, b, 0.25, (5, 6))
    assert joined["masks"].shape == (2, 5, 6)
    assert joined["masks"].flatten(1).sum(1).tolist() == [6, 4]
    assert joined["box_weights"].tolist() == [0.25, 0.375]
    assert union({"image_id": 3}, {"image_id": 4}, 0.5, (4, 4))["boxes"].shape == (0, 4)
    named = union(a | {"name": ["a"]}, b | {"name": ["b"]}, 0.25, (5, 6), keys=["name"])
    assert named["name"] == ["a", "b"]
    with pytest.warns(UserWarning, match="'masks'"):  # beyond the canvas
        assert "masks" not in union(a, b, 0.25, (3, 6))
    for changes in ({"labels": tensor([1, 2])}, {"box_weights": [-0.5]}, {"boxes": torch.ones(4)}):
        with pytest.raises(ValueError, match=f"target b.*{next(iter(changes))}"):
            union(a, b | changes, 0.25, (5, 6))
    for target, weights in ((a, [1.0]), (b, [0.5]), (a | {"box_weights": None}, [1.0])):
        assert box_weights(target).tolist() == weights
        assert box_weights(target).dtype == torch.float32
