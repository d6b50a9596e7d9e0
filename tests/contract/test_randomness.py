"""What is drawn: the distributions that are promised, from (seed, epoch, index) alone."""

from __future__ import annotations

import collections
import math
import statistics
from itertools import product

import pytest
import torch
from mixing_oracle import Plain, assert_same_batch, seeded
from torch.utils.data import DataLoader, DistributedSampler, Subset, default_collate

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice
from detmix.data import (
    SHAPE_CLASSES,
    AugmentedDataset,
    EpochBatchSampler,
    MixCollate,
    VOCDetection,
    collate,
    detection_transforms,
    eval_loader,
    train_loader,
)
from detmix.mixing import sample_seed

MIXUP, CUTMIX = DetectionMixUp(p=1.0), DetectionCutMix(p=1.0)
SOME = [
    DetectionMixUp(p=0.5),
    DetectionCutMix(p=0.5),
    RandomChoice([DetectionMixUp(p=0.5), CUTMIX]),
]


def assert_share(count, total, share):
    """A binomial count, within four standard deviations."""
    error = math.sqrt(share * (1 - share) / total)
    assert count / total == pytest.approx(share, abs=4 * error + 1e-9)


def augmented(root, seed):
    """Return the data set of the shapes in these files, augmented."""
    transform = detection_transforms(None, train=True, photometric=0.5, crop=0.5)
    return AugmentedDataset(VOCDetection(root, classes=SHAPE_CLASSES), transform, seed)


class TestDistributions:
    @pytest.mark.parametrize("alpha", [0.5, 1.5, 8.0])
    @pytest.mark.parametrize("mixer", [DetectionMixUp, DetectionCutMix])
    def test_ratios_have_the_moments_of_the_beta_distribution(self, mixer, alpha):
        params = mixer(alpha=alpha, p=1.0).make_params(8000, seeded(0))
        ratios = [getattr(param.how, "lam", param.how) for param in params]
        # four standard deviations, of the mean and of the variance
        assert statistics.fmean(ratios) == pytest.approx(0.5, abs=2 / math.sqrt(8000))
        variance = 1 / (4 * (2 * alpha + 1))
        assert statistics.pvariance(ratios, 0.5) == pytest.approx(variance, rel=0.06)
        assert all(0 <= ratio <= 1 for ratio in ratios)

    def test_rectangles_lie_everywhere_that_both_images_cover(self):
        a, b = (torch.zeros(3, 10, 40), {}), (torch.ones(3, 30, 8), {})
        mixed = [CUTMIX([a, b], generator=seeded(seed))[0][0] for seed in range(300)]
        covered = torch.stack(mixed).sum(0)[0]
        assert covered.shape == (10, 40)
        assert (covered[:, :8] > 0).all()
        assert (covered[:, 8:] == 0).all()

    @pytest.mark.parametrize("probabilities", [None, (1, 3), (0, 5)])
    def test_p_is_the_share_of_mixed_samples_and_a_choice_leaves_each_its_own(self, probabilities):
        mix = RandomChoice([DetectionMixUp(p=0.2), DetectionCutMix(p=0.9)], probabilities)
        first, second = probabilities or (1, 1)
        chances = 0.2 * first / (first + second), 0.9 * second / (first + second)
        data, nested = MixedDataset(Plain(4000), mix, seed=1), RandomChoice([MIXUP, mix], [0, 1])
        for hows in (
            [param and param.how for param in mix.make_params(4000, seeded(0))],
            [param and param.how for param in map(data.draw_params, range(4000))],
            [param and param.how[1] for param in nested.make_params(4000, seeded(0))],
        ):
            for number, chance in enumerate(chances):
                count = sum(how is not None and how[0] == number for how in hows)
                assert_share(count, 4000, chance)

    def test_in_a_batch_each_is_partner_once_and_never_its_own(self):
        for size in (2, 3, 8):
            seen = set()
            for seed in range(60):
                partners = [param.partner for param in MIXUP.make_params(size, seeded(seed))]
                assert sorted(partners) == list(range(size))
                seen |= set(enumerate(partners))
            assert seen == {(a, b) for a in range(size) for b in range(size) if a != b}

    def test_in_a_data_set_all_others_are_as_likely(self):
        mixed, counts = MixedDataset(Plain(5), DetectionMixUp(p=1.0), seed=3), collections.Counter()
        for epoch in range(400):
            mixed.set_epoch(epoch)
            counts.update((index, mixed.draw_params(index).partner) for index in range(5))
        assert len(counts) == 20
        for (own, partner), count in counts.items():
            assert own != partner
            assert_share(count, 400, 1 / 4)


