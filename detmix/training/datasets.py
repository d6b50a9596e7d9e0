"""From a configuration to data sets: as they are on disk, for training, for evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch.utils.data import Dataset, Subset

from detmix.data import (
    AugmentedDataset,
    CocoDetection,
    VOCDetection,
    detection_transforms,
)
from detmix.detectors import target_keys
from detmix.mixing import DetectionMixer, MixedDataset, Sample
from detmix.training.config import TrainConfig

__all__ = [
    "DetectionData",
    "build_test_set",
    "build_train_set",
    "check_keypoints",
    "check_same_keypoints",
    "note_data",
    "open_dataset",
    "with_data_noted",
]

DetectionData = VOCDetection | CocoDetection


def open_dataset(
    config: TrainConfig, *, train: bool, on_error: Literal["raise", "skip"] | None = None
) -> DetectionData:
    """Open the images and annotations to train or to evaluate on, as they are on disk.

    Masks and keypoints are read where the detector needs them. Evaluation keeps difficult objects,
    crowds and images without objects, and boxes of COCO that reach beyond their image: the rules
    of the devkit and of COCO need them; and it leaves out no image, whatever ``data.on_error`` is.

    Args:
        config: The training's configuration.
        train: Whether to train on them.
        on_error: In the place of these rules, ``"raise"`` or ``"skip"``.

    Raises:
        OSError, ValueError: As the data sets.
    """
    data = config.data
    on_error = on_error or (data.on_error if train else "raise")
    if data.format == "voc":
        return VOCDetection(
            data.root,
            image_sets=data.train if train else data.test,
            difficult=data.difficult if train else "keep",
            classes=data.class_names,
            on_error=on_error,
        )
    files, needed = data.coco, target_keys(config.detector.name)
    return CocoDetection(
        data.root / (files.train_images if train else files.test_images),
        data.root / (files.train_annotations if train else files.test_annotations),
        crowd="drop" if train else "keep",
        empty=files.empty if train else "keep",
        masks="masks" in needed,
        keypoints="keypoints" in needed,
        classes=data.classes,
        clip=train,
        on_error=on_error,
    )


def note_data(config: TrainConfig, dataset: DetectionData) -> TrainConfig:
    """Note what a data set says itself: its classes, and how many keypoints an object has.

    Checkpoints are whole with it, without the annotations that were trained on.

    Args:
        config: The training's configuration.
        dataset: What `open_dataset` returned.

    Raises:
        ValueError: If the detector finds keypoints and the data set has none, or not as many as
            ``data.num_keypoints`` says.
    """
    data = replace(config.data, classes=tuple(dataset.classes))
    if "keypoints" in target_keys(config.detector.name):
        assert isinstance(dataset, CocoDetection)  # the configuration allows no other
        check_keypoints(config, dataset, train=True)
        data = replace(data, num_keypoints=len(dataset.keypoint_names))
    return replace(config, data=data)


def check_keypoints(config: TrainConfig, dataset: DetectionData, *, train: bool) -> None:
    """Raise ValueError if a detector of keypoints cannot find those of a data set."""
    if "keypoints" not in target_keys(config.detector.name):
        return
    assert isinstance(dataset, CocoDetection)  # the configuration allows no other
    found, files, expected = (
        len(dataset.keypoint_names),
        config.data.coco,
        config.data.num_keypoints,
    )
    if found == 0 or found != (expected or found):
        path = files.train_annotations if train else files.test_annotations
        raise ValueError(
            f"{config.data.root / path} names {found} keypoints for each object, but "
            f"detector.name={config.detector.name} with data.num_keypoints={expected} needs "
            f"{expected or 'some'}"
        )


def check_same_keypoints(train_data: DetectionData, test_data: DetectionData) -> None:
    """Raise ValueError if the keypoints of two data sets, where both have any, differ."""
    names, test_names = (getattr(data, "keypoint_names", ()) for data in (train_data, test_data))
    if names and test_names and names != test_names:
        raise ValueError(
            f"the keypoints to evaluate, {', '.join(test_names)}, are not those to train, "
            f"{', '.join(names)}"
        )


def with_data_noted(config: TrainConfig) -> TrainConfig:
    """Return a configuration whose classes are known, if need be by reading the annotations."""
    if config.data.classes is not None or config.data.format == "voc":
        return config
    return note_data(config, open_dataset(config, train=True))


def build_train_set(
    config: TrainConfig, dataset: DetectionData, mix: DetectionMixer | None = None
) -> AugmentedDataset | MixedDataset:
    """Augment a data set for training and, if a mixer is given, mix it.

    Args:
        config: The training's configuration.
        dataset: What `open_dataset` returned.
        mix: A mixer, for ``mixing.place="dataset"``.
    """
    augment = config.augment
    has_keypoints = "keypoints" in target_keys(config.detector.name)
    transform = detection_transforms(
        augment.size,
        train=True,
        flip=augment.flip,
        photometric=augment.photometric,
        crop=augment.crop,
        keypoint_flip=dataset.keypoint_flip
        if has_keypoints and isinstance(dataset, CocoDetection)
        else None,
    )
    limited = _first(dataset, config.data.train_limit)
    augmented = AugmentedDataset(limited, transform, seed=config.seed)
    return augmented if mix is None else MixedDataset(augmented, mix, seed=config.seed)


def build_test_set(config: TrainConfig, dataset: DetectionData) -> AugmentedDataset:
    """Bring a data set to the scale of training, and change nothing else of it."""
    transform = detection_transforms(config.augment.size, train=False)
    return AugmentedDataset(_first(dataset, config.data.test_limit), transform, seed=config.seed)


def _first(dataset: DetectionData, limit: int | None) -> Dataset[Sample]:
    if limit is None or limit >= len(dataset):
        return dataset
    return Subset(dataset, range(limit))
