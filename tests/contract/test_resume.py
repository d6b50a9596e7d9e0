"""A run that is killed or stopped anywhere, and resumed, is bit for bit the run that was not."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import StoppingMixin, assert_same_run, contents, run_command, scalars
from tiny import STATEFUL, read_metrics, tiny_args, tiny_config
from torch import nn
from torch.optim.swa_utils import AveragedModel

from detmix.data import VOCDetection, eval_loader
from detmix.evaluation import VOCEvaluator
from detmix.files import temporary_path
from detmix.training import (
    DetectorTrainer,
    Interrupted,
    load_checkpoint,
    load_detector,
)
from detmix.training.inference import detect, score

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
    """Have this process and its workers get a signal when a moment comes for the n-th time."""
    os.setsid()
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)
    calls = itertools.count(1)
    is_counted = COUNTED.get(moment, lambda *args: True)

    def counted(*args, **kwargs):
        if is_counted(*args) and next(calls) == count:
            if moment == "write":
                write_half(original, *args)
            os.killpg(0, signum)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def write_half(save, state, file):
    buffer = io.BytesIO()
    save(state, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()


@pytest.fixture
def args_for(shapes_root):
    return lambda run_dir, *more: tiny_args(shapes_root, run_dir, *STATEFUL, "resume=auto", *more)


@pytest.fixture
def config_for(shapes_root, fresh_accelerator):
    return lambda run_dir, *overrides: tiny_config(shapes_root, run_dir, *STATEFUL, *overrides)


@pytest.fixture
def go_on(config_for, whole_run):
    """Return a function that resumes a run and asserts that it ends as the whole one."""

    def go_on(run_dir, *overrides):
        DetectorTrainer(config_for(run_dir, "resume=auto", *overrides)).fit()
        assert_same_run(run_dir, whole_run)
        assert {p.name for p in run_dir.iterdir()} == {p.name for p in whole_run.iterdir()}

    return go_on


def step_of(path):
    return load_checkpoint(path)["position"]["step"]


KILLS = [
    ("write", 3, 3, []),  # after the first evaluation, which is lost
    ("exchange", 1, 3, []),
    ("step", 2, 3, []),  # a line of the log is written again
    ("update", 2, 4, [EVERY_STEP, "data.workers=1"]),
    ("evaluation", 1, 6, []),
]


def test_killed_again_and_again(args_for, go_on, tmp_path):
    """By SIGKILL at one moment after the other; ``kept`` is the step of the newest checkpoint."""
    run_dir = tmp_path / "run"
    for moment, count, kept, overrides in KILLS:
        status = run_command(
            args_for(run_dir, *overrides), arrange_signal, signal.SIGKILL, moment, count
        )
        assert status == -signal.SIGKILL, moment
        assert (run_dir / "last.pt").exists() == (moment != "exchange")
        newest = "previous.pt" if moment == "exchange" else "last.pt"
        assert step_of(run_dir / newest) == kept, moment
    go_on(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["batch", "dataset"])
def test_killed_at_random(args_for, tmp_path, place):
    overrides = [f"mixing.place={place}", "epochs=5", EVERY_STEP, "data.workers=1"]
    args, rng, kills = args_for(tmp_path / "run", *overrides), random.Random(place), 0
    while code := run_command(
        args, arrange_signal, signal.SIGKILL, rng.choice(list(MOMENTS)), rng.randint(1, 4)
    ):
        assert code == -signal.SIGKILL
        kills += 1
    assert kills > 2
    assert run_command(args_for(tmp_path / "whole", *overrides)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


class Stopping(StoppingMixin, DetectorTrainer):
    """A detector's training that gets a real signal."""


