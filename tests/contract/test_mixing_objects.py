"""What mixing leaves of objects: of CutMix by hand, of any nesting counted pixel by pixel."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing_oracle import (
    FORMATS,
    TOLERANCE,
    assert_pixels,
    assert_same_target,
    make_boxes,
    make_image,
)
from torch import tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import (
    BoundingBoxes,
    BoundingBoxFormat,
    Image,
    Mask,
    TVTensor,
    set_return_type,
    wrap,
)

from detmix import cutmix, mixup
from detmix.mixing import Cut

SIZE = (20, 30)  # height, width
BOX, BEYOND = (10, 5, 20, 15), (5, 10, 25, 31)


def target_of(*boxes, **extra):
    boxes = tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "image_id": 1, **extra}


def cut_only(target, rectangle, side):
    """Mix with an image without objects: what is left of the objects of one side."""
    images = make_image(*SIZE, seed=1), make_image(*SIZE, seed=2)
    targets = (target, {}) if side == "a" else ({}, target)
    return cutmix(images[0], targets[0], images[1], targets[1], rectangle)[1]


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


# A box in one of the images, the rectangle, what is left of the box, and its share.
@pytest.mark.parametrize(
    ("given", "side", "rectangle", "box", "share"),
    [
        (BOX, "a", (0, 0, 14, 20), (14, 5, 20, 15), 0.6),  # left side, edge to edge and beyond
        (BOX, "a", (13, 0, 30, 20), (10, 5, 13, 15), 0.3),  # right side
        (BOX, "a", (0, 0, 30, 9), (10, 9, 20, 15), 0.6),  # top side
        (BOX, "a", (10, 13, 20, 20), (10, 5, 20, 13), 0.8),  # bottom side
        (BOX, "a", (8, 0, 14, 14), BOX, 1 - 0.4 * 0.9),  # a corner: an L is left
        (BOX, "a", (12, 7, 16, 11), BOX, 0.84),  # a hole
        (BOX, "a", (12, 0, 16, 20), BOX, 0.6),  # a band: two parts are left
        (BOX, "b", (12, 7, 16, 11), (12, 7, 16, 11), 0.16),
        # what is beyond the image is no part of an object
        (BEYOND, "a", (15, 0, 30, 20), (5, 10, 15, 20), 0.5),
        (BEYOND, "a", (0, 0, 30, 5), BEYOND, 1.0),  # not cut, it stays as it is
        (BEYOND, "b", (0, 0, 30, 20), (5, 10, 25, 20), 1.0),  # but not when pasted
    ],
)
def test_box_and_weight(given, side, rectangle, box, share):
    mixed = cut_only(target_of(given), rectangle, side)
    assert mixed["boxes"].tolist() == [list(map(float, box))]
    assert mixed["box_weights"].tolist() == pytest.approx([share], rel=1e-6)


@pytest.mark.parametrize(
    ("side", "box", "share", "seen"),
    [("a", [14, 5, 20, 15], 0.6, [0, 1, 0, 0]), ("b", [10, 5, 14, 15], 0.4, [1, 0, 1, 0])],
)
def test_dtypes_areas_and_keypoints(side, box, share, seen):
    def left_of(**fields):
        return cut_only({**target_of(BOX), **fields}, (0, 0, 14, 20), side)

    for dtype in (torch.float64, torch.float16, torch.int64):
        mixed = left_of(boxes=tensor([BOX], dtype=dtype))
        assert mixed["boxes"].tolist() == [box]
        assert (mixed["boxes"].dtype, mixed["box_weights"].dtype) == (dtype, torch.float32)
    for area in (tensor([80.0], dtype=torch.float64), tensor([80]), [80]):
        left = left_of(area=area)["area"]
        assert type(left) is type(area)
        assert float(left[0]) == pytest.approx(80 * share, rel=1e-6)
        assert isinstance(area, list) or area.dtype in (left.dtype, torch.int64)
    # Pixel 13 is the last in the rectangle, from 12.5 to 13.5, where the next begins.
    points = tensor([[[11.0, 6, 2], [13.5, 6, 1], [13.4, 14, 2], [0, 0, 0]]])
    assert torch.equal(left_of(keypoints=points)["keypoints"], points * tensor(seen)[:, None])
    without = points[..., :2]  # no visibility: they stay
    assert torch.equal(left_of(keypoints=without)["keypoints"], without)


@pytest.mark.parametrize(
    ("kind", "given", "left", "cut"),
    [  # (4.5, 4.5, 9.5, 9.5) by its centre; x from `left` on is left, and y is what it was
        ("CXCYWH", [7, 7, 5, 5], 7, [8, 7, 2, 5]),  # 8.25 and 2.5 to the nearest
        ("CXCYWH", [7, 7, 5, 5], 8, [9, 7, 2, 5]),  # 8.75 and 1.5
        ("CXCYWH", [7, 7, 4, 5], 7, [8, 7, 2, 5]),
        ("XYWH", [4, 4, 5, 5], 7, [7, 4, 2, 5]),
        ("XYXY", [4, 4, 9, 9], 7, [7, 4, 9, 9]),
    ],
)
def test_boxes_of_whole_numbers(kind, given, left, cut):
    def typed(rows, kind=kind):
        boxes = BoundingBoxes(tensor(rows), format=kind, canvas_size=SIZE)
        return {"boxes": boxes, "labels": torch.ones(len(rows), dtype=torch.int64)}

    for dtype in (torch.int64, torch.int32):
        target = typed([given, [18, 9, 19, 10]])
        target["boxes"] = wrap(target["boxes"].to(dtype), like=target["boxes"])
        mixed = cut_only(target, (0, 0, left, 20), "a")["boxes"]
        assert plain(mixed).tolist() == [cut, [18, 9, 19, 10]]  # this one is not cut
        assert (mixed.dtype, mixed.format) == (dtype, BoundingBoxFormat[kind])
    images = make_image(*SIZE, seed=1), make_image(*SIZE, seed=2)
    for other in FORMATS:  # joined, B's are what they are in decimals
        mixed = mixup(images[0], typed([given], kind), images[1], typed([[7, 7, 5, 5]], other), 0.5)
        boxes = mixed[1]["boxes"]
        assert (boxes.format, plain(boxes)[0].tolist()) == (BoundingBoxFormat[kind], given)
        exact = BoundingBoxes(tensor([[7.0, 7, 5, 5]]), format=other, canvas_size=SIZE)
        exact = convert_bounding_box_format(exact, new_format=BoundingBoxFormat[kind])
        assert plain(boxes)[1].tolist() == plain(exact)[0].tolist()
        assert boxes.is_floating_point() == ((kind == "CXCYWH") != (other == "CXCYWH"))


DEPTH = 3
PLACE, SIDE, EDGE = st.floats(0, 1, exclude_max=True), st.integers(1, 14), st.integers(0, 9)
CORNER_AND_SIZE = st.tuples(EDGE, EDGE, st.integers(0, 9), st.integers(0, 9))
# with a nesting of 3, none comes to less than float32 holds, but with 1e-60 all do
EXTREMES = st.sampled_from([0.0, 1.0, 0.5, 1e-60, 1e-12, 1e-3, 1 - 1e-3])
RATIO = st.one_of(EXTREMES, st.floats(0.01, 0.99))
HOW = st.one_of(RATIO, st.builds(Cut, RATIO, PLACE, PLACE))


KEYS = {"boxes", "labels", "names", "area", "box_weights", "masks"}


@dataclass
class Row:
    """An object as it ought to be."""

    box: list[int]
    label: int
    name: str
    area: float
    mask: np.ndarray
    weight: float


def draw_sample(draw, dtype, with_masks):
    """Draw (image, target) and return the rows expected too."""
    size, kind = (draw(SIDE), draw(SIDE)), draw(st.sampled_from([None, *FORMATS]))
    boxes = [[x, y, x + w, y + h] for x, y, w, h in draw(st.lists(CORNER_AND_SIZE, max_size=3))]
    count, seed = len(boxes), draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count, max_size=count))
    areas = rng.integers(1, 50, count).astype(np.float32)
    masks = rng.random((count, *size)) > 0.4
    typed_masks = torch.from_numpy(masks).to(draw(st.sampled_from([torch.uint8, torch.bool])))
    target = {
        "boxes": make_boxes(boxes, size, kind),
        "labels": torch.full((count,), seed),
        "names": [f"{seed}-{number}" for number in range(count)],
        "area": areas.tolist() if draw(st.booleans()) else torch.from_numpy(areas),
        "box_weights": torch.tensor(weights),
        "masks": typed_masks if kind is None else Mask(typed_masks),
    }
    left_out = {"box_weights"} if set(weights) <= {1.0} and draw(st.booleans()) else set()
    if not count:  # such images often lack some of the keys of others, or all; or their types
        target["labels"] = target["labels"].float() if draw(st.booleans()) else target["labels"]
        left_out = draw(st.sampled_from([left_out, target.keys() - {"boxes", "labels"}, {*target}]))
    if not with_masks:
        left_out = {*left_out, "masks"}
    target = {key: target[key] for key in target.keys() - left_out}
    target |= {"image_id": seed, "size": tensor(size)}  # as long as two objects are many
    image = make_image(*size, dtype, seed)
    rows = [
        Row(box, seed, f"{seed}-{number}", float(areas[number]), masks[number], weights[number])
        for number, box in enumerate(boxes)
    ]
    return (Image(image) if draw(st.booleans()) else image, target), rows


def plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def padded(mask, size):
    """Return a mask on a canvas of this size, perhaps a smaller one."""
    canvas = np.zeros(size, bool)
    part = mask[: size[0], : size[1]]
    canvas[: part.shape[0], : part.shape[1]] = part
    return canvas


def within(x1, y1, x2, y2):
    """Return a grid, larger than any image or box here, that is true in the rectangle."""
    y, x = np.mgrid[:24, :24]
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)


def box_around(pixels):
    rows, columns = np.nonzero(pixels)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def seen_part(row, rectangle, inside, size, with_masks, min_visibility):
    """Return the row that is left of an object in an image of this size, or None."""
    of_box = within(*row.box) & within(0, 0, size[1], size[0])
    seen = within(*rectangle) == inside
    if not (of_box & seen).any():
        return None
    mask = row.mask & seen[: size[0], : size[1]]
    whole, left = (row.mask, mask) if with_masks and row.mask.any() else (of_box, of_box & seen)
    share, around = left.sum() / whole.sum(), box_around(of_box & seen)
    if share < min_visibility:
        return None
    # left as it is where nothing was cut; but what is pasted is clipped to its image
    box = row.box if around == box_around(of_box) and not inside else around
    return replace(row, box=box, mask=mask, weight=row.weight * share, area=row.area * share)


def draw_mixed(draw, depth, dtype, with_masks, min_visibility):
    """Draw samples and mix them; return the result and its rows after checking every step."""
    if depth == 0 or (depth < DEPTH and draw(st.integers(0, 2)) == 0):
        return draw_sample(draw, dtype, with_masks)
    (sample_a, rows_a), (sample_b, rows_b) = (
        draw_mixed(draw, depth - 1, dtype, with_masks, min_visibility) for _ in range(2)
    )
    before, how = copy.deepcopy((sample_a, sample_b)), draw(HOW)
    plain_a, plain_b = plain(sample_a[0]), plain(sample_b[0])
    if isinstance(how, Cut):
        sizes = tuple(plain_a.shape[1:]), tuple(plain_b.shape[1:])
        x1, y1, x2, y2 = rectangle = how.rectangle(tuple(map(min, *sizes)))
        image, target = cutmix(
            *sample_a, *sample_b, rectangle, min_visibility=min_visibility, keys=["names"]
        )
        expected = plain_a.clone()
        expected[:, y1:y2, x1:x2] = plain_b[:, y1:y2, x1:x2]
        assert torch.equal(plain(image), expected)
        how = with_masks, min_visibility
        rows = [seen_part(row, rectangle, False, sizes[0], *how) for row in rows_a]
        rows += [seen_part(row, rectangle, True, sizes[1], *how) for row in rows_b]
    else:
        image, target = mixup(*sample_a, *sample_b, how, keys=["names"])
        assert_pixels(plain(image), plain_a, plain_b, how)
        rows = [replace(row, weight=row.weight * how) for row in rows_a]
        rows += [replace(row, weight=row.weight * (1 - how)) for row in rows_b]
    size = tuple(image.shape[1:])
    rows = [
        replace(row, mask=padded(row.mask, size)) for row in rows if row and np.float32(row.weight)
    ]
    assert type(image) is type(sample_a[0])
    for key in ("image_id", "size"):
        assert target[key] is sample_a[1][key]
    check_types(target, sample_a[1], sample_b[1], size)
    check_rows(target, rows)
    mixed = copy.deepcopy((image, target))
    for value in (image, *(target[key] for key in target.keys() & KEYS)):
        value.clear() if isinstance(value, list) else value.zero_()
    for (old, old_target), (kept, kept_target) in zip((sample_a, sample_b), before, strict=True):
        assert torch.equal(plain(old), plain(kept))
        assert_same_target(old_target, kept_target)
    return mixed, rows


def check_types(target, target_a, target_b, size):
    """The type is A's; B's where A has no objects and no type."""
    for key in target.keys() & {"boxes", "masks", "area"}:
        held = [part[key] for part in (target_a, target_b) if key in part]
        telling = [value for value in held if len(value) or isinstance(value, TVTensor)]
        found, like = target[key], (telling or held or [target[key]])[0]
        assert type(found) is type(like)
        if isinstance(like, BoundingBoxes):
            assert (found.format, found.canvas_size) == (like.format, size)


def check_rows(target, rows):
    """Exactly these objects, in this order, whatever key is asked."""
    boxes, weights = target["boxes"], target["box_weights"]
    assert boxes.dtype == weights.dtype == torch.float32
    if isinstance(boxes, BoundingBoxes):
        boxes = convert_bounding_box_format(boxes, new_format=BoundingBoxFormat.XYXY)
    assert plain(boxes).tolist() == [row.box for row in rows]
    assert target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [row.label for row in rows]
    assert ((weights > 0) & (weights <= 1)).all()
    assert weights.tolist() == pytest.approx([row.weight for row in rows], rel=1e-5)
    if not rows and "names" not in target:  # neither image had a word of objects
        return
    assert target["names"] == [row.name for row in rows]
    assert list(map(float, target["area"])) == pytest.approx([row.area for row in rows], rel=1e-5)
    if "masks" in target:
        assert target["masks"].dtype in (torch.uint8, torch.bool)
        assert plain(target["masks"]).bool().tolist() == [row.mask.tolist() for row in rows]


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["Tensor", "TVTensor"]),
)
def test_any_nesting(data, dtype, with_masks, min_visibility, return_type):
    """Whatever torchvision's own operations are told to return. Inputs and results stay apart."""
    with set_return_type(return_type):
        draw_mixed(data.draw, DEPTH, dtype, with_masks, min_visibility)
