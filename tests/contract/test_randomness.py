"""What is drawn: the distributions that are promised, from (seed, epoch, index) alone."""

from __future__ import annotations

import collections
import math
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from mixing_oracle import Plain, assert_same_batch, seeded
from torch import nn
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    StackDataset,
    Subset,
    default_collate,
    random_split,
)

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, set_epoch
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
from detmix.mixing import DetectionMixer, sample_seed

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


class Reads(Dataset):
    """A data set of a user's: what it reads from, it keeps as it likes."""

    def __init__(self, read, size, **kept):
        self.read, self.size = read, size
        vars(self).update(kept)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.read(self, index)


class Slots:
    __slots__ = ("source",)

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


class Stream(IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        return iter(self.source)


def split(data):
    """Put a random split in order again."""
    part, _ = random_split(data, [len(data), 0], seeded(0))
    return Subset(part, torch.tensor(part.indices).argsort().tolist())


# Each yields the samples of a data set in their order, whatever lies between.
HOLDERS = {
    "Subset": lambda data: Subset(data, range(len(data))),
    "random_split": split,
    "ConcatDataset": lambda data: ConcatDataset(
        [Subset(data, range(2)), Subset(data, range(2, len(data)))]
    ),
    "StackDataset": lambda data: Reads(
        lambda self, i: self.stack[i][1], len(data), stack=StackDataset(range(len(data)), data)
    ),
    "StackDataset by name": lambda data: Reads(
        lambda self, i: self.stack[i]["a"], len(data), stack=StackDataset(a=data)
    ),
    "attribute": lambda data: Reads(lambda self, i: self.source[i], len(data), source=data),
    "list": lambda data: Reads(lambda self, i: self.parts[1][i], len(data), parts=[7, data]),
    "dict of lists": lambda data: Reads(
        lambda self, i: self.parts["a"][0][i], len(data), parts={"a": [data]}
    ),
    "slots": Slots,
    "function": lambda data: Reads(lambda self, i: data[i], len(data)),
    "default argument": lambda data: Reads(lambda self, i, source=data: source[i], len(data)),
    "method": lambda data: Reads(lambda self, i: self.get(i), len(data), get=data.__getitem__),
    "partial": lambda data: Reads(
        lambda self, i: self.get(i), len(data), get=partial(lambda source, i: source[i], data)
    ),
    "named tuple": lambda data: Reads(
        lambda self, i: self.parts[0].source[i],
        len(data),
        parts=[collections.namedtuple("Part", ["source"])(data)],
    ),
    "four deep": lambda data: HOLDERS["dict of lists"](
        HOLDERS["ConcatDataset"](HOLDERS["attribute"](split(data)))
    ),
}
with_each_holder = pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)


def noted(image, target, seed):
    """An augmentation that tells its seed."""
    return image, {**target, "drawn": (*target.get("drawn", ()), seed)}


def stages(mix=None, hold=lambda data: data):
    """Return a data set, augmented and then mixed but in the third epoch."""
    mix = mix or DetectionMixUp(p=1.0, epochs=3, off_epochs=1)
    return MixedDataset(hold(AugmentedDataset(Plain(6), noted, 5)), mix, seed=7)


def collating(mix):
    """Return a collate function that has its mixer from around it."""
    return lambda samples: mix(samples)


