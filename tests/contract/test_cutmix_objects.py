"""What CutMix leaves of objects, worked by hand."""

from __future__ import annotations

import pytest
import torch
from mixing_oracle import make_image
from torch import tensor
from torchvision.transforms import v2

from detmix import cutmix
from detmix.mixing import Cut

SIZE = (20, 30)  # height, width
BOX = (10, 5, 20, 15)


def target_of(*boxes, **extra):
    boxes = tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "image_id": 1, **extra}


def cut_only(target, rectangle, side, **settings):
    """Mix with an image without objects: what is left of the objects of one side."""
    images = make_image(*SIZE, seed=1), make_image(*SIZE, seed=2)
    targets = (target, {}) if side == "a" else ({}, target)
    return cutmix(images[0], targets[0], images[1], targets[1], rectangle, **settings)[1]


@pytest.mark.parametrize("size", [(20, 30), (375, 500), (1, 1)])
def test_the_rectangle_is_torchvision_s_for_the_same_draws(size):
    height, width = size
    batch, transform = torch.zeros(2, 3, *size), v2.CutMix(num_classes=2)
    uniform = torch.distributions.Beta(tensor([1.0]), tensor([1.0]))  # as it has it
    for seed in range(100):
        torch.manual_seed(seed)
        expected = transform.make_params([batch])["box"]
        torch.manual_seed(seed)
        lam = float(uniform.sample(()))
        x, y = (int(torch.randint(side, (1,))) for side in (width, height))
        assert Cut(lam, (x + 0.5) / width, (y + 0.5) / height).rectangle(size) == expected


