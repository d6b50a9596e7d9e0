"""Building a Faster R-CNN from a config: any torchvision ResNet under a feature pyramid.

With the defaults it is torchvision's own ``fasterrcnn_resnet50_fpn``, key for key; narrower
pyramids, fewer levels and smaller heads make detectors that train on a CPU.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torchvision import models
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

__all__ = ["BackboneConfig", "DetectorConfig", "build_backbone", "build_detector"]

Norm = Literal["auto", "frozen", "batch", "sync", "group"]

# ResNet's trainable parts from the last to the first, as torchvision counts trainable_layers.
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")
_GROUPS = 32
_POOL_SIZE = 7


@dataclass(frozen=True)
class BackboneConfig:
    """A ResNet under a feature pyramid network.

    Attributes:
        name: A torchvision ResNet, ResNeXt or wide ResNet, such as ``"resnet18"``.
        weights: Name of its torchvision weights, such as ``"IMAGENET1K_V2"``; None for a random
            start.
        norm: Normalization: ``"frozen"`` batch norm, live ``"batch"`` norm, ``"sync"`` batch
            norm over all processes or ``"group"`` norm (without weights only); ``"auto"`` is
            frozen with weights and live without, as in torchvision.
        trainable_layers: How many of the five parts, from the last, are trained; None for 3
            with weights and 5 without, as in torchvision.
        fpn_channels: Channels of every pyramid level.
        levels: Which of the ResNet's stages 1 to 4 (strides 4 to 32) the pyramid starts from;
            one coarser level is added to them.
    """

    name: str = "resnet50"
    weights: str | None = None
    norm: Norm = "auto"
    trainable_layers: int | None = None
    fpn_channels: int = 256
    levels: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        names = list_models(module=models, include=("resne*", "wide_resnet*"))
        if self.name not in names:
            raise ValueError(f"backbone.name must be one of {', '.join(names)}, got {self.name!r}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"backbone.norm must be one of {get_args(Norm)}, got {self.norm!r}")
        if self.norm == "group" and self.weights:
            raise ValueError(
                f"backbone.norm=group does not fit the batch norm of weights={self.weights!r}"
            )
        if self.trainable_layers is not None and not 0 <= self.trainable_layers <= len(_LAYERS):
            raise ValueError(
                f"backbone.trainable_layers must be in 0..5, got {self.trainable_layers}"
            )
        if self.fpn_channels < 1:
            raise ValueError(f"backbone.fpn_channels must be positive, got {self.fpn_channels}")
        stages = set(self.levels)
        if not stages or not stages <= {1, 2, 3, 4} or len(stages) < len(self.levels):
            raise ValueError(
                f"backbone.levels must be different stages out of 1..4, got {self.levels}"
            )


@dataclass(frozen=True)
class DetectorConfig:
    """The detector above the backbone.

    Attributes:
        min_size: What the shorter side of an image is resized to, in pixels.
        max_size: What the longer side must not exceed, in pixels.
        anchor_sizes: Side of the square anchor at each pyramid level, in pixels of the resized
            image: one more than the backbone has levels.
        aspect_ratios: Height over width of the anchors at every level.
        roi_sampling_ratio: Points per side that RoI align samples in each of the 7×7 bins of a
            proposal; a quarter of the work on a CPU with 1 instead of 2.
        head_dim: Width of the two fully connected layers of the box head.
        options: Further keyword arguments of torchvision's `FasterRCNN`, such as
            ``rpn_post_nms_top_n_train`` or ``box_score_thresh``.
    """

    min_size: int = 800
    max_size: int = 1333
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    roi_sampling_ratio: int = 2
    head_dim: int = 1024
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("min_size", "max_size", "roi_sampling_ratio", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"detector.{name} must be positive, got {getattr(self, name)}")
        for name in ("anchor_sizes", "aspect_ratios"):
            values = getattr(self, name)
            if not values or not all(value > 0 for value in values):
                raise ValueError(f"detector.{name} must be positive numbers, got {values}")
        known = inspect.signature(FasterRCNN.__init__).parameters
        # What the other fields set must not be set twice.
        taken = {"self", "backbone", "num_classes", "min_size", "max_size", "kwargs"}
        taken |= {"rpn_anchor_generator", "box_roi_pool", "box_head", "box_predictor"}
        for name in self.options:
            if name not in known or name in taken:
                raise ValueError(
                    f"detector.options.{name} is not an option of Faster R-CNN; there are "
                    f"{', '.join(sorted(known.keys() - taken))}"
                )


def build_detector(
    detector: DetectorConfig,
    backbone: BackboneConfig,
    num_classes: int,
    *,
    load_weights: bool = True,
) -> FasterRCNN:
    """Build a Faster R-CNN with torchvision's plain losses.

    Args:
        detector: The detector above the backbone.
        backbone: The backbone.
        num_classes: K, the classes with background.
        load_weights: Whether to load the backbone's pretrained weights; not when a checkpoint
            of the whole detector follows.

    Returns:
        The detector, in training mode.

    Raises:
        ValueError: If there is not one anchor size for each pyramid level, or a weight name is
            unknown.
        ConnectionError: If pretrained weights cannot be downloaded.
    """
    if len(detector.anchor_sizes) != len(backbone.levels) + 1:
        raise ValueError(
            f"detector.anchor_sizes must have {len(backbone.levels) + 1} entries, one for each "
            f"of backbone.levels {backbone.levels} and one for the coarser level added to them, "
            f"got {detector.anchor_sizes}"
        )
    pyramid = build_backbone(backbone, load_weights=load_weights)
    features = pyramid.out_channels * _POOL_SIZE**2
    model = FasterRCNN(
        pyramid,
        min_size=detector.min_size,
        max_size=detector.max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in detector.anchor_sizes),
            (tuple(detector.aspect_ratios),) * len(detector.anchor_sizes),
        ),
        box_roi_pool=MultiScaleRoIAlign(
            [str(i) for i in range(len(backbone.levels))], _POOL_SIZE, detector.roi_sampling_ratio
        ),
        box_head=TwoMLPHead(features, detector.head_dim),
        box_predictor=FastRCNNPredictor(detector.head_dim, num_classes),
        **detector.options,
    )
    for head in (model.rpn.head, model.roi_heads.box_predictor):
        head.register_forward_hook(_to_float32)
    return model


def _to_float32(module: nn.Module, inputs: Any, outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Let boxes be decoded in float32: bfloat16 has whole pixels from 128 on."""
    first, second = (
        [level.float() for level in output] if isinstance(output, list) else output.float()
        for output in outputs
    )
    return first, second