class TestUnderneath:
    """What `set_epoch` reaches and the streams of random numbers are told apart by."""

    @with_each_holder
    def test_an_epoch_comes_through_whatever_holds_a_data_set(self, hold):
        plain = stages()
        loader = DataLoader(
            hold(stages()), 3, collate_fn=collate, num_workers=2, persistent_workers=True
        )
        seen = []
        for epoch in (2, 1):
            set_epoch(loader, epoch)
            plain.set_epoch(epoch)
            samples = [sample for batch in loader for sample in zip(*batch, strict=True)]
            assert_same_batch(zip(*samples, strict=True), zip(*plain, strict=True))
            assert {target["epoch"] for _, target in samples} == {epoch}
            weights = {*torch.cat([target["box_weights"] for _, target in samples]).tolist()}
            assert (weights == {1.0}) == (epoch == 2), "the last epoch mixes nothing"
            seen += [tuple(target["drawn"]) for _, target in samples]
        assert len({*seen}) == len(seen), "each epoch is augmented otherwise"

    @with_each_holder
    def test_what_lies_between_changes_nothing(self, hold):
        between = stages(hold=hold)
        outer = [stages(), between, MixedDataset(stages(), MIXUP, seed=7)]
        outer.append(MixedDataset(hold(between), MIXUP, seed=7))
        for epoch in (1, 2):
            for data in outer:
                data.set_epoch(epoch)
            assert_same_batch(zip(*outer[1], strict=True), zip(*outer[0], strict=True))
            assert_same_batch(zip(*outer[3], strict=True), zip(*outer[2], strict=True))

    def test_a_stage_draws_other_numbers_than_those_underneath(self):
        mix = DetectionMixUp(p=1.0)
        stack = [MixedDataset(Plain(50), mix, seed=1)]
        stack.append(MixedDataset(split(stack[0]), mix, seed=1))
        both = ConcatDataset([stack[1], MixedDataset(Plain(50), mix, seed=2)])
        stack.append(MixedDataset(Subset(both, range(50)), mix, seed=1))
        drawn = [[data.draw_params(index) for index in range(50)] for data in stack]
        for number, params in zip((0, 1, 3), drawn, strict=True):  # of those underneath
            seeds = [sample_seed(1, 0, i, f"mixing/dataset/{number}") for i in range(50)]
            assert [param.how for param in params] == [mix.draw(Random(seed)) for seed in seeds]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            pairs = zip(drawn[a], drawn[b], strict=True)
            assert sum(one.partner == other.partner for one, other in pairs) < 6
        for seed, stream in ((5, "augment/1"), (6, "augment")):  # seeds tell apart
            data = AugmentedDataset(split(AugmentedDataset(Plain(4), noted, 5)), noted, seed)
            for index in range(4):
                drawn = [sample_seed(5, 0, index, "augment"), sample_seed(seed, 0, index, stream)]
                assert data[index][1]["drawn"] == (*drawn,)

    @pytest.mark.parametrize(
        "put",
        [
            lambda mixers: mixers,
            lambda mixers: RandomChoice([RandomChoice(mixers[:1]), RandomChoice(mixers[1:])]),
            lambda mixers: nn.Sequential(*mixers),
            lambda mixers: nn.ModuleDict({"a": nn.ModuleList(mixers)}),
            lambda mixers: MixedDataset(Plain(), RandomChoice(mixers)),
            lambda mixers: MixedDataset(MixedDataset(Plain(), mixers[0]), mixers[1]),
            lambda mixers: partial(map, mixers),
            lambda mixers: dict.fromkeys(mixers, 0.5),
            lambda mixers: [MixCollate(mix, 0) for mix in mixers],
            lambda mixers: [collating(mix) for mix in mixers],
            lambda mixers: ChainDataset([Stream(MixedDataset(Plain(), mix)) for mix in mixers]),
            lambda mixers: train_loader(Plain(), 2, seed=0, workers=0, mix=RandomChoice(mixers)),
        ],
    )
    def test_parts_keep_schedules_of_their_own(self, put):
        long, short = {"epochs": 4, "off_epochs": 1}, {"epochs": 4, "off_epochs": 3}
        mixers = [DetectionMixUp(**long), DetectionCutMix(**short)]
        whole = put(mixers)
        for epoch, expected in enumerate(
            [(True, True), (True, False), (True, False), (False,) * 2]
        ):
            set_epoch(whole, epoch)
            assert tuple(mix.active for mix in mixers) == expected
            if isinstance(whole, DetectionMixer):
                assert (whole.active, whole.epoch) == (any(expected), epoch)

    def test_a_set_epoch_of_ones_own_is_called_once_and_prevails(self):
        class Repeats(Reads):
            told = ()

            def set_epoch(self, epoch):
                self.told += (epoch,)
                self.source.set_epoch(epoch // 2)

        inner, other = stages(), stages()
        own = Repeats(lambda self, i: self.source[i], 6, source=inner, other=other)
        whole = Reads(lambda self, i: self.own[i], 6, own=own, twice=[own, inner])
        own.above = whole  # a circle
        set_epoch(DataLoader(whole), 3)
        assert (inner[0][1]["epoch"], other[0][1]["epoch"]) == (1, 3)
        set_epoch(MixedDataset(own, MIXUP), 5)
        set_epoch(own, 6)
        assert (own.told, inner[0][1]["epoch"]) == ((3, 5, 6), 3)

    def test_millions_of_samples_and_names_do_not_hold_it_up(self):
        names = {"set": {*range(10**6)}, "names": ["a"] * 10**6, "paths": [Path("a")] * 10**6}
        samples, inner = [(torch.zeros(1), {}, "a")] * 10**5, stages()
        samples.append(samples)
        data = Reads(lambda self, i: self.inner[i], 6, lists=[names, samples], inner=inner, **names)
        begin = time.process_time()
        set_epoch(data, 2)
        assert time.process_time() - begin < 5
        assert inner[0][1]["epoch"] == 2

    def test_what_takes_no_epoch_is_refused_by_name(self):
        hidden = stages()
        held = type("Hidden", (Reads,), {"data": hidden})(lambda self, i: self.data[i], 6)
        for data in ([torch.zeros(3)], held, Subset(held, [0]), DataLoader(held)):
            with pytest.raises(ValueError, match=rf"{type(data).__name__}.*3"):
                set_epoch(data, 3)
        with pytest.raises(ValueError, match="-1"):
            set_epoch(Subset(hidden, [0]), -1)


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
