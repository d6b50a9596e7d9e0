"""Mixing two samples: pixels, objects with their weights, and whatever else a target holds.

Mixup blends A and B on the canvas of both; CutMix pastes a rectangle of B into A.
"""

from __future__ import annotations

import math

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
# With A's objects beside it and B's within, it leaves all of them whole; the other cuts most.
APART, ACROSS = (13, 0, 26, 20), (3, 2, 16, 14)
LAMS = [0.0, 1.0, 0.5, 0.3, 1e-12, 1e-3, 1 - 1e-3, math.nextafter(1.0, 0.0)]


def make_sample(side, kind=None, rows=None, **extra):
    size, rows = SIZES[side], BOXES[side] if rows is None else rows
    labels = torch.arange(len(rows)) + 10 * side + 1
    target = {"boxes": make_boxes(rows, size, kind), "labels": labels, "image_id": side}
    return make_image(*size, seed=side), {**target, **extra}


def mix(name, sample_a, sample_b, rectangle=APART):
    if name == "mixup":
        return mixup(*sample_a, *sample_b, LAM)
    return cutmix(*sample_a, *sample_b, rectangle, min_visibility=0.0)


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
        image, mixed = mix(name, *pair)
        assert image.shape == (3, *CANVAS[name])
        pixels = mix(name, *map(self.rich_sample, (0, 1)))[0]
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
        for values in (torch.rand(3), [1, 2, 3]):
            pair = make_sample(0), make_sample(1, area=values)
            for order in (pair, pair[::-1]):
                with pytest.raises(ValueError, match="'area'"):
                    mix(name, *order, ACROSS)


def test_functions_on_their_own():
    a = make_target(1, masks=torch.ones(1, 2, 3, dtype=torch.uint8))
    b = make_target(1, masks=torch.ones(1, 4, 1, dtype=torch.uint8), box_weights=[0.5])
    joined = union(a, b, 0.25, (5, 6))
    assert joined["masks"].shape == (2, 5, 6)
    assert joined["masks"].flatten(1).sum(1).tolist() == [6, 4]
    assert joined["box_weights"].tolist() == [0.25, 0.375]
    assert union({"image_id": 3}, {"image_id": 4}, 0.5, (4, 4))["boxes"].shape == (0, 4)
    for target, weights in ((a, [1.0]), (b, [0.5]), (a | {"box_weights": None}, [1.0])):
        assert box_weights(target).tolist() == weights
        assert box_weights(target).dtype == torch.float32
