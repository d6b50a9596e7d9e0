"""Running a detector over a loader, over all processes, and scoring what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from detmix.mixing import Target
from detmix.training.build import build_model
from detmix.training.checkpoint import load_checkpoint
from detmix.training.config import TrainConfig
from detmix.training.parsing import parse_args

__all__ = ["evaluate", "evaluating", "load_detector", "predict", "to_device"]

Prediction = dict[str, Tensor]

_UINT8_MAX = 255.0


class Evaluator(Protocol):
    """Whatever takes predictions and targets batch by batch."""

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add the images of a batch."""


def to_device(
    images: list[Tensor], targets: list[Target], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Move a batch to the device, and scale uint8 images to float32 in [0, 1] there."""
    images = [image.to(device, non_blocking=True) for image in images]
    images = [i.float() / _UINT8_MAX if i.dtype == torch.uint8 else i for i in images]
    return images, send_to_device(targets, device, non_blocking=True)


@torch.inference_mode()
def predict(
    model: nn.Module, loader: Iterable[Any], accelerator: Accelerator
) -> Iterator[tuple[list[Prediction], list[Target]]]:
    """Yield the predictions and targets of each batch of this process, all on the CPU.

    Args:
        model: A torchvision detector; it is left in evaluation mode.
        loader: Yields lists of images and targets.
        accelerator: Says the device and the precision.
    """
    model.eval()
    for images, targets in loader:
        with accelerator.autocast():
            predictions = model(to_device(images, [], accelerator.device)[0])
        predictions = [
            {
                k: v.float().cpu() if v.is_floating_point() else v.cpu()
                for k, v in prediction.items()
            }
            for prediction in predictions
        ]
        yield predictions, targets


@contextmanager
def evaluating(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator
) -> Iterator[Iterable[Any]]:
    """Put a model into evaluation mode for a pass over a loader, with a progress bar.

    Args:
        model: The model; its training mode is restored.
        loader: The loader.
        accelerator: Says which process shows the bar.

    Yields:
        The loader's batches.
    """
    training = model.training
    model.eval()
    hidden = not accelerator.is_main_process or None  # None: not into a file either
    try:
        with tqdm(loader, "evaluating", leave=False, disable=hidden) as batches:
            yield batches
    finally:
        model.train(training)


def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    evaluator: Evaluator,
    accelerator: Accelerator,
    *,
    after_batch: Callable[[], None] | None = None,
) -> None:
    """Run a detector over a loader and hand what it finds to an evaluator.

    Args:
        model: A torchvision detector; its training mode is restored.
        loader: Yields lists of images and targets.
        evaluator: Such as `VOCEvaluator`; is updated with the images of all processes.
        accelerator: Says the device and the precision, and gathers.
        after_batch: Called after each batch; may raise to end the evaluation.
    """
    found: list[tuple[Prediction, Target]] = []
    with evaluating(model, loader, accelerator) as batches:
        for predictions, targets in predict(model, batches, accelerator):
            found += zip(predictions, targets, strict=True)
            if after_batch is not None:
                after_batch()
    # Once, at the end: the processes need not have the same number of batches.
    found = gather_object(found) if accelerator.num_processes > 1 else found
    evaluator.update([prediction for prediction, _ in found], [target for _, target in found])


def load_detector(path: Path | str, overrides: Sequence[str] = ()) -> tuple[nn.Module, TrainConfig]:
    """Load a detector from a checkpoint of a training.

    Args:
        path: ``last.pt`` or ``best.pt`` of a run.
        overrides: Dotted arguments that change the checkpoint's configuration, such as
            ``["--data.root", "data/VOCdevkit"]``.

    Returns:
        The detector on the CPU in evaluation mode, with the averaged weights where there are
        some, and its configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a detector, or does not fit the configuration.
    """
    state = load_checkpoint(path)
    if "detector" not in state["config"]:
        raise ValueError(f"{path} is not a checkpoint of a detector, but of a classifier")
    try:
        config = parse_args(TrainConfig, ["--config", json.dumps(state["config"]), *overrides])
    except ValueError as error:
        raise ValueError(f"the configuration in {path}, with what changes it: {error}") from error
    if list(config.data.classes) != list(state["classes"]):
        raise ValueError(
            f"{path} is a detector of the classes {', '.join(state['classes'])}, not of "
            f"{', '.join(config.data.classes)}"
        )
    model = build_model(config, load_weights=False)
    try:
        model.load_state_dict(state.get("ema") or state["model"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit its configuration: {error}") from error
    if config.channels_last:  # as in training, so that the score is the same to the last digit
        model = model.to(memory_format=torch.channels_last)
    return model.eval(), config
