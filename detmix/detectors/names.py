"""Which detectors there are by name, and what torchvision says of each."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from torchvision.models import (
    WeightsEnum,
    detection,
    get_model_builder,
    get_model_weights,
    list_models,
)
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD

# Torchvision's class of each family that is built on the configured backbone.
_FAMILIES: dict[str, type[nn.Module]] = {
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
    "keypointrcnn": KeypointRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}
SEQUENCES = {"image_mean": 3, "image_std": 3, "bbox_reg_weights": 4}
"""The options that are sequences, of how many numbers; all others are a number."""


@dataclass(frozen=True)
class DetectorKind:
    """What the name of a detector stands for: a family, or one of torchvision's builders."""

    name: str
    cls: type[nn.Module]
    is_family: bool
    # What `DetectorConfig.options` may give, with the defaults of the class.
    options: Mapping[str, Any]
    # Trained detectors of torchvision: of the builder, or of the family's own on a ResNet-50.
    weights: tuple[WeightsEnum, ...]
    # What the builder's backbone may start from, and the classifier which that is.
    backbone_weights: tuple[WeightsEnum, ...]
    network: str
    # Whether that has the keys of the builder's backbone, so that any state of it can be loaded.
    stands_on_resnet: bool
    # Whether the builder gives its class anchors itself, and heads that are made for as many.
    sets_anchors: bool


@cache
def find_detector(name: str) -> DetectorKind:
    """Look up what a name stands for."""
    builders = {each: _signature(each).return_annotation for each in list_models(module=detection)}
    builders = {each: cls for each, cls in builders.items() if cls in (*_FAMILIES.values(), SSD)}
    cls = {**_FAMILIES, **builders}.get(name)
    if cls is None:
        raise ValueError(
            f"detector.name must be one of {', '.join(_FAMILIES)} (on the configured backbone) or "
            f"of torchvision's {', '.join(builders)}, got {name!r}"
        )
    builder = f"{name}_resnet50_fpn" if name in _FAMILIES else name
    arguments = inspect.signature(cls.__init__).parameters
    options = {
        key: argument.default
        for key, argument in arguments.items()
        # Not modules, of which None is the default.
        if key in SEQUENCES
        or (isinstance(argument.default, (int, float)) and key not in ("min_size", "max_size"))
    }
    annotated: tuple[Any, ...] = typing.get_args(
        _signature(builder).parameters["weights_backbone"].annotation
    )
    enum = next(kind for kind in annotated if issubclass(kind, WeightsEnum))
    network = enum.__name__.removesuffix("_Weights").lower()
    return DetectorKind(
        name=name,
        cls=cls,
        is_family=name in _FAMILIES,
        options=options,
        weights=tuple(get_model_weights(builder)),
        backbone_weights=tuple(enum),
        network=network,
        stands_on_resnet=network == "resnet50",
        sets_anchors=name.endswith("_v2"),
    )


def _signature(builder: str) -> inspect.Signature:
    return inspect.signature(get_model_builder(builder))


def takes_backbone(name: str) -> bool:
    """Return whether the detector of that name stands on the configured backbone, or its own.

    Raises:
        ValueError: If there is no such detector.
    """
    return find_detector(name).is_family


def target_keys(name: str) -> tuple[str, ...]:
    """Return what a target needs for a detector beyond boxes and labels: masks or keypoints.

    Raises:
        ValueError: If there is no such detector.
    """
    return {MaskRCNN: ("masks",), KeypointRCNN: ("keypoints",)}.get(find_detector(name).cls, ())
