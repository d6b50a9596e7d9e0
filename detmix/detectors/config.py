"""The typed configurations of a detector above its backbone, and of a classifier."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from detmix.backbones.resnet import Stem, build_resnet, check_choice, resnet_names
from detmix.backbones.timm import TIMM_PREFIX, create_timm_model, sync_batch_norm
from detmix.detectors.names import check_name, inapplicable_fields, option_defaults, option_names

STATISTICS = ("image_mean", "image_std")
"""The options that say how images are normalised."""

# Options that are None by default and sequences of numbers otherwise, each with how many.
_LENGTHS = {**dict.fromkeys(STATISTICS, 3), "bbox_reg_weights": 4}
_NUMBER_WORDS = {3: "three", 4: "four"}
ClassifierNorm = Literal["batch", "sync", "group"]


@dataclass(frozen=True)
class DetectorConfig:
    """A detector: a family on the configured backbone, or one that torchvision builds whole.

    What is None is as torchvision has it for that name. What means nothing to a detector, such as
    ``head_dim`` to a RetinaNet, must be None.

    Attributes:
        name: A family above the configured backbone and its feature pyramid: ``"fasterrcnn"``,
            ``"maskrcnn"``, ``"keypointrcnn"``, ``"retinanet"`` or ``"fcos"``. Or one of
            torchvision's builders, such as ``"ssdlite320_mobilenet_v3_large"``, which brings a
            backbone of its own: of the backbone's section only ``weights`` (a name of
            torchvision's; with a ResNet-50 whatever a backbone starts from; not SSDlite's),
            ``trainable_layers`` and ``norm_eps`` are for it.
        min_size: What the shorter side of an image is resized to, in pixels. SSD and SSDlite
            have images of a fixed size.
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
            families only. The heads of masks and keypoints are as wide as the pyramid and twice
            as wide.
        options: Further keyword arguments of torchvision's class, such as
            ``rpn_post_nms_top_n_train`` or ``score_thresh``: a positive whole number where
            torchvision's default is one, a number where it is any, and four numbers or None for
            ``bbox_reg_weights``. ``image_mean`` and ``image_std``, three numbers each, are those
            of the pretrained weights, or torchvision's without any, unless given here.
        weights: A whole detector to start from: a name of torchvision's weights, such as
            ``"COCO_V1"``, for one of its builders, or for an R-CNN family on a ResNet-50; or a
            file: a checkpoint of ``tools/train.py`` or a state dict of torchvision's. All of it
            is taken but what depends on the classes, which is new for those of the data set (and
            the keypoints' predictor where their number differs). None for a new detector, on a
            backbone that may be pretrained.

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
        check_name(self.name)
        self._check_applicable()
        for name in ("min_size", "max_size", "roi_sampling_ratio", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"detector.{name} must be positive, got {value}")
        for name in ("anchor_sizes", "aspect_ratios"):
            values = getattr(self, name)
            if values is not None and not (values and all(value > 0 for value in values)):
                raise ValueError(f"detector.{name} must be positive numbers, got {values}")
        self._check_options()

    def _check_applicable(self) -> None:
        """Refuse at once all that means nothing to this detector."""
        reset: dict[str, Any] = {}
        problems = []
        for name, reason in inapplicable_fields(self.name).items():
            value = getattr(self, name)
            if value is not None:
                reset[name] = None
                problems.append(
                    f"detector.{name} does not apply to {self.name} ({reason}), got {value}"
                )
        known = option_names(self.name)
        unknown = [name for name in self.options if name not in known]
        if unknown:
            reset["options"] = {}
            are = "are not options" if len(unknown) > 1 else "is not an option"
            problems.append(
                f"detector.options.{', '.join(unknown)} {are} of {self.name}; there are "
                f"{', '.join(known)}"
            )
        if problems:
            raise ValueError(f"{'; '.join(problems)}; to reset: {reset_flags('detector', reset)}")

    def _check_options(self) -> None:
        defaults = option_defaults(self.name)
        for name, value in self.options.items():
            wanted = _wrong_type(name, value, defaults[name])
            if wanted is not None:
                raise ValueError(f"detector.options.{name} must be {wanted}, got {value!r}")


def class_arguments(detector: DetectorConfig) -> dict[str, Any]:
    """Return the keyword arguments of a detector's class that its configuration gives as such."""
    # Not the image statistics: what they are by default must be known when weights bring others.
    sizes = {"min_size": detector.min_size, "max_size": detector.max_size}
    given = {name: value for name, value in sizes.items() if value is not None}
    return {**given, **_without_statistics(detector.options)}


def _without_statistics(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in STATISTICS}


def reset_flags(section: str, values: Mapping[str, Any]) -> str:
    """Return the arguments of ``tools/train.py`` that set fields of a section to such values."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in values.items()
    }
    return " ".join(f"--{section}.{name} {text}" for name, text in texts.items())


def _wrong_type(name: str, value: Any, default: Any) -> str | None:
    """Return what an option must be, or None for a value that is such."""
    if name in _LENGTHS:
        fits = value is None or _are_numbers(value, _LENGTHS[name])
        wanted = f"{_NUMBER_WORDS[_LENGTHS[name]]} numbers or null"
    elif isinstance(default, bool) or not isinstance(default, (int, float)):
        return None  # torchvision has no such option so far
    elif isinstance(default, int):  # a number of boxes or proposals
        fits = isinstance(value, int) and _is_number(value) and value > 0
        wanted = "a positive whole number"
    else:
        fits, wanted = _is_number(value), "a number"
    return None if fits else wanted


def _are_numbers(value: Any, length: int) -> bool:
    is_sequence = isinstance(value, (list, tuple)) and len(value) == length
    return is_sequence and all(_is_number(number) for number in value)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and not math.isnan(value)


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
        check_choice("model.stem", self.stem, get_args(Stem))
        check_choice("model.norm", self.norm, get_args(ClassifierNorm))
        if not self.name.startswith(TIMM_PREFIX):
            check_choice("model.name", self.name, (*resnet_names(), f"{TIMM_PREFIX}ARCH"))
        elif self.stem == "small" or self.norm == "group":
            raise ValueError(
                "model.stem=small and model.norm=group are for torchvision's ResNets only, got "
                f"model.name={self.name!r}"
            )


def build_classifier(config: ClassifierConfig, num_classes: int) -> nn.Module:
    """Build a classifier with random weights.

    Its state dict has torchvision's (or timm's) own keys, so that `BackboneConfig.weights` reads
    a file of it.

    Args:
        config: The classifier.
        num_classes: K, without any background.

    Returns:
        A module from float images (B, 3, H, W) to scores (B, K), in training mode.

    Raises:
        ValueError: If ``num_classes`` is below 1, or timm is asked for and not there or without
            that architecture.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    if not config.name.startswith(TIMM_PREFIX):
        resnet: nn.Module = build_resnet(
            config.name, norm=config.norm, stem=config.stem, num_classes=num_classes
        )
        return resnet
    model = create_timm_model(config.name, "model.name", num_classes)
    if config.norm == "sync":
        sync_batch_norm(model)
    return model
