"""What only long runs meet: memory that would grow, and worker processes that are killed."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import psutil
import pytest
import torch
from tiny import tiny_config

from detmix.data.loaders import eval_loader, explain_dead_workers, train_loader
from detmix.training import DetectorTrainer


def memory():
    """Return the resident mebibytes of this process and of those it started, by process id."""
    process = psutil.Process()
    return {p.pid: p.memory_info().rss / 2**20 for p in (process, *process.children())}


@pytest.mark.slow
def test_memory_does_not_grow(shapes_root, tmp_path, fresh_accelerator):
    """Thousands of steps with a loader's workers, mixing, an average, logs and checkpoints."""
    config = tiny_config(
        shapes_root, tmp_path / "run", "epochs=300", "eval_every=300", "save_every=20",
        "mixing.place=dataset", "data.workers=1", "optim.ema_decay=0.9", "log_every=10",
        "detector.min_size=32", "detector.max_size=32",
    )  # fmt: skip
    seen = {}

    class Watched(DetectorTrainer):
        def begin_epoch(self, epoch):
            seen[epoch] = memory()
            super().begin_epoch(epoch)

    Watched(config).fit()
    before, after = seen[50], seen[299]
    assert before.keys() == after.keys(), "the workers are the same ones"
    assert len(before) > 1
    assert max(after[pid] - before[pid] for pid in before) < 16


class Slow:
    """Its samples take a while to load."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.1)
        return torch.zeros(3, 4, 4), {"image_id": index, "pid": os.getpid()}


@pytest.mark.parametrize("open_loader", [partial(train_loader, seed=0), eval_loader])
def test_the_error_of_a_killed_worker_names_it(open_loader):
    batches = iter(open_loader(Slow(), 1, workers=1))
    pid = next(batches)[1][0]["pid"]

    def go_on():
        with explain_dead_workers():
            os.kill(pid, signal.SIGKILL)
            list(batches)

    with pytest.raises(ChildProcessError, match=rf"process {pid}, .*memory"):
        go_on()
    with pytest.raises(RuntimeError, match=r"^out of ideas$"), explain_dead_workers():
        raise RuntimeError("out of ideas")
