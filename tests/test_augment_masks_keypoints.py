"""Masks, keypoints, areas and tv_tensors through the albumentations adapter."""

from __future__ import annotations

import itertools
import os

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from detmix.data import AlbumentationsTransform, detection_transforms
from detmix.data.augment_fields import packed_fields

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as alb

HEIGHT, WIDTH = 40, 60
FORMATS = [BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH]
needs_keypoints = pytest.mark.skipif(
    not hasattr(tv_tensors, "KeyPoints"), reason="torchvision has KeyPoints from 0.23 on"
)


def make_image(height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def make_target(num=4, height=HEIGHT, width=WIDTH, seed=0):
    """Return ellipses with their boxes, and three keypoints on pixels of each."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num, height, width), np.uint8)
    boxes, keypoints = np.zeros((num, 4)), np.zeros((num, 3, 3))
    for i in range(num):
        half = rng.integers(2, 7, 2)
        centre = [int(rng.integers(h, side - h)) for h, side in zip(half, (width, height))]  # noqa: B905
        cv2.ellipse(masks[i], centre, half.tolist(), 0, 0, 360, 1, -1)
        y, x = masks[i].nonzero()
        boxes[i] = x.min(), y.min(), x.max() + 1, y.max() + 1
        picked = rng.choice(len(x), 3, replace=False)
        keypoints[i] = np.column_stack([x[picked], y[picked], [2, 1, 2]])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.arange(1, num + 1),
        "masks": torch.from_numpy(masks),
        "keypoints": torch.tensor(keypoints, dtype=torch.float32),
        "area": torch.from_numpy(masks).sum((1, 2)).float(),
        "image_id": 7,
    }


def make_pixels(positions):
    """Return one object for each position (x, y): a box, a mask and a keypoint on that pixel."""
    x, y = torch.tensor(positions).T
    masks = torch.zeros(len(x), HEIGHT, WIDTH, dtype=torch.bool)
    masks[torch.arange(len(x)), y, x] = True
    return {
        "boxes": torch.stack([x, y, x + 1, y + 1], dim=1).float(),
        "labels": torch.arange(1, len(x) + 1),
        "masks": masks,
        "keypoints": torch.stack([x, y, torch.full_like(x, 2)], dim=1)[:, None].float(),
    }


def as_tv(target, box_format=BoundingBoxFormat.XYXY):
    """Return the target with tv_tensors, keypoints without a visibility."""
    size = tuple(target["masks"].shape[1:])
    boxes = F.convert_bounding_box_format(target["boxes"], BoundingBoxFormat.XYXY, box_format)
    typed = {
        **target,
        "boxes": BoundingBoxes(boxes, format=box_format, canvas_size=size),
        "masks": Mask(target["masks"]),
    }
    del typed["keypoints"]
    if hasattr(tv_tensors, "KeyPoints"):
        points = target["keypoints"][..., :2]
        typed["keypoints"] = tv_tensors.KeyPoints(points, canvas_size=size)
    return typed


def check_equal_tv(found, expected):
    """Compare with what torchvision's own functional returns, types and all."""
    assert type(found) is type(expected)
    torch.testing.assert_close(
        found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=0, atol=1e-4
    )
    for name in ("canvas_size", "format"):
        if hasattr(expected, name):
            assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("box_format", FORMATS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (alb.HorizontalFlip(p=1), F.horizontal_flip),
        (alb.VerticalFlip(p=1), F.vertical_flip),
        (alb.Crop(5, 4, 55, 39, p=1), lambda value: F.crop(value, 4, 5, 35, 50)),
        (alb.Resize(20, 30, p=1), lambda value: F.resize(value, [20, 30])),
    ],
    ids=["hflip", "vflip", "crop", "resize"],
)
def test_tv_tensors_equal_torchvision(ours, theirs, box_format):
    transform = AlbumentationsTransform([ours], min_visibility=0, min_area=0)
    target = as_tv(make_target(), box_format)
    image, result = transform(Image(make_image()), target)
    assert isinstance(image, Image)
    if not isinstance(ours, alb.Resize):  # there the interpolation differs
        assert torch.equal(image, theirs(make_image()))
    boxes = theirs(target["boxes"])
    kept = (result["labels"] - 1).tolist()
    assert kept == list(range(4))
    check_equal_tv(result["boxes"], F.clamp_bounding_boxes(boxes))
    check_equal_tv(result["masks"], theirs(target["masks"]))
    if "keypoints" in target:
        # torchvision clamps points to the canvas in a crop; here they stay where they lie
        expected = theirs(target["keypoints"])
        inside = (target["keypoints"] >= torch.tensor([5, 4])) & (
            target["keypoints"] < torch.tensor([55, 39])
        )
        same = inside.all(-1) if isinstance(ours, alb.Crop) else inside.new_ones(inside.shape[:2])
        assert isinstance(result["keypoints"], tv_tensors.KeyPoints)
        assert result["keypoints"].canvas_size == expected.canvas_size == tuple(image.shape[1:])
        torch.testing.assert_close(
            result["keypoints"].as_subclass(torch.Tensor)[same.as_subclass(torch.Tensor)],
            expected.as_subclass(torch.Tensor)[same.as_subclass(torch.Tensor)],
        )


