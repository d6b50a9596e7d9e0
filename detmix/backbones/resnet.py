"""Torchvision's ResNets with a choice of normalization and of the first layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["Stem", "build_resnet", "check_choice", "resnet_names"]

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


def build_resnet(name: str, *, norm: str, stem: Stem, num_classes: int = 1000) -> ResNet:
    """Build a ResNet with random weights.

    Args:
        name: One of `resnet_names`.
        norm: ``"frozen"``, ``"batch"`` or ``"sync"`` batch norm, or ``"group"`` norm with 32
            groups (arXiv 1803.08494).
        stem: ``"standard"``: 7×7 convolution with stride 2 and max-pooling; the four stages then
            have strides 4 to 32. ``"small"``: 3×3 convolution with stride 1 and no pooling, as
            is usual for images of 32 or 64 pixels; strides 1 to 8.
        num_classes: Outputs of the classifier head, ``fc``.

    Returns:
        The network, in training mode.
    """
    model: ResNet = get_model(name, weights=None, num_classes=num_classes, norm_layer=_NORMS[norm])
    if stem == "small":
        conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        # As torchvision starts all convolutions of a ResNet.
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = conv1
        model.maxpool = nn.Identity()
    return model


def check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a setting has one of the values there are.

    Raises:
        ValueError: Naming the setting, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{setting} must be one of {', '.join(choices)}, got {value!r}")
