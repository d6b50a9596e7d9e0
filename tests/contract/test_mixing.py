"""Mixing two samples: pixels, objects with their weights, and whatever else a target holds.

Mixup blends A and B on the canvas of both; CutMix pastes a rectangle of B into A.
"""

from __future__ import annotations

import copy

import pytest
import torch
from mixing_oracle import (
    DEVICES,
    LAMS,
    TOLERANCE,
    assert_pixels,
    assert_same_target,
    expected_pixels,
    make_image,
    make_target,
    on,
)
from torch import tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, Mask

from detmix import cutmix, mixup
from detmix.mixing import blend, box_weights, union

SIZES = ((20, 30), (24, 26))  # height and width of A and of B
CANVAS = {"mixup": (24, 30), "cutmix": (20, 30)}
LAM = 0.25
BOXES = ([[1, 2, 11, 12], [0, 5, 13, 20]], [[14, 0, 26, 12], [13, 6, 18, 20], [15, 3, 19, 9]])
# With A's objects beside it and B's within, it leaves all of them whole; the other cuts most.
APART, ACROSS = (13, 0, 26, 20), (3, 2, 16, 14)
FORMATS = ["XYXY", "XYWH", "CXCYWH"]


def make_boxes(rows, size, kind=None):
    """Return boxes, given as (x1, y1, x2, y2), plain or in a format of torchvision's."""
    boxes = tensor(rows, dtype=torch.float32).reshape(-1, 4)
    if kind is None:
        return boxes
    typed = BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return convert_bounding_box_format(typed, new_format=tv_tensors.BoundingBoxFormat[kind])


def make_sample(side, kind=None, rows=None, **extra):
    size, rows = SIZES[side], BOXES[side] if rows is None else rows
    labels = torch.arange(len(rows)) + 10 * side + 1
    target = {"boxes": make_boxes(rows, size, kind), "labels": labels, "image_id": side}
    return make_image(*size, seed=side), {**target, **extra}


def mix(name, sample_a, sample_b, rectangle=APART, lam=LAM):
    if name == "mixup":
        return mixup(*sample_a, *sample_b, lam)
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

    def test_gradient_reaches_both_images(self):
        a, b = (torch.rand(3, 4, 4, requires_grad=True) for _ in range(2))
        blend(a, b, 0.3).sum().backward()
        torch.testing.assert_close(a.grad, torch.full_like(a, 0.3))
        torch.testing.assert_close(b.grad, torch.full_like(b, 0.7))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("size_b", [(20, 30), (12, 40), (35, 9)])
    def test_cutmix_takes_the_rectangle_from_b_and_the_rest_from_a(self, device, dtype, size_b):
        a = make_image(20, 30, dtype, 1, device=device)
        b = make_image(*size_b, dtype, 2, device=device)
        x2, y2 = min(25, size_b[1]), min(17, size_b[0])
        expected = a.clone()
        expected[:, 2:y2, 3:x2] = b[:, 2:y2, 3:x2]
        mixed, _ = cutmix(a, {}, b, {}, (3, 2, x2, y2))
        assert mixed.dtype == dtype
        assert torch.equal(mixed, expected)


