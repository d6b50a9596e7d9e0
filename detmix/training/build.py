"""From a configuration to data sets, a mixer, a detector and the evaluators."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from detmix.data import (
    VOC_CLASSES,
    AugmentedDataset,
    CocoDetection,
    VOCDetection,
    YOLODetection,
    detection_transforms,
    train_loader,
)
from detmix.data.layouts import Layout, find_layout
from detmix.detectors import build_detector, target_keys
from detmix.detectors.build import configured_normalization, set_normalization
from detmix.evaluation import COCOEvaluator, COCOResult, VOCEvaluator, VOCResult
from detmix.evaluation.coco.backend import Backend
from detmix.evaluation.results import IouType
from detmix.losses import weight_losses
from detmix.mixing import (
    DetectionCutMix,
    DetectionMixer,
    DetectionMixUp,
    MixedDataset,
    RandomChoice,
    Sample,
)
from detmix.training.checkpoint import Normalization
from detmix.training.config import CocoConfig, DataConfig, TrainConfig
from detmix.training.progress import Evaluation

DetectionData = VOCDetection | CocoDetection  # of which the first are YOLO's, too
Evaluator = VOCEvaluator | COCOEvaluator
Score = VOCResult | COCOResult
# What COCO calls the overlap of each thing that a target may need.
_IOU_TYPES: dict[str, IouType] = {"masks": "segm", "keypoints": "keypoints"}
_log = logging.getLogger(__name__)
PREVIEW_KEYS = ("source",)  # which image an object is from, where `preview` notes it


def build_mixer(config: TrainConfig) -> DetectionMixer | None:
    """Build the mixer, or None where nothing is mixed."""
    mixing = config.mixing
    if mixing.name == "none":
        return None
    off_epochs = min(mixing.off_epochs, config.epochs - 1)
    if off_epochs < mixing.off_epochs:  # as where one epoch is tried
        told = f"mixing.off_epochs={mixing.off_epochs} is taken as {off_epochs}: one epoch must mix"
        warnings.warn(told, UserWarning, stacklevel=2)
    # On the device images are already scaled to [0, 1].
    fill = mixing.fill / 255.0 if mixing.place == "device" else mixing.fill
    settings: Any = {"p": mixing.p, "epochs": config.epochs, "off_epochs": off_epochs}
    settings["keys"] = (*PREVIEW_KEYS, *target_keys(config.detector.name))
    mixup = DetectionMixUp(mixing.alpha, fill=fill, **settings)
    cutmix = DetectionCutMix(mixing.cutmix_alpha, min_visibility=mixing.min_visibility, **settings)
    both = RandomChoice([mixup, cutmix])
    return {"mixup": mixup, "cutmix": cutmix, "mixup+cutmix": both}[mixing.name]


def build_model(config: TrainConfig, saved: Normalization | None = None) -> nn.Module:
    """Build the detector with the losses that ``config.loss`` asks for.

    Given the normalization of a checkpoint that follows, no pretrained weights are opened.
    """
    keypoints = config.data.num_keypoints
    model = build_detector(
        config.detector,
        config.backbone,
        len(config.data.class_names) + 1,  # with background
        load_weights=saved is None,
        **({} if keypoints is None else {"num_keypoints": keypoints}),
    )
    if saved is not None:
        set_normalization(model, saved)
        set_normalization(model, configured_normalization(config.detector, config.backbone))
    if config.loss is None:
        return model
    return weight_losses(model, config.loss.background_weight, config.loss.normalizer)


def open_dataset(
    config: TrainConfig,
    *,
    train: bool,
    on_error: Literal["raise", "skip"] | None = None,
    layout: Layout | None = None,
) -> DetectionData:
    """Open the images and annotations to train or to evaluate on, as they are on disk."""
    # Evaluation keeps difficult objects, crowds, images without objects and boxes beyond the image,
    # as the devkit's and COCO's rules need them, and leaves out no image.
    if layout is None:
        config, layout = recognize(config)
    data, name = config.data, config.detector.name
    coco, needed = data.coco, target_keys(name)
    on_error = on_error or (data.on_error if train else "raise")
    part = layout and (layout.train if train else layout.test)
    files = part and part.files
    if data.format != "coco" and needed:
        raise ValueError(f"detector.name={name} needs {needed[0]}: set data.format=coco")
    if data.format == "yolo":
        return YOLODetection(data.root, files=files, classes=data.class_names, on_error=on_error)
    if data.format == "voc":
        return VOCDetection(
            data.root,
            image_sets=data.train if train else data.test,
            difficult=data.difficult if train else "keep",
            classes=data.classes,
            on_error=on_error,
            corners=data.corners or "1-inclusive",
            files=files,
        )
    images = coco.train_images if train else coco.test_images
    annotations = data.root / (coco.train_annotations if train else coco.test_annotations)
    if part:
        images, annotations = Path(), data.root / part.source
    dataset = CocoDetection(
        data.root / images,
        annotations,
        crowd="drop" if train else "keep",
        empty=coco.empty if train else "keep",
        masks="masks" in needed,
        keypoints="keypoints" in needed,
        classes=data.classes,
        clip=train,
        on_error=on_error,
        files=files,
    )
    found, expected = len(dataset.keypoint_names), data.num_keypoints
    if "keypoints" in needed and (found == 0 or found != (expected or found)):
        raise ValueError(
            f"{annotations} names {found} keypoints for each object, but detector.name={name} "
            f"with data.num_keypoints={expected} needs {expected or 'some'}"
        )
    return dataset


def open_datasets(
    config: TrainConfig, *, on_error: Literal["raise", "skip"] | None = None
) -> tuple[TrainConfig, DetectionData, DetectionData]:
    """Open what to train and to evaluate on; note in the configuration what the first says."""
    config, layout = recognize(config)
    if layout:
        _log.info(layout.told)
    options: Any = {"on_error": on_error, "layout": layout}
    train_data = open_dataset(config, train=True, **options)
    config = _note(config, train_data)
    if config.data.classes == VOC_CLASSES and (unused := train_data.unused_classes()):
        told = f"{config.data.root}: no object to train on is of VOC's {', '.join(unused)}: is it "
        warnings.warn(told + "data.classes that should be others?", UserWarning, stacklevel=2)
    test_data = open_dataset(config, train=False, **options)
    names, test_names = (getattr(data, "keypoint_names", ()) for data in (train_data, test_data))
    if names and test_names and names != test_names:
        raise ValueError(
            f"the keypoints to evaluate, {', '.join(test_names)}, are not those to train, "
            f"{', '.join(names)}"
        )
    return config, train_data, test_data


def with_data_noted(config: TrainConfig) -> TrainConfig:
    """Return a configuration whose classes are known, if need be by reading the annotations."""
    config, layout = recognize(config)
    if config.data.classes is not None:
        return config
    return _note(config, open_dataset(config, train=True, layout=layout))


def recognize(config: TrainConfig) -> tuple[TrainConfig, Layout | None]:
    """Note what the data are; return how they lie, or None where the configuration says so."""
    data = config.data
    years = [*data.root.glob("VOC[0-9]*/ImageSets"), *data.root.glob("VOCdevkit/VOC*/ImageSets")]
    jsons = [data.root / data.coco.train_annotations, data.root / data.coco.test_annotations]
    is_given = {
        "voc": years or (data.train, data.test) != (DataConfig.train, DataConfig.test),
        "coco": data.coco != CocoConfig(empty=data.coco.empty) or any(map(Path.exists, jsons)),
    }
    kinds = [kind for kind in is_given if is_given[kind] and data.format in ("auto", kind)]
    layout = None
    if data.split == "given" or (data.split == "auto" and kinds):
        kind = next(iter(kinds), "voc" if data.format == "auto" else data.format)
        noted: dict[str, Any] = {"format": kind, "split": "given"}
        noted |= {"classes": VOC_CLASSES, "corners": "1-inclusive"} if kind == "voc" else {}
    else:
        wanted = [None if each == "auto" else each for each in (data.format, data.split)]
        layout = find_layout(data.root, *wanted)
        noted = layout.noted
        numbered = noted["classes"] if noted["format"] == "yolo" else None
        if numbered and data.classes not in (None, numbered):
            told = f"{data.root} numbers {', '.join(numbered)}: expected these, or null"
            raise ValueError(f"data.classes is {data.classes}, but {told}")
    noted = {name: noted[name] for name in noted if getattr(data, name) in (None, "auto")}
    return replace(config, data=replace(data, **noted)), layout


def _note(config: TrainConfig, dataset: DetectionData) -> TrainConfig:
    """Note the classes of a data set, and how many keypoints a detector of these is to find."""
    data = replace(config.data, classes=tuple(dataset.classes))
    if "keypoints" in target_keys(config.detector.name):
        assert isinstance(dataset, CocoDetection)  # the configuration allows no other
        data = replace(data, num_keypoints=len(dataset.keypoint_names))
    return replace(config, data=data)


def build_train_loader(
    config: TrainConfig, dataset: DetectionData, mix: DetectionMixer | None, **share: Any
) -> DataLoader[Any]:
    """Augment a data set for training, mix it where that is its or its loader's work, load it."""
    augment, place = config.augment, config.mixing.place
    transform = detection_transforms(
        augment.size,
        train=True,
        flip=augment.flip,
        photometric=augment.photometric,
        crop=augment.crop,
        scale_jitter=augment.scale_jitter,
        keypoint_flip=getattr(dataset, "keypoint_flip", ()) or None,  # () where none are trained
        keys=PREVIEW_KEYS,
    )
    limited = Subset(dataset, range(len(dataset))[: config.data.train_limit])
    train_set: Dataset[Sample] = AugmentedDataset(limited, transform, seed=config.seed)
    if mix is not None and place == "dataset":
        train_set = MixedDataset(train_set, mix, seed=config.seed)
    elif mix is not None and config.mixing.p > 0 and config.data.batch_size == 1:
        raise ValueError("data.batch_size=1 leaves no partner: set mixing.place=dataset")
    mix = mix if place == "batch" else None
    return train_loader(train_set, config.data.batch_size, seed=config.seed, mix=mix, **share)


