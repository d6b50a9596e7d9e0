"""Building classifiers: alone, or pretrained or not under a feature pyramid."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from detmix.backbones.resnet import build_resnet
from detmix.backbones.timm import TIMM_PREFIX, TimmBody, TimmPyramid, create_timm_model
from detmix.detectors.config import BackboneConfig, ClassifierConfig
from detmix.pretrained.match_state import LoadReport
from detmix.pretrained.sources import Source, find_source, load_classifier

# A ResNet's trainable parts from the last to the first, as torchvision counts trainable_layers.
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")
_PRETRAINED_LAYERS = 3


def build_classifier(config: ClassifierConfig, num_classes: int) -> nn.Module:
    """Build a classifier with random weights, whose state dict has torchvision's or timm's keys.

    Args:
        config: The classifier.
        num_classes: K, without any background.

    Returns:
        A module from float images (B, 3, H, W) to scores (B, K), in training mode.

    Raises:
        ValueError: If ``num_classes`` is below 1, or timm is needed and has not that.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    if config.name.startswith(TIMM_PREFIX):
        return create_timm_model(config.name, "model.name", config.norm, num_classes)
    resnet: nn.Module = build_resnet(config.name, config.norm, config.stem, num_classes)
    return resnet


def build_backbone(config: BackboneConfig, *, load_weights: bool = True) -> BackboneWithFPN:
    """Build a classifier's body with a feature pyramid on top, and log what was loaded.

    Args:
        config: The backbone.
        load_weights: Whether to load its pretrained weights, or only to build as if.

    Returns:
        A module from images to feature maps by level name, with ``out_channels``.

    Raises:
        FileNotFoundError: If the file of the weights is not there.
        ValueError: If the weights are unknown, broken or of another network, or timm is needed
            and not there.
        ConnectionError: If the weights cannot be downloaded.
    """
    source = backbone_source(config)
    start = source if load_weights else None
    return build_pyramid(config, start, pretrained=source is not None)[0]


def backbone_source(config: BackboneConfig) -> Source | None:
    """Decide what a backbone starts from; None for a random start."""
    if config.weights is None:
        return None
    is_timm = config.name.startswith(TIMM_PREFIX)
    known = () if is_timm else tuple(get_model_weights(config.name))
    source = find_source(config.weights, "backbone.weights", known, config.name)
    if source.is_torchvisions and (config.norm == "group" or config.stem == "small"):
        raise ValueError(
            f"backbone.weights={config.weights!r} is with batch norm and the standard stem, got "
            f"backbone.norm={config.norm}, backbone.stem={config.stem}"
        )
    return source


def build_pyramid(
    config: BackboneConfig, source: Source | None, *, pretrained: bool
) -> tuple[BackboneWithFPN, LoadReport | None]:
    """Build a backbone, frozen as a pretrained one is or not, and tell what was loaded."""
    norm = config.norm
    if norm == "auto":
        norm = "frozen" if pretrained else "batch"
    stages = sorted(config.levels)
    is_timm = config.name.startswith(TIMM_PREFIX)
    if is_timm:
        model = create_timm_model(config.name, "backbone.name", norm)
    else:
        model = build_resnet(config.name, norm, config.stem)
    report = None
    if source is not None:
        report = load_classifier(model, source, config.name, config.stem)
    if is_timm:
        pyramid = TimmPyramid(model, config.name, stages, config.fpn_channels)
    else:
        pyramid = _resnet_pyramid(model, stages, config.fpn_channels)
    set_norm_epsilon(pyramid, config.norm_eps)
    _freeze(pyramid.body, config, pretrained)
    return pyramid, report


def _resnet_pyramid(model: Any, stages: list[int], width: int) -> BackboneWithFPN:
    # Each stage of a ResNet doubles the channels; layer4 ends at fc's.
    channels = [model.fc.in_features // 2 ** (4 - stage) for stage in stages]
    names = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(model, names, channels, width)


def _freeze(body: nn.Module, config: BackboneConfig, pretrained: bool) -> None:
    """Freeze all but the trained layers of a body."""
    network = body.model if isinstance(body, TimmBody) else body
    parts = {name.partition(".")[0] for name, _ in network.named_parameters()}
    is_resnet = parts <= {*_LAYERS, "bn1"}
    trainable = config.trainable_layers
    if trainable is None:
        trainable = _PRETRAINED_LAYERS if pretrained and is_resnet else len(_LAYERS)
    if trainable not in (range(len(_LAYERS) + 1) if is_resnet else (0, len(_LAYERS))):
        expected = "in 0..5" if is_resnet else "0, 5 or null, as it has not the parts of a ResNet"
        raise ValueError(
            f"backbone.trainable_layers of {config.name} must be {expected}, got {trainable}"
        )
    if trainable == len(_LAYERS):
        return
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
