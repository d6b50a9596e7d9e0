"""Mixing one pair: its ground truth by definition, and any nesting of pairs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing_oracle import DEVICES, LAMS, TOLERANCE, assert_pixels, make_image, make_target

from detmix import mixup
from detmix.mixing import box_weights, union


class TestGroundTruth:
    @pytest.mark.parametrize("device", DEVICES)
    def test_union_keeps_geometry_and_order(self, device):
        a, b = make_target(2, seed=1), make_target(3, seed=2)
        for target in (a, b):
            target.update({k: target[k].to(device) for k in ("boxes", "labels")})
        image, target = mixup(
            make_image(20, 30, device=device), a, make_image(25, 10, device=device), b, 0.3
        )
        assert image.shape == (3, 25, 30)
        assert torch.equal(target["boxes"], torch.cat([a["boxes"], b["boxes"]]))
        assert torch.equal(target["labels"], torch.cat([a["labels"], b["labels"]]))
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert target["box_weights"].dtype == torch.float32
        assert target["box_weights"].device == target["boxes"].device
        torch.testing.assert_close(
            target["box_weights"].cpu(), torch.tensor([0.3, 0.3, 0.7, 0.7, 0.7])
        )
        assert target["image_id"] == 1

    def test_all_keys_travel(self):
        sizes, counts = ((20, 30), (25, 10)), (2, 3)
        targets = []
        for seed, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
            targets.append(
                make_target(
                    count,
                    seed=seed,
                    box_weights=torch.linspace(0.5, 1, count),
                    difficult=torch.arange(count) % 2,
                    iscrowd=(torch.arange(count) + seed) % 2,
                    area=torch.rand(count),
                    masks=torch.rand(count, height, width) > 0.5,
                    keypoints=torch.rand(count, 17, 3),
                    pose=torch.rand(count, 2, 2),
                    names=[f"{seed}-{i}" for i in range(count)],
                )
            )
        a, b = targets
        _, target = mixup(make_image(*sizes[0]), a, make_image(*sizes[1]), b, 0.25)
        for key in ("difficult", "iscrowd", "area", "keypoints", "pose"):
            assert torch.equal(target[key], torch.cat([a[key], b[key]])), key
        assert target["names"] == ["0-0", "0-1", "1-0", "1-1", "1-2"]
        expected = torch.cat([0.25 * a["box_weights"], 0.75 * b["box_weights"]])
        torch.testing.assert_close(target["box_weights"], expected)
        masks = target["masks"]
        assert masks.shape == (5, 25, 30)
        assert masks.dtype == torch.bool
        assert torch.equal(masks[:2, :20, :30], a["masks"])
        assert torch.equal(masks[2:, :25, :10], b["masks"])
        assert masks.sum() == a["masks"].sum() + b["masks"].sum()

    def test_per_image_keys_are_a_s_even_with_as_many_entries_as_boxes(self):
        size_a, size_b = torch.tensor([20, 30]), torch.tensor([25, 10])
        a = make_target(2, seed=1, orig_size=size_a, size=size_a, path="a.jpg", score=0.5)
        b = make_target(2, seed=2, orig_size=size_b, size=size_b, path="b.jpg", score=0.7, more=1)
        a["image_id"], b["image_id"] = torch.tensor([1]), torch.tensor([2])
        _, target = mixup(make_image(20, 30), a, make_image(25, 10), b, 0.5)
        assert torch.equal(target["orig_size"], size_a)
        assert torch.equal(target["size"], size_a)
        assert (target["path"], target["score"], target["image_id"].tolist()) == ("a.jpg", 0.5, [1])
        assert "more" not in target

    def test_one_box_and_a_tensor_image_id_of_one_entry(self):
        a, b = make_target(1), make_target(1)
        a["image_id"], b["image_id"] = torch.tensor([4]), torch.tensor([5])
        _, target = mixup(make_image(4, 4), a, make_image(4, 4), b, 0.5)
        assert target["image_id"].tolist() == [4]

    @pytest.mark.parametrize(("key", "default"), [("difficult", 0), ("iscrowd", 0)])
    @pytest.mark.parametrize("holder", ["a", "b"])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
    def test_defaults_where_one_target_does_not_say(self, key, default, holder, dtype):
        a, b = make_target(2), make_target(2, seed=1)
        {"a": a, "b": b}[holder][key] = torch.ones(2, dtype=dtype)
        _, target = mixup(make_image(4, 4), a, make_image(4, 4), b, 0.5)
        expected = [1, 1, default, default] if holder == "a" else [default, default, 1, 1]
        assert target[key].tolist() == expected
        assert target[key].dtype == dtype

    @pytest.mark.parametrize("holder", ["a", "b"])
    def test_box_weights_default_to_one(self, holder):
        a, b = make_target(1), make_target(1)
        {"a": a, "b": b}[holder]["box_weights"] = torch.tensor([0.5])
        _, target = mixup(make_image(4, 4), a, make_image(4, 4), b, 0.25)
        expected = {"a": [0.125, 0.75], "b": [0.25, 0.375]}[holder]
        assert target["box_weights"].tolist() == expected

    def test_box_weights_may_be_a_list_or_none(self):
        target = make_target(2, box_weights=[0.5, 1])
        assert box_weights(target).tolist() == [0.5, 1.0]
        assert box_weights(target).dtype == torch.float32
        assert box_weights(make_target(2, box_weights=None)).tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("extra", [torch.rand(2), [3, 4]])
    def test_a_key_without_default_must_be_in_both(self, extra):
        a, b = make_target(2, area=extra), make_target(3)
        for pair in ((a, b), (b, a)):
            with pytest.raises(ValueError, match=r"per-object key 'area'.* 3 objects does not"):
                mixup(make_image(4, 4), pair[0], make_image(4, 4), pair[1], 0.5)

    @pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("counts", [(0, 0), (0, 2), (2, 0)])
    def test_images_without_boxes(self, lam, counts):
        a, b = (make_target(count, seed) for seed, count in enumerate(counts))
        image, target = mixup(make_image(4, 6), a, make_image(6, 4), b, lam)
        kept = counts[0] * (lam > 0) + counts[1] * (lam < 1)
        assert image.shape == (3, 6, 6)
        assert target["boxes"].shape == (kept, 4)
        assert target["labels"].shape == target["box_weights"].shape == (kept,)
        assert target["labels"].dtype == torch.int64
        assert (target["box_weights"] > 0).all()

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
    def test_an_empty_target_may_lack_its_partner_s_keys(self, flip, lam):
        full = make_target(
            2,
            area=torch.rand(2),
            masks=torch.ones(2, 4, 6, dtype=torch.uint8),
            keypoints=torch.rand(2, 5, 3),
            names=["x", "y"],
        )
        sample, empty = (make_image(4, 6), full), (make_image(6, 4), make_target(0, seed=1))
        pair = (*empty, *sample) if flip else (*sample, *empty)
        image, target = mixup(*pair, lam)
        ratio = 1 - lam if flip else lam
        kept = 2 if ratio else 0
        assert target["masks"].shape == (kept, *image.shape[1:])
        assert target["keypoints"].shape == (kept, 5, 3)
        assert target["area"].shape == (kept,)
        assert target["names"] == ["x", "y"][:kept]
        # What comes out can be mixed again.
        again_image, again = mixup(image, target, make_image(9, 9), make_target(0), 0.5)
        assert again["masks"].shape == (kept, *again_image.shape[1:])

    def test_an_empty_target_s_untyped_tensors_do_not_change_dtypes(self):
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.tensor([]), "area": torch.tensor([])}
        full = make_target(2, area=torch.rand(2))
        _, target = mixup(make_image(4, 4), empty, make_image(4, 4), full, 0.5)
        assert target["labels"].dtype == torch.int64

    @pytest.mark.parametrize(("lam", "which"), [(0.0, "b"), (1.0, "a"), (1e-60, "b")])
    def test_no_box_of_weight_zero_is_left(self, lam, which):
        parts = {
            "a": make_target(2, seed=1, difficult=torch.tensor([0, 1]), names=["p", "q"]),
            "b": make_target(3, seed=2, difficult=torch.tensor([1, 0, 1]), names=["r", "s", "t"]),
        }
        _, target = mixup(make_image(4, 4), parts["a"], make_image(4, 4), parts["b"], lam)
        kept = parts[which]
        for key in ("boxes", "labels", "difficult"):
            assert torch.equal(target[key], kept[key])
        assert target["names"] == kept["names"]
        assert target["box_weights"].tolist() == [1.0] * len(kept["boxes"])
        assert target["image_id"] == 1

    def test_an_object_of_weight_zero_is_left_out(self):
        a = make_target(3, box_weights=torch.tensor([0.5, 0.0, 1.0]), names=["x", "y", "z"])
        b = make_target(0, seed=1, names=[])
        _, target = mixup(make_image(4, 4), a, make_image(4, 4), b, 0.5)
        assert torch.equal(target["boxes"], a["boxes"][[0, 2]])
        assert target["names"] == ["x", "z"]
        assert target["box_weights"].tolist() == [0.25, 0.5]

    def test_nested_mixing_multiplies_weights(self):
        size, leaves = (4, 4), [make_target(2, seed=seed) for seed in range(4)]
        left = mixup(make_image(*size), leaves[0], make_image(*size), leaves[1], 0.25)
        right = mixup(make_image(*size), leaves[2], make_image(*size), leaves[3], 0.75)
        _, target = mixup(*left, *right, 0.5)
        expected = torch.tensor([0.125, 0.375, 0.375, 0.125]).repeat_interleave(2)
        assert torch.equal(target["box_weights"], expected)
        # Every leaf has two objects, so the weights of one object each sum to 1.
        assert target["box_weights"].sum() == 2.0

    def test_union_pads_masks_to_the_canvas_it_is_given(self):
        a = make_target(1, masks=torch.ones(1, 2, 3, dtype=torch.uint8))
        b = make_target(1, masks=torch.ones(1, 4, 1, dtype=torch.uint8))
        target = union(a, b, 0.5, (5, 6))
        assert target["masks"].shape == (2, 5, 6)
        assert target["masks"].flatten(1).sum(1).tolist() == [6, 4]


class TestInputsUntouched:
    def make_pair(self):
        samples = []
        for seed, (height, width) in ((1, (8, 6)), (2, (6, 8))):
            target = make_target(2, seed, difficult=torch.tensor([0, 1]), names=["x", "y"])
            target["masks"] = torch.ones(2, height, width, dtype=torch.uint8)
            target["orig_size"] = torch.tensor([height, width])
            samples += [make_image(height, width, seed=seed), target]
        return samples

    @staticmethod
    def assert_same(pair, before):
        torch.testing.assert_close(pair[0::2], before[0::2], rtol=0, atol=0)
        for target, expected in zip(pair[1::2], before[1::2], strict=True):
            assert target.keys() == expected.keys()
            assert target.pop("names") == expected.pop("names")
            torch.testing.assert_close(target, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
    def test_neither_by_mixing_nor_by_editing_the_result(self, lam):
        pair = self.make_pair()
        before = copy.deepcopy(pair)
        image, target = mixup(*pair, lam)
        image.zero_()
        for key in ("boxes", "labels", "box_weights", "difficult", "masks"):
            target[key].fill_(1)
        target["names"].append("z")
        target["path"] = "new"
        self.assert_same(pair, before)

    @pytest.mark.parametrize("lam", [0.0, 1.0])
    def test_also_with_images_of_one_size_and_float(self, lam):
        a, b = make_image(4, 4, torch.float32, 1), make_image(4, 4, torch.float32, 2)
        before = a.clone(), b.clone()
        image, _ = mixup(a, make_target(1), b, make_target(1), lam)
        image.zero_()
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


class TestBadInput:
    def mix(self, lam=0.5, image_b=None, **changes):
        a = {**make_target(2, seed=1), **changes}
        image_b = make_image(6, 6) if image_b is None else image_b
        return mixup(make_image(4, 4), a, image_b, make_target(2, seed=2), lam)

    @pytest.mark.parametrize("lam", [-0.1, 1.0001, math.nan, math.inf, -math.inf])
    def test_lam(self, lam):
        with pytest.raises(ValueError, match=rf"lam must be in \[0, 1\], got {lam}"):
            self.mix(lam=lam)

    @pytest.mark.parametrize(
        ("image_b", "message"),
        [
            (torch.zeros(3, 4, 4), r"same dtype, got torch.uint8 and torch.float32"),
            (torch.zeros(1, 4, 4, dtype=torch.uint8), r"as many channels, got 3 and 1"),
            (torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"), r"device, got cpu and meta"),
            (torch.zeros(4, 4, dtype=torch.uint8), r"sample b: image .*shape \(4, 4\)"),
            (np.zeros((3, 4, 4), np.uint8), r"sample b: image must be a \(C, H, W\) tensor"),
        ],
    )
    def test_images(self, image_b, message):
        with pytest.raises(ValueError, match=message):
            self.mix(image_b=image_b)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_boxes_not_finite(self, value):
        boxes = torch.tensor([[0.0, 0, 1, 1], [0, value, 1, 1]])
        with pytest.raises(ValueError, match=rf"sample a: 'boxes'\[1\].*\[0.0, {value}, 1.0, 1.0"):
            self.mix(boxes=boxes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"boxes": torch.zeros(2, 5)}, r"'boxes' must be .*\(2, 5\)"),
            ({"boxes": None}, "target has no 'boxes', only .*labels"),
            ({"box_weights": torch.ones(3)}, r"'box_weights' must be .* 2 entries.*\(3,\)"),
            ({"box_weights": torch.ones(2, 1)}, r"'box_weights' must have one axis.*\(2, 1\)"),
            ({"box_weights": torch.tensor([1, -0.5])}, r"'box_weights'\[1\].*-0.5"),
            ({"box_weights": torch.tensor([math.nan, 1])}, r"'box_weights'\[0\].*nan"),
            ({"box_weights": torch.tensor([1, math.inf])}, r"'box_weights'\[1\].*inf"),
            ({"labels": torch.ones(1)}, r"'labels' must be .* 2 entries.*\(1,\)"),
            ({"labels": torch.tensor(1)}, r"'labels' must be .* 2 entries.*\(\)"),
            ({"difficult": np.zeros(2)}, r"'difficult' must be a tensor or list.*ndarray"),
            ({"masks": torch.zeros(2, 4, 5)}, r"'masks' must be .*\(2, 4, 4\).*\(2, 4, 5\)"),
            ({"masks": [1, 2]}, r"'masks' must be .*\(2, 4, 4\).*list of length 2"),
        ],
    )
    def test_targets(self, changes, message):
        with pytest.raises(ValueError, match=r"sample a: " + message):
            self.mix(**changes)

    def test_target_that_is_no_dict(self):
        with pytest.raises(ValueError, match=r"sample b: target must be a dict, got None"):
            mixup(make_image(4, 4), make_target(1), make_image(4, 4), None, 0.5)


@st.composite
def trees(draw, depth):
    """A nested mix: a leaf (size, count, seed) or (left, right, λ)."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        side = st.integers(1, 24)
        return draw(side), draw(side), draw(st.integers(0, 4)), draw(st.integers(0, 99))
    ratio = st.one_of(st.sampled_from(LAMS), st.floats(0, 1))
    return draw(trees(depth - 1)), draw(trees(depth - 1)), draw(ratio)


