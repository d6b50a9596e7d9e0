"""What a configuration and a detector look like: a mixed batch, a few predictions."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice

from accelerate import Accelerator
from torch import Tensor, nn

from detmix.data.loaders import EpochBatchSampler, collate, eval_loader, train_loader
from detmix.mixing import Cut, DetectionCutMix, Target, mixup
from detmix.training.build import build_mixer
from detmix.training.config import TrainConfig
from detmix.training.datasets import build_test_set, build_train_set, open_dataset
from detmix.training.inference import Prediction, predict

__all__ = ["mixed_batch", "mixed_pair", "some_predictions"]


def mixed_batch(
    config: TrainConfig, *, epoch: int = 0, num_images: int = 8
) -> tuple[list[Tensor], list[Target]]:
    """Return the first images and targets of an epoch, as a training sees them.

    Args:
        config: The training's configuration.
        epoch: The epoch, from 0; in the last ``mixing.off_epochs`` nothing is mixed.
        num_images: How many.

    Returns:
        uint8 images ``(3, H_i, W_i)`` and their targets with ``box_weights``.
    """
    on_dataset = config.mixing.place == "dataset"
    if config.mixing.place == "device":  # the same, but for images that are uint8 still
        config = replace(config, mixing=replace(config.mixing, place="batch"))
    mix = build_mixer(config)
    data = open_dataset(config, train=True)
    dataset = build_train_set(config, data, mix if on_dataset else None)
    dataset.set_epoch(epoch)
    if mix is not None:
        mix.set_epoch(epoch)
    loader = train_loader(
        dataset,
        config.data.batch_size,
        seed=config.seed,
        workers=0,
        mix=None if on_dataset else mix,
    )
    assert isinstance(loader.batch_sampler, EpochBatchSampler)
    loader.batch_sampler.set_epoch(epoch)
    samples = chain.from_iterable(zip(*batch, strict=True) for batch in loader)
    return collate(list(islice(samples, num_images)))


def mixed_pair(
    config: TrainConfig, index_a: int, index_b: int, *, lam: float
) -> tuple[list[Tensor], list[Target]]:
    """Return two training images as they are on disk, and their mixture.

    Args:
        config: The training's configuration.
        index_a: The first image's index.
        index_b: The second image's index.
        lam: Blend ratio of the first image, in [0, 1]; with ``mixing.name="cutmix"`` the rectangle
            that is cut out of it lies in the middle.

    Returns:
        Three uint8 images ``(3, H_i, W_i)`` and their targets.
    """
    data = open_dataset(config, train=True)
    pair = (data[index_a], data[index_b])
    mixing = config.mixing
    if mixing.name == "cutmix":
        cut = DetectionCutMix(min_visibility=mixing.min_visibility)
        mixed = cut.mix_pair(*pair, Cut(lam, 0.5, 0.5))
    else:
        mixed = mixup(*pair[0], *pair[1], lam=lam, fill=mixing.fill)
    return collate([*pair, mixed])


def some_predictions(
    model: nn.Module, config: TrainConfig, accelerator: Accelerator, *, num_images: int = 8
) -> tuple[list[Tensor], list[Prediction], list[Target]]:
    """Run a detector on the first test images.

    Args:
        model: A detector on the accelerator's device.
        config: The training's configuration.
        accelerator: Says the device and the precision.
        num_images: How many images.

    Returns:
        uint8 images ``(3, H_i, W_i)``, predictions and targets.
    """
    dataset = build_test_set(config, open_dataset(config, train=False))
    num_images = min(num_images, len(dataset))
    images = [dataset[index][0] for index in range(num_images)]
    loader = eval_loader(dataset, num_images, workers=0)
    predictions, targets = next(predict(model, loader, accelerator))
    return images, predictions, targets