def test_plain_tensors_stay_plain():
    image, result = detection_transforms(train=True)(make_image(), make_target())
    for value in (image, result["boxes"], result["masks"], result["keypoints"], result["area"]):
        assert type(value) is torch.Tensor


def test_tv_boxes_of_integers_lose_nothing():
    """Half of an odd width must survive the conversion."""
    boxes = BoundingBoxes([[10, 10, 5, 7]], format="CXCYWH", canvas_size=(HEIGHT, WIDTH))
    result = AlbumentationsTransform([])(make_image(), {"boxes": boxes})[1]
    torch.testing.assert_close(
        result["boxes"].as_subclass(torch.Tensor), torch.tensor([[10.0, 10, 5, 7]])
    )


@needs_keypoints
def test_points_without_visibility_are_never_zeroed():
    points = torch.tensor([[[2.0, 3], [50, 30]]])
    target = {
        "boxes": torch.tensor([[30.0, 20, 60, 40]]),
        "keypoints": tv_tensors.KeyPoints(points, canvas_size=(HEIGHT, WIDTH)),
    }
    transform = AlbumentationsTransform([alb.Crop(20, 10, 60, 40)], keypoint_flip=[1, 0])
    result = transform(make_image(), target)[1]["keypoints"]
    assert result.canvas_size == (30, 40)
    assert result.tolist() == [[[-18, -7], [30, 20]]]
    flip = AlbumentationsTransform([alb.HorizontalFlip(p=1)], keypoint_flip=[1, 0])
    assert flip(make_image(), target)[1]["keypoints"].tolist() == [[[9, 30], [57, 3]]]


# Each with whether it turns the image over.
MOVES = {
    "hflip": (lambda: alb.HorizontalFlip(p=1), True),
    "vflip": (lambda: alb.VerticalFlip(p=1), True),
    "transpose": (lambda: alb.Transpose(p=1), True),
    "rotate90": (lambda: alb.RandomRotate90(p=1), False),
    "crop": (lambda: alb.RandomCrop(24, 24, pad_if_needed=True, p=1), False),
    "pad": (lambda: alb.PadIfNeeded(70, 80, position="random", p=1), False),
    "safe crop": (lambda: alb.BBoxSafeRandomCrop(p=1), False),
}


@settings(max_examples=80, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(MOVES)), max_size=5),
    positions=st.lists(
        st.tuples(st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1)), min_size=1, max_size=6
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_keypoint_stays_on_its_pixel(names, positions, seed):
    transforms = [MOVES[name][0]() for name in names]
    target = make_pixels(positions)
    result = AlbumentationsTransform(transforms)(make_image(), target, seed=seed)[1]
    assert len(result["keypoints"]) == len(result["masks"]) == len(result["labels"])
    for box, mask, point in zip(
        result["boxes"], result["masks"], result["keypoints"][:, 0], strict=True
    ):
        ((y, x),) = mask.nonzero().tolist()
        assert point.tolist() == [x, y, 2]
        torch.testing.assert_close(
            box, torch.tensor([x, y, x + 1, y + 1]).float(), rtol=0, atol=1e-3
        )


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(["hflip", "vflip", "transpose", "rotate90", "pad"]), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_keypoints_change_sides_in_a_mirrored_image(names, seed):
    transforms = [MOVES[name][0]() for name in names]
    target = make_target()
    straight = AlbumentationsTransform(transforms)(make_image(), target, seed=seed)[1]
    order = [2, 1, 0]
    result = AlbumentationsTransform(transforms, keypoint_flip=order)(
        make_image(), target, seed=seed
    )[1]
    is_mirrored = sum(MOVES[name][1] for name in names) % 2 == 1
    expected = straight["keypoints"][:, order] if is_mirrored else straight["keypoints"]
    assert torch.equal(result["keypoints"], expected)


