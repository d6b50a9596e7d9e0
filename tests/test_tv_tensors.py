"""tv_tensors through the mixers, and targets as torchvision's data sets make them."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from mixing_oracle import DEVICES, assert_same_target, make_image
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, Mask

from detmix import (
    DetectionCutMix,
    DetectionMixUp,
    MixedDataset,
    cutmix,
    mixup,
)
from detmix.mixing import Cut, MixParams, blend, union
from detmix.mixing.tv import box_format, converted, num_coordinates, plain, typed_as, xyxy

SIZES = ((20, 30), (24, 18))  # of A and of B
CANVAS = {"mixup": (24, 30), "cutmix": (20, 30)}
FORMATS = ["XYXY", "XYWH", "CXCYWH"]
BOXES = ([[1.0, 2, 11, 12], [10, 5, 30, 20]], [[0.0, 0, 12, 12], [4, 6, 18, 24], [3, 3, 9, 9]])


def make_boxes(rows, size, kind):
    """Boxes (x1, y1, x2, y2) as a plain tensor or in a format."""
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    if kind is None:
        return boxes
    typed = BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return convert_bounding_box_format(typed, new_format=tv_tensors.BoundingBoxFormat[kind])


def make_sample(side, kind, rows=None, **extra):
    size, rows = SIZES[side], BOXES[side] if rows is None else rows
    boxes = make_boxes(rows, size, kind)
    target = {"boxes": boxes, "labels": torch.arange(len(boxes)) + 10 * side, "image_id": side}
    return make_image(*size, seed=side), {**target, **extra}


def mix(name, sample_a, sample_b):
    if name == "mixup":
        return mixup(*sample_a, *sample_b, 0.3)
    return cutmix(*sample_a, *sample_b, (3, 2, 13, 14), min_visibility=0.0)


def plain_values(tensor):
    return tensor.as_subclass(torch.Tensor)


@pytest.mark.parametrize("name", CANVAS)
class TestTypes:
    @pytest.mark.parametrize("kind_b", [None, *FORMATS])
    @pytest.mark.parametrize("kind_a", [None, *FORMATS])
    def test_boxes_come_out_in_a_s_format_with_the_same_values(self, name, kind_a, kind_b):
        _, expected = mix(name, make_sample(0, None), make_sample(1, None))
        _, mixed = mix(name, make_sample(0, kind_a), make_sample(1, kind_b))
        boxes = mixed.pop("boxes")
        expected_boxes = expected.pop("boxes")
        assert_same_target(mixed, expected)
        if kind_a is None:
            assert type(boxes) is torch.Tensor
            assert torch.equal(boxes, expected_boxes)
            return
        assert type(boxes) is BoundingBoxes
        assert (boxes.format.value, boxes.canvas_size) == (kind_a, CANVAS[name])
        assert torch.equal(
            plain_values(boxes), plain_values(make_boxes(expected_boxes.tolist(), None, kind_a))
        )

    @pytest.mark.parametrize("kind", FORMATS)
    def test_boxes_that_are_not_clipped_keep_every_bit(self, name, kind):
        # converting there and back would round some of these
        rows = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * 3 + 15
        a = make_sample(0, None, BOXES[0][:1] * 200)
        if kind == "XYXY":
            rows[:, 2:] += 4
        a[1]["boxes"] = BoundingBoxes(rows, format=kind, canvas_size=SIZES[0])
        for b in (make_sample(1, None, []), make_sample(1, kind)):
            mixed = mixup(*a, *b, 0.3) if name == "mixup" else cutmix(*a, *b, (0, 0, 1, 1))
            assert torch.equal(plain_values(mixed[1]["boxes"])[:200], rows)

    @pytest.mark.parametrize("dtypes", [("uint8", "uint8"), ("bool", "uint8"), ("uint8", "bool")])
    @pytest.mark.parametrize("typed", [(True, True), (True, False), (False, True)])
    def test_masks(self, name, typed, dtypes):
        samples, plains = [], []
        for side in (0, 1):
            count = len(BOXES[side])
            masks = (
                torch.rand(count, *SIZES[side], generator=torch.Generator().manual_seed(side)) > 0.5
            )
            masks = masks.to(getattr(torch, dtypes[side]))
            plains.append(make_sample(side, None, masks=masks))
            samples.append(make_sample(side, None, masks=Mask(masks) if typed[side] else masks))
        _, mixed = mix(name, *samples)
        _, expected = mix(name, *plains)
        assert type(mixed["masks"]) is (Mask if typed[0] else torch.Tensor)
        assert torch.equal(plain_values(mixed["masks"]), expected["masks"])
        assert torch.equal(mixed["box_weights"], expected["box_weights"])
        assert mixed["masks"].shape[1:] == CANVAS[name]

    @pytest.mark.parametrize("typed", [(True, True), (True, False), (False, True), (False, False)])
    def test_image_is_typed_as_a_s(self, name, typed):
        pair = [make_sample(side, None) for side in (0, 1)]
        expected, _ = mix(name, *pair)
        images = [
            (tv_tensors.Image(image) if is_typed else image, target)
            for (image, target), is_typed in zip(pair, typed, strict=True)
        ]
        mixed, _ = mix(name, *images)
        assert type(mixed) is (tv_tensors.Image if typed[0] else torch.Tensor)
        assert torch.equal(plain_values(mixed), expected)

    def test_a_type_that_only_b_has(self, name):
        # A does not hold the key, or holds nothing in it that has a type
        full = make_sample(1, "XYWH", masks=Mask(torch.ones(3, *SIZES[1], dtype=torch.uint8)))
        image = make_image(*SIZES[0])
        for empty in ({"image_id": 7}, make_sample(0, None, rows=[])[1]):
            _, mixed = mix(name, (image, empty), full)
            assert (mixed["boxes"].format.value, mixed["boxes"].canvas_size) == (
                "XYWH",
                CANVAS[name],
            )
            assert type(mixed["masks"]) is Mask
            assert len(mixed["labels"]) == len(mixed["masks"]) == 3
            assert mixed["image_id"] == empty["image_id"]
            # and the other way round
            _, mixed = mix(name, full, (make_image(*SIZES[1]), empty))
            assert mixed["boxes"].format.value == "XYWH"
            assert mixed["boxes"].canvas_size == SIZES[1]

    def test_return_type_set_to_tv_tensors_changes_nothing(self, name):
        pair = [
            make_sample(s, "XYWH", masks=Mask(torch.ones(len(BOXES[s]), *SIZES[s]).byte()))
            for s in (0, 1)
        ]
        pair = [(tv_tensors.Image(image), target) for image, target in pair]
        image, expected = mix(name, *pair)
        with tv_tensors.set_return_type("TVTensor"):
            again, mixed = mix(name, *pair)
        assert torch.equal(plain_values(again), plain_values(image))
        assert_same_target(mixed, expected)

    def test_inputs_are_not_changed(self, name):
        pair = [make_sample(side, kind) for side, kind in ((0, "XYWH"), (1, "CXCYWH"))]
        before = copy.deepcopy(pair)
        _, mixed = mix(name, *pair)
        mixed["boxes"].fill_(0)
        for (image, target), (old, old_target) in zip(pair, before, strict=True):
            assert torch.equal(image, old)
            assert_same_target(target, old_target)

    @pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="torchvision has no KeyPoints")
    def test_key_points_are_carried(self, name):
        points = [torch.rand(len(BOXES[side]), 4, 2) * 15 for side in (0, 1)]
        pair = [
            make_sample(
                side, None, keypoints=tv_tensors.KeyPoints(points[side], canvas_size=SIZES[side])
            )
            for side in (0, 1)
        ]
        _, mixed = mix(name, *pair)
        assert type(mixed["keypoints"]) is tv_tensors.KeyPoints
        assert mixed["keypoints"].canvas_size == CANVAS[name]
        expected = [points[label // 10][label % 10] for label in mixed["labels"].tolist()]
        assert torch.equal(plain_values(mixed["keypoints"]), torch.stack(expected))


def rotated(side, format="CXCYWHR"):
    rows = torch.tensor([[10.0, 9, 8, 6, 30], [12, 12, 5, 4, -20]])
    boxes = BoundingBoxes(rows[: side + 1], format=format, canvas_size=SIZES[side])
    return make_image(*SIZES[side]), {"boxes": boxes, "labels": torch.arange(side + 1)}


@pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="torchvision rotates no boxes")
class TestRotated:
    def test_mixup_carries_them(self):
        (_, a), (_, b) = samples = rotated(0), rotated(1)
        _, mixed = mixup(*samples[0], *samples[1], 0.5)
        assert (mixed["boxes"].format.value, mixed["boxes"].canvas_size) == ("CXCYWHR", (24, 30))
        rows = torch.cat([plain_values(a["boxes"]), plain_values(b["boxes"])])
        assert torch.equal(plain_values(mixed["boxes"]), rows)

    @pytest.mark.parametrize("empty", [make_sample(0, None, []), make_sample(0, "XYWH", [])])
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
    def test_beside_an_image_without_boxes(self, empty, flip, lam):
        pair = (rotated(1), empty) if flip else (empty, rotated(1))
        _, mixed = mixup(*pair[0], *pair[1], lam)
        assert mixed["boxes"].format.value == "CXCYWHR"
        assert mixed["boxes"].shape == (2 if (lam if flip else 1 - lam) else 0, 5)

    @pytest.mark.parametrize("flip", [False, True])
    def test_they_do_not_join_others(self, flip):
        pair = (rotated(1), make_sample(0, "XYWH"))
        pair = pair[::-1] if flip else pair
        with pytest.raises(ValueError, match=r"boxes of the format \w+ cannot be made \w+ boxes"):
            mixup(*pair[0], *pair[1], 0.5)

    @pytest.mark.parametrize("flip", [False, True])
    def test_cutmix_refuses_them(self, flip):
        pair = (rotated(1), make_sample(0, "XYWH"))
        pair = pair[::-1] if flip else pair
        with pytest.raises(ValueError, match="boxes must not be rotated, got the format CXCYWHR"):
            cutmix(*pair[0], *pair[1], (0, 0, 5, 5))
        params = [MixParams(1, Cut(0.1, 0.5, 0.5)), None]
        with pytest.raises(
            ValueError, match=r"mixing sample 0.* with sample 1.*: boxes must not be"
        ):
            DetectionCutMix().transform(pair, params)

    def test_a_width_that_does_not_fit_the_format(self):
        image, target = rotated(1)
        target["boxes"] = BoundingBoxes(torch.zeros(2, 4), format="CXCYWHR", canvas_size=SIZES[1])
        with pytest.raises(ValueError, match=r"'boxes' must be an \(N, 5\) tensor.*\(2, 4\)"):
            mixup(image, target, *rotated(1), 0.5)


class TestBatches:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("mixer", [DetectionMixUp(p=0.5), DetectionCutMix(p=0.5)])
    def test_samples_that_are_not_mixed_keep_their_types(self, mixer, device):
        samples = []
        for side in (0, 1) * 4:
            image, target = make_sample(side, "XYWH")
            target = {
                k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()
            }
            samples.append((tv_tensors.Image(image).to(device), target))
        images, targets = mixer(samples, generator=torch.Generator().manual_seed(0))
        for image, target in zip(images, targets, strict=True):
            assert type(image) is tv_tensors.Image
            assert type(target["boxes"]) is BoundingBoxes
            assert target["boxes"].canvas_size == tuple(image.shape[-2:])
            assert target["boxes"].device.type == target["box_weights"].device.type == device

    @pytest.mark.parametrize("mixer", [DetectionMixUp(p=0.6), DetectionCutMix(p=0.6)])
    @pytest.mark.parametrize("count", [0, 5])
    def test_a_batch_of_images_in_one_tensor(self, mixer, count):
        batch = tv_tensors.Image(torch.rand(count, 3, 8, 9))
        images, targets = mixer(batch, [make_sample(0, "XYXY")[1]] * count)
        assert type(images) is tv_tensors.Image
        assert images.shape == batch.shape
        assert len(targets) == count

    def test_functions_on_their_own(self):
        a, b = (tv_tensors.Image(make_image(4, 5, seed=seed)) for seed in (0, 1))
        assert type(blend(a, b, 0.5)) is tv_tensors.Image
        joined = union(make_sample(0, "XYWH")[1], {"image_id": 3}, 0.5, (40, 50))
        assert joined["boxes"].canvas_size == (40, 50)
        assert union({"image_id": 3}, {"image_id": 4}, 0.5, (4, 4))["boxes"].shape == (0, 4)


class TestConversion:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_there_and_back(self, kind):
        boxes = make_boxes(BOXES[1], SIZES[1], kind)
        assert xyxy(boxes).tolist() == BOXES[1]
        assert type(xyxy(boxes)) is type(plain(boxes)) is torch.Tensor
        back = typed_as(xyxy(boxes), boxes, (50, 60))
        assert (box_format(back), back.canvas_size) == (box_format(boxes), (50, 60))
        assert torch.equal(plain(back), plain(boxes))
        assert num_coordinates(boxes) == 4

    def test_plain_stays_plain(self):
        boxes = torch.tensor(BOXES[0])
        assert plain(boxes) is boxes
        assert typed_as(boxes, torch.zeros(2), (3, 4)) is boxes
        assert typed_as(boxes, None, (3, 4)) is boxes
        assert box_format(boxes).value == "XYXY"
        assert converted(boxes, box_format(boxes), box_format(boxes)) is boxes


class TestImagesWithoutAnnotations:
    """`wrap_dataset_for_transforms_v2` leaves them a target of the image id alone."""

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(
        "mixer", [DetectionMixUp(p=1.0), DetectionCutMix(p=1.0), DetectionMixUp(p=0.0)]
    )
    def test_they_come_out_with_empty_keys(self, mixer, device):
        samples = [(make_image(9, 9, device=device), {"image_id": number}) for number in range(4)]
        for _, target in zip(*mixer(samples), strict=True):
            assert target["boxes"].shape == (0, 4)
            assert target["labels"].shape == target["box_weights"].shape == (0,)
            dtypes = [target[key].dtype for key in ("boxes", "labels", "box_weights")]
            assert dtypes == [torch.float32, torch.int64, torch.float32]
            assert {target[key].device.type for key in ("boxes", "labels", "box_weights")} == {
                device
            }
        assert all(target.keys() == {"image_id"} for _, target in samples)

    def test_in_a_mixed_dataset(self):
        samples = [
            (make_image(9, 9), {"image_id": 0}),
            make_sample(0, "XYXY"),
            make_sample(1, "XYXY"),
        ]
        for p in (0.0, 1.0):
            mixed = MixedDataset(samples, DetectionMixUp(p=p), seed=1)
            assert all({"boxes", "labels", "box_weights"} <= mixed[i][1].keys() for i in range(3))

    @pytest.mark.parametrize(
        "key", ["labels", "box_weights", "masks", "area", "bbox", "bboxes", "annotation"]
    )
    def test_with_any_other_key_it_is_an_error(self, key):
        """Such as of a data set of torchvision that nobody has wrapped."""
        target = {"image_id": 3, key: [1, 2]}
        with pytest.raises(ValueError, match=f"sample a: target has no 'boxes', only .*{key}"):
            mixup(make_image(4, 4), target, make_image(4, 4), {}, 0.5)

    @pytest.mark.parametrize("name", CANVAS)
    def test_lists_of_per_object_entries(self, name):
        a = make_sample(0, "XYXY", iscrowd=[0, 1], area=[100.0, 300.0], id=[5, 6])
        b = make_sample(1, "XYXY", iscrowd=[0, 0, 1], area=torch.tensor([1.0, 2, 3]), id=[7, 8, 9])
        _, mixed = mix(name, a, b)
        assert mixed["id"] == [5, 6, 7, 8, 9]
        assert mixed["iscrowd"] == [0, 1, 0, 0, 1]
        assert isinstance(mixed["area"], list)
        assert len(mixed["area"]) == 5
        _, mixed = mix(name, b, a)
        assert torch.is_tensor(mixed["area"])
        # who does not say has no crowds
        _, mixed = mix(name, make_sample(0, "XYXY"), make_sample(1, "XYXY", iscrowd=[1, 1, 1]))
        assert mixed["iscrowd"] == [0, 0, 1, 1, 1]
        # and nothing to say without objects
        _, mixed = mix(name, (make_image(*SIZES[0]), {"image_id": 1}), b)
        assert (mixed["iscrowd"], mixed["id"]) == ([0, 0, 1], [7, 8, 9])


def test_draws_do_not_depend_on_types():
    mixer = DetectionCutMix(p=1.0)
    cut = mixer.draw_pair(random.Random(3))
    plain_sample, _ = mixer.mix_pair(make_sample(0, None), make_sample(1, None), cut)
    typed_sample, _ = mixer.mix_pair(make_sample(0, "XYWH"), make_sample(1, "CXCYWH"), cut)
    assert torch.equal(plain_sample, typed_sample)
