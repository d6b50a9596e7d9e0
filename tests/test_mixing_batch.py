"""`DetectionMixUp` on batches, in collate functions and under a schedule."""

from __future__ import annotations

import copy
import io
import math
import pickle
import statistics

import pytest
import torch
from mixing_oracle import DEVICES
from torch import nn
from torch.utils.data import DataLoader

from detmix import DetectionMixUp, mixup
from detmix.mixing import DetectionMixer, MixParams, SharedEpoch, sample_seed

CONTEXTS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


class Plain(torch.utils.data.Dataset):
    """Sample i is an image full of i, of a size of its own, with one box of label i + 1."""

    def __init__(self, size=12):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = torch.full((3, 6 + index % 3, 8 - index % 4), index, dtype=torch.uint8)
        box = torch.tensor([[0.0, 0.0, 2.0 + index, 3.0]])
        return image, {"boxes": box, "labels": torch.tensor([index + 1]), "image_id": index}


def make_batch(size, device="cpu"):
    samples = [Plain(size)[i] for i in range(size)]
    images = [image.to(device) for image, _ in samples]
    targets = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for _, target in samples
    ]
    return images, targets


def who_with_whom(targets):
    """Return [(own label, partner's label or None)]."""
    return [(*target["labels"].tolist(), None)[:2] for target in targets]