class TestStopped:
    def test_the_command_and_its_workers(self, args_for, go_on, tmp_path):
        args = args_for(tmp_path / "run", "data.workers=1")
        status = run_command(args, arrange_signal, signal.SIGTERM, "step", 5)
        assert status == 128 + signal.SIGTERM
        assert step_of(tmp_path / "run" / "last.pt") == 5
        go_on(tmp_path / "run")

    @pytest.mark.parametrize(
        ("when", "signum", "step"),
        [("in_step", signal.SIGINT, 4), ("in_evaluation", signal.SIGTERM, 6)],
    )
    def test_the_same_trainer_goes_on(self, config_for, whole_run, tmp_path, when, signum, step):
        """As in a notebook."""
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        trainer = Stopping(config_for(tmp_path / "run"))
        trainer.signum = signum
        setattr(trainer, when, 4 if when == "in_step" else 2)
        with pytest.raises(Interrupted) as caught:
            trainer.fit()
        assert caught.value.signum == signum
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert step_of(tmp_path / "run" / "last.pt") == step
        trainer.in_step = None
        trainer.fit()
        assert_same_run(tmp_path / "run", whole_run)

    @pytest.mark.parametrize(
        ("signum", "error"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)]
    )
    def test_by_a_second_signal(self, config_for, tmp_path, signum, error):
        """A scheduler and torchrun may each send SIGTERM; a second Ctrl-C ends it at once."""

        class Twice(Stopping):
            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                os.kill(os.getpid(), signum)
                return losses

        trainer = Twice(config_for(tmp_path / "run"))
        trainer.in_step, trainer.signum = 1, signum
        # A shell has its background jobs ignore SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(error):
                trainer.fit()
        finally:
            signal.signal(signal.SIGINT, before)
        assert (tmp_path / "run" / "last.pt").exists() == (error is Interrupted)

    def test_by_a_full_disk(self, config_for, go_on, tmp_path):
        """At the end of the second epoch."""

        class Filling(DetectorTrainer):
            def begin_epoch(self, epoch):
                super().begin_epoch(epoch)
                if epoch == 1:
                    temporary_path(self.config.run_dir / "last.pt").symlink_to("/dev/full")

        path = tmp_path / "run" / "last.pt"
        with pytest.raises(OSError, match=f"{path}.*No space left"):
            Filling(config_for(path.parent)).fit()
        assert step_of(path) == 3
        go_on(path.parent)
        steps = [step for step, _ in scalars(path.parent)["train/loss"]]
        assert steps == [2, 4, 6], "TensorBoard has none twice"


@pytest.fixture
def before_the_end(whole_run, tmp_path):
    """Return a copy of the whole run before its last evaluation."""
    run_dir = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.copy(run_dir / "previous.pt", run_dir / "last.pt")
    assert load_checkpoint(run_dir / "last.pt")["position"]["evaluation_due"]
    return run_dir


