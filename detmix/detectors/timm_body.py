"""A classifier of timm as the body under a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

__all__ = ["FeatureBackboneWithFPN", "TimmBody", "check_timm_body"]


class TimmBody(nn.Module):
    """The features of a timm classifier at some strides; what comes after them is dropped.

    Args:
        model: The classifier, which is changed.
        levels: The stages k to return, ascending; the features of stride 2 to the k+1.

    Attributes:
        channels: Channels of each returned feature map.
    """

    def __init__(self, model: Any, levels: list[int]) -> None:
        super().__init__()
        stages = _stages(model)
        indices = [_last_of_stride(stages, 2 ** (level + 1)) for level in levels]
        self.channels = [stages[index]["num_chs"] for index in indices]
        self.indices = model.prune_intermediate_layers(indices, prune_norm=True)
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return feature maps (B, C, H', W') by name, ``"0"`` for the finest."""
        features = self.model.forward_intermediates(
            images, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return OrderedDict((str(i), feature) for i, feature in enumerate(features))


class FeatureBackboneWithFPN(BackboneWithFPN):  # type: ignore[misc]
    """Torchvision's backbone with a pyramid, on a body that returns its features by itself.

    Args:
        body: From images to feature maps by name.
        channels: Channels of each feature map.
        out_channels: Channels of every pyramid level.
    """

    def __init__(self, body: nn.Module, channels: list[int], out_channels: int) -> None:
        # Not torchvision's own constructor: it would take the body apart layer by layer.
        nn.Module.__init__(self)
        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels


def check_timm_body(model: Any, name: str, levels: list[int]) -> None:
    """Check that a classifier of timm can give a pyramid its features.

    Raises:
        ValueError: If it takes images of one size only, gives no features, or none of a stride.
    """
    if model.pretrained_cfg.get("fixed_input_size"):
        raise ValueError(
            f"backbone.name={name} takes images of one size only, and a detector's differ; "
            "choose a convolutional network"
        )
    needed = ("forward_intermediates", "prune_intermediate_layers", "feature_info")
    if not all(hasattr(model, attribute) for attribute in needed):
        raise ValueError(f"backbone.name={name} gives no intermediate features in timm")
    strides = sorted({stage["reduction"] for stage in _stages(model)})
    for level in levels:
        if 2 ** (level + 1) not in strides:
            raise ValueError(
                f"backbone.levels: {name} has no features of stride {2 ** (level + 1)} for level "
                f"{level}, only of {', '.join(map(str, strides))}"
            )


def _stages(model: Any) -> list[dict[str, Any]]:
    """Return timm's description of each stage: ``reduction`` and ``num_chs``."""
    info = model.feature_info
    return list(info.get_dicts() if hasattr(info, "get_dicts") else info)


def _last_of_stride(stages: list[dict[str, Any]], stride: int) -> int:
    return max(index for index, stage in enumerate(stages) if stage["reduction"] == stride)