def assert_same_batch(batch, expected):
    torch.testing.assert_close(batch[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(batch[1], expected[1], rtol=0, atol=0)


class TestBatch:
    @pytest.mark.parametrize("device", DEVICES)
    def test_transform_is_mixup_of_the_pairs_it_is_given(self, device):
        images, targets = make_batch(3, device)
        params = [MixParams(2, 0.25), None, MixParams(1, 1.0)]
        samples = list(zip(images, targets, strict=True))
        mixed = DetectionMixUp(fill=9).transform(samples, params)
        for index, (partner, lam) in ((0, (2, 0.25)), (2, (1, 1.0))):
            pair = (*samples[index], *samples[partner])
            torch.testing.assert_close(mixed[index], mixup(*pair, lam, 9), rtol=0, atol=0)
        assert mixed[1][0] is images[1]
        assert mixed[1][1]["box_weights"].tolist() == [1.0]

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
    def test_forward_applies_the_params_it_draws(self, device, p):
        images, targets = make_batch(7, device)
        mix = DetectionMixUp(p=p)
        params = mix.make_params(7, torch.Generator().manual_seed(5))
        result = mix(images, targets, generator=torch.Generator().manual_seed(5))
        expected = mix.transform(list(zip(images, targets, strict=True)), params)
        assert_same_batch(result, ([x for x, _ in expected], [t for _, t in expected]))
        assert all(image.device.type == device for image in result[0])

    def test_all_ways_to_pass_a_batch_agree(self):
        images, targets = make_batch(5)
        samples = list(zip(images, targets, strict=True))
        mix = DetectionMixUp(p=1.0)
        results = []
        for arguments in ((images, targets), (samples,), tuple(zip(*samples, strict=True))):
            torch.manual_seed(3)
            results.append(mix(*arguments))
        assert isinstance(results[0][0], list)
        assert_same_batch(results[1], results[0])
        assert_same_batch(results[2], results[0])

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
    def test_one_tensor_in_one_tensor_out(self, device, dtype):
        images = (torch.rand(4, 3, 6, 8) * 255).to(device, dtype)
        _, targets = make_batch(4, device)
        mix = DetectionMixUp(p=0.7)
        stacked, targets_a = mix(images, targets, generator=torch.Generator().manual_seed(1))
        listed, targets_b = mix(list(images), targets, generator=torch.Generator().manual_seed(1))
        assert isinstance(stacked, torch.Tensor)
        assert stacked.dtype == dtype
        assert torch.equal(stacked, torch.stack(listed))
        torch.testing.assert_close(targets_a, targets_b, rtol=0, atol=0)

    def test_p_0_leaves_the_batch_and_adds_weights(self):
        images, targets = make_batch(6)
        mixed, mixed_targets = DetectionMixUp(p=0.0)(images, targets)
        torch.testing.assert_close(mixed, images, rtol=0, atol=0)
        for target, before in zip(mixed_targets, targets, strict=True):
            assert target["box_weights"].tolist() == [1.0]
            assert "box_weights" not in before
            torch.testing.assert_close({**before, "box_weights": target["box_weights"]}, target)

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_p_1_mixes_all_each_being_partner_once_and_never_its_own(self, size):
        mix = DetectionMixUp(p=1.0)
        partners_seen = set()
        for seed in range(60):
            params = mix.make_params(size, torch.Generator().manual_seed(seed))
            partners = [param.partner for param in params]
            assert sorted(partners) == list(range(size))
            assert all(partner != index for index, partner in enumerate(partners))
            partners_seen |= set(enumerate(partners))
        assert len(partners_seen) == size * (size - 1)

    def test_p_is_the_share_of_mixed_samples(self):
        mix = DetectionMixUp(p=0.3)
        generator = torch.Generator().manual_seed(0)
        drawn = [param for _ in range(500) for param in mix.make_params(10, generator)]
        share = sum(param is not None for param in drawn) / len(drawn)
        assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 5000))

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 8.0])
    def test_ratios_have_the_moments_of_the_beta_distribution(self, alpha):
        mix = DetectionMixUp(alpha=alpha, p=1.0)
        generator = torch.Generator().manual_seed(0)
        ratios = [param.how for _ in range(200) for param in mix.make_params(100, generator)]
        variance = 1 / (4 * (2 * alpha + 1))
        # Kurtosis of Beta(α, α) less 3 is -6 / (2α + 3).
        variance_error = variance * math.sqrt((2 - 6 / (2 * alpha + 3)) / len(ratios))
        assert statistics.fmean(ratios) == pytest.approx(
            0.5, abs=4 * math.sqrt(variance / len(ratios))
        )
        assert statistics.pvariance(ratios, 0.5) == pytest.approx(variance, abs=4 * variance_error)
        assert all(0 <= ratio <= 1 for ratio in ratios)

    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_batch_of_one_stays_as_it_is(self, p):
        images, targets = make_batch(1)
        mixed, mixed_targets = DetectionMixUp(p=p)(images, targets)
        assert torch.equal(mixed[0], images[0])
        assert mixed_targets[0]["box_weights"].tolist() == [1.0]

    def test_empty_batch(self):
        mix = DetectionMixUp(p=1.0)
        assert mix([], []) == ([], [])
        stacked, targets = mix(torch.zeros(0, 3, 4, 4), [])
        assert stacked.shape == (0, 3, 4, 4)
        assert targets == []

    def test_inputs_are_not_changed(self):
        batch = make_batch(6)
        before = copy.deepcopy(batch)
        DetectionMixUp(p=0.5)(*batch)
        assert_same_batch(batch, before)

    def test_reproducible_under_either_generator(self):
        mix, batch = DetectionMixUp(p=0.8), make_batch(8)
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(mix(*batch))
        assert_same_batch(runs[0], runs[1])
        assert who_with_whom(runs[0][1]) != who_with_whom(runs[2][1])
        state = torch.get_rng_state()
        explicit = [mix(*batch, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
        assert_same_batch(*explicit)
        assert torch.equal(torch.get_rng_state(), state)

    def test_seeds_decide_for_each_sample_whatever_the_order_of_the_batch(self):
        mix, seeds = DetectionMixUp(p=0.5), [sample_seed(0, 0, index) for index in range(9)]
        params = mix.make_params(9, seeds=seeds)
        order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
        shuffled = mix.make_params(9, seeds=[seeds[index] for index in order])
        for place, index in enumerate(order):
            if params[index] is None:
                assert shuffled[place] is None
            else:
                assert shuffled[place].how == params[index].how
                assert order[shuffled[place].partner] == params[index].partner
        # in another batch: the same ratio, perhaps another partner
        part = mix.make_params(4, seeds=seeds[:4])
        assert [p and p.how for p in part] == [p and p.how for p in params[:4]]


class TestModule:
    def test_is_a_module_that_says_its_settings(self):
        mix = DetectionMixUp(alpha=2.0, p=0.25, fill=(1, 2, 3), epochs=5, off_epochs=2)
        assert isinstance(mix, nn.Module)
        assert isinstance(mix, DetectionMixer)
        text = "alpha=2.0, fill=(1, 2, 3), p=0.25, epochs=5, off_epochs=2"
        assert repr(mix) == f"DetectionMixUp({text})"
        assert mix.to("cpu").eval().p == 0.25
        assert not mix.state_dict()

    @pytest.mark.parametrize("twin", ["deepcopy", "pickle", "torch.save"])
    def test_copies_keep_settings_and_have_an_epoch_of_their_own(self, twin):
        mix = DetectionMixUp(alpha=2.0, p=1.0, epochs=5, off_epochs=2)
        mix.set_epoch(3)
        if twin == "deepcopy":
            other = copy.deepcopy(mix)
        elif twin == "pickle":
            other = pickle.loads(pickle.dumps(mix))
        else:
            torch.save(mix, file := io.BytesIO())
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert repr(other) == repr(mix)
        assert (other.epoch, other.active) == (3, False)
        other.set_epoch(0)
        assert (mix.epoch, mix.active, other.active) == (3, False, True)
        assert mixed_per_epoch(loader(other, num_workers=1, persistent_workers=True), other) == (
            [True, True, True, False, False]
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"p": 1.5}, r"p must be in \[0, 1\], got 1.5"),
            ({"p": -0.1}, r"p must be in \[0, 1\], got -0.1"),
            ({"p": math.nan}, r"p must be in \[0, 1\], got nan"),
            ({"alpha": 0}, r"alpha must be positive and finite, got 0"),
            ({"alpha": -1.0}, r"alpha .* got -1.0"),
            ({"alpha": math.inf}, r"alpha .* got inf"),
            ({"alpha": math.nan}, r"alpha .* got nan"),
            ({"off_epochs": -1}, r"off_epochs must not be negative, got -1"),
            ({"off_epochs": 3}, r"off_epochs=3 needs epochs"),
            ({"epochs": 20, "off_epochs": 20}, r"off_epochs=20 of epochs=20 would never mix"),
            ({"epochs": 20, "off_epochs": 21}, r"off_epochs=21 of epochs=20 would never mix"),
            ({"epochs": 0}, r"epochs must be positive, got 0"),
        ],
    )
    def test_settings_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DetectionMixUp(**arguments)

    def test_negative_epoch(self):
        with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
            DetectionMixUp().set_epoch(-1)

    def test_shared_epoch_says_its_number(self):
        epoch = SharedEpoch(3)
        assert repr(epoch) == "SharedEpoch(3)"
        assert copy.deepcopy(epoch).value == 3


