"""The typed configurations of a detector, of the backbone under it, and of a classifier.

And which detectors there are by name, with what torchvision says of each.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

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
def _find_detector(name: str) -> DetectorKind:
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
        if key in _SEQUENCES
        or (isinstance(argument.default, (int, float)) and key not in ("min_size", "max_size"))
    }
    annotated: tuple[Any, ...] = get_args(
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
    return _find_detector(name).is_family


def target_keys(name: str) -> tuple[str, ...]:
    """Return what a target needs for a detector beyond boxes and labels: masks or keypoints.

    Raises:
        ValueError: If there is no such detector.
    """
    return {MaskRCNN: ("masks",), KeypointRCNN: ("keypoints",)}.get(_find_detector(name).cls, ())


@dataclass(frozen=True)
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
    min_size: int | tuple[int, ...] | None = None
    max_size: int | None = None  #: pixels that the longer side must not exceed; not for SSD
    #: sides of the anchors at each level, in pixels of the resized image, the coarser level that
    #: is added included; null for 8 times its stride (R-CNNs), 4 times (retinanet) or 1 (fcos)
    anchor_sizes: tuple[int, ...] | None = None
    aspect_ratios: tuple[float, ...] | None = None  #: height over width; null for 0.5, 1 and 2
    roi_sampling_ratio: int | None = None  #: R-CNN families: points per side of a bin; null for 2
    head_dim: int | None = None  #: R-CNN families: width of the box head; null for 1024
    #: more arguments of torchvision's class, such as score_thresh; image_mean and image_std are
    #: those of the pretrained weights unless given
    options: dict[str, Any] = field(default_factory=dict)
    #: a trained detector to start from, all but its head: a name of torchvision's, such as
    #: COCO_V1, or a file
    weights: str | None = None
    #: place in a file of weights to look at alone, as backbone.weights_prefix
    weights_prefix: str | None = None

    @property
    def kind(self) -> DetectorKind:
        """What the name stands for."""
        return _find_detector(self.name)

    def __post_init__(self) -> None:
        kind = self.kind
        refuse("detector", self, _inapplicable(self, kind))
        for name in (*_SIZE_FIELDS, *_ROI_FIELDS, *_ANCHOR_FIELDS):
            value = getattr(self, name)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if value is not None and not (numbers and all(number > 0 for number in numbers)):
                raise ValueError(f"detector.{name} must be positive, got {value}")
        for name, value in self.options.items():
            wanted = _wanted(name, value, kind.options[name])
            if wanted is not None:
                raise ValueError(f"detector.options.{name} must be {wanted}, got {value!r}")


def _inapplicable(config: DetectorConfig, kind: DetectorKind) -> dict[str, str]:
    """Return what to say of each field that is set and means nothing to a detector."""
    reasons = {}
    if not kind.is_family:
        reasons = dict.fromkeys(_ROI_FIELDS, "torchvision's builder has heads of its own")
    elif not issubclass(kind.cls, FasterRCNN):
        reasons = dict.fromkeys(_ROI_FIELDS, "it pools no proposals")
    if kind.cls is SSD:
        reasons |= dict.fromkeys(_SIZE_FIELDS, "its images have a fixed size")
        reasons |= dict.fromkeys(_ANCHOR_FIELDS, "its default boxes are fixed")
    elif kind.cls is FCOS:
        reasons["aspect_ratios"] = "it has no anchors but locations"
    elif "mobilenet" in kind.name:
        reasons |= dict.fromkeys(_ANCHOR_FIELDS, "its five sizes at every level are fixed")
    if config.weights is None:
        reasons["weights_prefix"] = "it starts from no weights"
    problems = {
        name: f" does not apply to {kind.name} ({reason}), got {getattr(config, name)}"
        for name, reason in reasons.items()
        if getattr(config, name) is not None
    }
    if unknown := ", ".join(name for name in config.options if name not in kind.options):
        there_are = ", ".join(kind.options)
        problems["options"] = f".{unknown}: no option of {kind.name}; there are {there_are}"
    return problems


def _wanted(name: str, value: Any, default: Any) -> str | None:
    """Return what an option must be by the default of its class, None for what is such."""
    if default is None:
        length = _SEQUENCES[name]
        is_sequence = isinstance(value, (list, tuple)) and len(value) == length
        fits = value is None or (is_sequence and all(_is_number(each) for each in value))
        wanted = f"{length} numbers or null"
    elif isinstance(default, int):  # a number of boxes or proposals
        fits, wanted = type(value) is int and value > 0, "a positive whole number"
    else:
        fits, wanted = _is_number(value), "a number"
    return None if fits else wanted


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and not math.isnan(value)


def refuse(section: str, config: Any, problems: Mapping[str, str]) -> None:
    """Raise ValueError of all fields with a problem, if any, and with arguments to reset them."""
    if problems:
        default, flags = type(config)(), []
        for name in problems:
            text = json.dumps(getattr(default, name), separators=(",", ":")).strip('"')
            flags.append(f"--{section}.{name} {text}")
        told = "; ".join(f"{section}.{name}{problem}" for name, problem in problems.items())
        raise ValueError(f"{told}; to reset: {' '.join(flags)}")


@dataclass(frozen=True)
class BackboneConfig:
    """A classifier's body under a feature pyramid network.

    A builder with a backbone of its own takes ``weights``, ``weights_prefix``,
    ``trainable_layers`` and ``norm_eps``.
    """

    name: str = "resnet50"  #: a torchvision ResNet, ResNeXt or wide ResNet, or timm:ARCH
    #: pretrained ones: a name of torchvision's, such as IMAGENET1K_V2, timm:NAME, or a file of
    #: `detmix pretrain`, the official CutMix code or any state dict; null for a random start
    weights: str | None = None
    #: batch norm: frozen, live (batch) or over all processes (sync); or group norm (group); auto
    #: is frozen with weights and batch without
    norm: Norm = "auto"
    #: how many of the five parts, four stages (to the strides 4 to 32) and the stem, are trained,
    #: from the last; null for 3 of a ResNet with weights, else 5; a MobileNet that a detector
    #: brings has 6
    trainable_layers: int | None = None
    fpn_channels: int = 256  #: channels of every pyramid level
    #: which stages the pyramid starts from (strides 4 to 32); one coarser level is added to them
    levels: tuple[int, ...] = (1, 2, 3, 4)
    stem: Stem = "standard"  #: standard, or small: a 3x3 convolution with stride 1, no pooling
    norm_eps: float | None = None  #: epsilon of frozen batch norm; null for what the weights had
    #: place in a file of weights to look at alone: the name of a dict, such as model_ema, and of
    #: what is in it, as in state_dict.module.encoder_k; null for the first that has most
    weights_prefix: str | None = None

    def __post_init__(self) -> None:
        _check_network("backbone", self, get_args(Norm))
        layers, eps, stages = self.trainable_layers, self.norm_eps, set(self.levels)
        whose = "a MobileNet that a detector brings"
        expected = {
            "weights": (self.weights != "", "the name of some or null"),
            "weights_prefix": (self.weights or not self.weights_prefix, "null without weights"),
            "trainable_layers": (layers in (None, *range(7)), f"in 0..5 (0..6 of {whose})"),
            "fpn_channels": (self.fpn_channels > 0, "positive"),
            "levels": (
                0 < len(stages) == len(self.levels) and stages <= {1, 2, 3, 4},
                "different stages out of 1..4",
            ),
            "norm_eps": (eps is None or 0 <= eps < math.inf, "0 or more"),
        }
        for name, (is_right, wanted) in expected.items():
            if not is_right:
                raise ValueError(f"backbone.{name} must be {wanted}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ClassifierConfig:
    """An image classifier."""

    name: str = "resnet50"  #: a torchvision ResNet, ResNeXt or wide ResNet, or timm:ARCH
    stem: Stem = "standard"  #: standard, or small (stride 1, no pooling) for 32 or 64 pixels
    norm: ClassifierNorm = "batch"  #: batch norm, sync (over all processes) or group

    def __post_init__(self) -> None:
        _check_network("model", self, get_args(ClassifierNorm))


def _check_network(
    section: str, config: BackboneConfig | ClassifierConfig, norms: tuple[str, ...]
) -> None:
    """Check what a backbone and a classifier have in common."""
    is_timm = config.name.startswith(TIMM_PREFIX)
    choices = {"norm": norms, "stem": get_args(Stem)}
    if not is_timm:
        choices["name"] = (*resnet_names(), f"{TIMM_PREFIX}ARCH")
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"{section}.{name} must be one of {', '.join(known)}, got {value!r}")
    if is_timm and (config.stem == "small" or config.norm == "group"):
        raise ValueError(
            f"{section}.stem=small and {section}.norm=group are for torchvision's ResNets only, "
            f"got {section}.name={config.name!r}"
        )
