"""The training loop, from top to bottom: epochs, steps, evaluation, checkpoints, stops.

What is trained is left to a subclass. Beside it: what several processes exchange (`processes`),
what ends a training before its time (`stopping`), what is saved (`checkpoint`, `run_folder`).
"""

from __future__ import annotations

import abc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Generic, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from detmix.data.loaders import EpochBatchSampler, explain_dead_workers, take_batches
from detmix.mixing import sample_seed, set_epoch
from detmix.training.checkpoint import (
    LAST,
    Newest,
    Normalization,
    TrainingState,
    describe,
    digest_of,
    load_newest,
    restore,
    save_checkpoint,
    tell,
)
from detmix.training.config import LoopConfig
from detmix.training.optim import (
    build_optimizer,
    copy_statistics,
    is_finite,
    learning_rate_factor,
    moving_average,
    restore_statistics,
    scale_learning_rate,
    share_statistics,
)
from detmix.training.processes import StepNews, check_agreement, gather_causes, share_step
from detmix.training.progress import Evaluation, LossMeter, Position, Result, progress_bar
from detmix.training.run_folder import RunFolder, lock_folder, open_folder, versions
from detmix.training.stopping import (
    Interrupted,
    InterruptGuard,
    NonFiniteLossError,
    OtherProcessError,
    describe_losses,
    one_line,
)

_NOT_SAVED = "the checkpoint before is left as it is"