@pytest.mark.parametrize("name", CANVAS)
class TestTargets:
    def rich_sample(self, side):
        """A sample with all kinds of keys, its objects in their part of CutMix's image."""
        count, (x1, y1, x2, y2) = len(BOXES[side]), ((0, 0, 13, 20), APART)[side]
        generator = torch.Generator().manual_seed(side)
        masks = torch.zeros(count, *SIZES[side], dtype=torch.bool)
        masks[:, y1:y2, x1:x2] = torch.rand(count, 20, 13, generator=generator) > 0.5
        points = torch.rand(count, 17, 3, generator=generator) * 12 + tensor([x1, y1, 1])
        numbers = torch.arange(count) + side
        return make_sample(
            side,
            box_weights=torch.linspace(0.5, 1, count),
            difficult=numbers % 2,
            iscrowd=[int(number) % 2 for number in numbers],
            area=numbers * 1.5,
            masks=masks,
            keypoints=points,
            pose=torch.rand(count, 2, 2, generator=generator),
            names=[f"{side}-{number}" for number in range(count)],
            # of the image, two of them with as many entries as A has objects
            orig_size=tensor(SIZES[side]),
            size=tensor(SIZES[side]),
            path=f"{side}.jpg",
            score=0.5 + side,
            **({"more": 1} if side else {}),
        )

    @pytest.mark.parametrize("device", DEVICES)
    def test_keys_of_objects_are_joined_and_keys_of_the_image_are_a_s(self, name, device):
        (_, a), (_, b) = pair = [on(device, self.rich_sample(side)) for side in (0, 1)]
        image, mixed = mix(name, *pair)
        assert image.shape == (3, *CANVAS[name])
        ratio = {"mixup": (LAM, 1 - LAM), "cutmix": (1, 1)}[name]
        masks = torch.zeros(5, 24, 30, dtype=torch.bool, device=device)
        masks[:2, :20, :30], masks[2:, :24, :26] = a["masks"], b["masks"]
        expected = {**a, "masks": masks[:, : CANVAS[name][0]]}
        for key in ("boxes", "labels", "difficult", "area", "keypoints", "pose"):
            expected[key] = torch.cat([a[key], b[key]])
        for key in ("names", "iscrowd"):
            expected[key] = a[key] + b[key]
        weights = [part["box_weights"] * r for part, r in zip((a, b), ratio, strict=True)]
        assert_same_target(mixed, {**expected, "box_weights": torch.cat(weights)})

    @pytest.mark.parametrize("kind_b", [None, *FORMATS])
    @pytest.mark.parametrize("kind_a", [None, *FORMATS])
    def test_tv_tensors_come_out_as_a_s_with_the_values_of_plain_ones(self, name, kind_a, kind_b):
        expected_image, expected = mix(name, *map(self.typed_sample, (0, 1)), ACROSS)
        pair = [self.typed_sample(0, kind_a), self.typed_sample(1, kind_b)]
        before = copy.deepcopy(pair)
        if kind_a is not None:
            expected = self.typed(expected, CANVAS[name], kind_a)
        for return_type in ("Tensor", "TVTensor"):
            with tv_tensors.set_return_type(return_type):
                image, mixed = mix(name, *pair, ACROSS)
            assert type(image) is (torch.Tensor if kind_a is None else tv_tensors.Image)
            assert torch.equal(image.as_subclass(torch.Tensor), expected_image)
            assert_same_target(mixed, expected)
        mixed["boxes"].fill_(0)
        for (_, target), (_, old) in zip(pair, before, strict=True):
            assert_same_target(target, old)

    def typed_sample(self, side, kind=None):
        image, target = self.rich_sample(side)
        target["keypoints"] = target["keypoints"][..., :2]
        if kind is None:
            return image, target
        return tv_tensors.Image(image), self.typed(target, SIZES[side], kind)

    @staticmethod
    def typed(target, size, kind):
        target = {**target, "masks": Mask(target["masks"])}
        target["boxes"] = make_boxes(target["boxes"].tolist(), size, kind)
        if hasattr(tv_tensors, "KeyPoints"):  # from torchvision 0.23 on
            target["keypoints"] = tv_tensors.KeyPoints(target["keypoints"], canvas_size=size)
        return target

    @pytest.mark.parametrize("kind", FORMATS)
    def test_boxes_that_are_not_clipped_keep_every_bit(self, name, kind):
        # converting there and back would round some of these
        rows = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * 3 + 15
        rows[:, 2:] += 4 * (kind == "XYXY")
        image, target = make_sample(0, rows=BOXES[0][:1] * 200)
        target["boxes"] = BoundingBoxes(rows, format=kind, canvas_size=SIZES[0])
        for b in (make_sample(1, rows=[]), make_sample(1, kind)):
            _, mixed = mix(name, (image, target), b, (0, 0, 1, 1))
            assert torch.equal(mixed["boxes"].as_subclass(torch.Tensor)[:200], rows)

    def test_a_type_that_only_b_has(self, name):
        masks = Mask(torch.ones(3, *SIZES[1], dtype=torch.uint8))
        full, image = make_sample(1, "XYWH", masks=masks), make_image(*SIZES[0])
        # A does not hold the key, or nothing in it that has a type
        for empty in ({"image_id": 7}, make_sample(0, rows=[])[1]):
            for pair in (((image, empty), full), (full, (make_image(*SIZES[1]), empty))):
                rectangle = APART if pair[1] is full else (0, 0, 0, 0)
                mixed_image, mixed = mix(name, *pair, rectangle)
                boxes, size = mixed["boxes"], tuple(mixed_image.shape[1:])
                assert (boxes.format.value, boxes.canvas_size) == ("XYWH", size)
                assert type(mixed["masks"]) is Mask
                assert len(mixed["labels"]) == len(mixed["masks"]) == 3
                assert mixed["image_id"] == pair[0][1]["image_id"]

    @pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("counts", [(0, 0), (0, 2), (2, 0)])
    def test_images_without_boxes(self, name, counts, lam):
        pair = [
            make_sample(side, rows=BOXES[side][:count], area=[1.0] * count)
            for side, count in enumerate(counts)
        ]
        bare = [part if len(part[1]["labels"]) else (part[0], {"image_id": 0}) for part in pair]
        untyped = {"labels": tensor([]), "area": tensor([])}
        loose = [part if len(part[1]["labels"]) else (part[0], part[1] | untyped) for part in pair]
        kept = counts[0] * (lam > 0) + counts[1] * (lam < 1) if name == "mixup" else sum(counts)
        for samples in (pair, bare, loose):
            image, mixed = mix(name, *samples, lam=lam)
            assert image.shape == (3, *CANVAS[name])
            assert mixed["boxes"].shape == (kept, 4)
            assert mixed["labels"].shape == mixed["box_weights"].shape == (kept,)
            dtypes = [mixed[key].dtype for key in ("boxes", "box_weights")]
            assert dtypes == [torch.float32] * 2
            assert mixed["labels"].dtype == torch.int64 or samples is loose
            assert (mixed["box_weights"] > 0).all()

    @pytest.mark.parametrize("flip", [False, True])
    def test_an_empty_target_may_lack_its_partner_s_keys(self, name, flip):
        full = self.rich_sample(0)
        empty = make_image(*SIZES[1]), make_target(0)
        image, mixed = mix(name, *((empty, full) if flip else (full, empty)), (0, 0, 13, 20))
        kept = 2 if flip or name == "mixup" else 0
        assert mixed["masks"].shape == (kept, *image.shape[1:])
        assert mixed["keypoints"].shape == (kept, 17, 3)
        assert mixed["names"] == ["0-0", "0-1"][:kept]
        again_image, again = mix(name, (image, mixed), empty, (0, 0, 0, 0))
        assert again["masks"].shape == (kept, *again_image.shape[1:])

    def test_what_a_target_does_not_say_of_its_objects(self, name):
        ones = [torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.uint8), [1, 1, 1]]
        for key in ("difficult", "iscrowd"):
            for values in ones:
                _, mixed = mix(name, make_sample(0), make_sample(1, **{key: values}))
                assert list(mixed[key]) == [0, 0, 1, 1, 1]
                assert isinstance(values, list) or mixed[key].dtype == values.dtype
        ratio = {"mixup": (LAM, 1 - LAM), "cutmix": (1, 1)}[name]
        _, mixed = mix(name, make_sample(0), make_sample(1, box_weights=torch.full((3,), 0.5)))
        assert mixed["box_weights"].tolist() == [ratio[0]] * 2 + [0.5 * ratio[1]] * 3
        for values in (torch.rand(3), [1, 2, 3]):
            pair = make_sample(0), make_sample(1, area=values)
            for order in (pair, pair[::-1]):
                with pytest.raises(ValueError, match="'area'"):
                    mix(name, *order, ACROSS)

    def test_keys_of_the_image_with_as_many_entries_as_both_have_objects(self, name):
        for key, num in (("image_id", 1), ("orig_size", 2), ("size", 2)):
            pair = [make_sample(side, rows=BOXES[side][:num]) for side in (0, 1)]
            for (_, target), value in zip(pair, (4, 5), strict=True):
                target[key] = torch.full((num,), value)
            assert mix(name, *pair)[1][key].tolist() == [4] * num

    def test_lists_and_tensors_join_as_a_s_kind(self, name):
        pair = make_sample(0, area=[100.0, 300.0]), make_sample(1, area=tensor([1.0, 2, 3]))
        _, mixed = mix(name, *pair)
        assert mixed["area"] == [100, 300, 1, 2, 3]
        if name == "mixup":
            assert torch.equal(mix(name, *pair[::-1])[1]["area"], tensor([1.0, 2, 3, 100, 300]))

    def test_inputs_change_neither_by_mixing_nor_by_editing_the_result(self, name):
        for lam, size in ((0.0, SIZES[1]), (0.5, SIZES[0]), (1.0, SIZES[0]), (1.0, SIZES[1])):
            pair = [self.rich_sample(side) for side in (0, 1)]
            pair[0] = make_image(*size), pair[0][1] | {"masks": torch.ones(2, *size).bool()}
            before = copy.deepcopy(pair)
            image, mixed = mix(name, *pair, lam=lam)
            image.zero_()
            for key in ("boxes", "labels", "box_weights", "difficult", "area", "masks", "pose"):
                mixed[key].fill_(1)
            mixed["names"].append("z")
            mixed["path"] = "new"
            for (old, target), (kept, kept_target) in zip(pair, before, strict=True):
                assert torch.equal(old, kept)
                assert_same_target(target, kept_target)


