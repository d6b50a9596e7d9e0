"""Torchvision's ResNets with a choice of normalization and of the first layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d

Stem = Literal["standard", "small"]

_GROUPS = 32
_NORMS: dict[str, Callable[..., nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": partial(nn.GroupNorm, _GROUPS),
}


def resnet_names() -> list[str]:
    """Return the names of torchvision's ResNets, ResNeXts and wide ResNets."""
    names: list[str] = list_models(module=models, include=("resne*", "wide_resnet*"))
    return names


def build_resnet(name: str, norm: str, stem: Stem, num_classes: int = 1000) -> ResNet:
    """Build a ResNet with random weights."""
    model: ResNet = get_model(name, weights=None, num_classes=num_classes, norm_layer=_NORMS[norm])
    if stem == "small":
        conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        # As torchvision starts all convolutions of a ResNet.
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = conv1
        model.maxpool = nn.Identity()
    return model


def resnet_pyramid(model: ResNet, stages: list[int], width: int) -> BackboneWithFPN:
    """Put a feature pyramid on some stages of a ResNet."""
    # Each stage doubles the channels; layer4 ends at fc's.
    channels = [model.fc.in_features // 2 ** (4 - stage) for stage in stages]
    names = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(model, names, channels, width)
