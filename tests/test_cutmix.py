"""Detection CutMix of one pair: pixels, and objects worked by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mixing_oracle import DEVICES, assert_same_target, make_image, make_target
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import resize

from detmix import DetectionCutMix, cutmix
from detmix.mixing import Cut

SIZE = (20, 30)  # height, width


def target_of(*boxes, **extra):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "image_id": 1, **extra}


def cut_only(target, rectangle, side, **settings):
    """Mix with an image without objects: what is left of the objects of one side."""
    images, empty = (make_image(*SIZE, seed=1), make_image(*SIZE, seed=2)), target_of()
    pair = (target, empty) if side == "a" else (empty, target)
    return cutmix(images[0], pair[0], images[1], pair[1], rectangle, **settings)[1]


class TestPixels:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
    @pytest.mark.parametrize("size_b", [(20, 30), (12, 40), (35, 9)])
    def test_rectangle_is_b_s_and_the_rest_a_s(self, device, dtype, size_b):
        a = make_image(*SIZE, dtype, 1, device=device)
        b = make_image(*size_b, dtype, 2, device=device)
        x1, y1, x2, y2 = rectangle = (3, 2, min(25, size_b[1]), min(17, size_b[0]))
        before = a.clone(), b.clone()
        mixed, _ = cutmix(a, target_of(), b, target_of(), rectangle)
        assert mixed.shape == a.shape
        assert mixed.dtype == dtype
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                source = b if x1 <= x < x2 and y1 <= y < y2 else a
                assert torch.equal(mixed[:, y, x], source[:, y, x])
        mixed.zero_()
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])

    def test_order_in_memory_is_kept(self):
        a = make_image(*SIZE).permute(1, 2, 0).contiguous().permute(2, 0, 1)
        mixed, _ = cutmix(a, target_of(), make_image(*SIZE), target_of(), (0, 0, 5, 5))
        assert mixed.stride() == a.stride()


class TestGeometry:
    # The object of A is (10, 5, 20, 15); the rectangle, what is left of the box, and its share.
    @pytest.mark.parametrize(
        ("rectangle", "box", "share"),
        [
            ((0, 0, 10, 20), (10, 5, 20, 15), 1.0),  # touches from the left
            ((0, 0, 14, 20), (14, 5, 20, 15), 0.6),  # left side, edge to edge and beyond
            ((10, 5, 14, 15), (14, 5, 20, 15), 0.6),  # left side, exactly edge to edge
            ((13, 0, 30, 20), (10, 5, 13, 15), 0.3),  # right side
            ((0, 0, 30, 9), (10, 9, 20, 15), 0.6),  # top side
            ((10, 13, 20, 20), (10, 5, 20, 13), 0.8),  # bottom side
            ((8, 0, 14, 14), (10, 5, 20, 15), 1 - 0.4 * 0.9),  # a corner: an L is left
            ((12, 7, 16, 11), (10, 5, 20, 15), 0.84),  # a hole
            ((12, 0, 16, 20), (10, 5, 20, 15), 0.6),  # a band: two parts are left
            ((10, 0, 14, 14), (10, 5, 20, 15), 1 - 0.4 * 0.9),  # not quite edge to edge
            ((10, 5, 20, 13), (10, 13, 20, 15), 0.2),
        ],
    )
    @pytest.mark.parametrize("device", DEVICES)
    def test_object_of_a(self, rectangle, box, share, device):
        target = {
            k: torch.as_tensor(v, device=device) for k, v in target_of((10, 5, 20, 15)).items()
        }
        images = [make_image(*SIZE, seed=seed, device=device) for seed in (1, 2)]
        empty = {k: v[:0] for k, v in target.items() if k != "image_id"}
        _, mixed = cutmix(images[0], target, images[1], empty, rectangle)
        assert mixed["boxes"].tolist() == [list(map(float, box))]
        assert mixed["box_weights"].tolist() == pytest.approx([share], rel=1e-6)
        assert mixed["boxes"].device == mixed["box_weights"].device == images[0].device

    @pytest.mark.parametrize(
        ("rectangle", "box", "share"),
        [
            ((0, 0, 30, 20), (10, 5, 20, 15), 1.0),
            ((10, 5, 20, 15), (10, 5, 20, 15), 1.0),
            ((12, 7, 16, 11), (12, 7, 16, 11), 0.16),
            ((0, 0, 14, 10), (10, 5, 14, 10), 0.2),
            ((12, 0, 16, 20), (12, 5, 16, 15), 0.4),
        ],
    )
    def test_object_of_b_is_clipped_to_the_rectangle(self, rectangle, box, share):
        mixed = cut_only(target_of((10, 5, 20, 15)), rectangle, "b")
        assert mixed["boxes"].tolist() == [list(map(float, box))]
        assert mixed["box_weights"].tolist() == pytest.approx([share], rel=1e-6)

    def test_weights_multiply_and_rows_follow_their_objects(self):
        a = target_of(
            (0, 0, 10, 10),
            (10, 0, 20, 10),
            (2, 12, 6, 16),
            box_weights=torch.tensor([0.5, 0.5, 0.25]),
            difficult=torch.tensor([1, 0, 1]),
            names=["a0", "a1", "a2"],
            score=0.5,
        )
        b = target_of(
            (0, 0, 30, 20),
            (22, 0, 28, 8),
            (12, 2, 18, 6),
            labels=torch.tensor([7, 8, 9]),
            names=["b0", "b1", "b2"],
            image_id=2,
        )
        images = make_image(*SIZE, seed=1), make_image(*SIZE, seed=2)
        _, mixed = cutmix(images[0], a, images[1], b, (5, 0, 20, 10))
        # a0 loses half, a1 all, a2 nothing; of b0 a quarter is seen, of b1 nothing, of b2 all.
        assert mixed["boxes"].tolist() == [
            [0, 0, 5, 10],
            [2, 12, 6, 16],
            [5, 0, 20, 10],
            [12, 2, 18, 6],
        ]
        assert mixed["box_weights"].tolist() == [0.25, 0.25, 0.25, 1.0]
        assert mixed["labels"].tolist() == [1, 3, 7, 9]
        assert mixed["difficult"].tolist() == [1, 1, 0, 0]
        assert mixed["names"] == ["a0", "a2", "b0", "b2"]
        assert (mixed["image_id"], mixed["score"]) == (1, 0.5)

    def test_a_key_that_happens_to_fit_one_image_is_not_cut(self):
        a = target_of((0, 0, 10, 10), (10, 0, 20, 10), crop=[3, 4])
        b = target_of((0, 0, 9, 10), (9, 0, 20, 10), (8, 0, 20, 10), crop=[5, 6])
        images = make_image(*SIZE), make_image(*SIZE)
        # one object of A and two of B are left: now B's list fits as well
        _, mixed = cutmix(images[0], a, images[1], b, (9, 0, 20, 10))
        assert mixed["boxes"].tolist() == [[0, 0, 9, 10], [9, 0, 20, 10], [9, 0, 20, 10]]
        assert mixed["crop"] == [3, 4]

    @pytest.mark.parametrize("side", ["a", "b"])
    @pytest.mark.parametrize(
        ("min_visibility", "left"), [(0.0, 4), (0.1, 4), (0.11, 3), (0.5, 2), (0.51, 1), (1.0, 1)]
    )
    def test_min_visibility(self, side, min_visibility, left):
        # visible: 0, 0.1, 0.2, 0.5, 1 (within the rectangle, or outside of its mirror image)
        boxes = [(20, 0, 30, 10), (9, 0, 19, 10), (8, 0, 18, 10), (5, 0, 15, 10), (0, 0, 10, 10)]
        rectangle = (0, 0, 10, 20) if side == "b" else (10, 0, 30, 20)
        mixed = cut_only(target_of(*boxes), rectangle, side, min_visibility=min_visibility)
        assert mixed["box_weights"].tolist() == pytest.approx(
            [0.1, 0.2, 0.5, 1.0][-left:], rel=1e-6
        )
        assert mixed["labels"].tolist() == [2, 3, 4, 5][-left:]

    @pytest.mark.parametrize("side", ["a", "b"])
    def test_boxes_without_area_are_left_out(self, side):
        boxes = [(1, 1, 1, 5), (4, 4, 3, 3), (0, 0, 10, 10)]
        rectangle = (0, 0, 10, 20) if side == "b" else (10, 0, 30, 20)
        assert cut_only(target_of(*boxes), rectangle, side)["labels"].tolist() == [3]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
    def test_dtype_of_boxes_is_kept(self, dtype):
        target = target_of((10, 5, 20, 15))
        target["boxes"] = target["boxes"].to(dtype)
        for side, box in (("a", [14, 5, 20, 15]), ("b", [10, 5, 14, 15])):
            mixed = cut_only(target, (0, 0, 14, 20), side)
            assert mixed["boxes"].tolist() == [box]
            assert mixed["boxes"].dtype == dtype
            assert mixed["box_weights"].dtype == torch.float32

    @pytest.mark.parametrize("counts", [(0, 0), (0, 2), (2, 0), (2, 3)])
    @pytest.mark.parametrize(
        "rectangle", [(3, 3, 20, 15), (0, 0, 30, 20), (5, 5, 5, 9), (4, 4, 9, 4)]
    )
    def test_images_without_boxes_and_rectangles_without_area(self, counts, rectangle):
        a, b = (make_target(count, seed) for seed, count in enumerate(counts))
        images = make_image(*SIZE, seed=1), make_image(*SIZE, seed=2)
        image, mixed = cutmix(images[0], a, images[1], b, rectangle)
        rows = len(mixed["boxes"])
        assert mixed["boxes"].shape == (rows, 4)
        assert mixed["labels"].shape == mixed["box_weights"].shape == (rows,)
        assert mixed["labels"].dtype == torch.int64
        if rectangle == (0, 0, 30, 20):
            assert torch.equal(image, images[1])
        if (rectangle[2] - rectangle[0]) * (rectangle[3] - rectangle[1]) == 0:
            assert torch.equal(image, images[0])
            assert_same_target(mixed, {**a, "box_weights": torch.ones(counts[0])})

    def test_cut_twice_weights_are_products(self):
        images = [make_image(*SIZE, seed=seed) for seed in range(3)]
        once = cutmix(images[0], target_of((0, 0, 20, 10)), images[1], target_of(), (0, 0, 10, 20))
        assert once[1]["boxes"].tolist() == [[10, 0, 20, 10]]
        _, twice = cutmix(*once, images[2], target_of(), (15, 0, 30, 20))
        assert twice["boxes"].tolist() == [[10, 0, 15, 10]]
        assert twice["box_weights"].tolist() == [0.25]


class TestOtherKeys:
    def masks(self, dtype=torch.uint8):
        """A full box, a lower triangle, and nothing, within (10, 5, 20, 15)."""
        masks = torch.zeros(3, *SIZE, dtype=dtype)
        masks[0, 5:15, 10:20] = 1
        masks[1, 5:15, 10:20] = torch.ones(10, 10, dtype=torch.uint8).tril().to(dtype)
        return masks

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
    @pytest.mark.parametrize(("side", "sign"), [("a", False), ("b", True)])
    def test_masks_are_cut_exactly_and_give_the_shares(self, dtype, side, sign):
        masks, box = self.masks(dtype), (10, 5, 20, 15)
        mixed = cut_only(target_of(box, box, box, masks=masks), (0, 0, 15, 20), side)
        seen = torch.zeros(SIZE, dtype=torch.bool)
        seen[:, :15] = True
        expected = masks * (seen if sign else ~seen).to(dtype)
        assert torch.equal(mixed["masks"], expected)
        assert mixed["masks"].dtype == dtype
        # Left half of the triangle: 10 + 9 + 8 + 7 + 6 of its 55 pixels. The empty mask has the
        # share of its box.
        left = [0.5, 40 / 55, 0.5] if sign else [0.5, 15 / 55, 0.5]
        assert mixed["box_weights"].tolist() == pytest.approx(left, rel=1e-6)

    def test_an_object_whose_mask_is_hidden_is_left_out_though_its_box_is_seen(self):
        masks = torch.zeros(1, *SIZE, dtype=torch.uint8)
        masks[0, 5:8, 10:13] = 1
        target = target_of((10, 5, 20, 15), masks=masks)
        assert len(cut_only(target, (8, 4, 14, 9), "a")["boxes"]) == 0
        assert len(cut_only(target, (13, 5, 20, 15), "b")["boxes"]) == 0

    @pytest.mark.parametrize("size_b", [(12, 40), (35, 24)])
    def test_masks_of_b_are_cut_to_the_canvas_of_a(self, size_b):
        a = target_of((0, 0, 4, 4), masks=torch.ones(1, *SIZE, dtype=torch.uint8))
        b = target_of((2, 2, 20, 10), masks=torch.ones(1, *size_b, dtype=torch.bool))
        _, mixed = cutmix(make_image(*SIZE), a, make_image(*size_b), b, (2, 2, 20, 10))
        expected = torch.zeros(SIZE, dtype=torch.bool)
        expected[2:10, 2:20] = True
        assert mixed["masks"].shape == (2, *SIZE)
        assert torch.equal(mixed["masks"][1].bool(), expected)
        assert torch.equal(mixed["masks"][0].bool(), ~expected)

    def test_area_is_scaled_by_the_visible_share(self):
        box = (10, 5, 20, 15)
        floats = target_of(box, area=torch.tensor([80.0], dtype=torch.float64))
        whole = target_of(box, area=torch.tensor([80]))
        listed = target_of(box, area=[80])
        for target in (floats, whole, listed):
            for side, share in (("a", 0.6), ("b", 0.4)):
                area = cut_only(target, (0, 0, 14, 20), side)["area"]
                assert isinstance(area, type(target["area"]))
                assert float(area[0]) == pytest.approx(80 * share, rel=1e-6)
        assert cut_only(floats, (0, 0, 14, 20), "a")["area"].dtype == torch.float64

    def test_hidden_keypoints_are_not_labelled_any_more(self):
        # Pixel 13 is the last in the rectangle, and reaches from 12.5 to 13.5.
        points = torch.tensor([[[11.0, 6, 2], [13.6, 6, 1], [13.4, 14, 2], [0, 0, 0]]])
        gone = [0.0, 0.0, 0.0]
        target = target_of((10, 5, 20, 15), keypoints=points)
        rectangle = (0, 0, 14, 20)
        seen = cut_only(target, rectangle, "b")["keypoints"]
        assert seen.tolist() == [[points[0, 0].tolist(), gone, points[0, 2].tolist(), gone]]
        seen = cut_only(target, rectangle, "a")["keypoints"]
        assert seen.tolist() == [[gone, points[0, 1].tolist(), gone, gone]]

    @pytest.mark.parametrize("points", [[[5.0, 5, 2]], torch.ones(1, 51), torch.ones(1, 17, 4)])
    def test_keypoints_of_another_shape_are_refused(self, points):
        with pytest.raises(ValueError, match=r"'keypoints' must be a tensor \(N, K, 3\)"):
            cut_only(target_of((10, 5, 20, 15), keypoints=points), (0, 0, 14, 20), "a")

    def test_points_without_visibility_stay(self):
        target = target_of((10, 5, 20, 15), keypoints=torch.tensor([[[11.0, 6], [15, 6]]]))
        assert torch.equal(cut_only(target, (0, 0, 14, 20), "a")["keypoints"], target["keypoints"])

    @pytest.mark.parametrize("empty", ["a", "b"])
    def test_an_empty_target_may_lack_its_partner_s_keys(self, empty):
        full = target_of(
            (0, 0, 10, 20),
            (20, 0, 30, 20),
            masks=torch.ones(2, *SIZE, dtype=torch.uint8),
            keypoints=torch.ones(2, 5, 3),
            area=[200, 200],
            iscrowd=[0, 1],
            names=["x", "y"],
        )
        # (0, 0, 10, 20) is seen
        mixed = cut_only(
            full, (0, 0, 12, 20) if empty == "a" else (12, 0, 30, 20), "ba"[empty == "b"]
        )
        assert mixed["labels"].tolist() == [1]
        assert mixed["masks"].shape == (1, *SIZE)
        assert mixed["keypoints"].shape == (1, 5, 3)
        assert (mixed["iscrowd"], mixed["names"]) == ([0], ["x"])

    def test_inputs_are_not_changed(self):
        pair = []
        for seed in (1, 2):
            target = target_of((10, 5, 20, 15), (0, 0, 5, 5), masks=torch.ones(2, *SIZE).byte())
            target |= {"keypoints": torch.ones(2, 3, 3), "area": [4.0, 5.0], "names": ["x", "y"]}
            pair += [make_image(*SIZE, seed=seed), target]
        before = copy.deepcopy(pair)
        image, mixed = cutmix(*pair, (0, 0, 15, 12))
        image.zero_()
        for key in ("boxes", "labels", "box_weights", "masks", "keypoints"):
            mixed[key].fill_(1)
        mixed["names"].append("z")
        assert torch.equal(pair[0], before[0])
        assert torch.equal(pair[2], before[2])
        assert_same_target(pair[1], before[1])
        assert_same_target(pair[3], before[3])


class TestBadInput:
    @pytest.mark.parametrize(
        "rectangle",
        [
            (0, 0, 31, 5),
            (0, 0, 5, 21),
            (-1, 0, 5, 5),
            (5, 0, 4, 5),
            (0, 5, 5, 4),
            (0, 0, 5),
            (0, 0, 1.5, 5),
        ],
    )
    def test_rectangle_beyond_the_common_region(self, rectangle):
        with pytest.raises(
            ValueError, match=r"rectangle must be .* within the 30 x 20 pixels.*got \("
        ):
            cutmix(make_image(25, 30), target_of(), make_image(20, 40), target_of(), rectangle)

    @pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
    def test_min_visibility(self, share):
        with pytest.raises(ValueError, match=rf"min_visibility must be in \[0, 1\], got {share}"):
            cut_only(target_of(), (0, 0, 1, 1), "a", min_visibility=share)
        with pytest.raises(ValueError, match="min_visibility must be in"):
            DetectionCutMix(min_visibility=share)

    def test_images_and_targets(self):
        a, b = make_image(*SIZE), make_image(*SIZE, torch.float32)
        with pytest.raises(ValueError, match=r"same dtype, got torch.uint8 and torch.float32"):
            cutmix(a, target_of(), b, target_of(), (0, 0, 5, 5))
        with pytest.raises(ValueError, match=r"sample b: 'boxes'\[0\].*nan"):
            cutmix(a, target_of(), a, target_of((0, math.nan, 1, 1)), (0, 0, 5, 5))
        with pytest.raises(ValueError, match=r"per-object key 'area'.* 1 objects does not"):
            cutmix(a, target_of((0, 0, 9, 9), area=[1]), a, target_of((0, 0, 9, 9)), (0, 0, 4, 9))

    @pytest.mark.parametrize(
        ("cut", "message"),
        [
            (Cut(1.5, 0.0, 0.0), r"lam must be in \[0, 1\], got 1.5"),
            (Cut(math.nan, 0.0, 0.0), r"lam must be"),
            (Cut(0.5, 1.0, 0.0), r"x and y must be in \[0, 1\), got 1.0 and 0.0"),
            (Cut(0.5, 0.0, -0.1), r"x and y must be"),
        ],
    )
    def test_cut(self, cut, message):
        with pytest.raises(ValueError, match=message):
            cut.rectangle(SIZE)

    def test_settings(self):
        for arguments in (
            {"alpha": 0},
            {"p": 2},
            {"off_epochs": 1},
            {"epochs": 2, "off_epochs": 2},
        ):
            with pytest.raises(ValueError, match=next(iter(arguments))):
                DetectionCutMix(**arguments)


class TestBoxesBeyondTheImage:
    """What is beyond is no part of an object: not of what is covered, nor of what is left."""

    @pytest.mark.parametrize("bottom", [20.0, 20.000002, 31.0])
    def test_clipped_all_the_same(self, bottom):
        target = target_of((5, 10, 25, bottom))
        lower = cut_only(target, (0, 15, 30, 20), "a")
        assert lower["boxes"].tolist() == [[5, 10, 25, 15]]
        assert lower["box_weights"].tolist() == [0.5]
        right = cut_only(target, (15, 0, 30, 20), "a")
        assert right["boxes"].tolist() == [[5, 10, 15, 20]]
        assert right["box_weights"].tolist() == [0.5]
        inside = cut_only(target, (15, 0, 30, 20), "b")
        assert inside["boxes"].tolist() == [[15, 10, 25, 20]]

    def test_one_that_is_not_cut_stays_as_it_is(self):
        target = target_of((-5, 10, 10, 23))
        left = cut_only(target, (20, 0, 30, 20), "a")
        assert left["boxes"].tolist() == [[-5, 10, 10, 23]]
        assert left["box_weights"].tolist() == [1.0]

    def test_after_torchvision_s_resize(self):
        """Its rounding leaves an edge beyond the canvas: 375 to 800 pixels, 800.00006."""
        boxes = tv_tensors.BoundingBoxes([[250, 187.5, 500, 375]], format="XYXY",
                                         canvas_size=(375, 500), dtype=torch.float32)  # fmt: skip
        boxes = resize(boxes, [800])
        height, width = boxes.canvas_size
        target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}
        image = torch.zeros(3, height, width)
        _, mixed = cutmix(image, target, image, {}, (0, 600, width, height))
        assert mixed["boxes"][0, 3] == 600
        assert mixed["box_weights"].item() == pytest.approx(0.5, abs=1e-3)
