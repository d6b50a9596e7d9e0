"""A run that is killed or stopped anywhere, and resumed, is bit for bit the run that was not."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from runs import Stopping, assert_same_run, run_command, scalars
from tiny import STATEFUL, read_metrics, tiny_args, tiny_config
from torch import nn
from torch.optim.swa_utils import AveragedModel

from detmix.files import temporary_path
from detmix.training import DetectorTrainer, Interrupted, load_checkpoint

# What is called then, and which of its calls count.
MOMENTS = {
    "step": (torch.Tensor, "backward", None),
    "update": (AveragedModel, "update_parameters", None),  # the weights' average is not new yet
    "write": (torch, "save", None),
    # where there is no last.pt for a moment, only a previous.pt
    "exchange": (os, "replace", lambda source, target: Path(target).name == "last.pt"),
    "evaluation": (nn.Module, "eval", lambda model: model.training),
}


def arrange_signal(signum, moment, count):
    """Have this process and its workers get a signal when a moment comes for the n-th time."""
    os.setsid()
    owner, name, is_counted = MOMENTS[moment]
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if (is_counted is None or is_counted(*args)) and next(calls) == count:
            if moment == "write":  # half of it
                buffer = io.BytesIO()
                original(args[0], buffer)
                args[1].write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
                args[1].flush()
            os.killpg(0, signum)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


@pytest.fixture
def config_for(shapes_root):
    return lambda run_dir, *overrides: tiny_config(shapes_root, run_dir, *STATEFUL, *overrides)


@pytest.fixture
def go_on(config_for, whole_run):
    """Return a function that resumes a run and asserts that it ends as the whole one."""

    def go_on(run_dir):
        DetectorTrainer(config_for(run_dir, "resume=auto")).fit()
        assert_same_run(run_dir, whole_run)
        assert {p.name for p in run_dir.iterdir()} == {p.name for p in whole_run.iterdir()}

    return go_on


def step_of(path):
    return load_checkpoint(path)["position"]["step"]


# A moment, the number of its call, and the step of the newest checkpoint then.
KILLS = [
    ("write", 3, 3, []),  # after the first evaluation, which is lost
    ("exchange", 1, 3, []),
    ("step", 2, 3, []),  # a line of the log is written again
    ("update", 2, 4, ["save_minutes=1e-9", "data.workers=1"]),
    ("evaluation", 1, 6, []),
]


def test_killed_again_and_again(shapes_root, go_on, tmp_path):
    """By SIGKILL at one moment after the other."""
    run_dir = tmp_path / "run"
    for moment, count, kept, overrides in KILLS:
        args = tiny_args(shapes_root, run_dir, *STATEFUL, "resume=auto", *overrides)
        status = run_command(args, arrange_signal, signal.SIGKILL, moment, count)
        assert status == -signal.SIGKILL, moment
        assert (run_dir / "last.pt").exists() == (moment != "exchange")
        newest = "previous.pt" if moment == "exchange" else "last.pt"
        assert step_of(run_dir / newest) == kept, moment
    go_on(run_dir)


class TestStopped:
    def test_the_command_and_its_workers(self, shapes_root, go_on, tmp_path):
        args = tiny_args(shapes_root, tmp_path / "run", *STATEFUL, "data.workers=1")
        status = run_command(args, arrange_signal, signal.SIGTERM, "step", 5)
        assert status == 128 + signal.SIGTERM
        assert step_of(tmp_path / "run" / "last.pt") == 5
        go_on(tmp_path / "run")

    @pytest.mark.parametrize(
        ("when", "count", "signum", "step"),
        [("in_step", 4, signal.SIGINT, 4), ("in_evaluation", 2, signal.SIGTERM, 6)],
    )
    def test_the_same_trainer_goes_on(
        self, config_for, whole_run, tmp_path, when, count, signum, step
    ):
        """As in a notebook."""
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        trainer = Stopping(config_for(tmp_path / "run"))
        trainer.signum = signum
        setattr(trainer, when, count)
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
        trainer = Stopping(config_for(tmp_path / "run"))
        trainer.in_step, trainer.signum = 1, signum
        trainer.plain_model.register_forward_hook(lambda *_: os.kill(os.getpid(), signum))
        # A shell has its background jobs ignore SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(error):
                trainer.fit()
        finally:
            signal.signal(signal.SIGINT, before)
        assert (tmp_path / "run" / "last.pt").exists() == (error is Interrupted)

    @pytest.mark.parametrize(("method", "step"), [("begin_epoch", 3), ("evaluate", 6)])
    def test_by_a_full_disk(self, config_for, go_on, tmp_path, method, step):
        """In the second epoch, before its checkpoint or between an evaluation and its own."""
        path = tmp_path / "run" / "last.pt"
        trainer, calls = DetectorTrainer(config_for(path.parent)), itertools.count()
        original = getattr(trainer, method)

        def filling(*args):
            if next(calls) == 1:
                temporary_path(path).symlink_to("/dev/full")
            return original(*args)

        setattr(trainer, method, filling)
        with pytest.raises(OSError, match=f"{path}.*No space left"):
            trainer.fit()
        assert step_of(path) == step
        go_on(path.parent)
        points = scalars(path.parent)
        assert [step for step, _ in points["train/loss"]] == [2, 4, 6], "none twice"
        assert [step for step, _ in points["eval/mean_ap"]] == [3, 6]


@pytest.fixture
def before_the_end(whole_run, tmp_path):
    """Return a copy of the whole run before its last evaluation."""
    run_dir = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.copy(run_dir / "previous.pt", run_dir / "last.pt")
    assert load_checkpoint(run_dir / "last.pt")["position"]["evaluation_due"]
    return run_dir


def break_file(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(data)


class TestGoesOn:
    def test_from_the_checkpoint_before_a_broken_one(self, before_the_end, go_on):
        break_file(before_the_end / "last.pt")
        with open(before_the_end / "metrics.jsonl", "a") as file:
            file.write('{"event": "train", "st')  # half a line
        go_on(before_the_end)

    def test_from_format_1(self, before_the_end, go_on):
        """Which noted in the configuration what the model normalises with."""
        path = before_the_end / "last.pt"
        state = torch.load(path, weights_only=True)
        found, config = state.pop("normalization"), state["config"]
        for name in ("image_mean", "image_std"):
            config["detector"]["options"][name] = found[name]
        config["backbone"].setdefault("norm_eps", found["norm_eps"])
        for name in ("images", "num_images", "batch_size"):  # nor had the first ones these
            del state[name]
        del config["augment"]
        torch.save({**state, "format": 1}, path)
        go_on(before_the_end)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
            ("data.test_limit=2", "last.pt.*test_limit"),
            ("data.classes=[circle, cross, square, triangle, star]", "last.pt.*triangle"),
            ("detector.head_dim=16", "last.pt.*box_head"),
            ("optim.name=sgd", "last.pt.*optimizer"),
            ("detector.options.image_std=[1, 1, 1]", "last.pt.*image_std"),
        ],
    )
    def test_other_settings(self, config_for, whole_run, override, named):
        self.assert_refused(config_for(whole_run, override, "resume=auto"), named)

    @pytest.mark.parametrize(("split", "named"), [("trainval", "train"), ("test", "test")])
    def test_as_many_other_images(self, shapes_root, config_for, whole_run, tmp_path, split, named):
        root = Path(shutil.copytree(shapes_root, tmp_path / "data"))
        (path,) = root.rglob(f"{split}.txt")
        path.write_text("\n".join(path.read_text().split()[::-1]))
        self.assert_refused(config_for(whole_run, f"data.root={root}", "resume=auto"), named)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"position": {"epoch": "a", "batch": 0, "step": 0}}, "epoch"),
            ({"optimizer": {"state": [], "param_groups": []}}, "optimizer"),
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

    def test_no_whole_checkpoint_or_not_to_be_resumed(self, config_for, before_the_end):
        self.assert_refused(config_for(before_the_end), str(before_the_end), FileExistsError)
        for name in ("last.pt", "previous.pt"):
            break_file(before_the_end / name)
        self.assert_refused(config_for(before_the_end, "resume=auto"), "last.pt.*previous.pt")


def test_what_has_changed_is_named(config_for, before_the_end, caplog):
    caplog.set_level("INFO", "detmix")
    changes = {"mixing.p": ("0.8", "0.25"), "optim.lr": ("0.002", "0.5")}
    overrides = [f"{name}={now}" for name, (_, now) in changes.items()]
    DetectorTrainer(config_for(before_the_end, *overrides, "resume=auto"))
    told = [line for line in caplog.messages if line.split()[0] in changes]
    for line, name in zip(told, sorted(changes), strict=True):
        assert all(part in line for part in (name, *changes[name]))
    assert len(caplog.messages) == 1 + len(told), "places are none"


def test_the_best_checkpoint_is_of_the_highest_score(whole_run):
    scores = {m["step"]: m["mean_ap"] for m in read_metrics(whole_run) if m["event"] == "eval"}
    best = max(scores.values())
    assert scores[load_checkpoint(whole_run / "best.pt")["position"]["step"]] == best > 0
    assert load_checkpoint(whole_run / "last.pt")["position"]["best"] == best
