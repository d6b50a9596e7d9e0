"""Any nesting of mixup and CutMix over any samples, against pixels counted one by one.

A tree is drawn: its leaves are samples, its nodes a ratio or a rectangle. Beside it, plain
Python keeps what each object ought to be.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing_oracle import TOLERANCE, assert_pixels, assert_same_target, visible_pixels
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format

from detmix import DetectionCutMix, DetectionMixUp, RandomChoice, cutmix, mixup
from detmix.mixing import Cut

FORMATS = {name: tv_tensors.BoundingBoxFormat[name] for name in ("XYXY", "XYWH", "CXCYWH")}


@dataclass
class Row:
    """An object as it ought to be."""

    weight: float
    box: list[int]
    label: int
    name: str
    area: float
    mask: np.ndarray | None


@dataclass
class Leaf:
    """A sample still to be made."""

    size: tuple[int, int]
    boxes: list[list[int]]
    kind: str | None
    """The boxes' format; None for plain tensors."""
    typed_image: bool
    mask_dtype: torch.dtype
    area_as_list: bool
    weights: list[float] | None
    bare: bool
    """Whether an image without objects comes with no key of theirs."""
    seed: int


@dataclass
class Node:
    """Two mixed samples."""

    left: Any
    right: Any
    how: float | Cut


@st.composite
def leaves(draw):
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    count, low = draw(st.integers(0, 3)), st.integers(0, 9)
    boxes = []
    for _ in range(count):
        x, y = draw(low), draw(low)
        boxes.append([x, y, x + draw(st.integers(1, 9)), y + draw(st.integers(1, 9))])
    weight = st.sampled_from([0.25, 0.5, 1.0])
    weights = st.one_of(st.none(), st.lists(weight, min_size=count, max_size=count))
    return Leaf(
        size=(height, width),
        boxes=boxes,
        kind=draw(st.sampled_from([None, *FORMATS])),
        typed_image=draw(st.booleans()),
        mask_dtype=draw(st.sampled_from([torch.uint8, torch.bool])),
        area_as_list=draw(st.booleans()),
        weights=draw(weights),
        bare=count == 0 and draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def trees(draw, depth=3):
    if depth == 0 or (depth < 3 and draw(st.integers(0, 2)) == 0):
        return draw(leaves())
    # with a nesting of 3, none comes to less than float32 holds
    extremes = st.sampled_from([0.0, 1.0, 0.5, 1e-12, 1e-3, 1 - 1e-3])
    ratio, place = st.one_of(extremes, st.floats(0.01, 0.99)), st.floats(0, 1, exclude_max=True)
    how = st.one_of(ratio, st.builds(Cut, ratio, place, place))
    return Node(draw(trees(depth - 1)), draw(trees(depth - 1)), draw(how))


def make_leaf(leaf, dtype, masks):
    """Return (image, target) and the rows expected."""
    rng = np.random.default_rng(leaf.seed)
    count = len(leaf.boxes)
    image = torch.from_numpy(rng.integers(0, 256, (3, *leaf.size), dtype=np.uint8)).to(dtype)
    if dtype.is_floating_point:
        image /= 255
    names = [f"{leaf.seed}-{number}" for number in range(count)]
    areas = rng.integers(1, 50, count).astype(np.float32)
    shapes = rng.random((count, *leaf.size)) > 0.4
    rows = [
        Row(weight, box, leaf.seed, name, float(area), shape if masks else None)
        for weight, box, name, area, shape in zip(
            leaf.weights or [1.0] * count, leaf.boxes, names, areas, shapes, strict=True
        )
    ]
    target = {"image_id": leaf.seed}
    if not leaf.bare:
        boxes = torch.tensor(leaf.boxes, dtype=torch.float32).reshape(-1, 4)
        target["boxes"] = typed_boxes(boxes, leaf)
        target["labels"] = torch.full((count,), leaf.seed)
        target["names"] = names
        target["area"] = areas.tolist() if leaf.area_as_list else torch.from_numpy(areas)
        if leaf.weights is not None:
            target["box_weights"] = torch.tensor(leaf.weights)
        if masks:
            target["masks"] = torch.from_numpy(shapes).to(leaf.mask_dtype)
            target["masks"] = (
                target["masks"] if leaf.kind is None else tv_tensors.Mask(target["masks"])
            )
    return (tv_tensors.Image(image) if leaf.typed_image else image, target), rows


def typed_boxes(boxes, leaf):
    if leaf.kind is None:
        return boxes
    typed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=leaf.size)
    return convert_bounding_box_format(typed, new_format=FORMATS[leaf.kind])


def plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def xyxy(boxes):
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = convert_bounding_box_format(boxes, new_format=FORMATS["XYXY"])
    return plain(boxes).tolist()


def padded(mask, size):
    canvas = np.zeros(size, bool)
    canvas[: mask.shape[0], : mask.shape[1]] = mask[: size[0], : size[1]]
    return canvas


def blended_rows(sides, lam, size):
    """Every object of both, its weight times its image's ratio; a mask padded."""
    rows = []
    for side, ratio in zip(sides, (lam, 1 - lam), strict=True):
        for row in side:
            mask = None if row.mask is None else padded(row.mask, size)
            rows.append(replace(row, weight=row.weight * ratio, mask=mask))
    return [row for row in rows if row.weight]


