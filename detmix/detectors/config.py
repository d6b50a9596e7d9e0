"""The typed configurations of a detector, of the backbone under it, and of a classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.ssd import SSD

from detmix.backbones.resnet import Stem, check_choice, resnet_names
from detmix.backbones.timm import TIMM_PREFIX
from detmix.detectors.names import SEQUENCES, DetectorKind, find_detector

STATISTICS = ("image_mean", "image_std")
"""The options that say how images are normalised."""

Norm = Literal["auto", "frozen", "batch", "sync", "group"]
ClassifierNorm = Literal["batch", "sync", "group"]

# What torchvision counts in the MobileNet of a detector that brings its own backbone.
_MOST_LAYERS = 6
_ANCHOR_FIELDS = ("anchor_sizes", "aspect_ratios")


@dataclass(frozen=True)
class DetectorConfig:
    """A detector: a family on the configured backbone, or one that torchvision builds whole.

    What is None is as torchvision has it for that name; what means nothing to a detector must be.

    Attributes:
        name: A family above the configured backbone and its feature pyramid: ``"fasterrcnn"``,
            ``"maskrcnn"``, ``"keypointrcnn"``, ``"retinanet"`` or ``"fcos"``. Or one of
            torchvision's builders, such as ``"ssdlite320_mobilenet_v3_large"``, which brings a
            backbone of its own: of the backbone's section only ``weights`` (a name of
            torchvision's; with a ResNet-50 whatever a backbone starts from; not SSDlite's),
            ``trainable_layers`` and ``norm_eps`` are for it.
        min_size: What the shorter side of an image is resized to, in pixels; not SSD's, whose
            images have a fixed size.
        max_size: What the longer side must not exceed, in pixels.
        anchor_sizes: Side of the square anchor at each pyramid level, in pixels of the resized
            image: one more than the backbone has levels. None for 8 times the stride of a level
            (an R-CNN: 32 to 512 on all four levels), 4 times (RetinaNet, which has 2^(1/3) and
            2^(2/3) of each size too) or the stride (FCOS: a location learns of objects that
            reach 4 to 8 times this far).
        aspect_ratios: Height over width of the anchors at every level; None for 0.5, 1 and 2.
        roi_sampling_ratio: Points per side that RoI align samples in each bin of a proposal; a
            quarter of the work on a CPU with 1 instead of 2 (None). R-CNN families only.
        head_dim: Width of the two fully connected layers of the box head, 1024 (None). R-CNN
            families only.
        options: Further keyword arguments of torchvision's class, such as
            ``rpn_post_nms_top_n_train`` or ``score_thresh``. ``image_mean`` and ``image_std``,
            three numbers each, are those of the pretrained weights, or torchvision's without
            any, unless given here.
        weights: A whole detector to start from: a name of torchvision's weights, such as
            ``"COCO_V1"``, for one of its builders, or for an R-CNN family on a ResNet-50; or a
            file: a checkpoint of ``tools/train.py`` or a state dict of torchvision's. All of it
            is taken but what depends on the classes (and the keypoints' predictor where their
            number differs). None for a new detector, on a backbone that may be pretrained.

    Raises:
        ValueError: If a value is out of range or an option of another type, or some do not apply
            to this detector: all those at once, with how to reset them.
    """

    name: str = "fasterrcnn"
    min_size: int | None = None
    max_size: int | None = None
    anchor_sizes: tuple[int, ...] | None = None
    aspect_ratios: tuple[float, ...] | None = None
    roi_sampling_ratio: int | None = None
    head_dim: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        kind = find_detector(self.name)
        self._check_applicable(kind)
        for name in ("min_size", "max_size", "roi_sampling_ratio", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"detector.{name} must be positive, got {value}")
        for name in _ANCHOR_FIELDS:
            values = getattr(self, name)
            if values is not None and not (values and all(value > 0 for value in values)):
                raise ValueError(f"detector.{name} must be positive numbers, got {values}")
        for name, value in self.options.items():
            wanted = _wanted(name, value, kind.options[name])
            if wanted is not None:
                raise ValueError(f"detector.options.{name} must be {wanted}, got {value!r}")

    def _check_applicable(self, kind: DetectorKind) -> None:
        """Refuse at once all that means nothing to this detector."""
        given = {
            name: reason
            for name, reason in _inapplicable(kind).items()
            if getattr(self, name) is not None
        }
        problems = [
            f"detector.{name} does not apply to {self.name} ({reason}), got {getattr(self, name)}"
            for name, reason in given.items()
        ]
        reset: dict[str, Any] = dict.fromkeys(given)
        unknown = [name for name in self.options if name not in kind.options]
        if unknown:
            reset["options"] = {}
            problems.append(
                f"detector.options.{', '.join(unknown)}: no option of {self.name}; there are "
                f"{', '.join(kind.options)}"
            )
        refuse("detector", problems, reset)


def _inapplicable(kind: DetectorKind) -> dict[str, str]:
    """Return the fields of `DetectorConfig` that mean nothing to a detector, each with why."""
    roi_fields = ("roi_sampling_ratio", "head_dim")
    fields = {}
    if not kind.is_family:
        fields = dict.fromkeys(roi_fields, "torchvision's builder has heads of its own")
    elif not issubclass(kind.cls, FasterRCNN):
        fields = dict.fromkeys(roi_fields, "it pools no proposals")
    if kind.cls is SSD:
        fields |= dict.fromkeys(("min_size", "max_size"), "its images have a fixed size")
        fields |= dict.fromkeys(_ANCHOR_FIELDS, "its default boxes are fixed")
    elif kind.cls is FCOS:
        fields["aspect_ratios"] = "it has no anchors but locations"
    elif "mobilenet" in kind.name:
        fields |= dict.fromkeys(_ANCHOR_FIELDS, "its five sizes at every level are fixed")
    return fields


def _wanted(name: str, value: Any, default: Any) -> str | None:
    """Return what an option must be by the default of its class, None for what is such."""
    if default is None:
        length = SEQUENCES[name]
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


def refuse(section: str, problems: list[str], reset: Mapping[str, Any]) -> None:
    """Raise ValueError of all problems, if there are any, with the arguments that reset fields."""
    if problems:
        texts = {
            name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            for name, value in reset.items()
        }
        flags = " ".join(f"--{section}.{name} {text}" for name, text in texts.items())
        raise ValueError(f"{'; '.join(problems)}; to reset: {flags}")


@dataclass(frozen=True)
class BackboneConfig:
    """A classifier's body under a feature pyramid network.

    Attributes:
        name: A torchvision ResNet, ResNeXt or wide ResNet, such as ``"resnet18"``, or
            ``"timm:ARCH"`` for a convolutional architecture of timm.
        weights: Pretrained weights: a name of torchvision's, such as ``"IMAGENET1K_V2"``;
            ``"timm:NAME"``, such as ``"timm:resnet50.a1_in1k"``; or a file: a checkpoint of
            ``tools/pretrain.py`` or of the official CutMix repository, or any state dict of this
            network. None for a random start.
        norm: Normalization: ``"frozen"`` batch norm, live ``"batch"`` norm, ``"sync"`` batch
            norm over all processes or ``"group"`` norm (with weights that were trained with it);
            ``"auto"`` is frozen with weights and live without, as in torchvision. A timm
            architecture without batch norm keeps what it has.
        trainable_layers: How many of the five parts, from the last, are trained; None for 3
            with weights and 5 without, as in torchvision. An architecture without a ResNet's
            parts has 5 (None) or 0. A detector that brings its own backbone has torchvision's
            parts and default: 0 to 6 of a MobileNet.
        fpn_channels: Channels of every pyramid level.
        levels: Which of the stages 1 to 4 (strides 4 to 32; 1 to 8 with the small stem) the
            pyramid starts from; one coarser level is added to them.
        stem: ``"standard"``, or ``"small"`` for a 3×3 convolution with stride 1 and no pooling
            (torchvision's names only); as in the pretraining.
        norm_eps: Epsilon of frozen batch norm (torchvision's names only); None for torchvision's,
            which is 0 with its COCO weights and 1e-5 otherwise. A run notes here what it has.
    """

    name: str = "resnet50"
    weights: str | None = None
    norm: Norm = "auto"
    trainable_layers: int | None = None
    fpn_channels: int = 256
    levels: tuple[int, ...] = (1, 2, 3, 4)
    stem: Stem = "standard"
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        _check_network("backbone", self, get_args(Norm))
        layers, eps, stages = self.trainable_layers, self.norm_eps, set(self.levels)
        if layers is not None and not 0 <= layers <= _MOST_LAYERS:
            raise ValueError(
                "backbone.trainable_layers must be in 0..5 (0..6 of a MobileNet that a detector "
                f"brings), got {layers}"
            )
        if self.weights == "":
            raise ValueError("backbone.weights must name weights or be null, got ''")
        if eps is not None and not 0 <= eps < math.inf:
            raise ValueError(f"backbone.norm_eps must not be negative, got {eps}")
        if self.fpn_channels < 1:
            raise ValueError(f"backbone.fpn_channels must be positive, got {self.fpn_channels}")
        if not stages or not stages <= {1, 2, 3, 4} or len(stages) < len(self.levels):
            raise ValueError(
                f"backbone.levels must be different stages out of 1..4, got {self.levels}"
            )


@dataclass(frozen=True)
class ClassifierConfig:
    """An image classifier.

    Attributes:
        name: A torchvision ResNet, ResNeXt or wide ResNet, such as ``"resnet50"``, or
            ``"timm:ARCH"`` for an architecture of timm, such as ``"timm:resnet50d"``.
        stem: ``"standard"``, or ``"small"`` for images of 32 or 64 pixels: a 3×3 convolution with
            stride 1 and no pooling (torchvision's names only).
        norm: ``"batch"`` norm, ``"sync"`` batch norm over all processes, or ``"group"`` norm
            (torchvision's names only).
    """

    name: str = "resnet50"
    stem: Stem = "standard"
    norm: ClassifierNorm = "batch"

    def __post_init__(self) -> None:
        _check_network("model", self, get_args(ClassifierNorm))


def _check_network(
    section: str, config: BackboneConfig | ClassifierConfig, norms: tuple[str, ...]
) -> None:
    """Check what a backbone and a classifier have in common."""
    check_choice(f"{section}.norm", config.norm, norms)
    check_choice(f"{section}.stem", config.stem, get_args(Stem))
    if not config.name.startswith(TIMM_PREFIX):
        check_choice(f"{section}.name", config.name, (*resnet_names(), f"{TIMM_PREFIX}ARCH"))
    elif config.stem == "small" or config.norm == "group":
        raise ValueError(
            f"{section}.stem=small and {section}.norm=group are for torchvision's ResNets only, "
            f"got {section}.name={config.name!r}"
        )
