"""The training loop: epochs and steps, checkpoints, logs, signals, on one or many devices.

What is trained is left to a subclass. B is the batch size of one process.
"""

from __future__ import annotations

import abc
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from detmix.data.loaders import EpochBatchSampler
from detmix.mixing import sample_seed
from detmix.training.checkpoint import load_checkpoint, save_checkpoint
from detmix.training.config import LoopConfig
from detmix.training.interrupt import Interrupted, InterruptGuard
from detmix.training.meter import LossMeter
from detmix.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from detmix.training.run_folder import RunFolder, versions

__all__ = ["Evaluation", "NonFiniteLossError", "Position", "Trainer", "make_accelerator"]

Result = TypeVar("Result")


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the message names the images of the step."""


@dataclass
class Position:
    """How far a training has come.

    Attributes:
        epoch: The epoch under way, from 0.
        batch: Batches of it that are done.
        step: Optimizer steps taken.
        evaluation_due: Whether the epochs done so far are still to be evaluated.
        best: The highest score so far, None before the first evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluation_due: bool = False
    best: float | None = None


@dataclass(frozen=True)
class Evaluation(Generic[Result]):
    """What an evaluation came to.

    Attributes:
        result: The whole result.
        score: What the best checkpoint is chosen by, higher being better; None where undefined.
        metrics: Numbers for the log by name; None where undefined.
        summary: A line for a person.
    """

    result: Result
    score: float | None
    metrics: Mapping[str, float | None]
    summary: str


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Return the engine for the configuration's device and precision, and set the threads."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return Accelerator(mixed_precision=config.precision, cpu=config.device == "cpu")