class Trainer(abc.ABC, Generic[Result]):
    """Trains a model; `fit` runs to the end."""

    def __init__(
        self,
        config: LoopConfig,
        accelerator: Accelerator,
        loader: DataLoader[Any],
        classes: tuple[str, ...],
        image_names: Mapping[str, Sequence[str]],
    ) -> None:
        if config.precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("precision=fp16 needs a GPU: bf16 works on a CPU as well")
        assert isinstance(loader.batch_sampler, EpochBatchSampler)
        # With the precision that was decided, for the run's files and for going on.
        self.config = config = replace(config, precision=accelerator.mixed_precision)
        self.accelerator = accelerator
        self.loader, self.sampler, self.classes = loader, loader.batch_sampler, classes
        self._group, batches = config.optim.accumulate, len(self.sampler)
        self._epoch_steps = batches // self._group
        if not self._epoch_steps:
            raise ValueError(f"optim.accumulate={self._group}: an epoch has only {batches} batches")
        self._digests = {subset: digest_of(names) for subset, names in image_names.items()}
        self.position = Position()
        self.folder: RunFolder | None = None
        self._meter, self._guard = LossMeter(), InterruptGuard()
        self._saved_at = time.monotonic()
        resume = config.resume == "auto"
        is_to_lock = resume and accelerator.is_main_process and config.run_dir.is_dir()
        # Nobody else may go on from the checkpoint that is read here.
        with lock_folder(config.run_dir) if is_to_lock else nullcontext():
            newest = load_newest(config.run_dir) if resume else None
            optimizer = self._build(newest)
            # Before processes with other models wait for each other, and before the main process
            # moves what all must have read.
            if accelerator.num_processes > 1:
                self._check_agreement(newest)
            self.model, self.optimizer = accelerator.prepare(self.plain_model, optimizer)
            self._state = TrainingState(
                self.plain_model, self.ema, self.optimizer, accelerator.scaler, self._meter
            )
            if newest is not None:
                self.position = restore(newest, self._about(), self._state, accelerator.device)
                if accelerator.is_main_process:
                    tell(newest, config.as_dict())
            if accelerator.is_main_process:
                self.folder = open_folder(config, newest, self.position)

    def _build(self, newest: Newest | None) -> Optimizer:
        """Build the model that a checkpoint fits, its average and its optimizer."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)
        model = self.build_model(None if newest is None else newest.state["normalization"])
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.plain_model = model.to(accelerator.device)
        self.ema = moving_average(self.plain_model, config.optim.ema_decay)
        return build_optimizer(self.plain_model, config.optim)

    @abc.abstractmethod
    def build_model(self, saved: Normalization | None) -> nn.Module:
        """Build the model; ``saved`` is the normalization of a checkpoint that follows."""

    @abc.abstractmethod
    def normalization(self) -> Normalization:
        """Return what the model normalises with, for its checkpoints."""

    def begin_epoch(self, epoch: int) -> None:
        """Tell the loader and all it holds the epoch, counted from 0, in running workers too."""
        set_epoch(self.loader, epoch)

    @abc.abstractmethod
    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch, whose first entry is its images: scalars by name."""

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
        """Train to the end; return the last evaluation's result, None if nothing was left to do."""
        config, position, result = self.config, self.position, None
        steps, is_main = config.epochs * self._epoch_steps, self.accelerator.is_main_process
        bar = progress_bar(steps, position.step, shown=is_main)
        with bar, self._guard, self.folder or nullcontext(), explain_dead_workers():
            if position.evaluation_due:  # of a run that was stopped before it or in it
                result = self._evaluate(bar)
            patience = config.early_stopping or config.epochs + 1  # never so many evaluations
            while position.epoch < config.epochs and position.since_best < patience:
                self._train_epoch(bar)
                if position.evaluation_due:
                    result = self._evaluate(bar)
            if position.epoch < config.epochs and self.folder:
                bar.write(f"stopped early: no better score in {position.since_best} evaluations")
        return result

    def stop_if_asked(self) -> None:
        """Save a checkpoint and raise `Interrupted` if a signal has come."""
        # Several processes go on until they hear of it together, in the next step.
        if self.accelerator.num_processes == 1:
            self._stop_at(self._guard.signum)

    def _train_epoch(self, bar: Any) -> None:
        """Train to the end of an epoch, from its beginning or from where a run was stopped."""
        config, position = self.config, self.position
        self.begin_epoch(position.epoch)
        # Batches that are too few for a step are left out, as images that are for a batch.
        start, stop = position.batch * self._group, self._epoch_steps * self._group
        self.sampler.set_epoch(position.epoch, start, stop)
        self.model.train()
        self._meter.start_clock()
        for batches, problem in self._steps():
            news = self._step(batches, next_is_broken=problem is not None)
            position.batch += 1
            position.step += 1
            num_images = sum(len(batch[0]) for batch in batches) * self.accelerator.num_processes
            self._meter.update(news.means, num_images)
            bar.update()
            if position.step % config.log_every == 0:
                self._log(bar)
            minutes = (time.monotonic() - self._saved_at) / 60
            if config.save_minutes is not None and minutes >= config.save_minutes:
                self._save()
            self._stop_if_told(news, problem)
        position.epoch, position.batch = position.epoch + 1, 0
        is_last = position.epoch == config.epochs
        position.evaluation_due = is_last or position.epoch % config.eval_every == 0
        if position.evaluation_due or position.epoch % config.save_every == 0:
            self._save()

    def _steps(self) -> Iterator[tuple[list[Any], Exception | None]]:
        """Yield the batches of each step in the rest of an epoch, and what keeps the next away."""
        # A step ahead: where the next one is broken, all processes hear of it in the one before.
        loaded = iter(self.loader)
        batches, problem = take_batches(loaded, self._group)
        news = share_step(self.accelerator, {}, problem is not None, self._guard.signum)
        self._stop_if_told(news, problem)
        while batches:
            following, problem = take_batches(loaded, self._group)
            yield batches, problem
            batches = following

    def _step(self, batches: list[Any], *, next_is_broken: bool) -> StepNews:
        """Take one optimizer step; return what all processes tell of it."""
        config, step = self.config, self.position.step
        # Randomness within the model is a function of the step, so that a run resumes exactly
        # with no random state to save.
        torch.manual_seed(sample_seed(config.seed, self.accelerator.process_index, step, "model"))
        factor = learning_rate_factor(
            step, config.schedule, steps_per_epoch=self._epoch_steps, num_epochs=config.epochs
        )
        scale_learning_rate(self.optimizer, factor)
        statistics = copy_statistics(self.plain_model)
        self.optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            # Gradients of several batches go from process to process once, with the last.
            with nullcontext() if number == len(batches) else self.accelerator.no_sync(self.model):
                losses = self.compute_losses(batch)
                total = torch.stack(list(losses.values())).sum()
                known = {**losses, "loss": total}
                news = share_step(self.accelerator, known, next_is_broken, self._guard.signum)
                if not all(news.are_finite):
                    restore_statistics(self.plain_model, statistics)
                    is_well = news.are_finite[self.accelerator.process_index]
                    self._fail(None if is_well else describe_losses(losses, self.describe(batch)))
                self.accelerator.backward(total / len(batches))
            parts = {name: mean / len(batches) for name, mean in news.means.items()}
            means = {name: means.get(name, 0) + part for name, part in parts.items()}
        if config.optim.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain_model)
        return news._replace(means=means)

    def _log(self, bar: Any) -> None:
        meter, rate = self._meter, self.optimizer.param_groups[0]["lr"]
        values = {**meter.means(), "lr": rate, "images_per_s": meter.images_per_second()}
        meter.reset()
        text = f"loss {values['loss']:.3f}, lr {rate:.2e}, {values['images_per_s']:.1f} images/s"
        bar.set_postfix_str(text, refresh=False)
        self._record("train", values)

    def _record(self, event: str, values: Mapping[str, float | None]) -> None:
        position = self.position
        if self.folder:
            epoch = position.epoch + position.batch / self._epoch_steps
            self.folder.log(event, position.step, epoch, values)

    def _evaluate(self, bar: Any) -> Result:
        """Evaluate, and keep the best model so far."""
        start = time.perf_counter()
        share_statistics(self.eval_model)
        evaluation = self.evaluate()
        self._record("eval", {**evaluation.metrics, "seconds": time.perf_counter() - start})
        position, score = self.position, evaluation.score
        if self.folder:
            bar.write(f"epoch {position.epoch}: {evaluation.summary}")
        position.evaluation_due = False
        position.since_best += 1
        if score is not None and (position.best is None or score > position.best):
            position.best, position.since_best = score, 0
            if self.folder:
                state = {**self._about(), "model": self.eval_model.state_dict()}
                save_checkpoint(self.folder.best, state)
        self._save()
        return evaluation.result

    def _save(self) -> None:
        """Save the newest checkpoint; raise `NonFiniteLossError` if the model is spoilt."""
        if not is_finite(self.plain_model):
            raise NonFiniteLossError("the weights are", self.position, _NOT_SAVED)
        self._saved_at = time.monotonic()
        if self.folder:
            self.folder.save_last({**self._about(), **self._state.state_dict()})

    def _save_for_all(self) -> None:
        """Save before all processes stop: ``torchrun`` ends the others when the first one does."""
        self._save()
        self.accelerator.wait_for_everyone()

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint tells of a run, beside the state dicts."""
        return {
            "config": self.config.as_dict(),
            "classes": list(self.classes),
            "normalization": self.normalization(),
            "versions": versions(),
            "position": vars(self.position).copy(),
            "steps_per_epoch": self._epoch_steps,
            "batch_size": self.sampler.batch_size * self._group * self.accelerator.num_processes,
            "num_images": len(self.loader.dataset),  # type: ignore[arg-type]
            "images": self._digests,
        }

    def _check_agreement(self, newest: Newest | None) -> None:
        facts: dict[str, Any] = {f"the {subset} images": d for subset, d in self._digests.items()}
        facts["the checkpoint to go on from"] = None if newest is None else describe(newest)
        check_agreement({**self.config.as_dict(), **self.normalization(), **facts})

    def _stop_if_told(self, news: StepNews, problem: Exception | None) -> None:
        """Stop after the same step in all processes: at a signal, or before a broken batch."""
        # The signal first: where a server forks the workers, one to all processes ends these, too,
        # and the next batch looks broken.
        self._stop_at(self._guard.signum if self.accelerator.num_processes == 1 else news.signum)
        if not news.is_broken:
            return
        causes = gather_causes(None if problem is None else one_line(problem))
        try:
            self._save_for_all()
        except OSError as error:
            raise OSError(f"{error}, when {'; '.join(causes)}") from error
        raise problem or OtherProcessError(f"another process stops: {'; '.join(causes)}")

    def _stop_at(self, signum: int | None) -> None:
        if signum is None:
            return
        self._save_for_all()
        raise Interrupted(signum, self.position)

    def _fail(self, cause: str | None) -> NoReturn:
        """Stop for a loss that is not finite, with the causes of all; None where it is well."""
        causes = gather_causes(cause)
        saved = f"the weights before this step are saved in {self.config.run_dir / LAST}"
        if is_finite(self.plain_model):
            self._save_for_all()
        else:  # a gradient of a step before was not finite, though its loss was
            saved = f"the weights are not finite either: {_NOT_SAVED}"
        more = f"{'; in another process: '.join(causes)}; {saved}"
        raise NonFiniteLossError("a loss is", self.position, more)