@pytest.mark.parametrize("is_flipped", [True, False])
@pytest.mark.parametrize(
    "name", ["rotation", "affine", "perspective", "elastic", "elastic crop", "grid", "scale"]
)
def test_mirroring_is_found_through_any_geometry(name, is_flipped):
    """Also where probes leave the image, where a distortion forgets them."""
    transforms = {
        "rotation": [alb.Rotate((-180, 180), p=1)],
        "affine": [alb.Affine(scale=(0.5, 2), shear=(-30, 30), rotate=(-170, 170), p=1)],
        "perspective": [alb.Perspective((0.05, 0.1), p=1)],
        "elastic": [alb.ElasticTransform(alpha=20, sigma=5, p=1)],
        "elastic crop": [
            alb.Crop(18, 12, WIDTH, HEIGHT),
            alb.ElasticTransform(alpha=3, sigma=5, p=1),
        ],
        "grid": [alb.GridDistortion(p=1)],
        "scale": [alb.RandomScale((-0.5, 1), p=1)],
    }[name]
    if is_flipped:
        transforms = [alb.VerticalFlip(p=1), *transforms]
    target = make_target(8, seed=3)
    swapped = AlbumentationsTransform(transforms, min_visibility=0, keypoint_flip=[1, 0, 2])
    straight = AlbumentationsTransform(transforms, min_visibility=0)
    for seed in range(10):
        result = swapped(make_image(), target, seed=seed)[1]["keypoints"]
        expected = straight(make_image(), target, seed=seed)[1]["keypoints"]
        assert expected[..., 2].any()
        order = [1, 0, 2] if is_flipped else [0, 1, 2]
        assert torch.equal(result, expected[:, order])


@pytest.mark.parametrize("name", ["hflip", "vflip", "transpose"])
def test_mirrored_twice_is_the_identity(name):
    transform = AlbumentationsTransform([MOVES[name][0]()], keypoint_flip=[1, 0, 2])
    image, target = make_image(), make_target()
    once = transform(image, target)
    assert not torch.equal(once[1]["keypoints"], target["keypoints"])
    twice = transform(*once)
    assert torch.equal(twice[0], image)
    for key in ("masks", "keypoints", "labels", "area"):
        assert torch.equal(twice[1][key], target[key])
    torch.testing.assert_close(twice[1]["boxes"], target["boxes"], rtol=0, atol=1e-4)


