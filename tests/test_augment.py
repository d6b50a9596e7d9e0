"""The albumentations adapter: whatever an object has follows its box, and seeds decide everything.

That samples depend on seed, epoch and index alone, whoever loads them, is in
contract/test_randomness.py.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from detmix.data import AlbumentationsTransform, AugmentedDataset, detection_transforms

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as alb

HEIGHT, WIDTH = 40, 60
BOXES = [[0, 0, 10, 10], [30, 20, 60, 40], [5, 5, 25, 35]]
# The crop to x >= 20 loses the first box and cuts the third down to a quarter.
CROP = [alb.Crop(20, 0, 60, 40)]


def make_image(height=HEIGHT, width=WIDTH):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def augment(transforms, target, seed=None, **options):
    """Return what becomes of a target."""
    return AlbumentationsTransform(transforms, **options)(make_image(), target, seed=seed)[1]


def make_target(num=4, height=HEIGHT, width=WIDTH, seed=0):
    """Return ellipses with their boxes, and three keypoints on pixels of each."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num, height, width), np.uint8)
    boxes, keypoints = np.zeros((num, 4)), np.zeros((num, 3, 3))
    for i in range(num):
        half = rng.integers(2, 7, 2)
        centre = [int(rng.integers(h, side - h)) for h, side in zip(half, (width, height))]  # noqa: B905
        cv2.ellipse(masks[i], centre, half.tolist(), 0, 0, 360, 255, -1)
        y, x = masks[i].nonzero()
        boxes[i] = x.min(), y.min(), x.max() + 1, y.max() + 1
        picked = rng.choice(len(x), 3, replace=False)
        keypoints[i] = np.column_stack([x[picked], y[picked], [2, 1, 2]])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.arange(1, num + 1),
        "masks": torch.from_numpy(masks),
        "keypoints": torch.tensor(keypoints, dtype=torch.float32),
        "area": torch.from_numpy(masks).bool().sum((1, 2)).float(),
        "image_id": 7,
    }


def boxes_only(boxes=BOXES, **fields):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "image_id": 7, **fields}


def as_tv(target, box_format="XYXY"):
    """Return the target with tv_tensors, keypoints without a visibility."""
    size = tuple(target["masks"].shape[1:])
    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    boxes = F.convert_bounding_box_format(boxes, new_format=BoundingBoxFormat[box_format])
    typed = {**target, "boxes": boxes, "masks": Mask(target["masks"])}
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


def test_every_field_follows_its_box():
    follows = {
        "box_weights": torch.tensor([0.25, 0.5, 0.75]),
        "difficult": torch.tensor([True, False, True]),
        "embedding": torch.arange(6).reshape(3, 2),
        "text": ["a", "b", "c"],
    }
    size = torch.tensor([40, 60, 3])  # of length N by chance
    of_image = {"orig_size": size, "note": "kept", "image_id": 7, "img_shape": [40, 60, 3]}
    area = torch.tensor([100.0, 600.0, 600.0])
    target = boxes_only(**follows, **of_image, area=area)
    transform = AlbumentationsTransform(CROP, keys=["embedding", "text"])
    with pytest.warns(UserWarning, match="^'img_shape': kept as the image's"):
        image, result = transform(make_image(), target)
    transform(make_image(), target)  # told once
    assert torch.equal(image, make_image()[:, :, 20:])
    assert image.is_contiguous()
    assert result.keys() == target.keys()
    torch.testing.assert_close(result.pop("area"), torch.tensor([600.0, 150.0]))
    expected = torch.tensor([[10.0, 20, 40, 40], [0, 5, 5, 35]])
    torch.testing.assert_close(result.pop("boxes"), expected, rtol=0, atol=1e-4)
    assert result.pop("labels").tolist() == [2, 3]
    assert result.pop("text") == ["b", "c"]
    assert all(result.pop(key) is value for key, value in of_image.items())
    assert all(torch.equal(value, follows[key][1:]) for key, value in result.items())
    assert augment(CROP, boxes_only(labels=[5, 6, 7]))["labels"] == [6, 7]


