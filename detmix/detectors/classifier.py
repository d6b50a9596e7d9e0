"""Building a classifier from a config, to pretrain a detector's backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from detmix.backbones.resnet import Stem, build_resnet, check_choice, resnet_names
from detmix.backbones.timm import TIMM_PREFIX, create_timm_model, sync_batch_norm

__all__ = ["ClassifierConfig", "build_classifier"]

ClassifierNorm = Literal["batch", "sync", "group"]


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