def test_keypoints_outside_and_unlabelled_become_zero():
    keypoints = torch.tensor(
        [[[20.0, 10, 2], [19, 10, 2], [59, 29, 1], [59, 30, 1], [30, 20, 0], [60, 15, 2]]]
    )
    target = {"boxes": torch.tensor([[0.0, 0, 60, 40]]), "keypoints": keypoints}
    result = AlbumentationsTransform([alb.Crop(20, 10, 60, 30)])(make_image(), target)[1]
    expected = [[0, 0, 2], [0, 0, 0], [39, 19, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert result["keypoints"].tolist() == [expected]
    assert result["keypoints"].dtype == torch.float32


def test_the_last_column_stays_in_sight_when_shrunk_and_mirrored():
    """Its place is then between the last two pixel centres, and mirrored left of the first."""
    target = {
        "boxes": torch.tensor([[0.0, 0, 60, 40]]),
        "keypoints": torch.tensor([[[59.0, 39, 2]]]),
    }
    transform = detection_transforms(20, train=True, flip=1, photometric=0, crop=0)
    result = transform(make_image(), target)[1]["keypoints"][0, 0]
    torch.testing.assert_close(result, torch.tensor([0, 39 * 13 / 40, 2]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_masks_keep_dtype_and_values(dtype):
    target = make_target()
    target["masks"] = (target["masks"] * (255 if dtype == torch.uint8 else 1)).to(dtype)
    transform = detection_transforms(30, train=True, flip=1, crop=1)
    for seed in range(5):
        image, result = transform(make_image(), target, seed=seed)
        assert result["masks"].dtype == dtype
        assert result["masks"].shape == (len(result["boxes"]), *image.shape[1:])
        assert set(result["masks"].unique().tolist()) == {0, 255 if dtype == torch.uint8 else 1}


def test_targets_without_objects():
    target = make_target(0)
    for typed in (target, as_tv(target)):
        for transforms in ([], [alb.Transpose(p=1)], [alb.Crop(5, 4, 55, 39)]):
            image, result = AlbumentationsTransform(transforms, keypoint_flip=[1, 0, 2])(
                make_image(), typed
            )
            assert type(result["masks"]) is type(typed["masks"])
            assert result["masks"].shape == (0, *image.shape[1:])
            assert result["masks"].dtype == torch.uint8
            assert result["area"].shape == (0,)
            if "keypoints" in typed:
                assert result["keypoints"].shape == typed["keypoints"].shape
    short = {"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0), "masks": None}
    result = AlbumentationsTransform([], keypoint_flip=[1, 0, 2])(make_image(), short)[1]
    assert result["keypoints"].shape == (0,)
    assert result["masks"] is None


def test_all_objects_may_be_lost():
    transform = AlbumentationsTransform([alb.Crop(0, 0, 3, 3)])
    result = transform(make_image(), make_target())[1]
    assert result["masks"].shape == (0, 3, 3)
    assert result["keypoints"].shape == (0, 3, 3)


@pytest.mark.parametrize("size", [47, 30, 17])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 57)])
def test_shrunk_masks_and_keypoints(size, shape):
    """A mask takes the middle of each area, worked out pixel by pixel; keypoints the ratio."""
    target = make_target(6, *shape)
    image, result = detection_transforms(size, train=False)(make_image(*shape), target)
    height, width = image.shape[1:]
    assert max(height, width) == size

    def sample(nudge_y, nudge_x):  # a middle between two pixels may be either of them
        rows = [int((y + 0.5) * shape[0] / height + nudge_y) for y in range(height)]
        columns = [int((x + 0.5) * shape[1] / width + nudge_x) for x in range(width)]
        return target["masks"][:, rows][:, :, columns]

    nudges = itertools.product((-1e-6, 1e-6), repeat=2)
    assert any(torch.equal(result["masks"], sample(*nudge)) for nudge in nudges)
    ratio = torch.tensor([width / shape[1], height / shape[0], 1])
    torch.testing.assert_close(result["keypoints"], target["keypoints"] * ratio)
    torch.testing.assert_close(
        result["boxes"], target["boxes"] * ratio[[0, 1, 0, 1]], rtol=0, atol=1e-4
    )


def test_shrinking_never_enlarges_masks_or_keypoints():
    target = make_target()
    result = detection_transforms(200, train=False)(make_image(), target)[1]
    for key in ("masks", "keypoints", "area"):
        assert torch.equal(result[key], target[key])


def test_objects_whose_mask_is_lost_are_left_out_in_training_only():
    target = make_pixels([(20, 20), (13, 31)])
    target["masks"][0, 12:28, 12:28] = True
    target["boxes"] = torch.tensor([[12.0, 12, 28, 28], [10, 28, 16, 34]])
    target["area"] = torch.tensor([256.0, 1])
    for size in (20, None):
        image, result = detection_transforms(size, train=False)(make_image(), target)
        assert result["labels"].tolist() == [1, 2]
        assert torch.equal(result["area"], result["masks"].sum((1, 2)).float())
    image, result = detection_transforms(20, train=True, crop=0)(make_image(), target)
    assert image.shape == (3, 13, 20)
    assert result["labels"].tolist() == [1]
    assert len(result["boxes"]) == len(result["masks"]) == len(result["keypoints"]) == 1


def test_area_grows_and_shrinks_as_the_box_does():
    target = make_target()
    del target["masks"]
    half = detection_transforms(30, train=False)(make_image(), target)[1]
    torch.testing.assert_close(half["area"], target["area"] / 4)
    flipped = AlbumentationsTransform([alb.HorizontalFlip(p=1)])(make_image(), target)[1]
    torch.testing.assert_close(flipped["area"], target["area"])
    target = {"boxes": torch.tensor([[10.0, 10, 30, 30]]), "area": torch.tensor([301])}
    crop = AlbumentationsTransform([alb.Crop(15, 0, 60, 40)])(make_image(), target)[1]
    assert crop["area"].tolist() == [226]  # three quarters of 301 are 225.75
    assert crop["area"].dtype == torch.int64


def test_area_shrinks_as_the_mask_does():
    target = make_target()
    target["area"] = target["area"] * 2
    result = AlbumentationsTransform([alb.Crop(16, 12, 60, 40)], min_visibility=0)(
        make_image(), target
    )[1]
    rows = result["labels"] - 1
    left = target["masks"][rows, 12:, 16:].sum((1, 2)).float()
    assert not torch.equal(left, target["masks"][rows].sum((1, 2)).float())
    torch.testing.assert_close(result["area"], 2 * left)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(24, 70), seed=st.integers(0, 2**32 - 1), scene=st.integers(0, 20))
def test_what_training_returns_fits_together(size, seed, scene):
    """Masks and keypoints stay in their boxes, whatever was drawn."""
    target = make_target(5, seed=scene)
    transform = detection_transforms(size, train=True, crop=0.8, keypoint_flip=[1, 0, 2])
    image, result = transform(make_image(), target, seed=seed)
    assert max(image.shape[1:]) <= size
    for row, box in enumerate(result["boxes"].tolist()):
        y, x = result["masks"][row].numpy().nonzero()
        seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_allclose(seen, box, atol=1 if size >= 60 else 2)
        assert seen[0] >= box[0] - 1
        assert seen[1] >= box[1] - 1
        assert seen[2] <= box[2] + 1
        assert seen[3] <= box[3] + 1
        points = result["keypoints"][row]
        assert sorted(points[:, 2].tolist()) == [1, 2, 2]
        x1, y1, x2, y2 = box
        low, high = torch.tensor([x1 - 1, y1 - 1]), torch.tensor([x2, y2])
        assert ((points[:, :2] >= low) & (points[:, :2] <= high)).all()


def test_fields_make_no_difference_to_what_is_drawn():
    transform = detection_transforms(40, train=True)
    target = make_target()
    bare = {key: target[key] for key in ("boxes", "labels")}
    for seed in range(10):
        image, result = transform(make_image(), target, seed=seed)
        expected = transform(make_image(), bare, seed=seed)
        assert torch.equal(image, expected[0])
        assert torch.equal(result["boxes"], expected[1]["boxes"])


def test_nothing_more_is_passed_where_there_is_nothing_to_move():
    target = make_target()
    assert packed_fields(target, (HEIGHT, WIDTH)).keys() == {"masks", "keypoints"}
    for key in ("masks", "keypoints"):
        del target[key]
    assert packed_fields(target, (HEIGHT, WIDTH)) == {}
    assert packed_fields(make_target(0), (HEIGHT, WIDTH)) == {}
    assert packed_fields({"keypoints": torch.zeros(2, 3, 3)}, (HEIGHT, WIDTH)) == {}


def test_inputs_are_not_changed_and_not_shared():
    target = make_target()
    kept = {k: v.clone() for k, v in target.items() if isinstance(v, torch.Tensor)}

    def fill(mask, **_):
        return np.bitwise_or(mask, 1, out=mask)

    in_place = alb.Lambda(name="fill", mask=fill, p=1)
    for transforms in ([], [alb.HorizontalFlip(p=1)], [in_place]):
        result = AlbumentationsTransform(transforms)(make_image(), target, seed=1)[1]
        for key in ("boxes", "masks", "keypoints", "area"):
            result[key].zero_()
        assert all(torch.equal(target[k], v) for k, v in kept.items())


@pytest.mark.parametrize("key", ["masks", "keypoints"])
def test_transforms_that_copy_objects_are_refused(key):
    target = {k: v for k, v in make_target().items() if k in ("boxes", key)}
    pad = alb.PadIfNeeded(90, 120, border_mode=cv2.BORDER_REFLECT_101, p=1)
    with pytest.raises(ValueError, match=r"copied .*constant border"):
        AlbumentationsTransform([pad])(make_image(), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.zeros(4, 40, 60)}, "'masks' must be uint8 or bool, got torch.float32"),
        ({"masks": torch.zeros(4, 40, 59, dtype=torch.uint8)}, r"'masks'.*\(4, 40, 59\)"),
        ({"keypoints": torch.zeros(4, 3)}, r"'keypoints' must be \(N, K, 3\).*\(4, 3\)"),
        ({"keypoints": torch.zeros(4, 3, 4)}, r"'keypoints' must be \(N, K, 3\).*\(4, 3, 4\)"),
        ({"keypoints": [1, 2, 3, 4]}, "'keypoints' must be a tensor.*list"),
        ({"keypoints": torch.full((4, 3, 3), torch.nan)}, None),
        ({"keypoints": torch.full((4, 3, 2), torch.inf)}, r"'keypoints'\[0, 0\].*inf"),
        ({"keypoints": torch.ones(4, 5, 3)}, "'keypoints'.*3 keypoints.*got 5"),
    ],
)
def test_broken_fields_are_named(change, message):
    transform = AlbumentationsTransform([], keypoint_flip=[1, 0, 2])
    target = {**make_target(), **change}
    if message is None:  # a visibility of NaN is not above 0: it has no position
        assert not transform(make_image(), target)[1]["keypoints"].any()
        return
    with pytest.raises(ValueError, match=f"image_id 7: {message}"):
        transform(make_image(), target)


