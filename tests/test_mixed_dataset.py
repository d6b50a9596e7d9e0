"""`MixedDataset` and its seeds: independent partners, the same in whatever process."""

from __future__ import annotations

import collections
import math
import statistics

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from detmix import DetectionMixUp, MixedDataset, mixup
from detmix.mixing import SharedEpoch, sample_seed

CONTEXTS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


class Plain(Dataset):
    """Sample i is an image full of i, with one box of label i + 1."""

    def __init__(self, size=10, bad=None):
        self.size = size
        self.bad = bad
        self.epoch = SharedEpoch()

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch.value = epoch

    def __getitem__(self, index):
        image = torch.full((3, 6 + index % 3, 8 - index % 4), index % 256, dtype=torch.uint8)
        box = torch.tensor([[0.0, math.nan if index == self.bad else 0.0, 2.0 + index, 3.0]])
        target = {"boxes": box, "labels": torch.tensor([index + 1]), "image_id": index}
        return image, {**target, "epoch": self.epoch.value}


def unpack(samples):
    return samples


def labels_of(sample):
    return tuple(sample[1]["labels"].tolist())


def load_all(dataset, **settings):
    batches = DataLoader(dataset, batch_size=3, collate_fn=unpack, **settings)
    return [sample for batch in batches for sample in batch]


def assert_same_samples(samples, expected):
    torch.testing.assert_close(list(samples), list(expected), rtol=0, atol=0)


class TestPartners:
    def test_sample_is_mixup_with_the_partner_it_names(self):
        plain = Plain()
        mixed = MixedDataset(plain, DetectionMixUp(p=1.0, fill=7), seed=1)
        for index in range(len(mixed)):
            image, target = mixed[index]
            partner = target["labels"][1].item() - 1
            lam = target["box_weights"][0].double().item()
            expected, expected_target = mixup(*plain[index], *plain[partner], lam, 7)
            # λ is known from the weights to float32 only: a pixel at a tie may differ by one.
            assert (image.int() - expected.int()).abs().max() <= 1
            torch.testing.assert_close(target, expected_target)
            assert target["image_id"] == index

    def test_uniform_over_the_others_and_never_itself(self):
        mixed = MixedDataset(Plain(5), DetectionMixUp(p=1.0), seed=3)
        counts = collections.Counter()
        epochs = 400
        for epoch in range(epochs):
            mixed.set_epoch(epoch)
            counts.update(labels_of(mixed[index]) for index in range(5))
        assert len(counts) == 20
        assert all(own != partner for own, partner in counts)
        # Each of the 20 pairs is a binomial of 400 draws at 1/4; chi-squared of 15 degrees of
        # freedom exceeds 44.3 once in 10,000.
        chi_squared = sum((count - epochs / 4) ** 2 / (epochs / 4) for count in counts.values())
        assert chi_squared < 44.3

    def test_p_0_leaves_samples_and_adds_weights(self):
        plain, mixed = Plain(), MixedDataset(Plain(), DetectionMixUp(p=0.0), seed=1)
        assert len(mixed) == len(plain)
        for index in range(len(plain)):
            image, target = plain[index]
            assert_same_samples([mixed[index]], [(image, {**target, "box_weights": torch.ones(1)})])

    def test_p_is_the_share_of_mixed_samples(self):
        mixed = MixedDataset(Plain(1000), DetectionMixUp(p=0.3), seed=1)
        share = sum(len(labels_of(mixed[index])) == 2 for index in range(1000)) / 1000
        assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 1000))

    def test_a_single_sample_stays_as_it_is(self):
        mixed = MixedDataset(Plain(1), DetectionMixUp(p=1.0), seed=1)
        assert labels_of(mixed[0]) == (1,)
        assert mixed[0][1]["box_weights"].tolist() == [1.0]

    def test_input_samples_are_not_changed(self):
        samples = [Plain()[i] for i in range(4)]
        list(MixedDataset(samples, DetectionMixUp(p=1.0), seed=1))
        assert_same_samples(samples, [Plain()[i] for i in range(4)])

    def test_mixed_twice_weights_are_products(self):
        mix = DetectionMixUp(p=1.0)
        twice = MixedDataset(MixedDataset(Plain(), mix, seed=1), mix, seed=2)
        for _, target in (twice[i] for i in range(10)):
            assert target["box_weights"].shape == (4,)
            assert target["box_weights"].sum().item() == pytest.approx(1, rel=1e-6)


class TestIndices:
    def make(self):
        return MixedDataset(Plain(), DetectionMixUp(p=1.0), seed=1)

    def test_negative_index_counts_from_the_end(self):
        mixed = self.make()
        assert_same_samples([mixed[-1], mixed[-10]], [mixed[9], mixed[0]])

    @pytest.mark.parametrize("index", [10, -11])
    def test_index_out_of_range(self, index):
        with pytest.raises(IndexError, match=rf"index {index} is out of range for 10 samples"):
            self.make()[index]

    def test_iteration_ends(self):
        assert len(list(self.make())) == 10

    @pytest.mark.parametrize(
        "make",
        [lambda d: Subset(d, [5, 2, 8]), lambda d: [d[5], d[2], d[8]]],
        ids=["Subset", "list"],
    )
    def test_any_map_style_data_set(self, make):
        mixed = MixedDataset(make(Plain()), DetectionMixUp(p=1.0), seed=1)
        mixed.set_epoch(1)
        assert [labels_of(mixed[i])[0] for i in range(3)] == [6, 3, 9]
        assert {label for i in range(3) for label in labels_of(mixed[i])} == {6, 3, 9}

    def test_bad_sample_is_named(self):
        mixed = MixedDataset(Plain(3, bad=1), DetectionMixUp(p=0.0), seed=1)
        assert labels_of(mixed[0]) == (1,)
        with pytest.raises(ValueError, match=r"sample 1: 'boxes'\[0\].*nan"):
            mixed[1]

    def test_bad_partner_is_named(self):
        mixed = MixedDataset(Plain(2, bad=1), DetectionMixUp(p=1.0), seed=1)
        with pytest.raises(ValueError, match=r"sample 1: 'boxes'\[0\].*nan"):
            mixed[0]

    def test_pair_that_does_not_match_is_named(self):
        (image, target), (other, other_target) = Plain()[0], Plain()[1]
        samples = [(image, target), (other.float(), other_target)]
        mixed = MixedDataset(samples, DetectionMixUp(p=1.0), seed=1)
        with pytest.raises(ValueError, match=r"mixing sample 0 with sample 1: .*dtype"):
            mixed[0]


