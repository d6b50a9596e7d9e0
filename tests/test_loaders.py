"""Loaders: what a batch holds is a function of (seed, epoch), whoever makes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler, default_collate

from detmix.data import AugmentedDataset, VOCDetection, detection_transforms
from detmix.data.loaders import EpochBatchSampler, MixCollate, collate, eval_loader, train_loader
from detmix.data.shapes import SHAPE_CLASSES
from detmix.mixing import DetectionMixUp, MixedDataset


class Plain(Dataset):
    """Sample i is an image full of i, with one box of label i + 1."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = torch.full((3, 8, 8), index, dtype=torch.uint8)
        box = torch.tensor([[0.0, 0.0, 2.0 + index, 3.0]])
        return image, {"boxes": box, "labels": torch.tensor([index + 1]), "image_id": index}


class WorkerProbe(Dataset):
    """Every sample says which process loads it, and takes a while."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.zeros(3, 4, 4), {"pid": os.getpid(), "image_id": index}


def batches_of(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch, start)
    return list(sampler)


def ids_of(batches):
    return [[target["image_id"] for target in targets] for _, targets in batches]


def assert_same(batches, others):
    torch.testing.assert_close(list(batches), list(others), rtol=0, atol=0)


class TestEpochBatchSampler:
    def test_is_a_permutation_that_changes_with_seed_and_epoch(self):
        orders = set()
        for seed in (0, 10):
            sampler = EpochBatchSampler(12, 3, seed)
            for epoch in range(3):
                batches = batches_of(sampler, epoch)
                assert [len(batch) for batch in batches] == [3] * len(sampler) == [3] * 4
                order = tuple(index for batch in batches for index in batch)
                assert sorted(order) == list(range(12))
                assert batches_of(sampler, epoch) == batches
                orders.add(order)
        assert len(orders) == 6

    @pytest.mark.parametrize(("rank", "num_processes"), [(0, 1), (0, 2), (1, 2)])
    def test_order_is_that_of_torch(self, rank, num_processes):
        sampler = EpochBatchSampler(21, 2, 5, rank, num_processes)
        oracle = DistributedSampler(range(21), num_processes, rank, True, seed=5, drop_last=True)
        oracle.set_epoch(3)
        order = list(oracle)
        whole = len(order) // 2 * 2
        assert list(chain(*batches_of(sampler, epoch=3))) == order[:whole]

    @pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
    def test_start_leaves_exactly_the_rest(self, start):
        sampler = EpochBatchSampler(13, 3, seed=1)
        whole = batches_of(sampler, epoch=2)
        assert batches_of(sampler, epoch=2, start=start) == whole[start:]
        assert batches_of(sampler, epoch=2) == whole, "the next epoch begins at its beginning"

    @pytest.mark.parametrize("size", [16, 17, 19])
    def test_two_processes_share_the_batches_of_one(self, size):
        one = batches_of(EpochBatchSampler(size, 4, seed=3), epoch=1)
        two = [batches_of(EpochBatchSampler(size, 2, 3, rank, 2), epoch=1) for rank in (0, 1)]
        assert len(one) == 4
        assert [set(a + b) for a, b in zip(*two, strict=True)] == [set(batch) for batch in one]

    @pytest.mark.parametrize(
        ("size", "batch_size", "num_processes"), [(3, 4, 1), (7, 4, 2), (0, 1, 1)]
    )
    def test_too_few_samples(self, size, batch_size, num_processes):
        with pytest.raises(ValueError, match=f"{size} samples do not make one batch of"):
            EpochBatchSampler(size, batch_size, 0, 0, num_processes)

    def test_batch_size_zero(self):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            EpochBatchSampler(4, 0, 0)


class TestMixCollate:
    def test_is_a_function_of_seed_epoch_and_images(self):
        samples = [Plain(8)[i] for i in (5, 2, 7, 1)]

        def mixed(seed=0, epoch=0, samples=samples):
            mix = DetectionMixUp(p=1.0)
            mix.set_epoch(epoch)
            torch.rand(3)  # the global generator plays no part
            return MixCollate(mix, seed)(samples)

        assert_same([mixed()], [mixed()])
        weights = torch.cat([t["box_weights"] for t in mixed()[1]])
        for other in (mixed(seed=1), mixed(epoch=1), mixed(samples=samples[::-1])):
            others = torch.cat([t["box_weights"] for t in other[1]])
            assert not torch.equal(weights, others)

    def test_persistent_workers_see_the_epoch(self):
        streams = {}
        for workers in (0, 1, 2):
            mix = DetectionMixUp(p=1.0, epochs=3, off_epochs=1)
            loader = train_loader(Plain(12), 4, seed=2, workers=workers, mix=mix)
            streams[workers] = []
            for epoch in range(3):
                mix.set_epoch(epoch)
                loader.batch_sampler.set_epoch(epoch)
                streams[workers].append(list(loader))
        assert_same(streams[1], streams[0])
        assert_same(streams[2], streams[0])
        first, second, last = (
            [target["box_weights"] for _, targets in batches for target in targets]
            for batches in streams[0]
        )
        assert all(len(weights) == 2 for weights in (*first, *second))
        assert sorted(w[0].item() for w in first) != sorted(w[0].item() for w in second)
        assert all(weights.tolist() == [1.0] for weights in last), "the last epoch mixes nothing"

    def test_without_mixing_samples_pass_as_they_are(self):
        images, targets = collate([Plain(3)[1], Plain(3)[2]])
        assert [image.unique().tolist() for image in images] == [[1], [2]]
        assert [target["image_id"] for target in targets] == [1, 2]

    def test_a_mixer_collates_by_itself(self):
        with pytest.raises(ValueError, match="collate_fn must not be given"):
            train_loader(Plain(4), 2, seed=0, mix=DetectionMixUp(), collate_fn=default_collate)


class TestTrainLoader:
    """The whole stream, with real files, augmentation and mixing."""

    @staticmethod
    def stream(root, workers, place, start=0):
        voc = VOCDetection(root, classes=SHAPE_CLASSES)
        transform = detection_transforms(None, train=True, photometric=0.5, crop=0.5)
        dataset = AugmentedDataset(voc, transform, seed=7)
        mix = DetectionMixUp(p=0.7, fill=114)
        if place == "dataset":
            dataset = MixedDataset(dataset, mix, seed=7)
        on_batch = mix if place == "batch" else None
        loader = train_loader(dataset, 4, seed=7, workers=workers, mix=on_batch)
        for epoch in range(2):
            dataset.set_epoch(epoch)
            mix.set_epoch(epoch)
            loader.batch_sampler.set_epoch(epoch, start)
            yield list(loader)

    @pytest.mark.parametrize("place", ["batch", "dataset"])
    def test_is_the_same_with_any_number_of_workers(self, shapes_root, place):
        alone = list(self.stream(shapes_root, 0, place))
        for workers in (1, 2):
            assert_same(self.stream(shapes_root, workers, place), alone)
        first, second = ({t["image_id"]: t for _, ts in epoch for t in ts} for epoch in alone)
        assert sorted(first) == sorted(second) == list(range(24))
        weights = torch.cat([target["box_weights"] for target in first.values()])
        assert 0 < weights.min() < 1
        assert any(
            not torch.equal(target["boxes"], second[key]["boxes"]) for key, target in first.items()
        ), "epochs differ"

    @pytest.mark.parametrize("place", ["batch", "dataset"])
    def test_begins_within_an_epoch(self, shapes_root, place):
        whole = self.stream(shapes_root, 0, place)
        for epoch, rest in zip(whole, self.stream(shapes_root, 1, place, start=4), strict=True):
            assert len(epoch) == 6
            assert_same(rest, epoch[4:])


class TestEvalLoader:
    @pytest.mark.parametrize(("size", "num_processes"), [(8, 1), (10, 3), (2, 3)])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_visits_every_sample_once(self, size, num_processes, workers):
        seen = []
        for rank in range(num_processes):
            loader = eval_loader(
                Plain(size), 2, workers=workers, rank=rank, num_processes=num_processes
            )
            for _ in range(2):  # a second pass is the same
                mine = list(chain(*ids_of(loader)))
            seen += mine
        assert sorted(seen) == list(range(size))


def kill_from_outside(pid, *signals):
    for number in signals:
        subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_workers_leave_signals_to_the_loop(kind):
    if kind == "train":
        loader = train_loader(WorkerProbe(), 1, seed=0, workers=1)
    else:
        loader = eval_loader(WorkerProbe(), 1, workers=1)
    batches = iter(loader)
    pid = next(batches)[1][0]["pid"]
    assert pid != os.getpid()
    kill_from_outside(pid, signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    assert [targets[0]["pid"] for _, targets in batches] == [pid] * 7, "it went on working"


def test_a_worker_ends_with_a_sigterm_of_its_parent():
    def load():
        batches = iter(train_loader(WorkerProbe(), 1, seed=0, workers=1))
        os.kill(next(batches)[1][0]["pid"], signal.SIGTERM)
        list(batches)

    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        load()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_process_with_a_failed_loader_ends(method):
    """Its worker is still there then: the interpreter ends it, and waits for it."""
    code = (
        f"import multiprocessing; multiprocessing.set_start_method('{method}')\n"
        "from detmix.data.loaders import train_loader\n"
        "batches = iter(train_loader([(0, {})] * 9, 1, seed=0, workers=1))\n"
        "next(batches)\n"
        "raise SystemExit(5)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 5