def test_rotated_boxes_and_broken_permutations_are_named():
    for wrong in ([0, 0, 1], [1, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"keypoint_flip must hold each index.*got \["):
            detection_transforms(train=True, keypoint_flip=wrong)
    if hasattr(BoundingBoxFormat, "CXCYWHR"):
        boxes = BoundingBoxes([[9.0, 9, 4, 4, 30]], format="CXCYWHR", canvas_size=(40, 60))
        with pytest.raises(ValueError, match=r"image_id 7: 'boxes' must not be rotated.*CXCYWHR"):
            AlbumentationsTransform([])(make_image(), {"boxes": boxes, "image_id": 7})


def test_an_image_without_objects_as_torchvision_wraps_it():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    _, target = detection_transforms(10, train=True)(image, {"image_id": 3}, seed=0)
    assert target["image_id"] == 3
    assert (target["boxes"].shape, target["labels"].shape) == ((0, 4), (0,))


def test_labels_may_be_a_list():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 15]]), "labels": [2, 1]}
    transform = detection_transforms(None, train=True, flip=1.0, photometric=0, crop=0)
    assert transform(image, target, seed=0)[1]["labels"] == [2, 1]
    with pytest.raises(ValueError, match=r"'labels'\[1\] must be at least 1"):
        transform(image, target | {"labels": [2, 0]}, seed=0)


def test_area_of_an_image_that_stays_as_it_is():
    """COCO's is that of a polygon, and not exactly the number of its mask's pixels."""
    masks = torch.zeros(1, 20, 30, dtype=torch.uint8)
    masks[0, 2:8, 3:9] = 1
    target = {
        "boxes": torch.tensor([[3.0, 2, 9, 8]]),
        "labels": torch.tensor([1]),
        "masks": masks,
        "area": torch.tensor([33.25]),
    }
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    assert detection_transforms(None, train=False)(image, target)[1]["area"].tolist() == [33.25]
    _, shrunk = detection_transforms(15, train=False)(image, target)
    pixels = int(shrunk["masks"].sum())
    assert shrunk["area"].item() == pytest.approx(33.25 * pixels / 36)