def evaluate(tree, dtype):
    """Return the mixed sample, and [(weight, box, label)] and the steps of mixing expected."""
    if len(tree) == 4:
        height, width, count, seed = tree
        target = make_target(count, seed)
        rows = zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        return (make_image(height, width, dtype, seed), target), [(1.0, *row) for row in rows]
    left, right, lam = tree
    (sample_a, rows_a), (sample_b, rows_b) = evaluate(left, dtype), evaluate(right, dtype)
    mixed = mixup(*sample_a, *sample_b, lam)
    assert_pixels(mixed[0], sample_a[0], sample_b[0], lam)
    rows = [(lam * w, *row) for w, *row in rows_a] + [((1 - lam) * w, *row) for w, *row in rows_b]
    return mixed, rows


@settings(max_examples=150, deadline=None)
@given(trees(depth=3), st.sampled_from(list(TOLERANCE)))
def test_any_nesting_of_any_samples(tree, dtype):
    (_, target), rows = evaluate(tree, dtype)
    # float32 ends where float64 does not: leave out what may be lost, judge the rest.
    sure = [row for row in rows if row[0] > 1e-30]
    weights = target.get("box_weights", torch.ones(len(target["boxes"])))
    assert ((weights > 0) & (weights <= 1)).all()
    found = [
        row
        for row in zip(
            weights.tolist(), target["boxes"].tolist(), target["labels"].tolist(), strict=True
        )
        if row[0] > 1e-30
    ]
    assert [row[1:] for row in found] == [row[1:] for row in sure]
    assert [row[0] for row in found] == pytest.approx([row[0] for row in sure], rel=1e-5)
    assert len(target["boxes"]) <= sum(row[0] > 0 for row in rows)
