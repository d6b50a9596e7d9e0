"""Running a detector over a loader, over all processes, and scoring what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.transform import resize_boxes, resize_keypoints
from tqdm import tqdm

from detmix.data.loaders import explain_dead_workers
from detmix.evaluation import encode_masks
from detmix.mixing import Target
from detmix.pretrained.read_state import model_state
from detmix.training.build import DetectionData, Evaluator, build_model
from detmix.training.checkpoint import load_checkpoint
from detmix.training.config import TrainConfig
from detmix.training.parse import from_dict

Prediction = dict[str, Any]

_UINT8_MAX = 255.0
_MASKS_AT_ONCE = 8


def to_device(
    images: list[Tensor], targets: list[Target], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    """Move a batch to the device, and scale uint8 images to float32 in [0, 1] there."""
    images = [image.to(device, non_blocking=True) for image in images]
    images = [i.float() / _UINT8_MAX if i.dtype == torch.uint8 else i for i in images]
    return images, send_to_device(targets, device, non_blocking=True)


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Iterable[Any],
    accelerator: Accelerator,
    *,
    size_of: Callable[[Target], tuple[int, int]] | None = None,
) -> Iterator[tuple[list[Prediction], list[Target]]]:
    """Yield the predictions and targets of each batch of this process, all on the CPU.

    Args:
        model: A torchvision detector; it is left in evaluation mode.
        loader: Yields lists of images and targets.
        accelerator: Says the device and the precision.
        size_of: Returns (H, W) of the image that a target's predictions are wanted in; None for
            the image that the detector sees.

    Yields:
        Predictions as torchvision's, but with D run lengths of `encode_masks` for ``masks``.
    """
    model.eval()
    for images, targets in loader:
        with accelerator.autocast():
            predictions = model(to_device(images, [], accelerator.device)[0])
        sizes = [None if size_of is None else size_of(target) for target in targets]
        yield [in_pixels(*each) for each in zip(predictions, images, sizes, strict=True)], targets


def in_pixels(
    prediction: dict[str, Tensor], image: Tensor, size: tuple[int, int] | None = None
) -> Prediction:
    """Bring the predictions for an image to a size (H, W), by default the image's, on the CPU."""
    seen = (image.shape[-2], image.shape[-1])
    size = size or seen
    finished: Prediction = {
        key: (value.float() if value.is_floating_point() else value).cpu()
        for key, value in prediction.items()
        if key != "masks"
    }
    if seen != size:
        finished["boxes"] = resize_boxes(finished["boxes"], seen, size)
        if "keypoints" in finished:
            finished["keypoints"] = resize_keypoints(finished["keypoints"], seen, size)
    if "masks" in prediction:
        finished["masks"] = []
        # A few at a time: each is as large as its image.
        for part in torch.split(prediction["masks"], _MASKS_AT_ONCE):
            if seen != size:
                part = F.interpolate(part, size, mode="bilinear", align_corners=False)
            finished["masks"] += encode_masks(part)
    return finished


@contextmanager
def evaluating(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator
) -> Iterator[Iterable[Any]]:
    """Put a model into evaluation mode for a pass over a loader, with a progress bar."""
    training = model.training
    model.eval()
    hidden = not accelerator.is_main_process or None  # None: not into a file either
    try:
        with (
            explain_dead_workers(),
            tqdm(loader, "evaluating", leave=False, disable=hidden) as batches,
        ):
            yield batches
    finally:
        model.train(training)


def detect(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    *,
    truth: DetectionData,
    after_batch: Callable[[], None] | None = None,
) -> list[tuple[int, Prediction]]:
    """Run a detector over a loader, over all processes."""
    found: dict[int, Prediction] = {}

    def size_of(target: Target) -> tuple[int, int]:
        return truth.image_size(truth.index_of(target["image_id"]))

    with evaluating(model, loader, accelerator) as batches:
        for predictions, targets in predict(model, batches, accelerator, size_of=size_of):
            indices = [truth.index_of(target["image_id"]) for target in targets]
            found.update(zip(indices, predictions, strict=True))
            if after_batch is not None:
                after_batch()
    # Once, at the end: the processes need not have the same number of batches.
    if accelerator.num_processes > 1:
        found = dict(gather_object(list(found.items())))
    return sorted(found.items())


def score(
    found: Sequence[tuple[int, Prediction]],
    evaluators: Sequence[Evaluator],
    truth: DetectionData,
) -> None:
    """Hand what `detect` has found to evaluators."""
    for index, prediction in found:
        about = {"file_name": truth.names[index], "orig_size": truth.image_size(index)}
        target = {**truth.target(index), **about}
        for evaluator in evaluators:
            evaluator.update([prediction], [target])


def load_detector(path: Path | str, overrides: Sequence[str] = ()) -> tuple[nn.Module, TrainConfig]:
    """Load a detector, with averaged weights where there are some, and its configuration.

    Args:
        path: ``last.pt`` or ``best.pt`` of a run.
        overrides: Arguments that change the configuration, such as ``["--data.root", "data"]``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a detector, or does not fit the configuration.
    """
    state = load_checkpoint(path)
    if "detector" not in state["config"]:
        raise ValueError(f"{path} is not a checkpoint of a detector, but of a classifier")
    try:
        config = from_dict(TrainConfig, state["config"], overrides)
        classes = list(config.data.class_names)
    except ValueError as error:
        raise ValueError(f"the configuration in {path}, with what changes it: {error}") from error
    if classes != state["classes"]:
        raise ValueError(
            f"{path} is a detector of the classes {', '.join(state['classes'])}, not of "
            f"{', '.join(classes)}"
        )
    try:
        model = build_model(config, state["normalization"])
        model.load_state_dict(model_state(state))
    # RuntimeError: what torch says of other names and shapes, and of sizes beyond any memory.
    except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit its configuration: {error}") from error
    if config.channels_last:  # as in training, so that the score is the same to the last digit
        model = model.to(memory_format=torch.channels_last)
    return model.eval(), config
