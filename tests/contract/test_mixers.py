"""Mixers on a batch, as a collate function and in a data set: the same in all three places."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from mixing_oracle import (
    DEVICES,
    Plain,
    assert_same_batch,
    assert_same_samples,
    assert_same_target,
    make_image,
    on,
    seeded,
)
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, cutmix, mixup
from detmix.data import MixCollate, collate
from detmix.mixing import Cut, MixParams

MIXERS = {
    "mixup": DetectionMixUp,
    "cutmix": DetectionCutMix,
    "choice": lambda **settings: RandomChoice(
        [DetectionMixUp(**settings), DetectionCutMix(**settings)]
    ),
}
COPIES = {
    "mixer": lambda mix: mix,
    "deepcopy": copy.deepcopy,
    "pickle": lambda mix: pickle.loads(pickle.dumps(mix)),
}
with_each_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)


def of_albumentations(target):
    """Read a target as albumentations names it."""
    return {"boxes": target["bboxes"], "labels": target["class_labels"]}


def samples_of(size=12, device="cpu"):
    return [on(device, Plain()[index]) for index in range(size)]


def untouched(sample, index):
    """Whether it is sample ``index`` as it was, of weight 1."""
    image, target = sample
    return torch.equal(image, Plain()[index][0]) and target["box_weights"].tolist() == [1.0]


class TestBatch:
    @pytest.mark.parametrize("device", DEVICES)
    def test_transform_mixes_the_pairs_it_is_given(self, device):
        samples, cut = samples_of(3, device), Cut(0.4, 0.3, 0.7)
        choice = RandomChoice([DetectionMixUp(), DetectionCutMix(min_visibility=0.5)])
        # the third image is 18 x 22, the first 16 x 24: common are 16 x 22
        pasted = cutmix(*samples[0], *samples[2], cut.rectangle((16, 22)), min_visibility=0.5)
        blended = mixup(*samples[0], *samples[2], 0.25)
        for mixer, how, expected in (
            (DetectionMixUp(fill=9), 0.25, mixup(*samples[0], *samples[2], 0.25, 9)),
            (DetectionCutMix(min_visibility=0.5), cut, pasted),
            (choice, (0, 0.25), blended),
            (choice, (1, cut), pasted),
        ):
            mixed = mixer.transform(samples, [MixParams(2, how), None, None])
            assert_same_samples(mixed[:1], [expected])
            assert mixed[1][0] is samples[1][0]
            assert mixed[1][1]["box_weights"].tolist() == [1.0]

    @with_each_mixer
    @pytest.mark.parametrize("device", DEVICES)
    def test_all_ways_to_pass_a_batch_agree(self, make, device):
        samples, mix = samples_of(12, device), make(p=0.5)
        images, targets = collate(samples)
        before = copy.deepcopy(samples)
        params = mix.make_params(12, seeded(5))
        assert 1 <= params.count(None) <= 11
        expected = collate(mix.transform(samples, params))
        state = torch.get_rng_state()
        assert_same_batch(mix(images, targets, generator=seeded(5)), expected)
        assert torch.equal(torch.get_rng_state(), state)
        packed = (images, targets)
        for arguments in (packed, (samples,), tuple(zip(*samples, strict=True)), (packed,)):
            torch.manual_seed(5)
            assert_same_batch(mix(*arguments), expected)
        pair = images[:2], tuple(targets[:2])  # two samples are no packed batch
        for batch in (samples[:2], tuple(samples[:2]), pair, [*pair]):
            two = mix(*pair, generator=seeded(5))
            assert_same_batch(mix(batch, generator=seeded(5)), two)
        assert mix(([], [])) == ([], [])
        seeds = MixCollate(mix, seed=3)
        assert_same_batch(seeds.mix_batch(images, targets), seeds(samples))
        assert_same_samples(samples, before)
        for (_, target), mixed, param in zip(samples, expected[1], params, strict=True):
            assert mixed["image_id"] == target["image_id"]
            assert mixed["box_weights"].device.type == device
            if param is None:
                assert_same_target(mixed, target | {"box_weights": torch.ones(1, device=device)})

    @with_each_mixer
    @pytest.mark.parametrize("device", DEVICES)
    def test_one_tensor_in_one_tensor_out(self, make, device):
        for count, dtype, wrap in (
            (4, torch.uint8, torch.Tensor.clone),
            (4, torch.float16, tv_tensors.Image),
            (0, torch.float32, tv_tensors.Image),
        ):
            images = wrap((torch.rand(count, 3, 18, 24) * 255).to(device, dtype))
            targets = [target for _, target in samples_of(count, device)]
            stacked, mixed = make(p=0.7)(images, targets, generator=seeded(1))
            listed, expected = make(p=0.7)(list(images), targets, generator=seeded(1))
            assert type(stacked) is type(images)
            assert (stacked.shape, stacked.dtype) == (images.shape, dtype)
            for image, other, target, its in zip(stacked, listed, mixed, expected, strict=True):
                # laid out otherwise in memory, a tie may be rounded to the other side
                error = (image.double() - other.double()).abs().max()
                assert error <= (dtype == torch.uint8)
                assert_same_target(target, its)
            batch = make(p=0.7)((images, targets), generator=seeded(1))  # packed
            assert_same_batch(batch, (stacked, mixed))

    @with_each_mixer
    def test_targets_under_other_names(self, make):
        samples = samples_of(6)
        renamed = [
            (image, {"bboxes": target["boxes"], "class_labels": target["labels"], "id": number})
            for number, (image, target) in enumerate(samples)
        ]
        only = [(image, {k: target[k] for k in ("boxes", "labels")}) for image, target in samples]
        mix = make(p=0.7, target_getter=of_albumentations)
        expected = make(p=0.7)(only, generator=seeded(2))
        for batch in (renamed, collate(renamed)):
            assert_same_batch(mix(batch, generator=seeded(2)), expected)
            assert_same_batch(copy.deepcopy(mix)(batch, generator=seeded(2)), expected)
        mixed = MixedDataset(renamed, mix, seed=1)
        params = [mixed.draw_params(index) for index in range(6)]
        assert_same_samples(list(mixed), make(p=0.7).transform(only, params))

    @with_each_mixer
    def test_keys_left_out_and_unclear_ones_are_told_once(self, make):
        """Left out of the whole batch, mixed or not, so that all its targets have the same keys."""
        long = {"area": torch.ones(3), "iscrowd": torch.zeros(3)}
        own = [{**target, "name": [str(i)]} for i, (_, target) in enumerate(samples_of(6))]
        images = [image for image, _ in samples_of(6)]
        fine = [{**target, "area": torch.ones(1), "masks": None} for target in own]
        targets = [*fine[:5], fine[5] | long]
        mix = make(p=0.5)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for index, seed in enumerate((1, 2, 3)):
                more = [{**target, "score": [0.5]} if index == 2 else target for target in targets]
                _, mixed = mix(images, more, generator=seeded(seed))
                assert all(target.keys() & {"area", "iscrowd"} == set() for target in mixed)
                assert [target["name"] for target in mixed] == [target["name"] for target in own]
        first, second, third = (str(warning.message) for warning in told)
        assert "'area', 'iscrowd': left out" in first
        assert "'name': kept" in second
        assert "'score': kept" in third
        with pytest.raises(ValueError, match=r"sample 5 .*'area'"):
            make(keys=["area"])(images, targets)
        declared = make(p=0.7, keys=["name"])
        for _, target in zip(*declared(images, fine, generator=seeded(1)), strict=True):
            assert len(target["name"]) == len(target["area"]) == len(target["boxes"])
            assert [int(name) + 1 for name in target["name"]] == target["labels"].tolist()

    def test_a_loader_s_workers_tell_once_and_not_what_only_happens_to_fit(self):
        """As many entries as boxes in each sample that has any, in the first batch that has."""
        one = [(image, {**target, "hw": [16, 24], "area": []}) for image, target in samples_of(4)]
        two = [(image, {**t, "boxes": t["boxes"].repeat(2, 1), "labels": torch.ones(2)})
               for image, t in one]  # fmt: skip
        two[0][1].pop("hw")
        mix = DetectionMixUp()
        with pytest.warns(UserWarning, match="'area': left out") as told:
            DetectionMixUp()(one)
        assert len(told) == 1
        with pytest.warns(UserWarning, match="'area': left out|'hw': kept") as told:
            DetectionMixUp()(two)
        assert len(told) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which workers have too
            list(DataLoader(one, 2, collate_fn=mix, num_workers=2))
            warnings.simplefilter("error")
            mix(two)

    @with_each_mixer
    @pytest.mark.parametrize("device", DEVICES)
    def test_batches_of_few_samples_and_images_without_annotations(self, make, device):
        """`wrap_dataset_for_transforms_v2` leaves these a target of the image id alone."""
        mix, samples = make(p=1.0), [(make_image(9, 9, device=device), {"image_id": 3})] * 4
        assert mix([], []) == ([], [])
        assert untouched(next(zip(*mix(samples_of(1)), strict=True)), 0)
        expected = {
            "image_id": 3,
            "boxes": torch.zeros((0, 4), device=device),
            "labels": torch.zeros(0, dtype=torch.int64, device=device),
            "box_weights": torch.zeros(0, device=device),
        }
        for targets in (mix(samples)[1], mix(samples[:1])[1], [MixedDataset(samples, mix)[0][1]]):
            for target in targets:
                assert_same_target(target, expected)
                assert target["boxes"].device.type == target["labels"].device.type == device


class TestPlaces:
    @with_each_mixer
    def test_a_data_set_mixes_with_the_partner_it_names(self, make):
        mix, samples = make(p=0.7), samples_of()
        mixed = MixedDataset(Plain(), mix, seed=1)
        assert len(mixed) == 12
        params = [mixed.draw_params(index) for index in range(12)]
        assert params == [mixed.draw_params(index) for index in range(-12, 0)]
        assert 0 < params.count(None) < 12
        expected = mix.transform(samples, params)
        assert_same_samples(list(mixed), expected)

    def test_data_sets_of_any_kind_and_in_each_other(self):
        mix, plain = DetectionMixUp(p=1.0), Plain()
        for dataset in (Subset(plain, [5, 2, 8]), [plain[5], plain[2], plain[8]]):
            mixed = MixedDataset(dataset, mix, seed=1)
            samples = list(mixed)  # it ends
            assert [target["labels"][0].item() for _, target in samples] == [6, 3, 9]
            assert_same_samples([mixed[-1], mixed[-3]], [samples[2], samples[0]])
        assert untouched(MixedDataset(Plain(1), mix, seed=1)[0], 0)
        twice = MixedDataset(MixedDataset(plain, mix, seed=1), mix, seed=2)
        for _, target in twice:
            assert target["box_weights"].shape == (4,)
            assert target["box_weights"].sum().item() == pytest.approx(1, rel=1e-6)


class TestSchedule:
    @pytest.mark.parametrize("place", ["collate_fn", "dataset"])
    @pytest.mark.parametrize("twin", COPIES.values(), ids=COPIES)
    @pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_reaches_persistent_workers(self, place, twin, context):
        mix = twin(MIXERS["choice"](p=1.0, epochs=3, off_epochs=1))
        mixed = MixedDataset(Plain(), mix, seed=1)
        data, begin = (mixed, mixed) if place == "dataset" else (Plain(), mix)
        loader = DataLoader(
            data,
            batch_size=6,
            collate_fn=collate if place == "dataset" else mix,
            num_workers=2,
            persistent_workers=True,
            multiprocessing_context=context,
        )
        for epoch in (0, 2, 0):  # and it comes back on
            begin.set_epoch(epoch)
            samples = [sample for batch in loader for sample in zip(*batch, strict=True)]
            plain = sum(untouched(sample, index) for index, sample in enumerate(samples))
            # some of CutMix's rectangles are empty
            assert plain == 12 if epoch == 2 else plain < 9
            if place == "dataset":
                assert {target["epoch"] for _, target in samples} == {epoch}
                assert_same_samples(samples, list(mixed))

    def test_a_choice_brings_its_mixers_to_the_latest_epoch(self):
        mixers = [DetectionMixUp(), DetectionCutMix()]
        mixers[0].set_epoch(3)
        assert {RandomChoice(mixers).epoch, *(mixer.epoch for mixer in mixers)} == {3}

    @with_each_mixer
    @pytest.mark.parametrize("twin", [*COPIES.values()][1:], ids=[*COPIES][1:])
    def test_copies_keep_settings_and_have_an_epoch_of_their_own(self, make, twin):
        mix = make(p=1.0, epochs=5, off_epochs=2)
        mix.set_epoch(3)
        other = twin(mix)
        assert isinstance(other, nn.Module)
        assert not other.state_dict()
        assert "p=1.0, epochs=5, off_epochs=2" in repr(other)
        assert repr(other) == repr(mix)
        assert (other.epoch, other.active) == (3, False)
        other.set_epoch(2)
        assert (mix.epoch, mix.active, other.active) == (3, False, True)
        first, second = seeded(1), seeded(1)  # off, as much is drawn as on
        assert mix.make_params(4, first) == [None] * 4
        assert None not in other.make_params(4, second)
        assert torch.equal(first.get_state(), second.get_state())