class TestSeeds:
    def test_sample_seeds_are_frozen_all_different_and_from_the_whole_range(self):
        # Runs of different versions are only comparable while these stay.
        assert sample_seed(0, 0, 0) == 7683044551549099801
        assert sample_seed(42, 7, 4951, "mixing") == 932380681451282824
        names = product((0, 1, 12, 2**40), range(24), range(100), ("", "augment", "mixing"))
        seeds = [sample_seed(*name) for name in names]
        assert len(set(seeds)) == len(seeds)
        assert 0 <= min(seeds) <= 2**58 < 2**63 - 2**58 <= max(seeds) < 2**63

    @pytest.mark.parametrize("mix", SOME)
    def test_decide_for_each_sample_whatever_the_order_of_the_batch(self, mix):
        seeds = [sample_seed(0, 0, index) for index in range(9)]
        params = mix.make_params(9, seeds=seeds)
        assert 0 < params.count(None) < 9
        for order in ([4, 0, 8, 2, 6, 1, 3, 7, 5], [4, 0, 8]):
            part = mix.make_params(len(order), seeds=[seeds[index] for index in order])
            for param, index in zip(part, order, strict=True):
                assert (param and param.how) == (params[index] and params[index].how)
                if param is not None and len(order) == 9:
                    assert order[param.partner] == params[index].partner

    @pytest.mark.parametrize("place", ["data set", "batch", "augmentation"])
    def test_seed_and_epoch_decide(self, shapes_root, place):
        runs = []
        for seed, epoch in ((7, 2), (7, 2), (7, 3), (8, 2)):
            mix = DetectionMixUp(p=1.0)
            dataset = MixedDataset(Plain(), mix, seed=seed)
            if place == "augmentation":
                dataset = augmented(shapes_root, seed)
            torch.manual_seed(len(runs))  # which must not matter, nor the order
            state = torch.get_rng_state()
            dataset.set_epoch(epoch)
            if place == "batch":
                runs.append(MixCollate(mix, seed)([Plain()[index] for index in range(6)]))
            else:
                order = range(6) if runs else range(5, -1, -1)
                samples = {index: dataset[index] for index in order}
                runs.append(collate([samples[index] for index in range(6)]))
            assert torch.equal(torch.get_rng_state(), state)
        assert_same_batch(runs[1], runs[0])
        for images, _ in runs[2:]:
            assert not all(map(torch.equal, images, runs[0][0]))

    def test_one_data_set_within_another_of_the_same_seed_draws_its_own(self):
        inner = MixedDataset(Plain(50), MIXUP, seed=1)
        outer = MixedDataset(Subset(inner, range(50)), MIXUP, seed=1)
        pairs = [(inner.draw_params(i), outer.draw_params(i)) for i in range(50)]
        assert sum(a.partner == b.partner for a, b in pairs) < 5
        assert not any(a.how == b.how for a, b in pairs)

    @pytest.mark.parametrize("place", ["dataset", "collate_fn"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_without_a_seed_torch_s_governs_and_no_two_workers_draw_alike(self, place, workers):
        data, how = Plain(), MIXUP
        if place == "dataset":
            data, how = MixedDataset(data, MIXUP), collate
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            batches = DataLoader(data, 3, collate_fn=how, num_workers=workers)
            drawn = [target for _, targets in batches for target in targets]
            runs.append([(*t["labels"].tolist(), *t["box_weights"].tolist()) for t in drawn])
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]
        assert len({weights for *_, weights in runs[0]}) == 12


class TestLoaders:
    @pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (0, 2), (1, 2)])
    def test_the_order_is_that_of_torch_and_can_begin_within(self, rank, num_processes):
        sampler = EpochBatchSampler(21, 2, 5, rank, num_processes)
        oracle = DistributedSampler(range(21), num_processes, rank, True, seed=5, drop_last=True)
        for epoch in (3, 4):
            oracle.set_epoch(epoch)
            order = list(oracle)
            whole = [order[i : i + 2] for i in range(0, len(order) // 2 * 2, 2)]
            for start in ([], [1], [4], [99], []):  # the next epoch begins at its beginning
                sampler.set_epoch(epoch, *start)
                assert list(sampler) == whole[sum(start) :]
                assert len(sampler) == len(whole)

    def test_what_makes_no_batch_is_refused(self):
        for size, batch_size, num_processes in ((3, 4, 1), (7, 4, 2), (4, 0, 1)):
            with pytest.raises(ValueError, match=f"{batch_size}"):
                EpochBatchSampler(size, batch_size, 0, 0, num_processes)
        with pytest.raises(ValueError, match="collate_fn"):  # a mixer collates by itself
            train_loader(Plain(4), 2, seed=0, mix=MIXUP, collate_fn=default_collate)

    @staticmethod
    def epochs(root, workers, place):
        """The batches of each of three epochs: real files, augmented and mixed."""
        dataset = augmented(root, seed=7)
        mix = DetectionMixUp(p=0.7, fill=114, epochs=3, off_epochs=1)
        if place == "dataset":
            dataset = MixedDataset(dataset, mix, seed=7)
        on_batch = mix if place == "batch" else None
        loader = train_loader(dataset, 4, seed=7, workers=workers, mix=on_batch)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            mix.set_epoch(epoch)
            loader.batch_sampler.set_epoch(epoch)
            yield list(loader)

    @pytest.mark.parametrize("place", ["batch", "dataset"])
    def test_batches_are_the_same_with_any_number_of_workers(self, shapes_root, place):
        runs = (self.epochs(shapes_root, workers, place) for workers in (0, 2))
        for epoch, (batches, others) in enumerate(zip(*runs, strict=True)):
            for batch, other in zip(batches, others, strict=True):
                assert_same_batch(other, batch)
            targets = [target for _, part in batches for target in part]
            assert sorted(target["image_id"] for target in targets) == list(range(24))
            least = min(target["box_weights"].min() for target in targets if len(target["boxes"]))
            assert least == 1 if epoch == 2 else 0 < least < 1, "the last epoch mixes nothing"

    @pytest.mark.parametrize(
        ("size", "num_processes", "workers"), [(8, 1, 0), (10, 3, 0), (2, 3, 0), (5, 2, 1)]
    )
    def test_evaluation_visits_every_sample_once(self, size, num_processes, workers):
        seen = []
        for rank in range(num_processes):
            share = {"rank": rank, "num_processes": num_processes}
            loader = eval_loader(Plain(size), 2, workers=workers, **share)
            for _ in range(2):  # a second pass is the same
                mine = [target["image_id"] for _, targets in loader for target in targets]
            seen += mine
        assert sorted(seen) == list(range(size))