def build_backbone(config: BackboneConfig, *, load_weights: bool = True) -> BackboneWithFPN:
    """Build a ResNet with a feature pyramid on top.

    Args:
        config: The backbone.
        load_weights: Whether to load its pretrained weights.

    Returns:
        A module from images to feature maps by level name, with ``out_channels``.

    Raises:
        ValueError: If the weight name is unknown.
        ConnectionError: If the weights cannot be downloaded.
    """
    body = _build_resnet(config, load_weights)
    trainable = config.trainable_layers
    if trainable is None:
        trainable = 3 if config.weights else len(_LAYERS)
    if trainable < len(_LAYERS):
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name.startswith(_LAYERS[:trainable]))
    stages = sorted(config.levels)
    # Each stage of a ResNet doubles the channels; layer4 ends at fc's.
    channels = [body.fc.in_features // 2 ** (4 - stage) for stage in stages]
    names = {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(body, names, channels, config.fpn_channels)


def _build_resnet(config: BackboneConfig, load_weights: bool) -> ResNet:
    norm = config.norm
    if norm == "auto":
        norm = "frozen" if config.weights else "batch"
    layers = {
        "frozen": FrozenBatchNorm2d,
        "batch": nn.BatchNorm2d,
        "sync": nn.SyncBatchNorm,
        "group": partial(nn.GroupNorm, _GROUPS),
    }
    weights = None
    if config.weights and load_weights:
        enum = get_model_weights(config.name)
        known = list(enum.__members__)
        # Both IMAGENET1K_V1 and ResNet50_Weights.IMAGENET1K_V1 are in use.
        name = config.weights.removeprefix(f"{enum.__name__}.")
        if name not in known:
            raise ValueError(
                f"backbone.weights of {config.name} must be one of {', '.join(known)}, "
                f"got {config.weights!r}"
            )
        weights = enum[name]
    try:
        model: ResNet = get_model(config.name, weights=weights, norm_layer=layers[norm])
    except OSError as error:  # URLError and whatever else a broken connection gives
        raise ConnectionError(
            f"cannot load {weights} of {config.name} ({error}); put the file into "
            "torch's hub folder (torch.hub.get_dir()/checkpoints) by hand, or set "
            "backbone.weights=null to start from scratch"
        ) from error
    return model
