"""A trainer that is stopped on the way, the command in a process, and two runs compared."""

from __future__ import annotations

import io
import math
import os
import re
import runpy
import shutil
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.distributed as dist
from tiny import read_metrics

import detmix.commands
from detmix.training import DetectorTrainer
from detmix.training.console import run_tool

TOOLS = Path(__file__).parents[1] / "tools"


class StoppingMixin:
    """Gets a real signal in a step or an evaluation, or NaN in a batch, all counted from 1."""

    in_step = in_evaluation = nan_in = None
    signum = signal.SIGTERM
    batches = evaluations = 0

    def compute_losses(self, batch):
        if self.position.step + 1 == self.in_step:
            os.kill(os.getpid(), self.signum)
        losses = super().compute_losses(batch)
        self.batches += 1
        if self.batches == self.nan_in:
            losses[next(iter(losses))] *= math.nan
        return losses

    def evaluate(self):
        self.evaluations += 1
        if self.evaluations == self.in_evaluation:
            os.kill(os.getpid(), self.signum)
        return super().evaluate()


class Stopping(StoppingMixin, DetectorTrainer):
    pass


def as_process(function, *args):
    """Start a function in a process that has done its imports."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network at import
    context = get_context("forkserver")
    context.set_forkserver_preload(["detmix.training", "albumentations"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def on_two_processes(function, folder, *args):
    """Return what ``function(rank, *args)`` returns in each of two processes, over gloo."""
    processes = [as_process(_be_one_of_two, function, rank, folder, args) for rank in range(2)]
    for process in processes:
        process.join(180)
        process.kill()
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for of_process in found:
        assert not isinstance(of_process, str), of_process  # a traceback
    return found


def _be_one_of_two(function, rank, folder, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # wanted, though not used
    store, timeout = (folder / "store").as_uri(), timedelta(seconds=60)
    dist.init_process_group("gloo", store, timeout, rank=rank, world_size=2)
    try:
        found = function(rank, *args)
    except Exception:
        found = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_command(args, arrange, *arranged):
    """Run ``tools/train.py`` after calling ``arrange`` in its process; return its status."""
    process = as_process(_train, args, arrange, arranged)
    process.join(120)
    process.kill()
    return process.exitcode


def command(tool, *args):
    """Run a tool, or ``detmix``, in this process, for imports take seconds.

    Return status, output, errors.
    """
    out, err, args = io.StringIO(), io.StringIO(), [str(arg) for arg in args]
    with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.argv", [tool, *args]):
        try:
            if tool == "detmix":
                status = detmix.commands.main()
            else:
                status = run_tool(runpy.run_path(str(TOOLS / f"{tool}.py"))["main"], args)
        except SystemExit as end:  # of argparse
            status = end.code
    return status, out.getvalue(), err.getvalue()


def succeed(tool, *args):
    """Run a tool; return its output and what it logged."""
    status, out, err = command(tool, *args)
    assert status == 0, err
    return out, err


def _train(args, arrange, arranged):
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of the loader's workers
    arrange(*arranged)
    sys.argv = [str(TOOLS / "train.py"), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def outcome(run_dir):
    """Return what a run came to: its last checkpoint and its metrics but for the speed."""
    state = torch.load(run_dir / "last.pt", weights_only=True)
    del state["config"]
    speed = {"images_per_s", "seconds"}
    lines = [{k: v for k, v in line.items() if k not in speed} for line in read_metrics(run_dir)]
    best = torch.load(run_dir / "best.pt", weights_only=True)
    return state, best["model"], best["position"], lines


def assert_same_run(run_dir, other):
    """Compare bit for bit."""
    assert_same(outcome(run_dir), outcome(other))


def assert_same(value, other):
    for mine, theirs in zip(flat(value), flat(other), strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def flat(value):
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def scalars(run_dir):
    """Return TensorBoard's points of a run, (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # By number: TensorBoard takes a process's tenth writer of a second for older than its ninth.
    files = sorted(
        (run_dir / "tensorboard").iterdir(),
        key=lambda file: [int(part) for part in re.findall(r"\d+", file.name)],
    )
    with TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            shutil.copy(file, f"{folder}/events.out.tfevents.{number:03}")
        board = EventAccumulator(folder)
        board.Reload()
    return {n: [(p.step, p.value) for p in board.Scalars(n)] for n in board.Tags()["scalars"]}
