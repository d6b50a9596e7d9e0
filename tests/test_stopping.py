"""How a run is stopped, and what a run goes on from; the rest is in the contract."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from runs import StoppingMixin, assert_same_run
from tiny import tiny_config

from detmix.training import DetectorTrainer, Interrupted, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

# Everything that has a state: an average, momentum, augmentation, mixing, a schedule.
SETTINGS = (
    "optim.ema_decay=0.9", "optim.clip_norm=1", "optim.lr=0.002", "mixing.p=0.8", "epochs=3",
    "mixing.off_epochs=1", "log_every=4", "schedule.name=multistep", "schedule.milestones=[1]",
    "schedule.warmup_steps=4",
    "detector.options.box_score_thresh=0.01",
)  # fmt: skip
STEPS_PER_EPOCH = 6


class Stopping(StoppingMixin, DetectorTrainer):
    """A detector's training that gets a real signal."""


@pytest.fixture(scope="module")
def whole(shapes_root, tmp_path_factory):
    """Return the folder of a run that nothing happened to."""
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("whole") / "run"
    DetectorTrainer(config_for(shapes_root, folder)).fit()
    return folder


def config_for(shapes_root, run_dir, *overrides):
    return tiny_config(shapes_root, run_dir, *SETTINGS, *overrides)


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

    def test_after_a_full_disk(self, shapes_root, tmp_path, whole):
        class Filling(DetectorTrainer):
            """Meets a full disk at the end of its second epoch."""

            def begin_epoch(self, epoch):
                super().begin_epoch(epoch)
                if epoch == 1:
                    (self.config.run_dir / ".last.pt.tmp").symlink_to("/dev/full")

        config = config_for(shapes_root, tmp_path / "run")
        with pytest.raises(OSError, match=r"last\.pt could not be written: No space left"):
            Filling(config).fit()
        assert load_checkpoint(config.run_dir / "last.pt")["position"]["step"] == STEPS_PER_EPOCH
        self.go_on(config)
        assert_same_run(config.run_dir, whole)

    def test_a_second_sigterm_changes_nothing(self, shapes_root, tmp_path):
        """A scheduler and torchrun may each send one."""

        class Twice(Stopping):
            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                if self.position.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return losses

        trainer = Twice(config_for(shapes_root, tmp_path / "run"))
        trainer.in_step = 3
        with pytest.raises(Interrupted, match="after step 3 "):
            trainer.fit()

    def test_a_second_ctrl_c_ends_it_at_once(self, shapes_root, tmp_path):
        class Twice(Stopping):
            def compute_losses(self, batch):
                losses = super().compute_losses(batch)
                os.kill(os.getpid(), signal.SIGINT)
                return losses

        trainer = Twice(config_for(shapes_root, tmp_path / "run"))
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
        self.stop(config_for(shapes_root, tmp_path / "run"), in_step=1)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before

    def test_the_same_trainer_goes_on(self, shapes_root, tmp_path, whole):
        """As in a notebook, after Ctrl-C."""
        config = config_for(shapes_root, tmp_path / "run")
        trainer, _ = self.stop(config, in_step=8)
        trainer.in_step = None
        trainer.fit()
        assert_same_run(config.run_dir, whole)

    def test_tensorboard_goes_on(self, shapes_root, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        config = config_for(shapes_root, tmp_path / "run", "log_every=3")
        self.stop(config, in_evaluation=1)
        self.go_on(config)
        board = EventAccumulator(str(config.run_dir / "tensorboard"))
        board.Reload()
        assert [point.step for point in board.Scalars("train/loss")] == [3, 6, 9, 12, 15, 18]
        assert [point.step for point in board.Scalars("eval/seconds")] == [6, 12, 18]


@pytest.mark.parametrize(
    "change",
    [
        {"position": {"epoch": "a", "batch": 0, "step": 0}},
        {"position": {"epoch": 0, "batch": -3, "step": 0}},
        {"position": {"epoch": 0, "batch": 0, "step": 0, "best": "hi"}},
        {"meter": {"sums": {"loss": 1.0}}},
        {"optimizer": {"state": [], "param_groups": []}},
        {"ema": []},
        {"optimizer": None},  # as in best.pt
    ],
)
def test_a_checkpoint_of_wrong_values_is_refused(shapes_root, whole, tmp_path, change):
    """And nothing is changed."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    state = load_checkpoint(run_dir / "last.pt")
    state = {key: value for key, value in (state | change).items() if value is not None}
    save_checkpoint(run_dir / "last.pt", state)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"last\.pt"):
        DetectorTrainer(config_for(shapes_root, run_dir, "resume=auto"))
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
