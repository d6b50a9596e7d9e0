"""How a run is stopped, and what a run goes on from; the rest is in the contract."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
from runs import StoppingMixin, assert_same_run
from tiny import tiny_config

from detmix.training import DetectorTrainer, Interrupted, load_checkpoint, save_checkpoint
from detmix.training.stopping import NonFiniteLossError

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

# Everything that has a state: an average, momentum, augmentation, mixing, a schedule.
SETTINGS = (
    "optim.ema_decay=0.9", "optim.clip_norm=1", "mixing.p=0.8", "epochs=3", "mixing.off_epochs=1",
    "log_every=4", "schedule.name=multistep", "schedule.milestones=[1]", "schedule.warmup_steps=4",
    "detector.options.box_score_thresh=0.01",
)  # fmt: skip
STEPS_PER_EPOCH, STEPS = 6, 18


class Stopping(StoppingMixin, DetectorTrainer):
    """A detector's training that gets a real signal."""


@pytest.fixture(scope="module")
def whole(shapes_root, tmp_path_factory):
    """Return the folders of uninterrupted runs, with SGD and with AdamW."""
    from accelerate.state import AcceleratorState

    folders = {}
    for name in ("sgd", "adamw"):
        folders[name] = tmp_path_factory.mktemp("whole") / name
        AcceleratorState._reset_state(True)
        DetectorTrainer(config_for(shapes_root, folders[name], name)).fit()
    return folders


def config_for(shapes_root, run_dir, name, *overrides):
    lr = {"sgd": 0.02, "adamw": 0.002}[name]
    return tiny_config(
        shapes_root, run_dir, f"optim.name={name}", f"optim.lr={lr}", *SETTINGS, *overrides
    )


