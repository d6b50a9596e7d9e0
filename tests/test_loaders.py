"""The order of a loader's samples; its workers: their signals, their end, lost ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from detmix.data import eval_loader, train_loader
from detmix.data.loaders import explain_dead_workers


class WorkerProbe(Dataset):
    """Every sample says which process loads it, and takes a while."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.zeros(3, 4, 4), {"pid": os.getpid(), "image_id": index}


LOADERS = [
    lambda: train_loader(WorkerProbe(), 1, seed=0, workers=1),
    lambda: eval_loader(WorkerProbe(), 1, workers=1),
]


@pytest.mark.parametrize("make", LOADERS)
def test_workers_leave_signals_to_the_loop_and_obey_their_parent(make):
    batches = iter(make())
    pid = next(batches)[1][0]["pid"]
    assert pid != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)
    seen = [next(batches)[1][0]["pid"] for _ in range(6)]
    assert seen == [pid] * 6, "it went on working"
    worker = psutil.Process(pid)
    os.kill(pid, signal.SIGTERM)
    try:
        worker.wait(timeout=20)
    finally:
        with suppress(psutil.NoSuchProcess):  # or else the interpreter would wait for it
            worker.kill()


def test_a_process_with_a_failed_loader_ends():
    """Its worker is still there then: the interpreter ends it, and waits for it."""
    code = (  # with a fork server a worker's parent is not the process that the system says
        "import multiprocessing; multiprocessing.set_start_method('forkserver')\n"
        "from detmix.data import train_loader\n"
        "batches = iter(train_loader([(0, {})] * 9, 1, seed=0, workers=1))\n"
        "next(batches)\n"
        "raise SystemExit(5)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=90, check=False).returncode == 5


@pytest.mark.parametrize("make", LOADERS)
def test_the_error_of_a_killed_worker_names_it(make):
    batches = iter(make())
    pid = next(batches)[1][0]["pid"]

    def go_on():
        with explain_dead_workers():
            os.kill(pid, signal.SIGKILL)
            list(batches)

    with pytest.raises(ChildProcessError, match=rf"process {pid}, .*memory"):
        go_on()
    with pytest.raises(RuntimeError, match=r"^out of ideas$"), explain_dead_workers():
        raise RuntimeError("out of ideas")