class TestBadBatch:
    def test_different_numbers_of_images_and_targets(self):
        images, targets = make_batch(3)
        with pytest.raises(ValueError, match="got 3 images but 2 targets"):
            DetectionMixUp()(images, targets[:2])

    def test_tensor_without_targets(self):
        with pytest.raises(ValueError, match="targets are needed"):
            DetectionMixUp()(torch.zeros(2, 3, 4, 4))

    @pytest.mark.parametrize("p", [0.0, 1.0])
    @pytest.mark.parametrize(("image_id", "name"), [(77, r"sample 2 \(image_id 77\)"), (None, "2")])
    def test_bad_sample_is_named_whether_mixed_or_not(self, p, image_id, name):
        images, targets = make_batch(4)
        targets[2] |= {"boxes": torch.tensor([[0, math.nan, 1, 1]]), "image_id": image_id}
        with pytest.raises(ValueError, match=rf"{name}: 'boxes'\[0\].*nan"):
            DetectionMixUp(p=p)(images, targets)

    def test_pair_that_does_not_match_is_named(self):
        images, targets = make_batch(2)
        names = r"sample \d \(image_id \d\) with sample \d \(image_id \d\)"
        with pytest.raises(ValueError, match=rf"mixing {names}: images .*dtype"):
            DetectionMixUp(p=1.0)([images[0], images[1].float()], targets)
        targets[1]["area"] = torch.ones(1)
        with pytest.raises(ValueError, match=rf"mixing {names}: .*per-object key 'area'"):
            DetectionMixUp(p=1.0)(images, targets)

    def test_injected_ratio_out_of_range(self):
        images, targets = make_batch(2)
        samples = list(zip(images, targets, strict=True))
        with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got 1.5"):
            DetectionMixUp().transform(samples, [MixParams(1, 1.5), None])