@pytest.mark.parametrize(
    ("transforms", "boxes", "share", "kept"),
    [
        (CROP, BOXES, 0.3, {2: [10, 20, 40, 40]}),
        (CROP, BOXES, 0.2, {2: [10, 20, 40, 40], 3: [0, 5, 5, 35]}),
        ([], [[-5, -5, 9, 9], [70, 5, 90, 9], [5, 5, 5, 9]], 0.1, {1: [0, 0, 9, 9]}),
        ([], [[5, 5, 6.5, 5.5], [5, 5, 5, 9], [5, 5, 6, 6]], 0.1, {3: [5, 5, 6, 6]}),
        ([], [[5, 5, 6.5, 5.5], [5, 5, 5, 9]], 0, {1: [5, 5, 6.5, 5.5]}),
    ],
)
def test_boxes_are_clipped_and_of_which_too_little_is_left_dropped(transforms, boxes, share, kept):
    result = augment(transforms, boxes_only(boxes), min_visibility=share)
    assert result["labels"].tolist() == list(kept)
    expected = torch.tensor(list(kept.values()), dtype=torch.float32)
    torch.testing.assert_close(result["boxes"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "transform",
    [  # these draw from Python's generator, and noise from NumPy's
        detection_transforms(train=True, photometric=1),
        AlbumentationsTransform([alb.GaussNoise(std_range=(0.2, 0.2), p=1)]),
    ],
)
def test_the_seed_or_else_torch_decides_everything(transform):
    def outcomes(*seeds):
        return [transform(make_image(), boxes_only(), seed=seed)[0] for seed in seeds]

    torch.manual_seed(3)
    first = outcomes(1, 2, None, None)
    assert len({image.numpy().tobytes() for image in first}) == 4
    torch.manual_seed(3)
    assert all(torch.equal(*pair) for pair in zip(outcomes(1, 2, None, None), first, strict=True))


def test_transforms_draw_independently():
    """Flip and inversion must not be decided by the same draw."""
    transform = AlbumentationsTransform([alb.HorizontalFlip(p=0.5), alb.InvertImg(p=0.5)])
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :, 0] = 200
    outcomes = [transform(image, boxes_only([]), seed=seed)[0] for seed in range(400)]
    counts = Counter(tuple(outcome[0, 0, :2].tolist()) for outcome in outcomes)
    assert counts.keys() == {(200, 0), (0, 0), (55, 255), (255, 255)}
    assert max(counts.values()) < 145  # five standard deviations above a quarter of 400


class TestTensors:
    @pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (alb.HorizontalFlip(p=1), F.horizontal_flip),
            (alb.VerticalFlip(p=1), F.vertical_flip),
            (alb.Crop(5, 4, 55, 39, p=1), lambda value: F.crop(value, 4, 5, 35, 50)),
            (alb.Resize(20, 30, p=1), lambda value: F.resize(value, [20, 30])),
        ],
    )
    def test_tv_tensors_equal_torchvision(self, ours, theirs, box_format):
        transform = AlbumentationsTransform([ours], min_visibility=0)
        target = as_tv(make_target(), box_format)
        image, result = transform(Image(make_image()), target)
        assert isinstance(image, Image)
        if not isinstance(ours, alb.Resize):  # there the interpolation differs
            assert torch.equal(image, theirs(make_image()))
        check_equal_tv(result["boxes"], F.clamp_bounding_boxes(theirs(target["boxes"])))
        check_equal_tv(result["masks"], theirs(target["masks"]))
        if "keypoints" in target and not isinstance(ours, alb.Crop):  # there torchvision clamps
            check_equal_tv(result["keypoints"], theirs(target["keypoints"]))

    @pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="new in torchvision 0.23")
    def test_points_without_visibility_are_never_zeroed(self):
        points = torch.tensor([[[2.0, 3], [50, 30]]])
        target = {
            "boxes": torch.tensor([[30.0, 20, 60, 40]]),
            "keypoints": tv_tensors.KeyPoints(points, canvas_size=(HEIGHT, WIDTH)),
        }
        result = augment([alb.Crop(20, 10, 60, 40)], target, keypoint_flip=[1, 0])["keypoints"]
        assert result.canvas_size == (30, 40)
        assert result.tolist() == [[[-18, -7], [30, 20]]]

    def test_inputs_are_not_changed_and_not_shared(self):
        image = make_image()[None].to(memory_format=torch.channels_last)[0]
        target, kept = make_target(), make_target()

        def fill(mask, **_):
            return np.bitwise_or(mask, 1, out=mask)

        in_place = alb.Lambda(name="fill", mask=fill, p=1)
        for transforms in ([], [alb.HorizontalFlip(p=1)], [in_place]):
            new_image, result = AlbumentationsTransform(transforms)(image, target, seed=1)
            new_image.zero_()
            for key in ("boxes", "masks", "keypoints", "area"):
                result[key].zero_()
                assert torch.equal(target[key], kept[key])
            assert torch.equal(image, make_image())