class TestSeed:
    def test_the_same_samples_in_any_number_of_workers_and_any_order(self):
        mixed = MixedDataset(Plain(), DetectionMixUp(p=0.7), seed=1)
        mixed.set_epoch(2)
        expected = [mixed[i] for i in range(10)]
        torch.manual_seed(9)  # which must not matter
        assert_same_samples([mixed[i] for i in reversed(range(10))], reversed(expected))
        for num_workers in (0, 1, 2):
            assert_same_samples(load_all(mixed, num_workers=num_workers), expected)

    def test_another_epoch_or_seed_makes_other_samples_and_an_epoch_can_be_repeated(self):
        def run(seed, epoch):
            mixed = MixedDataset(Plain(), DetectionMixUp(p=1.0), seed=seed)
            mixed.set_epoch(epoch)
            return [(*labels_of(s), *s[1]["box_weights"].tolist()) for s in mixed]

        assert run(1, 0) == run(1, 0)
        runs = [run(1, 0), run(1, 1), run(2, 0)]
        for i in range(10):
            assert len({samples[i] for samples in runs}) == 3

    def test_one_within_another_of_the_same_seed_draws_its_own(self):
        mix = DetectionMixUp(p=1.0)
        inner = MixedDataset(Plain(50), mix, seed=1)
        outer = MixedDataset(Subset(inner, range(50)), mix, seed=1)
        pairs = [(inner.draw_params(i), outer.draw_params(i)) for i in range(50)]
        assert sum(a.partner == b.partner for a, b in pairs) < 5
        assert not any(a.how == b.how for a, b in pairs)

    def test_with_a_seed_torch_s_generator_is_left_alone(self):
        mixed = MixedDataset(Plain(), DetectionMixUp(p=1.0), seed=1)
        state = torch.get_rng_state()
        list(mixed)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_without_a_seed_torch_manual_seed_governs(self, num_workers):
        mixed = MixedDataset(Plain(), DetectionMixUp(p=1.0))
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            samples = load_all(mixed, num_workers=num_workers)
            runs.append([(*labels_of(s), *s[1]["box_weights"].tolist()) for s in samples])
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]
        assert len({weights for *_, weights in runs[0]}) == 10  # no two workers draw alike


class TestEpochs:
    def test_set_epoch_reaches_the_data_set_underneath(self):
        mix = DetectionMixUp(p=1.0)
        mixed = MixedDataset(MixedDataset(Plain(), mix, seed=1), mix, seed=2)
        mixed.set_epoch(4)
        assert mix.epoch == 4
        assert mixed[0][1]["epoch"] == 4

    @pytest.mark.parametrize("context", CONTEXTS)
    def test_set_epoch_and_schedule_reach_persistent_workers(self, context):
        mix = DetectionMixUp(p=1.0, epochs=4, off_epochs=2)
        mixed = MixedDataset(Plain(), mix, seed=1)
        loader = DataLoader(
            mixed,
            batch_size=5,
            collate_fn=unpack,
            num_workers=2,
            persistent_workers=True,
            multiprocessing_context=context,
        )
        for epoch in range(4):
            mixed.set_epoch(epoch)
            samples = [sample for batch in loader for sample in batch]
            assert [target["epoch"] for _, target in samples] == [epoch] * 10
            assert {len(labels_of(sample)) for sample in samples} == {2 if epoch < 2 else 1}
            assert_same_samples(samples, [mixed[i] for i in range(10)])


class TestSampleSeed:
    def test_frozen_numbers(self):
        # Runs of different versions are only comparable while these stay.
        assert sample_seed(0, 0, 0) == 7683044551549099801
        assert sample_seed(42, 7, 4951, "mixing") == 932380681451282824

    def test_no_collision_over_a_grid_and_within_range(self):
        seeds = [
            sample_seed(seed, epoch, index, stream)
            for seed in (0, 1, 2**40)
            for epoch in range(12)
            for index in range(400)
            for stream in ("", "augment", "mixing")
        ]
        assert len(set(seeds)) == len(seeds)
        assert min(seeds) >= 0
        assert max(seeds) < 2**63
        # Uniform: the mean of n numbers is off by 1 / sqrt(12 n).
        mean = statistics.fmean(seed / 2**63 for seed in seeds)
        assert mean == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(seeds)))

    def test_numbers_do_not_run_into_each_other(self):
        assert sample_seed(1, 23, 4) != sample_seed(12, 3, 4)
        assert sample_seed(1, 2, 34) != sample_seed(1, 23, 4)
