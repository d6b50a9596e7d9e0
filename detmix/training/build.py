"""From a configuration to data sets, a mixer, a detector and the evaluators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset, Subset

from detmix.data import (
    AugmentedDataset,
    CocoDetection,
    VOCDetection,
    detection_transforms,
)
from detmix.detectors import build_detector, target_keys
from detmix.detectors.config import STATISTICS
from detmix.detectors.pyramid import norm_epsilon
from detmix.evaluation import COCOEvaluator, COCOResult, VOCEvaluator, VOCResult
from detmix.evaluation.coco.backend import Backend
from detmix.evaluation.coco.result import IouType
from detmix.losses import weight_losses
from detmix.mixing import (
    DetectionCutMix,
    DetectionMixer,
    DetectionMixUp,
    MixedDataset,
    RandomChoice,
    Sample,
)
from detmix.training.checkpoint import load_newest
from detmix.training.config import TrainConfig
from detmix.training.progress import Evaluation

DetectionData = VOCDetection | CocoDetection
Score = VOCResult | COCOResult
# What COCO calls the overlap of each thing that a target may need.
_IOU_TYPES: dict[str, IouType] = {"masks": "segm", "keypoints": "keypoints"}


def build_mixer(config: TrainConfig) -> DetectionMixer | None:
    """Build the mixer, or None where nothing is mixed."""
    mixing = config.mixing
    names = [] if mixing.name == "none" else mixing.name.split("+")
    # On the device images are already scaled to [0, 1].
    fill = mixing.fill / 255.0 if mixing.place == "device" else mixing.fill
    schedule = {"epochs": config.epochs, "off_epochs": mixing.off_epochs}
    mixers: list[DetectionMixer] = []
    if "mixup" in names:
        mixers.append(DetectionMixUp(mixing.alpha, mixing.p, fill, **schedule))
    if "cutmix" in names:
        mixers.append(
            DetectionCutMix(mixing.cutmix_alpha, mixing.p, mixing.min_visibility, **schedule)
        )
    if len(mixers) > 1:
        return RandomChoice(mixers)
    return mixers[0] if mixers else None


def start_model(config: TrainConfig) -> tuple[nn.Module, TrainConfig]:
    """Build the detector that a training starts with, and complete the configuration by it."""
    # Mean, deviation and epsilon belong to the pretrained weights: noted in the configuration, they
    # make checkpoints whole without the file that the run started from.
    resume = config.resume == "auto"
    newest = load_newest(config.run_dir, config.as_dict()) if resume else None
    if newest is not None:
        saved = newest.state["config"]
        try:
            options = saved.get("detector", {}).get("options", {})
            backbone = saved.get("backbone", {})
            config = _note(config, options, backbone.get("norm_eps"))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"the configuration in {newest.path}: {error}") from error
    model: Any = build_model(config, load_weights=newest is None)
    used = {name: list(getattr(model.transform, name)) for name in STATISTICS}
    return model, _note(config, used, norm_epsilon(model))


def _note(config: TrainConfig, statistics: Mapping[str, Any], eps: float | None) -> TrainConfig:
    """Note the statistics and the epsilon where the configuration leaves them open."""
    detector, backbone = config.detector, config.backbone
    if backbone.norm_eps is None:
        backbone = replace(backbone, norm_eps=eps)
    given = {name: value for name, value in detector.options.items() if value is not None}
    noted = {name: statistics[name] for name in STATISTICS if name in statistics}
    detector = replace(detector, options={**noted, **given})
    return replace(config, detector=detector, backbone=backbone)


def build_model(config: TrainConfig, *, load_weights: bool = True) -> nn.Module:
    """Build the detector with the losses that ``config.loss`` asks for."""
    keypoints = config.data.num_keypoints
    model = build_detector(
        config.detector,
        config.backbone,
        len(config.data.class_names) + 1,  # with background
        load_weights=load_weights,
        **({} if keypoints is None else {"num_keypoints": keypoints}),
    )
    if config.loss is None:
        return model
    return weight_losses(model, config.loss.background_weight, config.loss.normalizer)


def open_dataset(
    config: TrainConfig, *, train: bool, on_error: Literal["raise", "skip"] | None = None
) -> DetectionData:
    """Open the images and annotations to train or to evaluate on, as they are on disk."""
    # Evaluation keeps difficult objects, crowds, images without objects and boxes beyond the image,
    # as the devkit's and COCO's rules need them, and leaves out no image.
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
    """Note what a data set says itself: its classes, and how many keypoints an object has."""
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
    """Augment a data set for training and, if a mixer is given, mix it."""
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


def build_evaluator(config: TrainConfig, dataset: DetectionData) -> VOCEvaluator | COCOEvaluator:
    """Return what a training on this kind of data is scored by."""
    if config.data.format == "voc":
        return VOCEvaluator(config.data.class_names)
    return build_coco_evaluator(config, dataset)


def build_coco_evaluator(
    config: TrainConfig, dataset: DetectionData, backend: Backend | None = None
) -> COCOEvaluator:
    """Return an evaluator of COCO's AP, of masks or keypoints too where the detector finds any."""
    more = [_IOU_TYPES[key] for key in target_keys(config.detector.name)]
    return COCOEvaluator(
        config.data.class_names,
        category_ids=dataset.category_ids,
        iou_types=("bbox", *more),
        backend=backend or config.data.coco.backend,
    )


def summarize(evaluator: VOCEvaluator | COCOEvaluator) -> Evaluation[Score]:
    """Compute what an evaluator has gathered, for the log and for the choice of a checkpoint."""
    if isinstance(evaluator, VOCEvaluator):
        return _summarize_voc(evaluator)
    result = evaluator.compute("bbox")
    metrics = {
        "mean_ap": result.ap,
        "ap50": result.ap50,
        "ap75": result.ap75,
        "ap_small": result.ap_small,
        "ap_medium": result.ap_medium,
        "ap_large": result.ap_large,
    }
    summary = f"AP {result.ap:.4f}, AP50 {result.ap50:.4f}, AP75 {result.ap75:.4f}"
    for iou_type in evaluator.iou_types:
        if iou_type != "bbox":
            name = {"segm": "mask", "keypoints": "keypoint"}[iou_type]
            metrics[f"{name}_ap"] = evaluator.compute(iou_type).ap
            summary += f", {name} AP {metrics[f'{name}_ap']:.4f}"
    plain = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    return Evaluation(result, plain["mean_ap"], plain, summary)


def _summarize_voc(evaluator: VOCEvaluator) -> Evaluation[Score]:
    result = evaluator.compute()
    eleven = evaluator.compute(interpolation="11point").mean_ap
    score = None if math.isnan(result.mean_ap) else result.mean_ap
    return Evaluation(
        result=result,
        score=score,
        metrics={"mean_ap": score, "mean_ap_11point": None if score is None else eleven},
        summary=f"mAP {result.mean_ap:.4f} (all-point), {eleven:.4f} (11-point)",
    )
