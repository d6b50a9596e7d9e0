"""Training a detector with weighted mixing, on one or many devices.

B images a step in each process; an epoch has as many steps as there are full batches.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from detmix.data.loaders import EpochBatchSampler, MixCollate, eval_loader, train_loader
from detmix.evaluation import VOCResult
from detmix.mixing import Target, sample_seed
from detmix.training.build import (
    build_mixer,
    build_model,
    build_test_set,
    build_train_set,
    open_voc,
)
from detmix.training.checkpoint import load_checkpoint, save_checkpoint
from detmix.training.config import TrainConfig
from detmix.training.evaluate import evaluate, to_device
from detmix.training.interrupt import Interrupted, InterruptGuard
from detmix.training.meter import LossMeter
from detmix.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from detmix.training.run_folder import RunFolder, versions

__all__ = ["DetectorTrainer", "NonFiniteLossError", "Position"]


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
        best: The highest mAP so far, None before the first evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluation_due: bool = False
    best: float | None = None


class DetectorTrainer:
    """Trains a detector as a configuration says; `fit` runs to the end.

    Everything that can be wrong with the input is met here, before the run's folder is made.

    Args:
        config: The configuration.

    Raises:
        FileExistsError: If the run's folder exists and is not to be resumed.
        FileNotFoundError, ValueError: For data or settings that are wrong.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=config.device == "cpu")
        self.classes = config.data.classes
        self._build_data()
        self._build_model()
        self.position = Position()
        resume = config.resume == "auto"
        last = config.run_dir / "last.pt"
        if resume and last.exists():
            self._restore(load_checkpoint(last))
        self.folder: RunFolder | None = None
        if self.accelerator.is_main_process:
            self.folder = RunFolder(config.run_dir, config.as_dict(), resume=resume)
            self.folder.forget_after(self.position.step)

    def _build_data(self) -> None:
        config, accelerator = self.config, self.accelerator
        share: dict[str, Any] = {
            "workers": config.data.workers,
            "rank": accelerator.process_index,
            "num_processes": accelerator.num_processes,
            "pin_memory": accelerator.device.type == "cuda",
        }
        mix = build_mixer(config)
        place = config.mixing.place
        train_voc, test_voc = open_voc(config, train=True), open_voc(config, train=False)
        self.names = train_voc.names
        self.train_set = build_train_set(config, train_voc, mix if place == "dataset" else None)
        self.train_loader = train_loader(
            self.train_set,
            config.data.batch_size,
            seed=config.seed,
            mix=mix if place == "batch" else None,
            **share,
        )
        sampler = self.train_loader.batch_sampler
        assert isinstance(sampler, EpochBatchSampler)
        self.sampler = sampler
        self.test_loader = eval_loader(
            build_test_set(config, test_voc), config.data.eval_batch_size, **share
        )
        self.mix = mix
        self.mix_on_device = (
            MixCollate(mix, config.seed).mix_batch if mix and place == "device" else None
        )

    def _build_model(self) -> None:
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)
        model: nn.Module = build_model(config)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model = model.to(accelerator.device)
        self.plain_model = model
        self.ema = None
        if config.optim.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.optim.ema_decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        optimizer = build_optimizer(model, config.optim)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated: the moving average where there is one."""
        return self.plain_model if self.ema is None else self.ema.module

    def fit(self) -> VOCResult | None:
        """Train to the end.

        Returns:
            The last evaluation, in a run that had nothing left to do None.

        Raises:
            Interrupted: After SIGINT or SIGTERM; a checkpoint of the last whole step is saved.
            NonFiniteLossError: If a loss is not finite; a checkpoint of the step before is
                saved.
        """
        config, position = self.config, self.position
        steps = len(self.sampler)
        result = None
        bar = tqdm(
            total=config.epochs * steps,
            initial=position.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        with bar, InterruptGuard() as guard:
            self.guard = guard
            while True:
                if position.evaluation_due:
                    result = self._evaluate(bar)
                    position.evaluation_due = False
                    self._save_last()
                self._stop_if_asked()
                if position.epoch >= config.epochs:
                    break
                self._train_epoch(bar)
                position.epoch, position.batch = position.epoch + 1, 0
                is_last = position.epoch == config.epochs
                position.evaluation_due = is_last or position.epoch % config.eval_every == 0
                self._save_last()
        if self.folder:
            self.folder.close()
        return result

    def _train_epoch(self, bar: Any) -> None:
        position = self.position
        self.train_set.set_epoch(position.epoch)
        if self.mix is not None:
            self.mix.set_epoch(position.epoch)
        self.sampler.set_epoch(position.epoch, start=position.batch)
        self.model.train()
        meter = LossMeter()
        batches = iter(self.train_loader)
        while position.batch < len(self.sampler):
            images, targets = self._next(batches)
            losses, rate = self._step(images, targets)
            position.batch += 1
            position.step += 1
            meter.update(losses, len(images) * self.accelerator.num_processes)
            bar.update()
            if position.step % self.config.log_every == 0:
                self._log(meter, rate, bar)
                meter = LossMeter()
            self._stop_if_asked()

    def _next(self, batches: Any) -> tuple[list[Tensor], list[Target]]:
        images, targets = next(batches)
        images, targets = to_device(images, targets, self.accelerator.device)
        if self.mix_on_device is not None:
            images, targets = self.mix_on_device(images, targets)
        return images, targets

    def _step(self, images: list[Tensor], targets: list[Target]) -> tuple[dict[str, Tensor], float]:
        """Take one optimizer step; return the losses and the learning rate."""
        config, step = self.config, self.position.step
        # Sampling of anchors and proposals: a function of the step, so that a run resumes
        # exactly with no random state to save.
        torch.manual_seed(sample_seed(config.seed, self.accelerator.process_index, step, "model"))
        rate = config.optim.lr * learning_rate_factor(
            step,
            config.schedule,
            steps_per_epoch=len(self.sampler),
            num_epochs=config.epochs,
        )
        set_learning_rate(self.optimizer, rate)
        statistics = [buffer.clone() for buffer in self.statistics]
        losses: dict[str, Tensor] = self.model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self._check_finite(losses, total, targets, statistics)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if config.optim.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain_model)
        return {name: loss.detach() for name, loss in losses.items()} | {
            "loss": total.detach()
        }, rate

    def _check_finite(
        self,
        losses: dict[str, Tensor],
        total: Tensor,
        targets: list[Target],
        statistics: list[Tensor],
    ) -> None:
        """Stop the training if a loss is not finite, in whichever process.

        This waits for the device, which torchvision's detectors do throughout their forward
        pass anyway; the backward pass is queued behind it as a whole.
        """
        if self.accelerator.num_processes > 1:
            finite = torch.isfinite(total).float()
            everywhere = bool(
                self.accelerator.reduce(finite, "sum")
                == finite.new_tensor(self.accelerator.num_processes)
            )
        else:
            everywhere = math.isfinite(total.item())
        if everywhere:
            return
        with torch.no_grad():  # the forward pass has moved them
            for buffer, before in zip(self.statistics, statistics, strict=True):
                buffer.copy_(before)
        self._save_last()
        values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
        names = ", ".join(self.names[int(target["image_id"])] for target in targets)
        raise NonFiniteLossError(
            f"a loss is not finite at step {self.position.step} (epoch {self.position.epoch}): "
            f"{values}; images of the step: {names}. The weights before this step are saved in "
            f"{self.config.run_dir / 'last.pt'}. A lower optim.lr, a longer warm-up or "
            "optim.clip_norm often helps"
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

    def _evaluate(self, bar: Any) -> VOCResult:
        start = time.perf_counter()
        evaluator = evaluate(
            self.eval_model,
            self.test_loader,
            self.classes,
            self.accelerator,
            after_batch=self._stop_if_asked,
        )
        result = evaluator.compute()
        eleven = evaluator.compute(interpolation="11point")
        undefined = math.isnan(result.mean_ap)
        mean_ap = None if undefined else result.mean_ap
        self._record(
            "eval",
            {
                "mean_ap": mean_ap,
                "mean_ap_11point": None if undefined else eleven.mean_ap,
                "seconds": time.perf_counter() - start,
            },
        )
        bar.write(
            f"epoch {self.position.epoch}: mAP {result.mean_ap:.4f} (all-point), "
            f"{eleven.mean_ap:.4f} (11-point)"
        )
        position = self.position
        if mean_ap is not None and (position.best is None or mean_ap > position.best):
            position.best = mean_ap
            self._save_best(mean_ap)
        return result

    def _stop_if_asked(self) -> None:
        if self.guard.signum is None:
            return
        self._save_last()
        position = self.position
        raise Interrupted(
            self.guard.signum,
            f"stopped by signal {self.guard.signum} after step {position.step} (epoch "
            f"{position.epoch}); go on with --resume auto",
        )

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.as_dict(),
            "classes": list(self.classes),
            "versions": versions(),
            "position": vars(self.position).copy(),
        }

    def _save_best(self, mean_ap: float) -> None:
        if self.folder:
            state = {**self._state(), "model": self.eval_model.state_dict(), "mean_ap": mean_ap}
            save_checkpoint(self.folder.best, state)

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
