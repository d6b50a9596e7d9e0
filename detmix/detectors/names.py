"""Which detectors there are by name, and what each of them takes."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from torch import nn
from torchvision.models import WeightsEnum, detection, get_model_builder, list_models
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

FAMILIES: dict[str, type[nn.Module]] = {
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
    "keypointrcnn": KeypointRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}
"""Torchvision's class of each family that is built on the configured backbone."""

# Arguments of the classes that are modules or what a builder and the other fields set.
_NO_OPTIONS = {
    *("self", "kwargs", "backbone", "num_classes", "num_keypoints", "min_size", "max_size", "size"),
    *("rpn_anchor_generator", "anchor_generator", "rpn_head", "head", "proposal_matcher"),
    *(f"{part}_{kind}" for part in ("box", "mask", "keypoint") for kind in ("roi_pool", "head")),
    *(f"{part}_predictor" for part in ("box", "mask", "keypoint")),
}
_ROI_FIELDS = {
    "roi_sampling_ratio": "it pools no proposals",
    "head_dim": "it has no fully connected layers",
}
_ANCHOR_FIELDS = ("anchor_sizes", "aspect_ratios")


def builder_names() -> tuple[str, ...]:
    """Return the names of torchvision's own detection builders that can be trained here."""
    known = (*FAMILIES.values(), SSD)
    names = list_models(module=detection)
    return tuple(name for name in names if _returned_class(name) in known)


def check_name(name: str) -> None:
    """Check that there is such a detector."""
    if name not in FAMILIES and name not in builder_names():
        raise ValueError(
            f"detector.name must be one of {', '.join(FAMILIES)} (on the configured backbone) or "
            f"of torchvision's {', '.join(builder_names())}, got {name!r}"
        )


def takes_backbone(name: str) -> bool:
    """Return whether a detector stands on the configured backbone, or brings its own.

    Args:
        name: As `DetectorConfig.name`.

    Raises:
        ValueError: If there is no such detector.
    """
    check_name(name)
    return name in FAMILIES


def target_keys(name: str) -> tuple[str, ...]:
    """Return what a target needs for a detector, beyond ``boxes`` and ``labels``.

    Args:
        name: As `DetectorConfig.name`.

    Returns:
        ``("masks",)`` for Mask R-CNN, ``("keypoints",)`` for Keypoint R-CNN, else nothing.

    Raises:
        ValueError: If there is no such detector.
    """
    cls = detector_class(name)
    return {MaskRCNN: ("masks",), KeypointRCNN: ("keypoints",)}.get(cls, ())


def detector_class(name: str) -> type[nn.Module]:
    """Return torchvision's class of a detector."""
    check_name(name)
    return FAMILIES.get(name) or _returned_class(name)


def option_names(name: str) -> list[str]:
    """Return which keyword arguments of a detector's class ``detector.options`` may give."""
    return sorted(option_defaults(name))


def option_defaults(name: str) -> dict[str, Any]:
    """Return what ``detector.options`` may give, each with the default of the detector's class."""
    known = inspect.signature(detector_class(name).__init__).parameters
    return {key: known[key].default for key in known if key not in _NO_OPTIONS}


def inapplicable_fields(name: str) -> dict[str, str]:
    """Return the fields of `DetectorConfig` that mean nothing to a detector, each with why."""
    cls = detector_class(name)
    is_rcnn = issubclass(cls, FasterRCNN)
    if name in FAMILIES:
        fields = {} if is_rcnn else dict(_ROI_FIELDS)
    else:
        fields = dict.fromkeys(_ROI_FIELDS, "torchvision's builder has heads of its own")
    if cls is SSD:
        fields |= dict.fromkeys(("min_size", "max_size"), "its images have a fixed size")
        fields |= dict.fromkeys(_ANCHOR_FIELDS, "its default boxes are fixed")
    elif cls is FCOS:
        fields["aspect_ratios"] = "it has no anchors but locations"
    elif name not in FAMILIES and "mobilenet" in name:
        fields |= dict.fromkeys(_ANCHOR_FIELDS, "its five sizes at every level are fixed")
    return fields


def backbone_weights(name: str) -> list[WeightsEnum]:
    """Return the weights that a torchvision builder's own backbone may start from."""
    parameters = inspect.signature(get_model_builder(name)).parameters
    annotated: tuple[Any, ...] = typing.get_args(parameters["weights_backbone"].annotation)
    return list(next(kind for kind in annotated if issubclass(kind, WeightsEnum)))


def _returned_class(name: str) -> type[nn.Module]:
    cls: type[nn.Module] = inspect.signature(get_model_builder(name)).return_annotation
    return cls
