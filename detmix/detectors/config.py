"""The typed configurations of a detector, of the backbone under it, and of a classifier.

And which detectors there are by name, with what torchvision says of each.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
)
from pydantic.dataclasses import dataclass
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

from detmix.backbones.resnet import Stem, resnet_names
from detmix.backbones.timm import TIMM_PREFIX

Norm = Literal["auto", "frozen", "batch", "sync", "group"]
ClassifierNorm = Literal["batch", "sync", "group"]

OPTIONS = ConfigDict(extra="forbid", allow_inf_nan=False)  # of all configurations
_SIZE_FIELDS = ("min_size", "max_size")
_ROI_FIELDS = ("roi_sampling_ratio", "head_dim")
_ANCHOR_FIELDS = ("anchor_sizes", "aspect_ratios")
# Torchvision's class of each family that is built on the configured backbone.
_FAMILIES: dict[str, type[nn.Module]] = {
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
    "keypointrcnn": KeypointRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}
# The options that are sequences, of how many numbers; all others are a number.
_SEQUENCES = {"image_mean": 3, "image_std": 3, "bbox_reg_weights": 4}


class DetectorKind(NamedTuple):
    """What the name of a detector stands for: a family, or one of torchvision's builders."""

    name: str
    cls: type[nn.Module]
    is_family: bool
    # What `DetectorConfig.options` may give.
    options: type[BaseModel]
    # Trained detectors of torchvision: of the builder, or of the family's own on a ResNet-50.
    weights: tuple[WeightsEnum, ...]
    # What the builder's backbone may start from, and the classifier which that is.
    backbone_weights: tuple[WeightsEnum, ...]
    network: str
    # Whether the builder gives its class anchors itself, and heads that are made for as many.
    sets_anchors: bool