class TestMixUpWeights:
    @pytest.mark.parametrize(("lam", "which"), [(0.0, 1), (1.0, 0), (1e-60, 1)])
    def test_objects_of_weight_zero_are_left_out(self, lam, which):
        pair = [make_sample(side, names=["p", "q", "r"][: 2 + side]) for side in (0, 1)]
        _, mixed = mix("mixup", *pair, lam=lam)
        assert_same_target(
            mixed, pair[which][1] | {"box_weights": torch.ones(2 + which), "image_id": 0}
        )
        a = make_sample(0, box_weights=tensor([0.0, 1.0]), names=["x", "y"])
        _, mixed = mix("mixup", a, make_sample(1, rows=[]), lam=0.5)
        assert mixed["boxes"].tolist() == BOXES[0][1:]
        assert (mixed["names"], mixed["box_weights"].tolist()) == (["y"], [0.5])

    def test_functions_on_their_own(self):
        a = make_target(1, masks=torch.ones(1, 2, 3, dtype=torch.uint8))
        b = make_target(1, masks=torch.ones(1, 4, 1, dtype=torch.uint8), box_weights=[0.5])
        joined = union(a, b, 0.25, (5, 6))
        assert joined["masks"].shape == (2, 5, 6)
        assert joined["masks"].flatten(1).sum(1).tolist() == [6, 4]
        assert joined["box_weights"].tolist() == [0.25, 0.375]
        image = tv_tensors.Image(make_image(4, 5))
        assert type(blend(image, make_image(4, 5), 0.5)) is tv_tensors.Image
        assert union({"image_id": 3}, {"image_id": 4}, 0.5, (4, 4))["boxes"].shape == (0, 4)
        for target, weights in ((a, [1.0]), (b, [0.5]), (a | {"box_weights": None}, [1.0])):
            assert box_weights(target).tolist() == weights
            assert box_weights(target).dtype == torch.float32
