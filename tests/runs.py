"""Two runs compared bit for bit, and a trainer that is stopped on the way."""

from __future__ import annotations

import json
import os
import signal

import torch


class StoppingMixin:
    """Gets a real signal in the given step, or in the given evaluation, counted from 1."""

    in_step = in_evaluation = None
    signum = signal.SIGTERM
    evaluations = 0

    def compute_losses(self, batch):
        if self.position.step + 1 == self.in_step:
            os.kill(os.getpid(), self.signum)
        return super().compute_losses(batch)

    def evaluate(self):
        self.evaluations += 1
        if self.evaluations == self.in_evaluation:
            os.kill(os.getpid(), self.signum)
        return super().evaluate()


def outcome(run_dir):
    """Return what a run came to: its last checkpoint and its metrics but for the speed."""
    state = torch.load(run_dir / "last.pt", weights_only=True)
    del state["config"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("images_per_s", "seconds"):
            line.pop(name, None)
    best = torch.load(run_dir / "best.pt", weights_only=True)
    return state, best["model"], best["position"], lines


def assert_same_run(run_dir, other):
    for mine, theirs in zip(flat(outcome(run_dir)), flat(outcome(other)), strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        else:
            assert mine == theirs


def flat(value):
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]
