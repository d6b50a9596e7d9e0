"""The training loop: epochs and steps, checkpoints, logs, signals, on one or many devices.

What is trained is left to a subclass. B is the batch size of one process.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Generic

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detmix.data.loaders import EpochBatchSampler, explain_dead_workers
from detmix.mixing import sample_seed
from detmix.training.checkpoint import (
    LAST,
    Newest,
    TrainingState,
    check_fits,
    describe,
    digests_of,
    load_newest,
    tell,
)
from detmix.training.config import LoopConfig
from detmix.training.norm_statistics import (
    check_norm,
    copy_statistics,
    is_finite,
    moving_average,
    restore_statistics,
    share_statistics,
)
from detmix.training.optim import build_optimizer, learning_rate_factor, scale_learning_rate
from detmix.training.processes import check_agreement, share_step
from detmix.training.progress import Evaluation, LossMeter, Position, Result, progress_bar
from detmix.training.run_folder import RunFolder, lock_folder, versions
from detmix.training.stopping import (
    Interrupted,
    InterruptGuard,
    describe_losses,
    non_finite_loss,
    non_finite_weights,
    one_line,
    stopped_elsewhere,
)


class Trainer(abc.ABC, Generic[Result]):
    """Trains a model; `fit` runs to the end."""

    def __init__(
        self,
        config: LoopConfig,
        accelerator: Accelerator,
        model: nn.Module,
        loader: DataLoader[Any],
        classes: tuple[str, ...],
        images: Mapping[str, Sequence[str]],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.classes = classes
        self._images = digests_of(images)
        self._num_images = {subset: len(names) for subset, names in images.items()}
        self.loader = loader
        assert isinstance(loader.batch_sampler, EpochBatchSampler)
        if config.precision == "fp16" and accelerator.device.type == "cpu":
            raise ValueError("precision=fp16 needs a GPU: bf16 works on a CPU as well")
        self.sampler = loader.batch_sampler
        check_norm(model, accelerator)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.plain_model = model.to(accelerator.device)
        self.ema = moving_average(self.plain_model, config.optim.ema_decay)
        optimizer = build_optimizer(self.plain_model, config.optim)
        self.position = Position()
        self._meter = LossMeter()
        self._guard = InterruptGuard()
        self._stop: int | None = None  # the signal that all processes know of
        self._batch: Any = None  # the last one
        self._broken: Exception | None = None  # why there is no next one
        self._saved_at = time.monotonic()
        self.folder: RunFolder | None = None
        resume = config.resume == "auto"
        is_to_lock = resume and accelerator.is_main_process and config.run_dir.is_dir()
        # Nobody else may go on from the checkpoint that is read here.
        with lock_folder(config.run_dir) if is_to_lock else nullcontext():
            newest = load_newest(config.run_dir, config.as_dict()) if resume else None
            # Before processes with other models wait for each other, and before the main process
            # moves what all must have read.
            self._check_agreement(newest)
            self.model, self.optimizer = accelerator.prepare(self.plain_model, optimizer)
            self._changing = TrainingState(
                self.plain_model, self.ema, self.optimizer, accelerator.scaler, self._meter
            )
            if newest is not None:
                self._restore(newest)
            if accelerator.is_main_process:
                self.folder = self._open_folder(newest)

    def _open_folder(self, newest: Newest | None) -> RunFolder:
        config, position = self.config, self.position
        folder = RunFolder(config.run_dir, config.as_dict(), resume=config.resume == "auto")
        if newest is not None and newest.problem is not None:
            folder.take_previous()
        folder.forget_after(position.step, evaluation=position.evaluation_due)
        return folder

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
        """Train to the end."""
        config, position = self.config, self.position
        result = None
        steps = config.epochs * len(self.sampler)
        bar = progress_bar(steps, position.step, shown=self.accelerator.is_main_process)
        with bar, self._guard, self.folder or nullcontext(), explain_dead_workers():
            while True:
                if position.evaluation_due:
                    result = self._evaluate(bar)
                if position.epoch >= config.epochs:
                    return result
                self._train_epoch(bar)

    def stop_if_asked(self) -> None:
        """Save a checkpoint and raise `Interrupted` if a signal has come."""
        # Several processes go on until they hear of it together, in the next step.
        if self.accelerator.num_processes == 1:
            self._stop_at(self._guard.signum)

    def _stop_at(self, signum: int | None) -> None:
        if signum is None:
            return
        self._save_for_all()
        position = self.position
        raise Interrupted(
            signum,
            f"stopped by signal {signum} after step {position.step} (epoch {position.epoch}); "
            "go on with --resume auto",
        )

    def _train_epoch(self, bar: Any) -> None:
        config, position = self.config, self.position
        self.begin_epoch(position.epoch)
        self.sampler.set_epoch(position.epoch, start=position.batch)
        self.model.train()
        self._meter.start(afresh=position.batch == 0)
        num_processes = self.accelerator.num_processes
        for batch in self._batches():
            losses, rate = self._step(batch)
            self._batch = batch
            position.batch += 1
            position.step += 1
            self._meter.update(losses, len(batch[0]) * num_processes)
            bar.update()
            if position.step % config.log_every == 0:
                self._log(rate, bar)
            minutes = (time.monotonic() - self._saved_at) / 60
            if config.save_minutes is not None and minutes >= config.save_minutes:
                self._save_last()
            # Several processes must all stop after the same step.
            self._stop_at(self._guard.signum if num_processes == 1 else self._stop)
        position.epoch, position.batch = position.epoch + 1, 0
        is_last = position.epoch == config.epochs
        position.evaluation_due = is_last or position.epoch % config.eval_every == 0
        if position.evaluation_due or position.epoch % config.save_every == 0:
            self._save_last()

    def _batches(self) -> Iterator[Any]:
        """Yield the rest of the epoch; save what was trained before an image that is broken."""
        # One of several processes that meets a bad image yields its last batch again, so as to take
        # part in the step in which the others hear of it.
        self._broken = None
        try:
            yield from self.loader
        except Exception as error:
            # Where a server forks the workers, a signal to all processes may end these.
            self.stop_if_asked()
            if self.accelerator.num_processes == 1 or self._batch is None:
                self._save_last()
                raise
            self._broken = error
        if self._broken is not None:
            yield self._batch

    def _step(self, batch: Any) -> tuple[dict[str, Tensor], float]:
        """Take one optimizer step; return the losses of all processes and the learning rate."""
        config, step = self.config, self.position.step
        # Randomness within the model is a function of the step, so that a run resumes exactly
        # with no random state to save.
        torch.manual_seed(sample_seed(config.seed, self.accelerator.process_index, step, "model"))
        factor = learning_rate_factor(
            step, config.schedule, steps_per_epoch=len(self.sampler), num_epochs=config.epochs
        )
        scale_learning_rate(self.optimizer, factor)
        statistics = copy_statistics(self.plain_model)
        losses = self.compute_losses(batch)
        total = torch.stack(list(losses.values())).sum()
        news = share_step(
            self.accelerator,
            {**losses, "loss": total},
            is_broken=self._broken is not None,
            signum=self._guard.signum,
        )
        if news.is_broken or not all(news.are_finite):
            restore_statistics(self.plain_model, statistics)
        if news.is_broken:
            self._fail_without_batch()
        if not all(news.are_finite):
            own_is_finite = news.are_finite[self.accelerator.process_index]
            self._fail(None if own_is_finite else describe_losses(losses, self.describe(batch)))
        self._stop = news.signum
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if config.optim.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain_model)
        return news.means, config.optim.lr * factor

    def _fail_without_batch(self) -> None:
        """Save, and raise the error of the loader, or what tells of those of other processes."""
        causes = gather_object([] if self._broken is None else [one_line(self._broken)])
        try:
            self._save_for_all()
        except OSError as error:
            raise OSError(f"{error}, when {'; '.join(causes)}") from error
        if self._broken is not None:
            raise self._broken
        raise stopped_elsewhere(causes)

    def _fail(self, cause: str | None) -> None:
        """Raise an error that tells the causes of all processes; None for one that has none."""
        causes = gather_object([] if cause is None else [cause])
        saved = f"The weights before this step are saved in {self.config.run_dir / LAST}"
        if is_finite(self.plain_model):
            self._save_for_all()
        else:  # a gradient of a step before was not finite, though its loss was
            saved = "The weights are not finite either: the checkpoint before is left as it is"
        raise non_finite_loss(causes, self.position, saved)

    def _log(self, rate: float, bar: Any) -> None:
        meter = self._meter
        values = {**meter.means(), "lr": rate, "images_per_s": meter.images_per_second()}
        meter.start(afresh=True)
        text = f"loss {values['loss']:.3f}, lr {rate:.2e}, {values['images_per_s']:.1f} images/s"
        bar.set_postfix_str(text, refresh=False)
        self._record("train", values)

    def _record(self, event: str, values: Mapping[str, float | None]) -> None:
        position = self.position
        if self.folder:
            epoch = position.epoch + position.batch / len(self.sampler)
            self.folder.log(event, position.step, epoch, values)

    def _evaluate(self, bar: Any) -> Result:
        start = time.perf_counter()
        share_statistics(self.eval_model)
        evaluation = self.evaluate()
        seconds = time.perf_counter() - start
        self._record("eval", {**evaluation.metrics, "seconds": seconds})
        position, score = self.position, evaluation.score
        if self.folder:
            bar.write(f"epoch {position.epoch}: {evaluation.summary}")
        position.evaluation_due = False
        if score is not None and (position.best is None or score > position.best):
            position.best = score
            if self.folder:
                self.folder.save_best({**self._state(), "model": self.eval_model.state_dict()})
        self._save_last()
        return evaluation.result

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.as_dict(),
            "classes": list(self.classes),
            "versions": versions(),
            "position": vars(self.position).copy(),
            "steps_per_epoch": len(self.sampler),
            "batch_size": self.sampler.batch_size * self.accelerator.num_processes,
            "num_images": len(self.loader.dataset),  # type: ignore[arg-type]
            "images": self._images,
        }

    def _check_agreement(self, newest: Newest | None) -> None:
        """Raise `ValueError` unless all processes do the same."""
        if self.accelerator.num_processes == 1:
            return
        facts: dict[str, str | None] = {}
        for subset, digest in self._images.items():
            facts[f"the {subset} images"] = f"{self._num_images[subset]}, digest {digest[:8]}"
        facts["the checkpoint to go on from"] = None if newest is None else describe(newest)
        check_agreement(self.config.as_dict(), facts)

    def _save_last(self) -> None:
        if not is_finite(self.plain_model):
            raise non_finite_weights(self.position)
        self._saved_at = time.monotonic()
        if self.folder:
            self.folder.save_last({**self._state(), **self._changing.state_dict()})

    def _save_for_all(self) -> None:
        """Save before all processes stop: ``torchrun`` ends the others when the first one does."""
        self._save_last()
        self.accelerator.wait_for_everyone()

    def _restore(self, newest: Newest) -> None:
        path, state, _ = newest
        check_fits(newest, self._state())
        try:
            self._restore_state(state)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: only a last.pt can be resumed from") from error
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit the configuration: {error}") from error
        if self.accelerator.is_main_process:
            tell(newest, self.config.as_dict())

    def _restore_state(self, state: dict[str, Any]) -> None:
        self._changing.load_state_dict(state, self.accelerator.device)
        self.position = Position(**state["position"])
