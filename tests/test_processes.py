"""A training on two processes is the training on one: these are real ones, over gloo.

At the end those of ``torchrun``, which loses one.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import psutil
import pytest
import torch
from runs import TOOLS, StoppingMixin, assert_same_run, copied, on_two_processes
from tiny import CLASSIFIER, read_metrics, tiny_args, tiny_config

from detmix.data import write_shapes
from detmix.training import (
    ClassifierTrainer,
    DetectorTrainer,
    Interrupted,
    NonFiniteLossError,
    load_checkpoint,
)
from detmix.training.stopping import OtherProcessError

# RetinaNet's loss is the mean over images of what each has by itself, and it samples nothing.
SETTINGS = (
    "optim.name=sgd", "optim.momentum=0.9", "schedule.warmup_steps=0", "optim.lr=0.005",
    "mixing.place=dataset", "mixing.p=0.7", "backbone.norm=group", "data.train_limit=12",
    "detector.name=retinanet", "detector.roi_sampling_ratio=null", "detector.head_dim=null",
    "detector.options={score_thresh: 0.01, detections_per_img: 50}",
)  # fmt: skip
STEPS, EPOCH = 6, 3
RESUMED_AFTER = 5  # between two lines of the log


class Recorder(StoppingMixin, DetectorTrainer):
    """Keeps what it trains on; meets images it cannot read where it is told to."""

    broken_after = None

    def __init__(self, config):
        self.seen = []
        super().__init__(config)

    def compute_losses(self, batch):
        self.names = self.describe(batch)
        samples = list(zip(*batch, strict=True))
        self.seen.append({int(sample[1]["image_id"]): sample for sample in samples})
        losses = super().compute_losses(batch)
        if self.position.step == self.broken_after:
            for path in self.config.data.root.rglob("*.jpg"):
                path.write_bytes(path.read_bytes()[:400])
        return losses


def trainer_of(root, run_dir, num_processes, *overrides):
    batch_size = f"data.batch_size={4 // num_processes}"
    trainer = Recorder(tiny_config(root, run_dir, *SETTINGS, batch_size, *overrides))
    assert trainer.accelerator.num_processes == num_processes
    return trainer


def train(*args):
    """Train; return what is to be the same with any number of processes."""
    trainer, told, log = trainer_of(*args), io.StringIO(), logging.getLogger("detmix")
    log.setLevel("INFO")
    log.addHandler(handler := logging.StreamHandler(told))
    result = trainer.fit()
    log.removeHandler(handler)
    found = {"seen": trainer.seen, "weights": copied(trainer.plain_model)}
    return {**found, "mean_ap": result.mean_ap, "told": told.getvalue()}


def end_early(root, run_dir, rank, kind):
    """Train until process 1 alone meets a bad loss, an image it cannot read or a signal."""
    # Each process has statistics of its own, until an evaluation shares the first one's.
    norm = "batch" if kind == "stopped" else "group"
    trainer = trainer_of(root, run_dir, 2, "log_every=1", f"backbone.norm={norm}")
    if rank == 1:
        name, when = {
            "failed": ("nan_in", 3), "broken": ("broken_after", 0), "stopped": ("in_evaluation", 1)
        }[kind]  # fmt: skip
        setattr(trainer, name, when)
    with pytest.raises((ValueError, OtherProcessError, NonFiniteLossError, Interrupted)) as caught:
        trainer.fit()
    return {
        "error": (type(caught.value).__name__, str(caught.value)),
        "names": trainer.names.split(", "),
        "step": trainer.position.step,
        "model": copied(trainer.plain_model),
    }


# What each of two processes begins with: the number of its images' root, and an option.
DISAGREEMENTS = {
    "the checkpoint to go on from": [(0, "resume=auto")] * 2,  # which the first alone has
    "the test images": [(0, "seed=0"), (2, "seed=0")],
    "seed": [(0, "seed=0"), (0, "seed=3")],
}


def disagree(roots, run_dir, rank):
    found = []
    for root, option in (of_processes[rank] for of_processes in DISAGREEMENTS.values()):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            trainer_of(roots[root], run_dir, 2, option)
        found.append(str(caught.value))
    return found


def classify(root, run_dir):
    """Score a classifier: by batches of 3, each of two processes has 10 of 20 images."""
    config = tiny_config(root, run_dir, "data.eval_batch_size=3", settings=CLASSIFIER)
    return astuple(ClassifierTrainer(config).evaluate().result)


def work(rank, roots, folder):
    """Be one of two processes; each is given a folder of its own to show who writes."""
    runs = folder / str(rank)
    return {
        "whole": train(roots[0], runs / "whole", 2),
        "resumed": train(roots[0], runs / "resumed", 2, "resume=auto"),
        "accumulated": train(
            roots[0], runs / "accumulated", 2, "data.batch_size=1", "optim.accumulate=2"
        ),
        # Each process has a copy of the images.
        **{k: end_early(roots[rank], runs / k, rank, k) for k in ("failed", "stopped", "broken")},
        "disagreed": disagree(roots, runs / "whole", rank),
        "classified": classify(roots[3], runs / "classified"),
    }


@pytest.fixture(scope="module")
def one(shapes_root, tmp_path_factory):
    """What the run on one process came to, and its folder."""
    folder = tmp_path_factory.mktemp("one") / "whole"
    return train(shapes_root, folder, 1), folder


@pytest.fixture(scope="module")
def two(shapes_root, stripes_root, tmp_path_factory):
    """What the runs on two processes came to in each, and the folder with their folders."""
    folder = tmp_path_factory.mktemp("two")
    stopped = trainer_of(shapes_root, folder / "0" / "resumed", 1)
    stopped.in_step = RESUMED_AFTER
    with pytest.raises(Interrupted):
        stopped.fit()
    shutil.copytree(folder / "0" / "resumed", folder / "1" / "resumed")
    copy = Path(shutil.copytree(shapes_root, folder / "copied"))
    other = write_shapes(folder / "other", num_train=24, num_test=6, image_size=64)
    roots = (shapes_root, copy, other, stripes_root)
    return on_two_processes(work, folder, roots, folder), folder


def test_a_global_batch_is_the_same(one, two):
    """Images, augmentation, partners and ratios, bit for bit; each image in one process only."""
    (alone, _), (parts, _) = one, two
    shares = [part["whole"]["seen"] for part in parts]
    assert len(alone["seen"]) == len(shares[0]) == len(shares[1]) == STEPS
    mixed = 0
    for whole, mine, others in zip(alone["seen"], *shares, strict=True):
        assert len(mine) == len(others) == 2
        joined = mine | others
        assert joined.keys() == whole.keys()
        for image_id, (image, target) in whole.items():
            torch.testing.assert_close(joined[image_id], (image, target), rtol=0, atol=0)
            mixed += bool((target["box_weights"] < 1).any())
    assert mixed > len(shares[0])


@pytest.mark.parametrize(
    ("kind", "batches"),
    [("whole", STEPS), ("resumed", STEPS - RESUMED_AFTER), ("accumulated", 2 * STEPS)],
)
def test_weights_scores_and_logs_are_the_same(one, two, kind, batches):
    """Of the run that began on one process, and of one with two batches a step, too."""
    (alone, folder), (parts, folders) = one, two
    assert alone["mean_ap"] > 0
    for part in (part[kind] for part in parts):
        assert len(part["seen"]) == batches
        torch.testing.assert_close(part["weights"], alone["weights"], rtol=1e-4, atol=1e-6)
        assert part["mean_ap"] == pytest.approx(alone["mean_ap"], abs=1e-6)
        torch.testing.assert_close(part["weights"], parts[0][kind]["weights"], rtol=0, atol=0)
    found, expected = read_metrics(folders / "0" / kind), read_metrics(folder)
    for metrics, others in zip(found, expected, strict=True):
        assert metrics.keys() == others.keys()
        for key in metrics.keys() - {"event", "images_per_s", "seconds"}:
            assert metrics[key] == pytest.approx(others[key], rel=1e-4, abs=1e-6), key


def test_only_the_first_process_writes_and_tells(one, two):
    """Of all images, and of the batch in all processes."""
    parts, folders = two
    plans = [one[0]["told"], *(part["accumulated"]["told"] for part in parts)]
    data = [re.findall("(?m)^data .* 12 images to train, 8 to test", plan) for plan in plans]
    assert data[0] == data[1] != []
    assert "batch 2 processes x 2 batches x 1" in plans[1]
    assert plans[2] == ""
    written = {"whole", "resumed", "accumulated", "failed", "broken", "stopped", "classified"}
    assert {path.name for path in (folders / "0").iterdir()} == written
    assert {path.name for path in (folders / "1").iterdir()} == {"resumed"}  # a copy, to be read
    assert load_checkpoint(folders / "1/resumed/last.pt")["position"]["step"] == RESUMED_AFTER


def test_a_classifier_s_score_is_the_same(stripes_root, tmp_path, two):
    expected = classify(stripes_root, tmp_path / "run")
    assert [part["classified"] for part in two[0]] == [pytest.approx(expected, rel=1e-5)] * 2


@pytest.mark.parametrize(("kind", "step"), [("failed", 2), ("broken", 2), ("stopped", EPOCH)])
def test_all_stop_where_one_does(two, kind, step):
    """A signal that comes in an evaluation is told before the next epoch."""
    parts, folders = two
    state = load_checkpoint(folders / "0" / kind / "last.pt")
    assert {state["position"]["step"], *(part[kind]["step"] for part in parts)} == {step}
    for part in parts:
        torch.testing.assert_close(dict(state["model"]), part[kind]["model"], rtol=0, atol=0)


def test_the_error_of_one_is_told_by_all(two):
    (first, second), _ = two
    for part in (first, second):
        name, message = part["failed"]["error"]
        assert name == "NonFiniteLossError"
        assert re.search(r"step 2 .*classification nan", message)
        assert all(image in message for image in second["failed"]["names"])
        assert not any(image in message for image in first["failed"]["names"])
        assert part["stopped"]["error"][0] == "Interrupted"
    name, message = second["broken"]["error"]
    assert name == "ValueError"
    assert re.search(r"VOC2007/\d{6}|\.jpg", message)
    assert first["broken"]["error"] == ("OtherProcessError", f"another process stops: {message}")


def test_all_begin_alike_or_not_at_all(two):
    first, second = (part["disagreed"] for part in two[0])
    assert first == second
    for message, name in zip(first, DISAGREEMENTS, strict=True):
        assert re.search(rf"{name}: process 0 has \S+.* process 1 has", message)


LAUNCHED = (
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
def launched(shapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(tiny_args(shapes_root, folder, *LAUNCHED)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "signum"), [(0, signal.SIGKILL), (1, signal.SIGTERM), ("torchrun", signal.SIGTERM)]
)
def test_a_run_that_loses_a_process(shapes_root, launched, tmp_path, to, signum):
    """After SIGTERM all stop together; after SIGKILL the last checkpoint is what is left."""
    run_dir = tmp_path / "run"
    args = tiny_args(shapes_root, run_dir, *LAUNCHED)
    process = start(args)
    deadline = time.monotonic() + 120
    while not (run_dir / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children() if to != "torchrun" else ()
    pids = {worker.environ().get("RANK"): worker.pid for worker in workers}
    os.kill(pids.get(str(to), process.pid), signum)
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    if signum == signal.SIGTERM:
        assert "--resume auto" in err
    else:
        assert f"error in process {1 - to}: lost another process" in err
    assert 0 < load_checkpoint(run_dir / "last.pt")["position"]["step"] < 36
    finish(start(args))
    assert_same_run(run_dir, launched)
