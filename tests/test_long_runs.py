"""What only long runs meet: memory that would grow, and worker processes that are killed."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import partial

import psutil
import pytest
import torch
from tiny import tiny_config

from detmix.data import AugmentedDataset, VOCDetection, detection_transforms
from detmix.data.loaders import eval_loader, explain_dead_workers, train_loader
from detmix.data.shapes import SHAPE_CLASSES
from detmix.mixing import DetectionMixUp
from detmix.training import DetectorTrainer

MEBIBYTE = 2**20


def memory():
    """Return the resident bytes of this process and of those it started, by process id."""
    process = psutil.Process()
    return {p.pid: p.memory_info().rss for p in (process, *process.children())}


def assert_flat(before, after, mebibytes):
    assert before.keys() == after.keys(), "the workers are the same ones"
    assert len(before) > 1
    growth = {pid: (after[pid] - before[pid]) / MEBIBYTE for pid in before}
    assert max(growth.values()) < mebibytes, growth


class TestMemory:
    def test_of_a_loader(self, shapes_root):
        """Six batches an epoch."""
        voc = VOCDetection(shapes_root, classes=SHAPE_CLASSES)
        dataset = AugmentedDataset(voc, detection_transforms(None, train=True, crop=0.5), seed=0)
        mix = DetectionMixUp(p=0.7)
        loader = train_loader(dataset, 4, seed=0, workers=1, mix=mix)
        for epoch in range(20):
            if epoch == 10:
                before = memory()
            dataset.set_epoch(epoch)
            mix.set_epoch(epoch)
            loader.batch_sampler.set_epoch(epoch)
            for _ in loader:
                pass
        assert_flat(before, memory(), 4)

    @pytest.mark.slow
    def test_of_a_training(self, shapes_root, tmp_path, fresh_accelerator):
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
        assert_flat(seen[50], seen[299], 16)


class Slow:
    """Its samples take a while to load."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.1)
        return torch.zeros(3, 4, 4), {"image_id": index, "pid": os.getpid()}


class TestDeadWorkers:
    @pytest.mark.parametrize(
        ("open_loader", "signum", "name"),
        [
            (partial(train_loader, seed=0), signal.SIGKILL, "Killed"),
            (eval_loader, signal.SIGSEGV, "Segmentation fault"),
        ],
    )
    def test_the_error_names_the_worker(self, open_loader, signum, name):
        batches = iter(open_loader(Slow(), 1, workers=1))
        pid = next(batches)[1][0]["pid"]

        def go_on():
            with explain_dead_workers():
                os.kill(pid, signum)
                list(batches)

        start = time.monotonic()
        with pytest.raises(ChildProcessError, match=rf"process {pid}, .*memory") as caught:
            go_on()
        assert re.search(rf"{name}|exited unexpectedly", str(caught.value))
        assert time.monotonic() - start < 20

    def test_other_errors_pass(self):
        with pytest.raises(RuntimeError, match=r"^out of ideas$"), explain_dead_workers():
            raise RuntimeError("out of ideas")