@cache
def find_detector(name: str) -> DetectorKind:
    """Look up what a name stands for."""
    builders = {each: _signature(each).return_annotation for each in list_models(module=detection)}
    cls = {**_FAMILIES, **builders}.get(name)
    if cls is None:
        raise ValueError(
            f"detector.name must be one of {', '.join(_FAMILIES)} (on the configured backbone) or "
            f"of torchvision's {', '.join(builders)}, got {name!r}"
        )
    builder = f"{name}_resnet50_fpn" if name in _FAMILIES else name
    arguments = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {}
    for key, argument in arguments.items():
        if key in _SEQUENCES:
            length = Field(min_length=_SEQUENCES[key], max_length=_SEQUENCES[key])
            options[key] = (Annotated[Sequence[float], length] | None, None)
        elif key not in _SIZE_FIELDS and isinstance(argument.default, (int, float)):
            # A whole number counts boxes or proposals.
            kind = PositiveInt if isinstance(argument.default, int) else float
            options[key] = (kind, argument.default)
    annotation = _signature(builder).parameters["weights_backbone"].annotation
    enum: Any = next(each for each in get_args(annotation) if issubclass(each, WeightsEnum))
    network = enum.__name__.removesuffix("_Weights").lower()
    return DetectorKind(
        name=name,
        cls=cls,
        is_family=name in _FAMILIES,
        options=create_model(name, __config__=ConfigDict(strict=True, **OPTIONS), **options),
        weights=tuple(get_model_weights(builder)),
        backbone_weights=tuple(enum),
        network=network,
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


@dataclass(frozen=True, config=OPTIONS)
class DetectorConfig:
    """A detector: a family on the configured backbone, or one that torchvision builds whole.

    What is null is as torchvision has it for that name; what does not apply to a detector must be.

    Raises:
        ValueError: If a value is out of range or an option of another type, or some do not apply
            to this detector: all those at once, with how to reset them.
    """

    #: a family on the backbone: fasterrcnn, maskrcnn, keypointrcnn, retinanet or fcos; or one of
    #: torchvision's builders, such as ssdlite320_mobilenet_v3_large, with a backbone of its own
    name: str = "fasterrcnn"
    #: pixels of the shorter side; of several a random one, in evaluation the last; not for SSD
    min_size: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    max_size: PositiveInt | None = None  #: pixels that the longer side must not exceed; not for SSD
    #: sides of the anchors at each level, in pixels of the resized image, the coarser level that
    #: is added included; null for 8 times its stride (R-CNNs), 4 times (retinanet) or 1 (fcos)
    anchor_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    #: height over width; null for 0.5, 1 and 2
    aspect_ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    #: R-CNN families: points per side of a bin; null for 2
    roi_sampling_ratio: PositiveInt | None = None
    head_dim: PositiveInt | None = None  #: R-CNN families: width of the box head; null for 1024
    #: more arguments of torchvision's class, such as score_thresh; image_mean and image_std are
    #: those of the pretrained weights unless given
    options: dict[str, Any] = field(default_factory=dict)
    #: a trained detector to start from, all but its head: a name of torchvision's, such as
    #: COCO_V1, or a file
    weights: str | None = None
    #: place in a file of weights to look at alone, as backbone.weights_prefix
    weights_prefix: str | None = None

    def __post_init__(self) -> None:
        kind, reasons = find_detector(self.name), dict[str, str]()
        if not kind.is_family:
            reasons |= dict.fromkeys(_ROI_FIELDS, "torchvision's builder has heads of its own")
        elif not issubclass(kind.cls, FasterRCNN):
            reasons |= dict.fromkeys(_ROI_FIELDS, "it pools no proposals")
        if kind.cls is SSD:
            reasons |= dict.fromkeys(_SIZE_FIELDS, "its images have a fixed size")
            reasons |= dict.fromkeys(_ANCHOR_FIELDS, "its default boxes are fixed")
        elif kind.cls is FCOS:
            reasons["aspect_ratios"] = "it has no anchors but locations"
        elif "mobilenet" in kind.name:
            reasons |= dict.fromkeys(_ANCHOR_FIELDS, "its five sizes at every level are fixed")
        if self.weights is None:
            reasons["weights_prefix"] = "it starts from no weights"
        problems = {
            name: f" does not apply to {kind.name} ({reason}), got {getattr(self, name)}"
            for name, reason in reasons.items()
            if getattr(self, name) is not None
        }
        try:
            kind.options.model_validate(self.options)
        except ValidationError as error:
            told = ", ".join(f".{item['loc'][0]}: {item['msg']}" for item in error.errors())
            told = told.replace("Extra inputs are not permitted", "no such option")
            there_are = ", ".join(kind.options.model_fields)
            problems["options"] = f"{told}, got {self.options}; {kind.name} has {there_are}"
        refuse("detector", self, problems)


def refuse(section: str, config: Any, problems: Mapping[str, str]) -> None:
    """Raise ValueError of all fields with a problem, if any, and with arguments to reset them."""
    if problems:
        default, flags = type(config)(), []
        for name in problems:
            text = json.dumps(getattr(default, name), separators=(",", ":")).strip('"')
            flags.append(f"--{section}.{name} {text}")
        told = "; ".join(f"{section}.{name}{problem}" for name, problem in problems.items())
        raise ValueError(f"{told}; to reset: {' '.join(flags)}")


@dataclass(frozen=True, config=OPTIONS)
class BackboneConfig:
    """A classifier's body under a feature pyramid network.

    A builder with a backbone of its own takes ``weights``, ``weights_prefix``,
    ``trainable_layers`` and ``norm_eps``.
    """

    name: str = "resnet50"  #: a torchvision ResNet, ResNeXt or wide ResNet, or timm:ARCH
    #: pretrained ones: a name of torchvision's, such as IMAGENET1K_V2, timm:NAME, or a file of
    #: `detmix pretrain`, the official CutMix code or any state dict; null for a random start
    weights: Annotated[str, Field(min_length=1)] | None = None
    #: batch norm: frozen, live (batch) or over all processes (sync); or group norm (group); auto
    #: is frozen with weights and batch without
    norm: Norm = "auto"
    #: how many of the five parts, four stages (to the strides 4 to 32) and the stem, are trained,
    #: from the last; null for 3 of a ResNet with weights, else 5; a MobileNet that a detector
    #: brings has 6
    trainable_layers: Annotated[int, Field(ge=0, le=6)] | None = None
    fpn_channels: PositiveInt = 256  #: channels of every pyramid level
    #: which stages the pyramid starts from (strides 4 to 32); one coarser level is added to them
    levels: tuple[Annotated[int, Field(ge=1, le=4)], ...] = (1, 2, 3, 4)
    stem: Stem = "standard"  #: standard, or small: a 3x3 convolution with stride 1, no pooling
    #: epsilon of frozen batch norm; null for what the weights had
    norm_eps: NonNegativeFloat | None = None
    #: place in a file of weights to look at alone: the name of a dict, such as model_ema, and of
    #: what is in it, as in state_dict.module.encoder_k; null for the first that has most
    weights_prefix: str | None = None

    def __post_init__(self) -> None:
        _check_network("backbone", self)
        if not 0 < len(set(self.levels)) == len(self.levels):
            raise ValueError(f"backbone.levels must be different stages, got {self.levels}")
        if self.weights_prefix and not self.weights:
            raise ValueError(
                f"backbone.weights_prefix must be null without weights, got {self.weights_prefix!r}"
            )


@dataclass(frozen=True, config=OPTIONS)
class ClassifierConfig:
    """An image classifier."""

    name: str = "resnet50"  #: a torchvision ResNet, ResNeXt or wide ResNet, or timm:ARCH
    stem: Stem = "standard"  #: standard, or small (stride 1, no pooling) for 32 or 64 pixels
    norm: ClassifierNorm = "batch"  #: batch norm, sync (over all processes) or group

    def __post_init__(self) -> None:
        _check_network("model", self)


def _check_network(section: str, config: BackboneConfig | ClassifierConfig) -> None:
    """Check what a backbone and a classifier have in common."""
    is_timm = config.name.startswith(TIMM_PREFIX)
    if not is_timm and config.name not in (known := resnet_names()):
        names = ", ".join((*known, f"{TIMM_PREFIX}ARCH"))
        raise ValueError(f"{section}.name must be one of {names}, got {config.name!r}")
    if is_timm and (config.stem == "small" or config.norm == "group"):
        raise ValueError(
            f"{section}.stem=small and {section}.norm=group are for torchvision's ResNets only, "
            f"got {section}.name={config.name!r}"
        )