FLIP, CROP_18 = alb.VerticalFlip(p=1), alb.Crop(18, 12, 60, 40)
TURNED = alb.Affine(scale=(0.5, 2), shear=(-30, 30), rotate=(-170, 170), p=1)
BENT = alb.ElasticTransform(alpha=3, sigma=5, p=1)


class TestKeypoints:
    @pytest.mark.parametrize(
        ("transforms", "is_mirrored"),
        [
            ([alb.HorizontalFlip(p=1)], True), ([alb.HorizontalFlip(p=1), FLIP], False),
            ([alb.Transpose(p=1), alb.PadIfNeeded(70, 80, position="random", p=1)], True),
            ([alb.RandomRotate90(p=1)], False),
            ([TURNED], False), ([CROP_18, BENT], False), ([alb.GridDistortion(p=1)], False),
            ([FLIP, TURNED], True), ([FLIP, CROP_18, BENT], True),
            ([FLIP, alb.GridDistortion(p=1)], True),
        ],
    )  # fmt: skip
    def test_they_change_sides_in_a_mirrored_image(self, transforms, is_mirrored):
        """Also where probes leave the image, where a distortion forgets them."""
        order = [1, 0, 2] if is_mirrored else [0, 1, 2]
        target = make_target(8, seed=3)
        for seed in range(10):
            straight = augment(transforms, target, seed, min_visibility=0)["keypoints"]
            result = augment(transforms, target, seed, min_visibility=0, keypoint_flip=[1, 0, 2])
            assert straight[..., 2].any()
            assert torch.equal(result["keypoints"], straight[:, order])

    def test_outside_and_unlabelled_become_zero(self):
        keypoints = torch.tensor(
            [[[20.0, 10, 2], [19, 10, 2], [59, 29, 1], [59, 30, 1], [30, 20, 0], [60, 15, 2]]]
        )
        target = {"boxes": torch.tensor([[0.0, 0, 60, 40]]), "keypoints": keypoints}
        result = augment([alb.Crop(20, 10, 60, 30)], target)["keypoints"]
        assert result.tolist() == [[[0, 0, 2], [0] * 3, [39, 19, 1], [0] * 3, [0] * 3, [0] * 3]]
        assert result.dtype == torch.float32
        target["keypoints"] = torch.full_like(keypoints, torch.nan)  # NaN is not above 0 either
        assert not augment([], target)["keypoints"].any()

    @pytest.mark.parametrize("shape", [(0,), (0, 3, 3), (3, 0, 3)])
    def test_no_objects_have_none_in_whatever_shape(self, shape):
        target = {"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(shape)}
        result = augment([alb.HorizontalFlip(p=1)], target, keypoint_flip=[1, 0, 2])
        assert len(result["boxes"]) == len(result["keypoints"]) == 0

    def test_the_last_column_stays_in_sight_when_shrunk_and_mirrored(self):
        boxes, keypoints = torch.tensor([[0.0, 0, 60, 40]]), torch.tensor([[[59.0, 39, 2]]])
        transform = detection_transforms(20, train=True, flip=1, photometric=0, crop=0)
        result = transform(make_image(), {"boxes": boxes, "keypoints": keypoints})[1]["keypoints"]
        torch.testing.assert_close(result[0, 0], torch.tensor([0, 39 * 13 / 40, 2]))


@pytest.mark.parametrize("typed", [as_tv, dict])
def test_targets_without_objects(typed):
    target = typed(make_target(0))
    training = detection_transforms(32, train=True, flip=1, photometric=1, crop=1)
    transposed = AlbumentationsTransform([alb.Transpose(p=1)], keypoint_flip=[1, 0, 2])
    for transform in (transposed, detection_transforms(32, train=False), training):
        image, result = transform(make_image(), target, seed=1)
        assert type(result["masks"]) is type(target["masks"])
        assert result["masks"].shape == (0, *image.shape[1:])
        for key in target.keys() - {"masks", "image_id"}:
            assert result[key].shape == target[key].shape
    # A pipeline that has seen no boxes must still carry them afterwards.
    assert len(training(make_image(), typed(make_target()))[1]["labels"]) == 4
    # as torchvision wraps an image without objects
    result = training(make_image(), {"image_id": 3})[1]
    assert (result["boxes"].shape, result["labels"].shape) == ((0, 4), (0,))
    assert augment([alb.Crop(0, 0, 3, 3)], typed(make_target()))["masks"].shape == (0, 3, 3)


@pytest.mark.parametrize(("size", "shape"), [(200, (40, 60)), (47, (40, 60)), (17, (33, 57))])
def test_shrunk_masks_and_keypoints(size, shape):
    """A mask takes the middle of each area, worked out pixel by pixel; keypoints the ratio."""
    target = make_target(6, *shape)
    image, result = detection_transforms(size, train=False)(make_image(*shape), target)
    height, width = image.shape[1:]
    assert max(height, width) == min(size, *shape[1:])
    assert size < 60 or torch.equal(image, make_image(*shape))

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


def test_objects_whose_mask_is_lost_are_left_out_in_training_only():
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 12:28, 12:28] = masks[1, 31, 13] = True
    target = boxes_only([[12, 12, 28, 28], [10, 28, 16, 34]], masks=masks)
    target |= {"area": torch.tensor([256.0, 1]), "keypoints": torch.ones(2, 1, 3)}
    for train, kept in ((False, [1, 2]), (True, [1])):
        result = detection_transforms(20, train=train, crop=0)(make_image(), target)[1]
        assert result["labels"].tolist() == kept
        assert len(result["boxes"]) == len(result["keypoints"]) == len(kept)
        assert torch.equal(result["area"], result["masks"].sum((1, 2)).float())


