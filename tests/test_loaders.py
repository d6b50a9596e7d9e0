"""Workers of a loader: which signals they obey, and that they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import Dataset

from detmix.data import eval_loader, train_loader


class WorkerProbe(Dataset):
    """Every sample says which process loads it, and takes a while."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.zeros(3, 4, 4), {"pid": os.getpid(), "image_id": index}


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
        "from detmix.data import train_loader\n"
        "batches = iter(train_loader([(0, {})] * 9, 1, seed=0, workers=1))\n"
        "next(batches)\n"
        "raise SystemExit(5)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 5
