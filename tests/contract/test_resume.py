"""A run that is killed or stopped anywhere, and resumed, is bit for bit the run that was not."""

from __future__ import annotations

import io
import itertools
import os
import random
import runpy
import shutil
import signal
import sys
from multiprocessing import get_context, set_start_method
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import assert_same_run
from tiny import read_metrics, tiny_args, tiny_config
from torch import nn
from torch.optim.swa_utils import AveragedModel

from detmix.data import VOCDetection, eval_loader, write_shapes
from detmix.evaluation import VOCEvaluator
from detmix.training import (
    DetectorTrainer,
    evaluate,
    load_checkpoint,
    load_detector,
    save_checkpoint,
)

TRAIN = str(Path(__file__).resolve().parents[2] / "tools" / "train.py")
# Everything that has a state: an average, momentum, augmentation, mixing, a schedule.
SETTINGS = (
    "optim.ema_decay=0.9", "optim.clip_norm=1", "optim.lr=0.002", "mixing.p=0.8", "epochs=2",
    "mixing.off_epochs=1", "log_every=2", "schedule.name=multistep", "schedule.milestones=[1]",
    # the detector is bad: only so is its score not 0
    "detector.options.box_score_thresh=1e-4", "detector.options.box_detections_per_img=60",
    "detector.options.rpn_post_nms_top_n_test=60", "detector.options.rpn_pre_nms_top_n_test=60",
)  # fmt: skip
STEPS_PER_EPOCH = 3
EVERY_STEP = "save_minutes=1e-9"
MOMENTS = {
    "step": (torch.Tensor, "backward"),
    "update": (AveragedModel, "update_parameters"),  # weights are new, their average is not
    "write": (torch, "save"),
    "sync": (os, "fsync"),
    "exchange": (os, "replace"),
    "evaluation": (nn.Module, "eval"),
}
COUNTED = {
    # where there is no last.pt for a moment, only a previous.pt
    "exchange": lambda source, target: Path(target).name == "last.pt",
    "evaluation": lambda model: model.training,
}


def arrange_signal(signum, moment, count):
    """Have this process get a signal when a moment comes for the ``count``-th time."""
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)
    calls = itertools.count(1)
    is_counted = COUNTED.get(moment, lambda *args: True)

    def counted(*args, **kwargs):
        if is_counted(*args) and next(calls) == count:
            if moment == "write":
                write_half(original, *args)
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def write_half(save, state, file):
    buffer = io.BytesIO()
    save(state, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()


def train(args, arranged):
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of the loader's workers
    if arranged:
        arrange_signal(*arranged)
    sys.argv = [TRAIN, *args]
    runpy.run_path(TRAIN, run_name="__main__")


def run(args, *arranged):
    """Run the command in a process that has done its imports; return its status."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network at import
    context = get_context("forkserver")
    context.set_forkserver_preload(["detmix.training", "albumentations"])
    process = context.Process(target=train, args=(args, arranged))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    return process.exitcode


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data"), num_train=12, num_test=8, image_size=64)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """Return the folder of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny_args(root, run_dir, *SETTINGS)) == 0
    return run_dir