def loader(mix, **settings):
    settings = {"batch_size": 3, "collate_fn": mix, **settings}
    return DataLoader(Plain(), **settings)


def mixed_per_epoch(batches, mix, epochs=5):
    """Return for each epoch whether samples were mixed: all (True) or none (False)."""
    mixed = []
    for epoch in range(epochs):
        mix.set_epoch(epoch)
        found = {len(target["labels"]) == 2 for _, targets in batches for target in targets}
        assert len(found) == 1
        mixed.append(found.pop())
    return mixed


class TestLoader:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_collate_fn(self, num_workers):
        seen = []
        for images, targets in loader(DetectionMixUp(p=1.0), num_workers=num_workers):
            for image, target in zip(images, targets, strict=True):
                own, partner = (Plain()[label - 1][0] for label in target["labels"].tolist())
                lam = target["box_weights"][0].item()
                assert target["box_weights"].sum().item() == pytest.approx(1)
                height = max(own.shape[1], partner.shape[1])
                width = max(own.shape[2], partner.shape[2])
                assert image.shape == (3, height, width)
                corner = lam * own[0, 0, 0].item() + (1 - lam) * partner[0, 0, 0].item()
                assert abs(image[0, 0, 0].item() - corner) <= 0.5 + 1e-4
                seen.append(target["image_id"])
        assert seen == list(range(12))

    def test_reproducible_under_manual_seed_and_different_in_each_worker(self):
        def run(seed):
            torch.manual_seed(seed)
            batches = list(loader(DetectionMixUp(p=1.0), num_workers=2))
            return [target["box_weights"].tolist() for _, targets in batches for target in targets]

        first, again, other = run(1), run(1), run(2)
        assert first == again
        assert first != other
        assert len(set(map(tuple, first))) == len(first)

    @pytest.mark.parametrize("context", CONTEXTS)
    def test_schedule_reaches_persistent_workers(self, context):
        mix = DetectionMixUp(p=1.0, epochs=5, off_epochs=2)
        batches = loader(
            mix, num_workers=2, persistent_workers=True, multiprocessing_context=context
        )
        assert mixed_per_epoch(batches, mix) == [True, True, True, False, False]
        assert mixed_per_epoch(batches, mix, epochs=1) == [True]  # and it comes back on

    def test_schedule_switches_off_without_changing_what_is_drawn(self):
        mix = DetectionMixUp(p=1.0, epochs=2, off_epochs=1)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        mix.make_params(4, generators[0])
        mix.set_epoch(1)
        assert mix.make_params(4, generators[1]) == [None] * 4
        assert torch.equal(generators[0].get_state(), generators[1].get_state())

    def test_epochs_without_off_epochs_always_mix(self):
        mix = DetectionMixUp(p=1.0, epochs=5)
        assert mixed_per_epoch(loader(mix), mix) == [True] * 5