class TestBoxes:
    # The object is BOX; the rectangle, what is left of the box, and its share.
    @pytest.mark.parametrize(
        ("side", "rectangle", "box", "share"),
        [
            ("a", (0, 0, 10, 20), BOX, 1.0),  # touches from the left
            ("a", (0, 0, 14, 20), (14, 5, 20, 15), 0.6),  # left side, edge to edge and beyond
            ("a", (10, 5, 14, 15), (14, 5, 20, 15), 0.6),  # left side, exactly edge to edge
            ("a", (13, 0, 30, 20), (10, 5, 13, 15), 0.3),  # right side
            ("a", (0, 0, 30, 9), (10, 9, 20, 15), 0.6),  # top side
            ("a", (10, 13, 20, 20), (10, 5, 20, 13), 0.8),  # bottom side
            ("a", (8, 0, 14, 14), BOX, 1 - 0.4 * 0.9),  # a corner: an L is left
            ("a", (12, 7, 16, 11), BOX, 0.84),  # a hole
            ("a", (12, 0, 16, 20), BOX, 0.6),  # a band: two parts are left
            ("a", (10, 0, 14, 14), BOX, 1 - 0.4 * 0.9),  # not quite edge to edge
            ("b", (0, 0, 30, 20), BOX, 1.0),
            ("b", (10, 5, 20, 15), BOX, 1.0),
            ("b", (12, 7, 16, 11), (12, 7, 16, 11), 0.16),
            ("b", (0, 0, 14, 10), (10, 5, 14, 10), 0.2),
            ("b", (12, 0, 16, 20), (12, 5, 16, 15), 0.4),
        ],
    )
    def test_box_and_weight(self, side, rectangle, box, share):
        mixed = cut_only(target_of(BOX), rectangle, side)
        assert mixed["boxes"].tolist() == [list(map(float, box))]
        assert mixed["box_weights"].tolist() == pytest.approx([share], rel=1e-6)

    def test_weights_multiply_and_rows_follow_their_objects(self):
        weights = tensor([0.5, 0.5, 0.25])
        a = target_of((0, 0, 10, 10), (10, 0, 20, 10), (2, 12, 6, 16), box_weights=weights)
        b = target_of((0, 0, 30, 20), (22, 0, 28, 8), (12, 2, 18, 6))
        # two entries, as many as B has objects left: no key of objects all the same
        a |= {"names": ["a0", "a1", "a2"], "crop": [3, 4]}
        b |= {"names": ["b0", "b1", "b2"], "crop": [5, 6]}
        sample = cutmix(make_image(*SIZE), a, make_image(*SIZE), b, (5, 0, 20, 10))
        mixed = sample[1]
        # a0 loses half, a1 all, a2 nothing; of b0 a quarter is seen, of b1 nothing, of b2 all.
        boxes = [[0, 0, 5, 10], [2, 12, 6, 16], [5, 0, 20, 10], [12, 2, 18, 6]]
        assert mixed["boxes"].tolist() == boxes
        assert mixed["box_weights"].tolist() == [0.25, 0.25, 0.25, 1.0]
        assert (mixed["names"], mixed["crop"]) == (["a0", "a2", "b0", "b2"], [3, 4])
        # and again: of b0 two thirds are left
        _, again = cutmix(*sample, make_image(*SIZE), {}, (15, 0, 20, 20))
        assert again["boxes"].tolist() == [*boxes[:2], [5, 0, 15, 10], [12, 2, 15, 6]]
        expected = pytest.approx([0.25, 0.25, 0.25 * 2 / 3, 0.5], rel=1e-6)
        assert again["box_weights"].tolist() == expected

    @pytest.mark.parametrize("side", ["a", "b"])
    @pytest.mark.parametrize(
        ("min_visibility", "left"), [(0.0, 4), (0.1, 4), (0.11, 3), (0.5, 2), (0.51, 1), (1.0, 1)]
    )
    def test_min_visibility(self, side, min_visibility, left):
        # visible: 0, 0.1, 0.2, 0.5, 1 (within the rectangle, or outside of its mirror image)
        boxes = [(20, 0, 30, 10), (9, 0, 19, 10), (8, 0, 18, 10), (5, 0, 15, 10), (0, 0, 10, 10)]
        boxes += [(1, 1, 1, 5), (4, 4, 3, 3)]  # without area
        rectangle = (0, 0, 10, 20) if side == "b" else (10, 0, 30, 20)
        mixed = cut_only(target_of(*boxes), rectangle, side, min_visibility=min_visibility)
        shares = pytest.approx([0.1, 0.2, 0.5, 1.0][-left:], rel=1e-6)
        assert mixed["box_weights"].tolist() == shares
        assert mixed["labels"].tolist() == [2, 3, 4, 5][-left:]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
    def test_dtype_of_boxes_is_kept(self, dtype):
        target = target_of(BOX)
        target["boxes"] = target["boxes"].to(dtype)
        for side, box in (("a", [14, 5, 20, 15]), ("b", [10, 5, 14, 15])):
            mixed = cut_only(target, (0, 0, 14, 20), side)
            assert mixed["boxes"].tolist() == [box]
            assert mixed["boxes"].dtype == dtype
            assert mixed["box_weights"].dtype == torch.float32

    @pytest.mark.parametrize("bottom", [20.0, 20.000002, 31.0])
    def test_what_is_beyond_the_image_is_no_part_of_an_object(self, bottom):
        target = target_of((5, 10, 25, bottom))
        for side, rectangle, box, share in (
            ("a", (0, 15, 30, 20), [5, 10, 25, 15], 0.5),
            ("a", (15, 0, 30, 20), [5, 10, 15, 20], 0.5),
            ("b", (15, 0, 30, 20), [15, 10, 25, 20], 0.5),
            ("a", (0, 0, 30, 5), target["boxes"][0].tolist(), 1.0),  # not cut, it stays as it is
        ):
            mixed = cut_only(target, rectangle, side)
            assert mixed["boxes"].tolist() == [box]
            assert mixed["box_weights"].tolist() == [share]


class TestOtherKeys:
    def test_area_is_scaled_by_the_visible_share(self):
        for area in (tensor([80.0], dtype=torch.float64), tensor([80]), [80]):
            for side, share in (("a", 0.6), ("b", 0.4)):
                left = cut_only(target_of(BOX, area=area), (0, 0, 14, 20), side)["area"]
                assert type(left) is type(area)
                assert float(left[0]) == pytest.approx(80 * share, rel=1e-6)
                assert isinstance(area, list) or area.dtype in (left.dtype, torch.int64)

    def test_hidden_keypoints_are_not_labelled_any_more(self):
        # Pixel 13 is the last in the rectangle, from 12.5 to 13.5, where the next begins.
        points = tensor([[[11.0, 6, 2], [13.5, 6, 1], [13.4, 14, 2], [0, 0, 0]]])
        for side, seen in (("a", [0, 1, 0, 0]), ("b", [1, 0, 1, 0])):
            mixed = cut_only(target_of(BOX, keypoints=points), (0, 0, 14, 20), side)
            assert torch.equal(mixed["keypoints"], points * tensor(seen)[:, None])
        without = points[..., :2]  # no visibility: they stay
        mixed = cut_only(target_of(BOX, keypoints=without), (0, 0, 14, 20), "a")
        assert torch.equal(mixed["keypoints"], without)
