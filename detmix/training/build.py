"""From a configuration to data sets, a mixer and a detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset, Subset
from torchvision.models.detection import FasterRCNN

from detmix.data import AugmentedDataset, VOCDetection, detection_transforms
from detmix.detectors import build_detector, weight_losses
from detmix.detectors.detector_weights import norm_epsilon
from detmix.mixing import DetectionMixUp, MixedDataset, Sample
from detmix.training.checkpoint import load_checkpoint
from detmix.training.config import TrainConfig

__all__ = [
    "build_mixer",
    "build_model",
    "build_test_set",
    "build_train_set",
    "open_voc",
    "start_model",
]

_STATISTICS = ("image_mean", "image_std")


def open_voc(config: TrainConfig, *, train: bool) -> VOCDetection:
    """Open the images and annotations to train or to evaluate on, as they are on disk.

    Evaluation keeps difficult objects, whatever ``data.difficult`` says: the devkit's rule
    needs them.
    """
    data = config.data
    return VOCDetection(
        data.root,
        image_sets=data.train if train else data.test,
        difficult=data.difficult if train else "keep",
        classes=data.classes,
    )


def build_train_set(
    config: TrainConfig, voc: VOCDetection, mix: DetectionMixUp | None = None
) -> AugmentedDataset | MixedDataset:
    """Augment a data set for training and, if a mixer is given, mix it.

    Args:
        config: The training's configuration.
        voc: What `open_voc` returned.
        mix: A mixer, for ``mixing.place="dataset"``.
    """
    augment = config.augment
    transform = detection_transforms(
        augment.size,
        train=True,
        flip=augment.flip,
        photometric=augment.photometric,
        crop=augment.crop,
    )
    limited = _first(voc, config.data.train_limit)
    augmented = AugmentedDataset(limited, transform, seed=config.seed)
    return augmented if mix is None else MixedDataset(augmented, mix, seed=config.seed)


def build_test_set(config: TrainConfig, voc: VOCDetection) -> AugmentedDataset:
    """Bring a data set to the scale of training, and change nothing else of it."""
    transform = detection_transforms(config.augment.size, train=False)
    return AugmentedDataset(_first(voc, config.data.test_limit), transform, seed=config.seed)


def build_mixer(config: TrainConfig) -> DetectionMixUp | None:
    """Build the mixer, or None where nothing is mixed."""
    mixing = config.mixing
    if mixing.name == "none":
        return None
    # On the device images are already scaled to [0, 1].
    fill = mixing.fill / 255.0 if mixing.place == "device" else mixing.fill
    return DetectionMixUp(
        mixing.alpha, mixing.p, fill, epochs=config.epochs, off_epochs=mixing.off_epochs
    )


def start_model(config: TrainConfig) -> tuple[FasterRCNN, TrainConfig]:
    """Build the detector that a training starts with, and complete the configuration by it.

    The mean and deviation that images are normalised with belong to the pretrained weights, and so
    does the epsilon of frozen batch norm. They go into ``detector.options`` and
    ``backbone.norm_eps``, so that the run's checkpoints are whole without the file it started
    from; a run that is resumed needs that file, or a network, no more.

    Args:
        config: The training's configuration.

    Returns:
        The detector, with its pretrained weights, and the completed configuration.
    """
    last = config.run_dir / "last.pt"
    is_resumed = config.resume == "auto" and last.exists()
    if is_resumed:
        saved = load_checkpoint(last)["config"]
        options = saved.get("detector", {}).get("options", {})
        config = _note(config, options, saved.get("backbone", {}).get("norm_eps"))
    model = build_model(config, load_weights=not is_resumed)
    used = {name: list(getattr(model.transform, name)) for name in _STATISTICS}
    return model, _note(config, used, norm_epsilon(model))


def _note(config: TrainConfig, statistics: Mapping[str, Any], eps: float | None) -> TrainConfig:
    """Note the image statistics and the epsilon where the configuration leaves them open."""
    detector, backbone = config.detector, config.backbone
    if backbone.norm_eps is None:
        backbone = replace(backbone, norm_eps=eps)
    given = {name: value for name, value in detector.options.items() if value is not None}
    noted = {name: statistics[name] for name in _STATISTICS if name in statistics}
    detector = replace(detector, options={**noted, **given})
    return replace(config, detector=detector, backbone=backbone)


def build_model(config: TrainConfig, *, load_weights: bool = True) -> FasterRCNN:
    """Build the detector with the losses that ``config.loss`` asks for.

    Args:
        config: The training's configuration.
        load_weights: Whether to load pretrained weights; not when a checkpoint of the whole
            detector follows.
    """
    num_classes = len(config.data.classes) + 1  # with background
    model = build_detector(config.detector, config.backbone, num_classes, load_weights=load_weights)
    if config.loss is None:
        return model
    return weight_losses(model, config.loss.background_weight, config.loss.normalizer)


def _first(dataset: VOCDetection, limit: int | None) -> Dataset[Sample]:
    if limit is None or limit >= len(dataset):
        return dataset
    return Subset(dataset, range(limit))