def break_file(path, how="flipped"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(data if how == "flipped" else data[: len(data) // 2])


class TestGoesOn:
    @pytest.mark.parametrize("how", ["flipped", "half"])
    def test_from_the_checkpoint_before_a_broken_one(self, before_the_end, go_on, how):
        break_file(before_the_end / "last.pt", how)
        with open(before_the_end / "metrics.jsonl", "a") as file:
            file.write('{"event": "train", "st')  # half a line
        go_on(before_the_end)

    def test_from_format_1(self, before_the_end, go_on):
        """Which noted in the configuration what the model normalises with."""
        path = before_the_end / "last.pt"
        state = torch.load(path, weights_only=True)
        config = state["config"]
        found = state.pop("normalization", {})
        for name in ("image_mean", "image_std"):
            if name in found:
                config["detector"]["options"][name] = found[name]
        config["backbone"].setdefault("norm_eps", found.get("norm_eps"))
        for name in ("images", "num_images", "batch_size"):  # nor had the first ones these
            del state[name]
        del config["augment"]
        torch.save({**state, "format": 1}, path)
        go_on(before_the_end)


class TestRefused:
    """What does not fit is not resumed from, and nothing is changed."""

    def assert_refused(self, config, named, error=ValueError):
        before = contents(config.run_dir)
        with pytest.raises(error, match=f"(?s){named}"):
            DetectorTrainer(config)
        assert contents(config.run_dir) == before

    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("seed=1", "last.pt.*seed"),
            ("data.batch_size=6", "last.pt.*6"),
            ("data.train_limit=8", "last.pt.*8"),
            ("data.test_limit=2", "last.pt.*test_limit"),
            ("data.classes=[circle, cross, square, triangle, star]", "last.pt.*triangle"),
            ("detector.head_dim=16", "last.pt.*box_head"),
            ("optim.name=sgd", "last.pt.*optimizer"),
            ("detector.options.image_std=[1, 1, 1]", "last.pt.*image_std"),
        ],
    )
    def test_other_settings(self, config_for, whole_run, override, named):
        self.assert_refused(config_for(whole_run, override, "resume=auto"), named)

    @pytest.mark.parametrize("split", ["trainval", "test"])
    def test_as_many_other_images(self, shapes_root, config_for, whole_run, tmp_path, split):
        root = Path(shutil.copytree(shapes_root, tmp_path / "data"))
        (path,) = root.rglob(f"{split}.txt")
        path.write_text("\n".join(path.read_text().split()[::-1]))
        named = f"last.pt.*{split.removesuffix('val')}"
        self.assert_refused(config_for(whole_run, f"data.root={root}", "resume=auto"), named)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"position": {"epoch": "a", "batch": 0, "step": 0}}, "epoch"),
            ({"position": {"epoch": 0, "batch": -3, "step": 0}}, "batch"),
            ({"meter": {"sums": {"loss": 1.0}}}, ""),
            ({"optimizer": {"state": [], "param_groups": []}}, "optimizer"),
            ({"ema": []}, ""),
            ({"optimizer": None}, "optimizer"),  # as in best.pt
            ({"config": {"model": {"name": "resnet18"}}}, "detector"),  # a classifier's
            ({"format": 3}, "3"),
        ],
    )
    def test_a_checkpoint_of_wrong_values(self, config_for, before_the_end, change, named):
        """It is not passed over for the one before, either."""
        path = before_the_end / "last.pt"
        state = {**torch.load(path, weights_only=True), **change}
        torch.save({key: value for key, value in state.items() if value is not None}, path)
        self.assert_refused(config_for(before_the_end, "resume=auto"), f"last.pt.*{named}")

    def test_no_whole_checkpoint(self, config_for, before_the_end):
        for name in ("last.pt", "previous.pt"):
            break_file(before_the_end / name)
        self.assert_refused(config_for(before_the_end, "resume=auto"), "last.pt.*previous.pt")

    def test_a_run_that_is_there(self, config_for, whole_run):
        self.assert_refused(config_for(whole_run), str(whole_run), FileExistsError)


def test_what_has_changed_is_named(config_for, before_the_end, caplog):
    caplog.set_level("INFO", "detmix")
    changes = {
        "mixing.p": ("0.8", "0.25"),
        "optim.lr": ("0.002", "0.5"),
        "detector.options": ("0.0001", "0.0625"),
    }
    overrides = ("mixing.p=0.25", "optim.lr=0.5", "detector.options.box_score_thresh=0.0625")
    DetectorTrainer(config_for(before_the_end, *overrides, "resume=auto"))
    for name, (before, now) in changes.items():
        (line,) = (line for line in caplog.messages if line.startswith(name))
        assert before in line
        assert now in line


def test_the_best_checkpoint_scores_what_the_metrics_say(shapes_root, whole_run):
    model, config = load_detector(whole_run / "best.pt")
    dataset = VOCDetection(shapes_root, (("2007", "test"),), classes=config.data.class_names)
    loader = eval_loader(dataset, 4, workers=0)
    evaluator = VOCEvaluator(config.data.class_names)
    score(detect(model, loader, Accelerator(cpu=True), truth=dataset), [evaluator], dataset)
    scores = [line["mean_ap"] for line in read_metrics(whole_run) if line["event"] == "eval"]
    assert len(scores) == 2
    assert evaluator.compute().mean_ap == max(scores) > 0