@pytest.fixture(scope="module")
def killed(root, tmp_path_factory):
    """Return the folder of a run that was killed in its last step, after five checkpoints."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    args = tiny_args(root, run_dir, *SETTINGS, EVERY_STEP)
    assert run(args, signal.SIGKILL, "step", 6) == -signal.SIGKILL
    return run_dir


@pytest.fixture
def copied(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "run"))


def assert_ends_as(whole, root, run_dir, *overrides):
    assert run(tiny_args(root, run_dir, *SETTINGS, "resume=auto", *overrides)) == 0
    assert_same_run(run_dir, whole)
    assert {p.name for p in run_dir.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize(
    ("moment", "count", "kept", "overrides"),
    [
        ("step", 5, 3, []),  # a line of the log is written again
        ("step", 3, 2, [EVERY_STEP, "data.workers=1"]),
        ("write", 3, 3, []),  # after the first evaluation
        ("exchange", 3, 3, []),
        ("evaluation", 2, 6, []),
    ],
)
def test_killed(root, tmp_path, whole, moment, count, kept, overrides):
    run_dir = tmp_path / "run"
    args = tiny_args(root, run_dir, *SETTINGS, *overrides, "resume=auto")
    assert run(args, signal.SIGKILL, moment, count) == -signal.SIGKILL
    assert (run_dir / "last.pt").exists() == (moment != "exchange")
    newest = "previous.pt" if moment == "exchange" else "last.pt"
    assert load_checkpoint(run_dir / newest)["position"]["step"] == kept
    assert_ends_as(whole, root, run_dir, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "overrides"),
    [("batch", []), ("batch", [EVERY_STEP, "data.workers=1"]), ("dataset", [EVERY_STEP])],
)
def test_killed_again_and_again(root, tmp_path, place, overrides):
    overrides = [f"mixing.place={place}", "epochs=5", *overrides, "resume=auto"]
    args = tiny_args(root, tmp_path / "run", *SETTINGS, *overrides)
    rng = random.Random(str(overrides))
    kills = 0
    while code := run(args, signal.SIGKILL, rng.choice(list(MOMENTS)), rng.randint(1, 4)):
        assert code == -signal.SIGKILL
        kills += 1
    assert kills > 3
    assert run(tiny_args(root, tmp_path / "whole", *SETTINGS, *overrides)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("signum", "moment", "count", "step"),
    [(signal.SIGTERM, "step", 2, 2), (signal.SIGTERM, "evaluation", 1, 3)],
)
def test_stopped(root, tmp_path, whole, signum, moment, count, step):
    run_dir = tmp_path / "run"
    assert run(tiny_args(root, run_dir, *SETTINGS), signum, moment, count) == 128 + signum
    assert load_checkpoint(run_dir / "last.pt")["position"]["step"] == step
    assert_ends_as(whole, root, run_dir)


def break_file(path, how):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(data if how == "flipped" else data[: len(data) // 2])


@pytest.mark.parametrize("how", ["flipped", "half"])
def test_a_broken_checkpoint_gives_way_to_the_one_before(root, whole, copied, how):
    assert load_checkpoint(copied / "last.pt")["position"]["step"] == 5
    break_file(copied / "last.pt", how)
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # half a line
    with pytest.raises(ValueError, match=r"last\.pt"):
        load_checkpoint(copied / "last.pt")
    assert load_checkpoint(copied / "previous.pt")["position"]["step"] == 4
    assert_ends_as(whole, root, copied)


def test_a_checkpoint_of_an_earlier_version(root, whole, copied):
    state = load_checkpoint(copied / "last.pt")
    for name in ("images", "num_images", "batch_size"):
        del state[name]
    del state["config"]["augment"]
    save_checkpoint(copied / "last.pt", state)
    assert_ends_as(whole, root, copied)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("fresh_accelerator")
class TestRefused:
    """What does not fit is not resumed from, and nothing is changed."""

    def assert_refused(self, root, run_dir, *overrides, named, error=ValueError):
        before = contents(run_dir)
        config = tiny_config(root, run_dir, *SETTINGS, "resume=auto", *overrides)
        with pytest.raises(error, match=f"(?s){named}"):
            DetectorTrainer(config)
        assert contents(run_dir) == before

    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("seed=1", "seed"),
            ("data.batch_size=6", "6"),
            ("data.train_limit=8", "8"),
            ("data.test_limit=2", "test_limit"),
            ("data.classes=[circle, cross, square, triangle, star]", "triangle"),
            ("detector.head_dim=16", "size mismatch"),
            ("backbone.levels=[2,3]", ""),
            ("backbone.trainable_layers=2", ""),
            ("optim.name=sgd", "optimizer"),
        ],
    )
    def test_other_settings(self, root, whole, override, named):
        self.assert_refused(root, whole, override, named=f"last.pt.*{named}")

    @pytest.mark.parametrize("split", ["trainval", "test"])
    def test_as_many_other_images(self, root, whole, tmp_path, split):
        other = Path(shutil.copytree(root, tmp_path / "data"))
        (path,) = other.rglob(f"{split}.txt")
        path.write_text("\n".join(path.read_text().split()[::-1]))
        self.assert_refused(other, whole, named=f"last.pt.*{split.removesuffix('val')}")

    def test_no_whole_checkpoint(self, root, copied):
        for name in ("last.pt", "previous.pt"):
            break_file(copied / name, "flipped")
        self.assert_refused(root, copied, named="last.pt.*previous.pt")

    def test_a_newer_checkpoint_is_not_passed_over(self, root, copied):
        state = torch.load(copied / "last.pt", weights_only=True)
        torch.save({**state, "format": 3}, copied / "last.pt")
        self.assert_refused(root, copied, named="last.pt.*3")

    def test_a_run_that_is_there(self, root, whole):
        self.assert_refused(root, whole, "resume=never", named="run", error=FileExistsError)

    def test_what_has_changed_is_named(self, root, copied, caplog):
        caplog.set_level("INFO", "detmix")
        overrides = ("mixing.p=0.25", "optim.lr=0.5", "data.workers=1", "resume=auto")
        DetectorTrainer(tiny_config(root, copied, *SETTINGS, *overrides))
        for name, before, now in (("mixing.p", "0.8", "0.25"), ("optim.lr", "0.002", "0.5")):
            (line,) = (line for line in caplog.messages if line.startswith(name))
            assert before in line
            assert now in line


def test_the_best_checkpoint_scores_what_the_metrics_say(root, whole):
    model, config = load_detector(whole / "best.pt")
    dataset = VOCDetection(root, (("2007", "test"),), classes=config.data.class_names)
    loader = eval_loader(dataset, 4, workers=0)
    evaluator = VOCEvaluator(config.data.class_names)
    evaluate(model, loader, [evaluator], Accelerator(cpu=True), truth=dataset)
    scores = [line["mean_ap"] for line in read_metrics(whole) if line["event"] == "eval"]
    assert len(scores) == 2
    assert evaluator.compute().mean_ap == max(scores) > 0