def build_test_set(config: TrainConfig, dataset: DetectionData) -> AugmentedDataset:
    """Bring a data set to the scale of training, and change nothing else of it."""
    transform = detection_transforms(config.augment.size, train=False)
    limited = Subset(dataset, range(len(dataset))[: config.data.test_limit])
    return AugmentedDataset(limited, transform, seed=config.seed)


def build_evaluator(config: TrainConfig, dataset: DetectionData) -> Evaluator:
    """Return what a training on this kind of data is scored by."""
    if isinstance(dataset, VOCDetection):
        return VOCEvaluator(config.data.class_names)
    return build_coco_evaluator(config, dataset)


def build_coco_evaluator(
    config: TrainConfig, dataset: DetectionData, backend: Backend = "auto"
) -> COCOEvaluator:
    """Return an evaluator of COCO's AP, of masks or keypoints too where the detector finds any."""
    more = [_IOU_TYPES[key] for key in target_keys(config.detector.name)]
    names, ids = config.data.class_names, dataset.category_ids
    return COCOEvaluator(names, category_ids=ids, iou_types=("bbox", *more), backend=backend)


def summarize(evaluator: Evaluator) -> Evaluation[Score]:
    """Compute what an evaluator has gathered, for the log and for the choice of a checkpoint."""
    if isinstance(evaluator, VOCEvaluator):
        return _summarize_voc(evaluator)
    result = evaluator.compute("bbox")
    names = ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    metrics = {"mean_ap": result.ap, **{name: getattr(result, name) for name in names}}
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
    metrics = {"mean_ap": score, "mean_ap_11point": None if score is None else eleven}
    summary = f"mAP {result.mean_ap:.4f} (all-point), {eleven:.4f} (11-point)"
    return Evaluation(result, score, metrics, summary)
