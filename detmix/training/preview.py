"""What a configuration and a detector look like: mixed images, a few predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detmix.data.loaders import collate
from detmix.mixing import Cut, DetectionCutMix, MixParams, Sample, Target, box_weights, mixup
from detmix.mixing.seeding import set_epoch
from detmix.training.build import (
    PREVIEW_KEYS,
    DetectionData,
    build_mixer,
    build_test_set,
    build_train_loader,
    open_dataset,
)
from detmix.training.config import TrainConfig
from detmix.training.inference import Prediction, predict


def join_weights(samples: Iterable[Sample]) -> Tensor:
    """Return the weight of every box of samples."""
    return torch.cat([torch.zeros(0), *(box_weights(target) for _, target in samples)])


def mixed_samples(config: TrainConfig, epoch: int = 0) -> Iterator[Sample]:
    """Yield the samples of an epoch, as a training sees them."""
    if not 0 <= epoch < config.epochs:
        raise ValueError(f"epoch must be in 0..{config.epochs - 1}, got {epoch}")
    if config.mixing.place == "device":  # the same, but for images that are uint8 still
        config = replace(config, mixing=replace(config.mixing, place="batch"))
    mixer = build_mixer(config)
    if mixer is not None:
        mix_pair = mixer.mix_pair

        def mix_sources(sample_a: Sample, sample_b: Sample, how: Any) -> Sample:
            return _join_sources(mix_pair(sample_a, sample_b, how), sample_a, sample_b)

        mixer.mix_pair = mix_sources  # type: ignore[method-assign]
    loader = build_train_loader(config, _open_with_sources(config), mixer, workers=0)
    set_epoch(loader, epoch)
    for images, targets in loader:
        yield from zip(images, targets, strict=True)


def mixed_pair(
    config: TrainConfig, index_a: int, index_b: int, *, lam: float
) -> tuple[list[Tensor], list[Target]]:
    """Return two training images as they are on disk, and their mixture."""
    mixing = config.mixing
    if mixing.name == "none":
        raise ValueError("mixing.name is none: expected mixup or cutmix to mix a pair")
    data = _open_with_sources(config)
    if index_a == index_b or not {index_a, index_b} <= set(range(len(data))):
        raise ValueError(f"images {index_a} and {index_b}: expected two of 0..{len(data) - 1}")
    pair = (data[index_a], data[index_b])
    if mixing.name == "cutmix":
        cut = DetectionCutMix(min_visibility=mixing.min_visibility, keys=PREVIEW_KEYS)
        mixed = cut.transform(pair, [MixParams(1, Cut(lam, 0.5, 0.5)), None])[0]
    else:
        mixed = mixup(*pair[0], *pair[1], lam=lam, fill=mixing.fill, keys=PREVIEW_KEYS)
    return collate([*pair, _join_sources(mixed, *pair)])


def some_predictions(
    model: nn.Module, config: TrainConfig, accelerator: Accelerator, *, num_images: int = 8
) -> tuple[list[Tensor], list[Prediction], list[Target]]:
    """Run a detector on the first test images."""
    dataset = build_test_set(config, open_dataset(config, train=False))
    images, targets = collate([dataset[index] for index in range(min(num_images, len(dataset)))])
    predictions, _ = next(predict(model, [(images, targets)], accelerator))
    return images, predictions, targets


def _open_with_sources(config: TrainConfig) -> DetectionData:
    """Open the training images, each object with the image it is from."""
    data = open_dataset(config, train=True)

    def note(image: Tensor, target: Target) -> Sample:
        index = data.index_of(target["image_id"])
        target["source"] = torch.full((len(target["boxes"]),), index, dtype=torch.int64)
        target["sources"] = {index: data.names[index]}
        return image, target

    data.transforms = note
    return data


def _join_sources(mixed: Sample, sample_a: Sample, sample_b: Sample) -> Sample:
    """Also name an image that has no objects there, and so no weight that tells of it."""
    image, target = mixed
    return image, {**target, "sources": sample_a[1]["sources"] | sample_b[1]["sources"]}
