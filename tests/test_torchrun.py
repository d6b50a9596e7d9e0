"""Runs that ``torchrun`` starts, as on a machine with several GPUs: one goes down, all go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runs import assert_same_run
from tiny import tiny_args

from detmix.training import load_checkpoint

pytestmark = pytest.mark.slow

TRAIN = str(Path(__file__).parents[1] / "tools/train.py")
SETTINGS = (
    "epochs=6",
    "optim.ema_decay=0.9",
    "mixing.p=0.8",
    "data.batch_size=2",
    "save_minutes=0.001",
)


def start(root, run_dir):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN]
    return subprocess.Popen(
        [sys.executable, *command, *tiny_args(root, run_dir, *SETTINGS, "resume=auto")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def whole(shapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(shapes_root, folder))
    return folder


def worker_of(process, rank):
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no process {rank}")


@pytest.mark.parametrize(
    ("to", "signum"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGKILL),
        (0, signal.SIGTERM),
        (1, signal.SIGTERM),
        ("torchrun", signal.SIGTERM),
    ],
)
def test_a_run_that_loses_a_process(shapes_root, whole, tmp_path, to, signum):
    """After SIGTERM all stop together; after SIGKILL the last checkpoint is what is left."""
    run_dir = tmp_path / "run"
    process = start(shapes_root, run_dir)
    deadline = time.monotonic() + 120
    while not (run_dir / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid if to == "torchrun" else worker_of(process, to), signum)
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    if signum == signal.SIGTERM:
        assert "go on with --resume auto" in err
    else:
        assert f"error in process {1 - to}: lost another process" in err
    assert 0 < load_checkpoint(run_dir / "last.pt")["position"]["step"] < 36
    finish(start(shapes_root, run_dir))
    assert_same_run(run_dir, whole)