class Trainer(abc.ABC, Generic[Result]):
    """Trains a model; `fit` runs to the end.

    Args:
        config: The configuration.
        accelerator: From `make_accelerator`.
        model: The model, on any device.
        loader: The training batches, with an `EpochBatchSampler`.
        classes: Class names, which the checkpoints carry.

    Raises:
        FileExistsError: If the run's folder exists and is not to be resumed.
        ValueError: If the checkpoint to resume from does not fit.
    """

    def __init__(
        self,
        config: LoopConfig,
        accelerator: Accelerator,
        model: nn.Module,
        loader: DataLoader[Any],
        classes: tuple[str, ...],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.classes = classes
        self.loader = loader
        assert isinstance(loader.batch_sampler, EpochBatchSampler)
        self.sampler = loader.batch_sampler
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.plain_model = model.to(accelerator.device)
        self.ema = _moving_average(self.plain_model, config.optim.ema_decay)
        optimizer = build_optimizer(self.plain_model, config.optim)
        self.model, self.optimizer = accelerator.prepare(self.plain_model, optimizer)
        self.position = Position()
        self._guard = InterruptGuard()
        resume = config.resume == "auto"
        if resume and (config.run_dir / "last.pt").exists():
            self._restore(load_checkpoint(config.run_dir / "last.pt"))
        self.folder: RunFolder | None = None
        if accelerator.is_main_process:
            self.folder = RunFolder(config.run_dir, config.as_dict(), resume=resume)
            self.folder.forget_after(self.position.step)

    @abc.abstractmethod
    def begin_epoch(self, epoch: int) -> None:
        """Prepare data and mixing for an epoch, counted from 0."""

    @abc.abstractmethod
    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch by name, each a scalar; their sum is minimised."""

    @abc.abstractmethod
    def describe(self, batch: Any) -> str:
        """Name the images of a batch."""

    @abc.abstractmethod
    def evaluate(self) -> Evaluation[Result]:
        """Evaluate `eval_model`; call `stop_if_asked` between batches."""

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated: the moving average where there is one."""
        return self.plain_model if self.ema is None else self.ema.module

    def fit(self) -> Result | None:
        """Train to the end.

        Returns:
            The last evaluation; None of a run that had nothing left to do.

        Raises:
            Interrupted: After SIGINT or SIGTERM; a checkpoint of the last whole step is saved.
            NonFiniteLossError: If a loss is not finite; a checkpoint of the step before is
                saved.
        """
        config, position = self.config, self.position
        result = None
        bar = tqdm(
            total=config.epochs * len(self.sampler),
            initial=position.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        with bar, self._guard:
            while True:
                if position.evaluation_due:
                    result = self._evaluate(bar)
                self.stop_if_asked()
                if position.epoch >= config.epochs:
                    break
                self._train_epoch(bar)
        if self.folder:
            self.folder.close()
        return result

    def stop_if_asked(self) -> None:
        """Save a checkpoint and raise `Interrupted` if a signal has come."""
        if self._guard.signum is None:
            return
        self._save_last()
        position = self.position
        raise Interrupted(
            self._guard.signum,
            f"stopped by signal {self._guard.signum} after step {position.step} (epoch "
            f"{position.epoch}); go on with --resume auto",
        )

    def _train_epoch(self, bar: Any) -> None:
        config, position = self.config, self.position
        self.begin_epoch(position.epoch)
        self.sampler.set_epoch(position.epoch, start=position.batch)
        self.model.train()
        meter = LossMeter()
        for batch in self.loader:
            losses, rate = self._step(batch)
            position.batch += 1
            position.step += 1
            meter.update(losses, len(batch[0]) * self.accelerator.num_processes)
            bar.update()
            if position.step % config.log_every == 0:
                self._log(meter, rate, bar)
                meter = LossMeter()
            self.stop_if_asked()
        position.epoch, position.batch = position.epoch + 1, 0
        is_last = position.epoch == config.epochs
        position.evaluation_due = is_last or position.epoch % config.eval_every == 0
        if position.evaluation_due or position.epoch % config.save_every == 0:
            self._save_last()

    def _step(self, batch: Any) -> tuple[dict[str, Tensor], float]:
        """Take one optimizer step; return the losses and the learning rate."""
        config, step = self.config, self.position.step
        # Randomness within the model is a function of the step, so that a run resumes exactly
        # with no random state to save.
        torch.manual_seed(sample_seed(config.seed, self.accelerator.process_index, step, "model"))
        rate = config.optim.lr * learning_rate_factor(
            step,
            config.schedule,
            steps_per_epoch=len(self.sampler),
            num_epochs=config.epochs,
        )
        set_learning_rate(self.optimizer, rate)
        statistics = _copy_statistics(self.plain_model)
        losses = self.compute_losses(batch)
        total = torch.stack(list(losses.values())).sum()
        if not self._is_finite(total):
            _restore_statistics(self.plain_model, statistics)
            self._fail(losses, batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if config.optim.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain_model)
        return {name: loss.detach() for name, loss in (*losses.items(), ("loss", total))}, rate

    def _is_finite(self, loss: Tensor) -> bool:
        """Tell whether the loss is finite in every process.

        This waits for the device, which torchvision's detectors do throughout their forward
        pass anyway; the backward pass is queued behind it as a whole.
        """
        finite = torch.isfinite(loss.detach()).float()
        return bool(self.accelerator.reduce(finite, "mean") == 1.0)

    def _fail(self, losses: dict[str, Tensor], batch: Any) -> None:
        self._save_last()
        values = ", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items())
        raise NonFiniteLossError(
            f"a loss is not finite at step {self.position.step} (epoch {self.position.epoch}): "
            f"{values}; images of the step: {self.describe(batch)}. The weights before this step "
            f"are saved in {self.config.run_dir / 'last.pt'}. A lower optim.lr, a longer warm-up "
            "or optim.clip_norm often helps"
        )

    def _log(self, meter: LossMeter, rate: float, bar: Any) -> None:
        values = {**meter.means(), "lr": rate, "images_per_s": meter.images_per_second()}
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, lr {rate:.2e}, {values['images_per_s']:.1f} images/s",
            refresh=False,
        )
        self._record("train", values)

    def _record(self, event: str, values: Mapping[str, float | None]) -> None:
        position = self.position
        if self.folder:
            epoch = position.epoch + position.batch / len(self.sampler)
            self.folder.log(event, position.step, epoch, values)

    def _evaluate(self, bar: Any) -> Result:
        start = time.perf_counter()
        evaluation = self.evaluate()
        seconds = time.perf_counter() - start
        self._record("eval", {**evaluation.metrics, "seconds": seconds})
        bar.write(f"epoch {self.position.epoch}: {evaluation.summary}")
        position, score = self.position, evaluation.score
        position.evaluation_due = False
        if score is not None and (position.best is None or score > position.best):
            position.best = score
            if self.folder:
                best = {**self._state(), "model": self.eval_model.state_dict()}
                save_checkpoint(self.folder.best, best)
        self._save_last()
        return evaluation.result

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.as_dict(),
            "classes": list(self.classes),
            "versions": versions(),
            "position": vars(self.position).copy(),
        }

    def _save_last(self) -> None:
        if not self.folder:
            return
        scaler = self.accelerator.scaler
        state = {
            **self._state(),
            "model": self.plain_model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": 0 if self.ema is None else int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        save_checkpoint(self.folder.last, state)

    def _restore(self, state: dict[str, Any]) -> None:
        if list(state["classes"]) != list(self.classes):
            raise ValueError(
                f"{self.config.run_dir / 'last.pt'} was trained on other classes: "
                f"{', '.join(state['classes'])}"
            )
        self.plain_model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.position = Position(**state["position"])


def _moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _statistics(model: nn.Module) -> list[Tensor]:
    """Return what the forward pass of a training changes: the statistics of live batch norm."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def _copy_statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in _statistics(model)]


@torch.no_grad()
def _restore_statistics(model: nn.Module, saved: list[Tensor]) -> None:
    for buffer, before in zip(_statistics(model), saved, strict=True):
        buffer.copy_(before)
