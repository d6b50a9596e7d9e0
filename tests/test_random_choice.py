"""`RandomChoice`: one of several mixers for each sample, each with its own chance and schedule."""

from __future__ import annotations

import copy
import math
import pickle
import random

import pytest
import torch
from mixing_oracle import DEVICES, assert_same_target
from torch.utils.data import DataLoader, Dataset

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, cutmix, mixup
from detmix.mixing import Cut, DetectionMixer, MixParams, sample_seed

CONTEXTS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


class Plain(Dataset):
    """Sample i is an image full of 10 i with one object that covers it all, of label i + 1."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = torch.full((3, 12, 16), 10 * index, dtype=torch.uint8)
        boxes = torch.tensor([[0.0, 0.0, 16.0, 12.0]])
        return image, {"boxes": boxes, "labels": torch.tensor([index + 1]), "image_id": index}


def samples_of(device="cpu"):
    return [
        (
            image.to(device),
            {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()},
        )
        for image, target in (Plain()[index] for index in range(10))
    ]


def both(p=1.0, probabilities=None, mixup_epochs=None, cutmix_epochs=None):
    """A choice of mixup and CutMix; ``..._epochs`` are (epochs, off_epochs)."""
    epochs = [pair or (None, 0) for pair in (mixup_epochs, cutmix_epochs)]
    mixers = [
        DetectionMixUp(p=p, epochs=epochs[0][0], off_epochs=epochs[0][1]),
        DetectionCutMix(p=p, epochs=epochs[1][0], off_epochs=epochs[1][1]),
    ]
    return RandomChoice(mixers, probabilities)


def picked(params):
    """The number of the mixer of each sample, None for one that is not mixed."""
    return [None if param is None else param.how[0] for param in params]


class TestChoice:
    @pytest.mark.parametrize("device", DEVICES)
    def test_transform_is_that_of_the_mixer_picked(self, device):
        samples, mix = samples_of(device), both()
        cut = Cut(0.3, 0.4, 0.5)
        params = [MixParams(1, (0, 0.25)), MixParams(2, (1, cut)), None, *[None] * 7]
        mixed = mix.transform(samples, params)
        expected = [
            mixup(*samples[0], *samples[1], 0.25),
            cutmix(*samples[1], *samples[2], cut.rectangle((12, 16))),
        ]
        for (image, target), (other, other_target) in zip(mixed, expected, strict=False):
            assert torch.equal(image, other)
            assert_same_target(target, other_target)
        assert mixed[2][0] is samples[2][0]
        assert mixed[2][1]["box_weights"].tolist() == [1.0]

    @pytest.mark.parametrize("probabilities", [None, (0.5, 0.5), (1, 3), (0.2, 0.8), (0, 5)])
    def test_mixers_are_picked_as_likely_as_they_should(self, probabilities):
        mix, generator = both(probabilities=probabilities), torch.Generator().manual_seed(0)
        numbers = [n for _ in range(300) for n in picked(mix.make_params(10, generator))]
        share = (probabilities or (1, 1))[1] / sum(probabilities or (1, 1))
        error = 4 * math.sqrt(share * (1 - share) / len(numbers))
        assert None not in numbers
        assert sum(numbers) / len(numbers) == pytest.approx(share, abs=error)

    def test_each_mixer_keeps_its_own_chance(self):
        mix = RandomChoice([DetectionMixUp(p=0.2), DetectionCutMix(p=0.9)], [0.25, 0.75])
        assert mix.p == pytest.approx(0.25 * 0.2 + 0.75 * 0.9)
        generator = torch.Generator().manual_seed(0)
        numbers = [n for _ in range(400) for n in picked(mix.make_params(10, generator))]
        for number, share in ((0, 0.05), (1, 0.675)):
            error = 4 * math.sqrt(share * (1 - share) / len(numbers))
            assert numbers.count(number) / len(numbers) == pytest.approx(share, abs=error)

    def test_forward_applies_the_params_it_draws(self):
        mix, samples = both(0.7), samples_of()
        params = mix.make_params(10, torch.Generator().manual_seed(5))
        assert {0, 1, None} <= set(picked(params))
        images, targets = mix(samples, generator=torch.Generator().manual_seed(5))
        for image, target, (other, expected) in zip(
            images, targets, mix.transform(samples, params), strict=True
        ):
            assert torch.equal(image, other)
            assert_same_target(target, expected)

    def test_seeds_decide_for_each_sample_whatever_the_order_of_the_batch(self):
        mix, seeds = both(0.5), [sample_seed(0, 0, index) for index in range(9)]
        params = mix.make_params(9, seeds=seeds)
        order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
        shuffled = mix.make_params(9, seeds=[seeds[index] for index in order])
        assert [p and p.how for p in shuffled] == [params[i] and params[i].how for i in order]

    def test_one_sample_alone_stays(self):
        assert both().make_params(1) == [None]

    def test_choices_can_be_nested(self):
        inner = both(probabilities=(0, 1))
        mix = RandomChoice([inner, DetectionMixUp(p=0.0)], [1, 0])
        images, targets = mix(samples_of(), generator=torch.Generator().manual_seed(1))
        params = mix.make_params(10, torch.Generator().manual_seed(1))
        assert all(param.how[0] == 0 and param.how[1][0] == 1 for param in params)
        assert any(len(image.unique()) == 2 for image in images)
        assert all(target["box_weights"].sum() <= 1 + 1e-6 for target in targets)

    def test_a_drawn_pair_is_always_mixed(self):

        mix, rng = RandomChoice([DetectionMixUp(p=0.0), DetectionCutMix(p=0.0)]), random.Random(0)
        drawn = [mix.draw_pair(rng) for _ in range(50)]
        assert {number for number, _ in drawn} == {0, 1}
        assert all(isinstance(how, Cut if number else float) for number, how in drawn)
        assert all(mix.draw(rng) is None for _ in range(50))


class TestSchedule:
    def test_each_mixer_keeps_its_own(self):
        mix = both(mixup_epochs=(4, 3), cutmix_epochs=(4, 1))
        found = []
        for epoch in range(4):
            mix.set_epoch(epoch)
            generator = torch.Generator().manual_seed(0)
            numbers = [n for _ in range(10) for n in picked(mix.make_params(10, generator))]
            found.append({number for number in numbers if number is not None})
            assert mix.active == bool(found[-1])
            assert mix.epoch == epoch
        assert found == [{0, 1}, {1}, {1}, set()]

    @pytest.mark.parametrize("context", CONTEXTS)
    def test_reaches_persistent_workers(self, context):
        mix = both(mixup_epochs=(3, 1), cutmix_epochs=(3, 2))
        loader = DataLoader(
            Plain(),
            batch_size=5,
            collate_fn=mix,
            num_workers=2,
            persistent_workers=True,
            multiprocessing_context=context,
        )
        found = []
        for epoch in range(3):
            mix.set_epoch(epoch)
            weights = [t["box_weights"].tolist() for _, targets in loader for t in targets]
            found.append(sum(len(w) == 2 or w != [1.0] for w in weights))
        assert found[0] > 4
        assert found[1] > 0
        assert found[2] == 0

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix))])
    def test_copies_keep_settings_and_have_epochs_of_their_own(self, twin):
        mix = both(0.5, (1, 3), mixup_epochs=(4, 3), cutmix_epochs=(4, 3))
        mix.set_epoch(2)
        other = twin(mix)
        assert repr(other) == repr(mix)
        assert (other.epoch, other.active) == (2, False)
        other.set_epoch(0)
        assert (mix.active, other.active) == (False, True)

    def test_mixed_dataset(self):
        mixed = MixedDataset(Plain(), both(0.8, mixup_epochs=(2, 1), cutmix_epochs=(2, 1)), seed=3)
        numbers = picked([mixed.draw_params(index) for index in range(10)])
        assert {0, 1} <= set(numbers)
        for index, number in enumerate(numbers):
            image, target = mixed[index]
            if number is None:
                assert torch.equal(image, Plain()[index][0])
            elif number == 0:
                assert target["box_weights"].sum().item() == pytest.approx(1)
                assert len(image.unique()) == 1
            assert_same_target(mixed[index][1], target)
        mixed.set_epoch(1)
        assert [mixed.draw_params(index) for index in range(10)] == [None] * 10


class TestSettings:
    def test_is_a_mixer_that_says_its_settings(self):
        mix = both(0.5, (1, 3))
        assert isinstance(mix, DetectionMixer)
        text = repr(mix)
        assert "probabilities=(0.25, 0.75)" in text
        assert "DetectionMixUp(alpha=1.5" in text
        assert "DetectionCutMix(alpha=1.0" in text
        assert not mix.state_dict()

    @pytest.mark.parametrize(
        "probabilities", [(1,), (1, 2, 3), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1)]
    )
    def test_probabilities_that_are_none(self, probabilities):
        with pytest.raises(ValueError, match=r"probabilities must be 2 finite numbers.*got \("):
            both(probabilities=probabilities)

    def test_mixers_that_are_none(self):
        with pytest.raises(ValueError, match="at least one mixer"):
            RandomChoice([])
        with pytest.raises(TypeError, match=r"mixers\[1\] must be a DetectionMixer, got Identity"):
            RandomChoice([DetectionMixUp(), torch.nn.Identity()])

    def test_negative_epoch(self):
        with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
            both().set_epoch(-1)