class TestResume:
    def stop(self, config, **when):
        trainer = Stopping(config)
        vars(trainer).update(when)
        with pytest.raises(Interrupted) as stop:
            trainer.fit()
        return trainer, stop.value

    def go_on(self, config):
        trainer = Stopping(dataclasses.replace(config, resume="auto"))
        trainer.fit()
        return trainer

    @pytest.mark.parametrize("step", [6, 18])  # the last ones of an epoch and of all
    def test_after_any_step(self, shapes_root, tmp_path, whole, step):
        config = config_for(shapes_root, tmp_path / "run", "sgd")
        trainer, stop = self.stop(config, in_step=step)
        assert stop.signum == signal.SIGTERM
        assert f"after step {step} " in str(stop)
        state = load_checkpoint(config.run_dir / "last.pt")
        assert state["position"]["step"] == trainer.position.step == step
        self.go_on(config)
        assert_same_run(config.run_dir, whole["sgd"])

    def test_again_and_again(self, shapes_root, tmp_path, whole):
        config = config_for(shapes_root, tmp_path / "run", "adamw")
        config = dataclasses.replace(config, resume="auto")  # of a folder that is not there yet
        for step in (1, 8, 11):
            self.stop(config, in_step=step, signum=signal.SIGINT)
        self.go_on(config)
        assert_same_run(config.run_dir, whole["adamw"])

    def test_after_a_full_disk(self, shapes_root, tmp_path, whole):
        class Filling(DetectorTrainer):
            """Meets a full disk at the end of its second epoch."""

            def begin_epoch(self, epoch):
                super().begin_epoch(epoch)
                if epoch == 1:
                    (self.config.run_dir / ".last.pt.tmp").symlink_to("/dev/full")

        config = config_for(shapes_root, tmp_path / "run", "adamw")
        with pytest.raises(OSError, match=r"last\.pt could not be written: No space left"):
            Filling(config).fit()
        assert load_checkpoint(config.run_dir / "last.pt")["position"]["step"] == STEPS_PER_EPOCH
        self.go_on(config)
        assert_same_run(config.run_dir, whole["adamw"])

    def test_weights_that_are_not_finite_replace_no_checkpoint(self, shapes_root, tmp_path):
        class Overflowing(DetectorTrainer):
            """The gradient of the last step of its second epoch is not finite, its loss is."""

            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                if self.position.step == 2 * STEPS_PER_EPOCH - 1:
                    weight = self.plain_model.roi_heads.box_predictor.cls_score.weight
                    root = (weight.flatten()[0] * 0).sqrt()  # 0, with an infinite slope
                    losses["loss_classifier"] = losses["loss_classifier"] + root
                return losses

        trainer = Overflowing(config_for(shapes_root, tmp_path / "run", "adamw"))
        with pytest.raises(NonFiniteLossError, match="weights are not finite at step 12"):
            trainer.fit()
        state = load_checkpoint(tmp_path / "run" / "last.pt")
        assert state["position"]["step"] == STEPS_PER_EPOCH

    def test_a_second_sigterm_changes_nothing(self, shapes_root, tmp_path):
        """A scheduler and torchrun may each send one."""

        class Twice(Stopping):
            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                if self.position.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return losses

        trainer = Twice(config_for(shapes_root, tmp_path / "run", "adamw"))
        trainer.in_step = 3
        with pytest.raises(Interrupted, match="after step 3 "):
            trainer.fit()

    def test_a_second_ctrl_c_ends_it_at_once(self, shapes_root, tmp_path):
        class Twice(Stopping):
            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                os.kill(os.getpid(), signal.SIGINT)
                return losses

        trainer = Twice(config_for(shapes_root, tmp_path / "run", "adamw"))
        trainer.in_step, trainer.signum = 1, signal.SIGINT
        # A shell has its background jobs ignore SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                trainer.fit()
        finally:
            signal.signal(signal.SIGINT, before)

    def test_handlers_are_put_back(self, shapes_root, tmp_path):
        before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        self.stop(config_for(shapes_root, tmp_path / "run", "adamw"), in_step=1)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before

    def test_the_same_trainer_goes_on(self, shapes_root, tmp_path, whole):
        """As in a notebook, after Ctrl-C."""
        config = config_for(shapes_root, tmp_path / "run", "adamw")
        trainer, _ = self.stop(config, in_step=8)
        trainer.in_step = None
        trainer.fit()
        assert_same_run(config.run_dir, whole["adamw"])

    def test_tensorboard_goes_on(self, shapes_root, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        config = config_for(shapes_root, tmp_path / "run", "adamw", "log_every=3")
        self.stop(config, in_evaluation=1)
        self.go_on(config)
        board = EventAccumulator(str(config.run_dir / "tensorboard"))
        board.Reload()
        assert [point.step for point in board.Scalars("train/loss")] == [3, 6, 9, 12, 15, 18]
        assert [point.step for point in board.Scalars("eval/seconds")] == [6, 12, 18]


class TestRefused:
    """A checkpoint that does not fit is not resumed from, and nothing is changed."""

    @pytest.fixture
    def stopped(self, shapes_root, tmp_path):
        config = config_for(shapes_root, tmp_path / "run", "adamw")
        trainer = Stopping(config)
        trainer.in_step = 2
        with pytest.raises(Interrupted):
            trainer.fit()
        return tmp_path / "run"

    def test_another_file(self, shapes_root, stopped):
        state = load_checkpoint(stopped / "last.pt")
        del state["optimizer"]  # as in best.pt
        save_checkpoint(stopped / "last.pt", state)
        self.assert_refused(stopped, shapes_root, "adamw", [], "lacks 'optimizer': only")
        (stopped / "last.pt").write_bytes(b"broken")
        self.assert_refused(stopped, shapes_root, "adamw", [], "is broken")

    def assert_refused(self, run_dir, shapes_root, name, overrides, message):
        config = config_for(shapes_root, run_dir, name, "resume=auto", *overrides)
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        with pytest.raises(ValueError, match=f"(?s)last.pt.* {message}"):
            DetectorTrainer(config)
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before

    def test_as_many_steps_of_other_batches(self, shapes_root, tmp_path):
        options = ("data.batch_size=9", "mixing.p=0")
        trainer = Stopping(config_for(shapes_root, tmp_path / "run", "adamw", *options))
        trainer.in_step = 1
        with pytest.raises(Interrupted):
            trainer.fit()
        options = ["data.batch_size=12", "mixing.p=0"]
        message = "with 9 images in a batch of all processes, this one has 12"
        self.assert_refused(tmp_path / "run", shapes_root, "adamw", options, message)

    @pytest.mark.parametrize(
        "change",
        [
            {"position": {"epoch": "a", "batch": 0, "step": 0}},
            {"position": {"epoch": 0, "batch": -3, "step": 0}},
            {"position": {"epoch": 0, "batch": 0, "step": 0, "best": "hi"}},
            {"position": {"epoch": 0, "other": 1}},
            {"meter": {"sums": {"loss": 1.0}}},
            {"meter": {"sums": []}},
            {"optimizer": {"state": [], "param_groups": []}},
            {"ema": []},
        ],
    )
    def test_wrong_values(self, shapes_root, stopped, change):
        state = load_checkpoint(stopped / "last.pt")
        save_checkpoint(stopped / "last.pt", {**state, **change})
        self.assert_refused(stopped, shapes_root, "adamw", ["optim.ema_decay=0.9"], "")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"backbone": None}, "'NoneType' object has no attribute"),
            ({"detector": "x"}, "of another kind of training: it has no section detector"),
            ({"optim": []}, "of another kind of training: it has no section optim"),
        ],
    )
    def test_wrong_sections(self, shapes_root, stopped, change, message):
        state = load_checkpoint(stopped / "last.pt")
        config = {**state["config"], **change}
        save_checkpoint(stopped / "last.pt", {**state, "config": config})
        self.assert_refused(stopped, shapes_root, "adamw", [], message)

    def test_new_settings_of_the_optimizer_count(self, shapes_root, stopped):
        config = config_for(
            shapes_root, stopped, "adamw", "resume=auto", "optim.weight_decay=0.25", "epochs=4"
        )
        (group,) = DetectorTrainer(config).optimizer.param_groups
        assert group["weight_decay"] == 0.25