def test_the_area_shrinks_as_the_mask_does_or_the_box():
    """COCO's is that of a polygon, and not exactly the number of its mask's pixels."""
    target = make_target()
    target["area"] = target["area"] * 2 + 0.25
    pixels = target["masks"].bool().sum((1, 2))
    assert torch.equal(augment([], target)["area"], target["area"])
    result = augment([alb.Crop(0, 20, 60, 40)], target, min_visibility=0)
    rows = result["labels"] - 1
    assert rows.tolist() == [1, 2, 3]
    left = target["masks"][rows, 20:].bool().sum((1, 2))
    assert (left < pixels[rows]).any()
    torch.testing.assert_close(result["area"], target["area"][rows] * left / pixels[rows])
    box = boxes_only([[10.0, 10, 30, 30]], area=torch.tensor([301]))
    area = augment([alb.Crop(15, 0, 60, 40)], box)["area"]
    assert (area.tolist(), area.dtype) == ([226], torch.int64)  # three quarters are 225.75


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(24, 70),
    seed=st.integers(0, 2**32 - 1),
    scene=st.integers(0, 20),
    jitter=st.sampled_from([None, (0.5, 2.0)]),
)
def test_what_training_returns_fits_together(size, seed, scene, jitter):
    """Masks and keypoints stay in their boxes, whatever was drawn; and change nothing of it."""
    target = make_target(5, seed=scene)
    transform = detection_transforms(
        size, train=True, crop=0.8, scale_jitter=jitter, keypoint_flip=[1, 0, 2]
    )
    image, result = transform(make_image(), target, seed=seed)
    assert max(image.shape[1:]) <= size
    for box, mask, points in zip(
        result["boxes"], result["masks"], result["keypoints"], strict=True
    ):
        assert mask.unique().tolist() == [0, 255]
        y, x = mask.numpy().nonzero()
        seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        beyond = (box.numpy() - seen) * [1, 1, -1, -1]  # what is cut may leave a corner empty
        assert (beyond <= 2).all()
        assert jitter or (abs(beyond) <= (1 if size >= 60 else 2)).all()
        assert sorted(points[:, 2].tolist()) == [1, 2, 2] or jitter
        points = points[points[:, 2] > 0]
        # the size in whole pixels scales boxes, and what it was rounded from scales points
        assert ((points[:, :2] >= box[:2] - 1) & (points[:, :2] <= box[2:] + 0.5)).all()
    bare = {key: target[key] for key in ("boxes", "labels")}
    same, expected = transform(make_image(), bare, seed=seed)
    assert torch.equal(image, same)
    rows = [expected["labels"].tolist().index(label) for label in result["labels"].tolist()]
    assert torch.equal(result["boxes"], expected["boxes"][rows])


