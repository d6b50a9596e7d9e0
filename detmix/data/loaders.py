"""Loaders whose batches are a function of (seed, epoch) alone, for training and evaluation.

B is the batch size of one process.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from multiprocessing import parent_process
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, Subset

from detmix.mixing import DetectionMixer, Sample, Target, sample_seed

Batch = tuple[list[Tensor], list[Target]]

# What torch says of a worker that died, as in "DataLoader worker (pid 7) is killed by signal: ...".
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) ([^.]*)")


def collate(samples: Sequence[Sample]) -> Batch:
    """Turn B samples into a list of B images, of any sizes, and a list of B targets."""
    return [image for image, _ in samples], [target for _, target in samples]


class MixCollate:
    """Collate a batch and mix it, with no randomness but that of (seed, epoch, sample index).

    Whether a sample is mixed and its ratio depend on its own index alone; its partner, on which
    others are in the batch. The mixer's `set_epoch` says the epoch, in running workers too.
    """

    def __init__(self, mix: DetectionMixer, seed: int) -> None:
        self.mix = mix
        self.seed = seed

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collate and mix; every target needs an ``image_id``, an integer or a string."""
        found = [target["image_id"] for _, target in samples]
        ids = [image_id if isinstance(image_id, str) else int(image_id) for image_id in found]
        seeds = [sample_seed(self.seed, self.mix.epoch, each, "mixing") for each in ids]
        return collate(self.mix.transform(samples, self.mix.make_params(len(samples), seeds=seeds)))

    def mix_batch(self, images: list[Tensor], targets: list[Target]) -> Batch:
        """Mix a batch that is collated already, on whatever device it lies."""
        return self(list(zip(images, targets, strict=True)))


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of a permutation that is a function of (seed, epoch); can begin within an epoch.

    Incomplete batches are left out, and ValueError is raised where there are not enough samples
    for a single one. Of several processes each, numbered from 0 by its ``rank``, takes its share
    of the same global batches.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, num_processes: int = 1
    ) -> None:
        if size < batch_size * num_processes:
            raise ValueError(
                f"{size} samples do not make one batch of {batch_size} in each of "
                f"{num_processes} processes: a smaller batch_size is needed"
            )
        # DistributedSampler asks only for the length of its data set.
        self._order: DistributedSampler[int] = DistributedSampler(
            range(size),  # type: ignore[arg-type]
            num_replicas=num_processes,
            rank=rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self.batch_size = batch_size
        self._batches = BatchSampler(self._order, batch_size, drop_last=True)
        self._start: int = 0
        self._stop: int | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """Begin an epoch, counted from 0, at batch ``start`` of it, and end before ``stop``."""
        self._order.set_epoch(epoch)
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self._batches), self._start, self._stop)


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    seed: int,
    workers: int = 2,
    mix: DetectionMixer | None = None,
    collate_fn: Callable[[list[Any]], Any] = collate,
    rank: int = 0,
    num_processes: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Build the training loader; its ``batch_sampler`` is an `EpochBatchSampler`.

    Args:
        dataset: The samples; those to be mixed with an ``image_id``, an integer or a string.
        batch_size: B, in one process.
        seed: The run's seed.
        workers: Worker processes; they persist over the epochs.
        mix: Mixes each batch of detection samples in the worker.
        collate_fn: Makes a batch where ``mix`` does not; ValueError if both are given.
        rank: Number of this process, from 0.
        num_processes: Number of processes.
        pin_memory: Whether batches are put into page-locked memory for a GPU.
    """
    if mix is not None and collate_fn is not collate:
        raise ValueError(f"mix collates by itself: collate_fn must not be given, got {collate_fn}")
    size = len(dataset)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_sampler=EpochBatchSampler(size, batch_size, seed, rank, num_processes),
        collate_fn=collate_fn if mix is None else MixCollate(mix, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
    )


def eval_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    workers: int = 2,
    collate_fn: Callable[[list[Any]], Any] = collate,
    rank: int = 0,
    num_processes: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Build a loader that visits every sample once over all processes, without padding.

    The arguments are those of `train_loader`; workers start anew for each pass.
    """
    share = range(rank, len(dataset), num_processes)  # type: ignore[arg-type]
    return DataLoader(
        Subset(dataset, share),
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=init_worker,
    )


def take_batches(batches: Iterator[Any], number: int) -> tuple[list[Any], Exception | None]:
    """Return the next batches, [] where there are none, and what keeps them from coming."""
    try:
        return list(islice(batches, number)), None
    except Exception as error:
        return [], error


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Within its context, say what may have ended a loader's worker process."""
    # Torch tells of it wherever the main process happens to be, in the midst of a step too.
    try:
        yield
    except RuntimeError as error:
        found = _DEAD_WORKER.match(str(error))
        if found is None:
            raise
        raise ChildProcessError(
            f"a loader's worker, process {found[1]}, {found[2].strip()}. Most often the system has "
            "ended it for lack of memory, or shared memory (/dev/shm) was full: fewer workers or "
            "a smaller batch take less"
        ) from error


def init_worker(worker_id: int) -> None:
    """Prepare a loader's worker process; pass it as ``worker_init_fn``.

    Without it OpenCV and torch start as many threads in each worker as there are cores, and a
    signal to the whole process group ends workers before the training loop has ended its step.
    """
    # First of all: a thread that is started before, as by the import below, would not have the
    # signal blocked, and the whole process would die of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()  # os.getppid() is another where a server forks the workers
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(parent.pid,), daemon=True).start()
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _obey_parent(parent: int) -> None:
    """End this process at a SIGTERM of its parent, and of nobody else."""
    # At its exit Python ends worker processes that are left in this way, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
