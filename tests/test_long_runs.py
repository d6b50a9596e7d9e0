"""What only long runs meet: processes of ``torchrun`` or a loader that die; memory that grows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from runs import TOOLS, assert_same_run
from tiny import tiny_args, tiny_config

from detmix.data.loaders import eval_loader, explain_dead_workers, train_loader
from detmix.training import DetectorTrainer, load_checkpoint

SETTINGS = (
    "epochs=6", "optim.ema_decay=0.9", "mixing.p=0.8", "data.batch_size=2", "save_minutes=0.001",
    "resume=auto",
)  # fmt: skip


def start(args):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(TOOLS / "train.py"), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def whole(shapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(tiny_args(shapes_root, folder, *SETTINGS)))
    return folder


def worker_of(process, rank):
    children = psutil.Process(process.pid).children()
    return next(c.pid for c in children if c.environ().get("RANK") == str(rank))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "signum"), [(0, signal.SIGKILL), (1, signal.SIGTERM), ("torchrun", signal.SIGTERM)]
)
def test_a_run_that_loses_a_process(shapes_root, whole, tmp_path, to, signum):
    """After SIGTERM all stop together; after SIGKILL the last checkpoint is what is left."""
    run_dir = tmp_path / "run"
    args = tiny_args(shapes_root, run_dir, *SETTINGS)
    process = start(args)
    deadline = time.monotonic() + 120
    while not (run_dir / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid if to == "torchrun" else worker_of(process, to), signum)
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    if signum == signal.SIGTERM:
        assert "--resume auto" in err
    else:
        assert f"error in process {1 - to}: lost another process" in err
    assert 0 < load_checkpoint(run_dir / "last.pt")["position"]["step"] < 36
    finish(start(args))
    assert_same_run(run_dir, whole)


def memory():
    """Return the resident mebibytes of this process and of those it started, by process id."""
    process = psutil.Process()
    return {p.pid: p.memory_info().rss / 2**20 for p in (process, *process.children())}


@pytest.mark.slow
def test_memory_does_not_grow(shapes_root, tmp_path):
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