def cut_rows(sides, rectangle, sizes, min_visibility):
    """What is seen of every object, pixel by pixel."""
    rows, size = [], sizes[0]
    for side, inside, own in zip(sides, (False, True), sizes, strict=True):
        for row in side:
            share, box, mask = visible_pixels(row.box, rectangle, inside, own, row.mask)
            if not box or share <= 0 or share < min_visibility:
                continue
            mask = None if mask is None else padded(mask, size)
            weight, area = row.weight * share, row.area * share
            rows.append(replace(row, weight=weight, area=area, box=box, mask=mask))
    return rows


def pasted(image_a, image_b, rectangle):
    x1, y1, x2, y2 = rectangle
    expected = image_a.clone()
    expected[:, y1:y2, x1:x2] = image_b[:, y1:y2, x1:x2]
    return expected


def evaluate(tree, dtype, masks, min_visibility):
    """Mix a tree; return the sample and the rows expected after checking every node."""
    if isinstance(tree, Leaf):
        return make_leaf(tree, dtype, masks)
    (sample_a, rows_a), (sample_b, rows_b) = (
        evaluate(part, dtype, masks, min_visibility) for part in (tree.left, tree.right)
    )
    before = copy.deepcopy((sample_a, sample_b))
    how, plain_a, plain_b = tree.how, plain(sample_a[0]), plain(sample_b[0])
    if isinstance(how, Cut):
        region = np.minimum(plain_a.shape[1:], plain_b.shape[1:]).tolist()
        rectangle, size = how.rectangle(tuple(region)), tuple(plain_a.shape[1:])
        settings = {"min_visibility": min_visibility}
        image, target = cutmix(*sample_a, *sample_b, rectangle, **settings)
        assert torch.equal(plain(image), pasted(plain_a, plain_b, rectangle))
        sizes = size, tuple(plain_b.shape[1:])
        rows = cut_rows((rows_a, rows_b), rectangle, sizes, min_visibility)
    else:
        image, target = mixup(*sample_a, *sample_b, how)
        assert_pixels(plain(image), plain_a, plain_b, how)
        size = tuple(image.shape[1:])
        rows = blended_rows((rows_a, rows_b), how, size)
    for (old_image, old_target), (kept, kept_target) in zip(
        (sample_a, sample_b), before, strict=True
    ):
        assert torch.equal(plain(old_image), plain(kept))
        assert_same_target(old_target, kept_target)
    assert type(image) is type(sample_a[0])
    check_types(target, sample_a[1], sample_b[1], size)
    check_rows(target, rows)
    return (image, target), rows


def check_types(target, target_a, target_b, size):
    """The type is A's; B's where A has no boxes and no type."""
    boxes = [part.get("boxes", torch.zeros(0, 4)) for part in (target_a, target_b)]
    has_say = len(boxes[0]) > 0 or isinstance(boxes[0], tv_tensors.TVTensor)
    like, found = boxes[0 if has_say else 1], target["boxes"]
    assert type(found) is type(like)
    assert found.dtype == torch.float32
    if isinstance(like, tv_tensors.BoundingBoxes):
        assert (found.format, found.canvas_size) == (like.format, size)


def check_rows(target, rows):
    """Exactly these objects, in this order, whatever key is asked."""
    assert xyxy(target["boxes"]) == [list(map(float, row.box)) for row in rows]
    assert target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [row.label for row in rows]
    weights = target["box_weights"]
    assert weights.dtype == torch.float32
    assert ((weights > 0) & (weights <= 1)).all()
    assert weights.tolist() == pytest.approx([row.weight for row in rows], rel=1e-5)
    if not rows and "names" not in target:  # neither image had a word of objects
        return
    assert target["names"] == [row.name for row in rows]
    assert list(map(float, target["area"])) == pytest.approx([row.area for row in rows], rel=1e-5)
    if "masks" in target:
        assert target["masks"].dtype in (torch.uint8, torch.bool)
        masks = plain(target["masks"]).bool()
        assert len(masks) == len(rows)
        for mask, row in zip(masks, rows, strict=True):
            assert np.array_equal(mask.numpy(), row.mask)
    else:
        assert all(row.mask is None for row in rows)


@settings(max_examples=100, deadline=None)
@given(
    trees(),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
)
def test_any_nesting(tree, dtype, masks, min_visibility):
    evaluate(tree, dtype, masks, min_visibility)


@settings(max_examples=50, deadline=None)
@given(st.lists(leaves(), max_size=5), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_a_batch_of_anything(samples, p, seed, masks):
    mixers = [
        DetectionMixUp(p=p),
        DetectionCutMix(p=p),
        RandomChoice([DetectionMixUp(p=p), DetectionCutMix(p=1 - p)]),
    ]
    for mixer in mixers:
        batch = [make_leaf(leaf, torch.uint8, masks)[0] for leaf in samples]
        before = copy.deepcopy(batch)
        params = mixer.make_params(len(batch), torch.Generator().manual_seed(seed))
        images, targets = mixer(batch, generator=torch.Generator().manual_seed(seed))
        assert len(images) == len(targets) == len(batch)
        for (image, target), (old, old_target), mixed, mixed_target, param in zip(
            batch, before, images, targets, params, strict=True
        ):
            assert_same_target(target, old_target)
            assert torch.equal(plain(image), plain(old))
            assert type(mixed) is type(image)
            mixup(mixed, mixed_target, mixed, mixed_target, 0.5)  # it can be mixed again
            count = len(mixed_target["boxes"])
            keys = {"labels", "box_weights", "names", "area", "masks"} & mixed_target.keys()
            assert all(len(mixed_target[key]) == count for key in keys)
            assert mixed_target["image_id"] == target["image_id"]
            if param is None:
                assert mixed is image
                assert all(mixed_target[key] is target[key] for key in target)