class TestScaleJitter:
    SIZE = 48

    def jittered(self, seed, low, high, image=None, **options):
        """Return what becomes of an image, and of a box over the whole of it."""
        options = dict.fromkeys(("flip", "photometric", "crop"), 0.0) | options
        transform = detection_transforms(self.SIZE, train=True, scale_jitter=(low, high), **options)
        target = {"boxes": torch.tensor([[0.0, 0, WIDTH, HEIGHT]]), "labels": torch.tensor([1])}
        image, target = transform(make_image() if image is None else image, target, seed=seed)
        assert image.shape == (3, self.SIZE, self.SIZE)
        return image, target["boxes"][0].tolist()

    @pytest.mark.parametrize("scale", [0.1, 0.33, 0.5, 1.0])
    def test_the_size_is_torchvisions_and_the_rest_is_filled(self, scale):
        ramp = torch.arange(WIDTH).expand(3, HEIGHT, WIDTH).to(torch.uint8) * 4
        image, box = self.jittered(0, scale, scale, ramp)
        theirs = v2.ScaleJitter((self.SIZE, self.SIZE), (scale, scale))(Image(ramp))
        height, width = theirs.shape[1:]
        assert box == pytest.approx([0, 0, width, height], abs=1)
        if scale >= 0.5:  # there torchvision's whole numbers are not rounded
            seen = image[:, :height, :width].float()
            assert (seen - theirs.float()).abs().mean() < 2  # neighbours differ by 4 and more
        left, (width, height) = image.clone(), map(round, box[2:])
        left[:, :height, :width] = torch.tensor([124, 116, 104])[:, None, None]
        assert (left == torch.tensor([124, 116, 104])[:, None, None]).all()

    def test_a_larger_one_is_cut_anywhere(self):
        """Out of twice the size: objects in the middle of the four quarters are seen in turns."""
        ramp = torch.arange(WIDTH).expand(3, HEIGHT, WIDTH).to(torch.uint8) * 4
        begins = []
        for seed in range(60):
            image, box = self.jittered(seed, 2.0, 2.0, ramp)
            assert box == [0, 0, self.SIZE, self.SIZE]
            row = image[0, 0].float() / 4
            assert row[-1] - row[0] == pytest.approx(self.SIZE * WIDTH / 96, abs=1.5)
            begins.append(float(row[0]))
        assert min(begins) < 4
        assert max(begins) > WIDTH / 2 - 5
        assert 10 < np.mean(begins) < 20

    def test_scales_are_uniform_and_of_the_seed(self):
        boxes = [self.jittered(seed, 0.25, 1.0)[1] for seed in range(300)]
        assert boxes[:20] == [self.jittered(seed, 0.25, 1.0)[1] for seed in range(20)]
        lengths = np.array(boxes)[:, 2]
        assert {12.0, 48.0} <= set(lengths) <= set(range(12, 49))
        assert abs(lengths.mean() - 30) < 5 * lengths.std() / 300**0.5

    def test_evaluation_only_shrinks(self):
        transform = detection_transforms(self.SIZE, train=False)
        assert transform(make_image(), boxes_only())[0].shape == (3, 32, 48)


REFLECTED = alb.PadIfNeeded(90, 120, border_mode=cv2.BORDER_REFLECT_101, p=1)


def of_target(*transforms, **changes):
    return lambda: augment(transforms, make_target() | changes, keypoint_flip=[1, 0, 2])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (of_target(boxes=torch.full((4, 4), torch.nan)), "image_id 7: 'boxes'.*nan"),
        (of_target(labels=[2, 0, 1, 1]), r"image_id 7: 'labels'\[1\].*0"),
        (of_target(labels=torch.tensor([2, 3, 1, -1])), r"image_id 7: 'labels'\[3\].*-1"),
        (of_target(masks=torch.zeros(4, 40, 60)), "image_id 7: 'masks'.*float32"),
        (of_target(keypoints=torch.full((4, 3, 2), torch.inf)), r"'keypoints'\[0, 0\].*inf"),
        (of_target(keypoints=torch.ones(4, 5, 3)), r"'keypoints'.*\(N, 3, 3\).*\(4, 5, 3\)"),
        (of_target(REFLECTED, masks=None), "copied .*constant border"),
        (of_target(REFLECTED, keypoints=None), "copied .*constant border"),
        (lambda: AlbumentationsTransform([])(make_image().float(), make_target()), "image_id 7"),
        (lambda: AlbumentationsTransform([], min_visibility=1.5), r"min_visibility.*1\.5"),
        (lambda: detection_transforms(train=True, crop=2), "crop.*2"),
        (lambda: detection_transforms(9, train=True, scale_jitter=(2, 1)), r"jitter.*\(2, 1\)"),
        (lambda: detection_transforms(train=True, keypoint_flip=[0, 0, 1]), "keypoint_flip"),
    ],
)
def test_what_is_broken_is_named(call, named):
    """What mixers refuse too, as the first of these, is in contract/test_mixing_refused.py."""
    with pytest.raises(ValueError, match=named):
        call()


def test_an_augmented_data_set_checks_the_index():
    data = AugmentedDataset([(make_image(), make_target())] * 6, detection_transforms(train=True))
    assert torch.equal(data[-1][0], data[5][0])
    with pytest.raises(IndexError, match="index 6 is out of range for 6"):
        data[6]
