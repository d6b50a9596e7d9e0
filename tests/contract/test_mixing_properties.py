"""Any nesting of mixup and CutMix over any samples, against objects counted pixel by pixel."""

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
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask, TVTensor

from detmix import cutmix, mixup
from detmix.mixing import Cut

DEPTH = 3
PLACE, SIDE, EDGE = st.floats(0, 1, exclude_max=True), st.integers(1, 14), st.integers(0, 9)
CORNER_AND_SIZE = st.tuples(EDGE, EDGE, st.integers(1, 9), st.integers(1, 9))
# with a nesting of 3, none comes to less than float32 holds
EXTREMES = st.sampled_from([0.0, 1.0, 0.5, 1e-12, 1e-3, 1 - 1e-3])
RATIO = st.one_of(EXTREMES, st.floats(0.01, 0.99))
HOW = st.one_of(RATIO, st.builds(Cut, RATIO, PLACE, PLACE))


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
    weights = draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=count, max_size=count))
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
    if not count:  # such images often lack some of the keys of others, or all
        left_out = draw(st.sampled_from([left_out, target.keys() - {"boxes", "labels"}, {*target}]))
    if not with_masks:
        left_out = {*left_out, "masks"}
    target = {"image_id": seed, **{key: target[key] for key in target.keys() - left_out}}
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


def seen_part(row, rectangle, inside, size, with_masks):
    """Return the share of an object that is seen, and the row that is left of it."""
    of_box = within(*row.box) & within(0, 0, size[1], size[0])
    seen = within(*rectangle) == inside
    if not (of_box & seen).any():
        return 0, row
    mask = row.mask & seen[: size[0], : size[1]]
    whole, left = (row.mask, mask) if with_masks and row.mask.any() else (of_box, of_box & seen)
    share, around = left.sum() / whole.sum(), box_around(of_box & seen)
    box = row.box if around == box_around(of_box) else around
    return share, replace(row, box=box, mask=mask, weight=row.weight * share, area=row.area * share)


def blended_rows(sides, lam):
    """Every object of both, its weight times its image's ratio."""
    rows = [
        replace(row, weight=row.weight * ratio)
        for side, ratio in zip(sides, (lam, 1 - lam), strict=True)
        for row in side
    ]
    return [row for row in rows if row.weight]


def cut_rows(sides, rectangle, sizes, min_visibility, with_masks):
    """What is seen of every object."""
    parts = [
        seen_part(row, rectangle, inside, size, with_masks)
        for side, inside, size in zip(sides, (False, True), sizes, strict=True)
        for row in side
    ]
    return [row for share, row in parts if share > 0 and share >= min_visibility]


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
        image, target = cutmix(*sample_a, *sample_b, rectangle, min_visibility=min_visibility)
        expected = plain_a.clone()
        expected[:, y1:y2, x1:x2] = plain_b[:, y1:y2, x1:x2]
        assert torch.equal(plain(image), expected)
        rows = cut_rows((rows_a, rows_b), rectangle, sizes, min_visibility, with_masks)
    else:
        image, target = mixup(*sample_a, *sample_b, how)
        assert_pixels(plain(image), plain_a, plain_b, how)
        rows = blended_rows((rows_a, rows_b), how)
    size = tuple(image.shape[1:])
    rows = [replace(row, mask=padded(row.mask, size)) for row in rows]
    for (old, old_target), (kept, kept_target) in zip((sample_a, sample_b), before, strict=True):
        assert torch.equal(plain(old), plain(kept))
        assert_same_target(old_target, kept_target)
    assert type(image) is type(sample_a[0])
    assert target["image_id"] == sample_a[1]["image_id"]
    check_types(target, sample_a[1], sample_b[1], size)
    check_rows(target, rows)
    return (image, target), rows


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
    st.sampled_from([0.0, 0.1, 0.3, 0.5]),
)
def test_any_nesting(data, dtype, with_masks, min_visibility):
    draw_mixed(data.draw, DEPTH, dtype, with_masks, min_visibility)
