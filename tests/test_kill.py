"""A run that is killed at any moment, and resumed, is bit for bit the run that was not."""

from __future__ import annotations

import io
import os
import random
import signal
from functools import partial
from multiprocessing import get_context, set_start_method

import pytest
import torch
from runs import assert_same_run
from tiny import tiny_args
from torch.optim.swa_utils import AveragedModel

from detmix.training import DetectorTrainer, TrainConfig, parse_args
from detmix.training.run_folder import RunFolder

# Everything that has a state: an average, momentum, augmentation, mixing, a schedule.
SETTINGS = (
    "optim.ema_decay=0.9", "optim.clip_norm=1", "optim.lr=0.002", "mixing.p=0.8", "epochs=2",
    "mixing.off_epochs=1", "log_every=4", "schedule.name=multistep", "schedule.milestones=[1]",
    # the detector is bad: only so is its score not 0
    "detector.options.box_score_thresh=1e-4", "detector.options.box_detections_per_img=50",
)  # fmt: skip
EVERY_STEP = "save_minutes=1e-9"
PLACES = ("batch", "dataset")
# How often in a run of 2 epochs of 6 steps each moment comes, at least.
MOMENTS = {
    "step": 12, "update": 12, "write": 4, "sync": 10, "rename": 9, "log": 5, "evaluation": 2,
    "time": 100,
}  # fmt: skip
POINTS = [
    ("write", 2, ["mixing.place=batch", EVERY_STEP]),
    ("rename", 5, ["mixing.place=batch"]),  # between the two that exchange the checkpoints
]


def random_points(num, seed):
    rng = random.Random(seed)
    for index in range(num):
        moment = list(MOMENTS)[index % len(MOMENTS)]
        overrides = [f"mixing.place={rng.choice(PLACES)}", *rng.choice([[], [EVERY_STEP]])]
        workers = rng.choice([0, 0, 1])
        yield moment, rng.randint(1, MOMENTS[moment]), [*overrides, f"data.workers={workers}"]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(moment, count):
    """Have this process killed when a moment comes for the ``count``-th time."""
    seen = 0

    def replace(owner, name, at_death=lambda *args: None):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == count:
                at_death(original, *args)
                die()
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    def write_half(save, state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()

    def log_half(log, folder, event, *args):
        with open(folder.metrics, "a") as file:
            file.write(f'{{"event": "{event}", "st')

    {
        "step": partial(replace, DetectorTrainer, "compute_losses"),
        "update": partial(replace, AveragedModel, "update_parameters"),  # weights, not the average
        "write": partial(replace, torch, "save", write_half),
        "sync": partial(replace, os, "fsync"),
        "rename": partial(replace, os, "replace"),
        "log": partial(replace, RunFolder, "log", log_half),
        "evaluation": partial(replace, DetectorTrainer, "evaluate"),
    }[moment]()


def train(args, moment=None, count=0):
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of the loader's workers
    if moment is not None:
        arrange_death(moment, count)
    DetectorTrainer(parse_args(TrainConfig, args)).fit()


def run(args, moment=None, count=0):
    """Train in a process of its own; return its exit status."""
    context = get_context("forkserver")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network at import
    context.set_forkserver_preload(["detmix.training", "albumentations"])
    own = (args,) if moment in (None, "time") else (args, moment, count)
    process = context.Process(target=train, args=own)
    process.start()
    process.join(0.03 * count if moment == "time" else 120)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def check_folder(run_dir, whole):
    assert_same_run(run_dir, whole)
    assert {p.name for p in run_dir.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.fixture(scope="module")
def whole(shapes_root, tmp_path_factory):
    """Return a function of the place of mixing to the folder of a run that was not killed."""
    folders = {}

    def get(place):
        if place not in folders:
            folders[place] = tmp_path_factory.mktemp("whole") / place
            overrides = (*SETTINGS, f"mixing.place={place}")
            assert run(tiny_args(shapes_root, folders[place], *overrides)) == 0
        return folders[place]

    return get


@pytest.mark.parametrize(
    ("moment", "count", "overrides"),
    [
        *POINTS,
        *(pytest.param(*point, marks=pytest.mark.slow) for point in random_points(20, seed=6)),
    ],
)
def test_killed_at(shapes_root, tmp_path, whole, moment, count, overrides):
    args = tiny_args(shapes_root, tmp_path / "run", *SETTINGS, *overrides, "resume=auto")
    code = run(args, moment, count)
    assert code == -signal.SIGKILL or (moment == "time" and code == 0)
    assert run(args) == 0
    check_folder(tmp_path / "run", whole(overrides[0].rpartition("=")[2]))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_again_and_again(shapes_root, tmp_path, whole, place):
    overrides = (f"mixing.place={place}", EVERY_STEP, "resume=auto")
    args = tiny_args(shapes_root, tmp_path / "run", *SETTINGS, *overrides)
    rng = random.Random(place)
    kills = 0
    while code := run(args, rng.choice(list(MOMENTS)[:-1]), rng.randint(2, 4)):
        assert code == -signal.SIGKILL
        kills += 1
    assert kills > 3
    check_folder(tmp_path / "run", whole(place))
