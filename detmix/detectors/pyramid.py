"""Building a backbone from a config: a classifier, pretrained or not, under a feature pyramid."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from detmix.backbones.resnet import Stem, build_resnet, check_choice, resnet_names
from detmix.backbones.timm import (
    TIMM_PREFIX,
    FeatureBackboneWithFPN,
    TimmBody,
    check_timm_body,
    create_timm_model,
    freeze_batch_norm,
    sync_batch_norm,
)
from detmix.pretrained.match_state import LoadReport
from detmix.pretrained.sources import (
    find_named,
    load_into_classifier,
    read_backbone_weights,
    resnet_weights,
)

Norm = Literal["auto", "frozen", "batch", "sync", "group"]

# A ResNet's trainable parts from the last to the first, as torchvision counts trainable_layers.
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")
_PRETRAINED_LAYERS = 3
# What torchvision counts in the MobileNet of a detector that brings its own backbone.
_MOST_LAYERS = 6

_log = logging.getLogger(__name__)


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
        check_choice("backbone.norm", self.norm, get_args(Norm))
        check_choice("backbone.stem", self.stem, get_args(Stem))
        if not self.name.startswith(TIMM_PREFIX):
            check_choice("backbone.name", self.name, (*resnet_names(), f"{TIMM_PREFIX}ARCH"))
        elif self.stem == "small" or self.norm == "group":
            raise ValueError(
                "backbone.stem=small and backbone.norm=group are for torchvision's ResNets only, "
                f"got backbone.name={self.name!r}"
            )
        named = find_named(self.weights or "", resnet_weights(self.name))
        if named and (self.norm == "group" or self.stem == "small"):
            setting = "norm=group" if self.norm == "group" else "stem=small"
            raise ValueError(
                f"backbone.{setting} does not fit weights={self.weights!r}: torchvision's have "
                "batch norm and the standard stem"
            )
        if self.trainable_layers is not None and not 0 <= self.trainable_layers <= _MOST_LAYERS:
            raise ValueError(
                "backbone.trainable_layers must be in 0..5 (0..6 of a MobileNet that a detector "
                f"brings), got {self.trainable_layers}"
            )
        if self.weights == "":
            raise ValueError("backbone.weights must name weights or be null, got ''")
        if self.norm_eps is not None and not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"backbone.norm_eps must not be negative, got {self.norm_eps}")
        if self.fpn_channels < 1:
            raise ValueError(f"backbone.fpn_channels must be positive, got {self.fpn_channels}")
        stages = set(self.levels)
        if not stages or not stages <= {1, 2, 3, 4} or len(stages) < len(self.levels):
            raise ValueError(
                f"backbone.levels must be different stages out of 1..4, got {self.levels}"
            )


def build_backbone(config: BackboneConfig, *, load_weights: bool = True) -> BackboneWithFPN:
    """Build a classifier's body with a feature pyramid on top.

    What was loaded is logged as one line.

    Args:
        config: The backbone.
        load_weights: Whether to load its pretrained weights; nothing is opened or downloaded
            otherwise, and the architecture is the same.

    Returns:
        A module from images to feature maps by level name, with ``out_channels``.

    Raises:
        FileNotFoundError: If the file of the weights is not there.
        ValueError: If the weights are unknown, broken or of another network, or timm is needed
            and not there.
        ConnectionError: If the weights cannot be downloaded.
    """
    return build_backbone_with_report(config, load_weights=load_weights)[0]


def build_backbone_with_report(
    config: BackboneConfig, *, load_weights: bool = True, pretrained: bool | None = None
) -> tuple[BackboneWithFPN, LoadReport | None]:
    """Build a backbone as `build_backbone` and tell what was loaded."""
    if config.trainable_layers is not None and config.trainable_layers > len(_LAYERS):
        raise ValueError(
            f"backbone.trainable_layers of {config.name} must be in 0..5, got "
            f"{config.trainable_layers}"
        )
    if pretrained is None:
        pretrained = config.weights is not None
    norm = config.norm
    if norm == "auto":
        norm = "frozen" if pretrained else "batch"
    weights = None
    if config.weights is not None and load_weights:
        weights = read_backbone_weights(
            config.weights, "backbone.weights", config.name, config.stem
        )
    is_timm = config.name.startswith(TIMM_PREFIX)
    model: nn.Module
    if is_timm:
        model = create_timm_model(config.name, "backbone.name")
        check_timm_body(model, config.name, sorted(config.levels))
    else:
        model = build_resnet(config.name, norm=norm, stem=config.stem)
    report = None
    if weights is not None:
        report = load_into_classifier(model, weights, config.name)
        _log.info("%s", report)
    pyramid = (_timm_pyramid if is_timm else _resnet_pyramid)(model, config, norm)
    set_norm_epsilon(pyramid, config.norm_eps)
    _freeze(pyramid.body, config, pretrained)
    return pyramid, report


def _resnet_pyramid(model: Any, config: BackboneConfig, norm: str) -> BackboneWithFPN:
    stages = sorted(config.levels)
    # Each stage of a ResNet doubles the channels; layer4 ends at fc's.
    channels = [model.fc.in_features // 2 ** (4 - stage) for stage in stages]
    names = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(model, names, channels, config.fpn_channels)


def _timm_pyramid(model: nn.Module, config: BackboneConfig, norm: str) -> BackboneWithFPN:
    if norm == "frozen":
        freeze_batch_norm(model)
    elif norm == "sync":
        sync_batch_norm(model)
    body = TimmBody(model, sorted(config.levels))
    return FeatureBackboneWithFPN(body, body.channels, config.fpn_channels)


def _freeze(body: nn.Module, config: BackboneConfig, pretrained: bool) -> None:
    """Freeze all but the trained layers of a body."""
    network = body.model if isinstance(body, TimmBody) else body
    parts = {name.partition(".")[0] for name, _ in network.named_parameters()}
    is_resnet = parts <= {*_LAYERS, "bn1"}
    trainable = config.trainable_layers
    if trainable is None:
        trainable = _PRETRAINED_LAYERS if pretrained and is_resnet else len(_LAYERS)
    if trainable == len(_LAYERS):
        return
    if trainable and not is_resnet:
        raise ValueError(
            f"backbone.trainable_layers of {config.name} must be 0, 5 or null, as it has not the "
            f"parts of a ResNet, got {trainable}"
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(_LAYERS[:trainable]))


def norm_epsilon(model: nn.Module) -> float | None:
    """Return the epsilon of a model's frozen batch norm, None if it has none."""
    found = (module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d))
    return next(found, None)


def set_norm_epsilon(model: nn.Module, eps: float | None) -> None:
    """Set the epsilon of a model's frozen batch norm, in place; None leaves it as it is."""
    for module in model.modules():
        if eps is not None and isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
