"""Building networks from their configurations: detectors, backbones and classifiers.

With the defaults a detector is torchvision's own ``fasterrcnn_resnet50_fpn``, key for key; narrower
pyramids, fewer levels and smaller heads make detectors that train on a CPU.

Torchvision's builders download what they are asked to start from. `_stand_in` lets them build the
same architecture (frozen norm, frozen layers) from tensors at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from detmix.backbones.resnet import build_resnet, resnet_pyramid
from detmix.backbones.timm import TIMM_PREFIX, create_timm_model, last_stages, timm_pyramid
from detmix.detectors.config import BackboneConfig, ClassifierConfig, DetectorConfig
from detmix.detectors.half_precision import keep_boxes_in_float32
from detmix.detectors.spec import DetectorSpec, backbone_source, resolve
from detmix.pretrained.match_state import LoadReport, load_classifier, load_detector
from detmix.pretrained.read_state import STATISTICS, Source, read_source

_HEAD_DIM = 1024
_SAMPLING_RATIO = 2
_BOX_POOL, _ROI_POOL = 7, 14  # bins per side of a proposal: for its box, for masks and keypoints
_NUM_MASK_CONVS, _NUM_KEYPOINT_CONVS = 4, 8
# A ResNet's trainable parts from the last to the first, as torchvision counts trainable_layers;
# other networks have as many, a stem and the stages up to the strides 4 to 32.
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")
_PRETRAINED_LAYERS = 3

_log = logging.getLogger(__name__)


def build_detector(
    detector: DetectorConfig,
    backbone: BackboneConfig,
    num_classes: int,
    *,
    num_keypoints: int = 17,
    load_weights: bool = True,
) -> nn.Module:
    """Build a detector of torchvision, with its plain losses, in training mode.

    Pretrained weights bring the mean and deviation that images are normalised with. What was
    loaded is logged as one line. Under autocast, boxes are decoded in float32.

    Args:
        detector: The detector above the backbone, or with a backbone of its own.
        backbone: The backbone.
        num_classes: The classes with background.
        num_keypoints: Keypoints of each object, for Keypoint R-CNN; 17 in COCO.
        load_weights: Whether to load pretrained weights. Without, as when a checkpoint follows,
            nothing is opened or downloaded: a mean, deviation or epsilon that only the weights
            tell must be in the configuration, or be set afterwards.

    Raises:
        FileNotFoundError: If the file of the weights is not there.
        ValueError: If the two configurations do not fit each other or both have weights, or the
            weights are unknown, broken or of another network.
        ConnectionError: If pretrained weights cannot be downloaded.
    """
    spec = resolve(detector, backbone)
    loads_body = load_weights and not spec.starts_whole
    if spec.kind.is_family:
        pyramid, report = _build_pyramid(backbone, spec.source, loads_body)
        model = _build_family(spec, pyramid, num_classes, num_keypoints)
    else:
        model, report = _build_by_name(spec, num_classes, num_keypoints, loads_body)
    if spec.source is not None and spec.starts_whole and load_weights:
        title = f"{detector.name} on {backbone.name}" if spec.kind.is_family else detector.name
        report = load_detector(model, spec.source, title, num_classes)
    keep_boxes_in_float32(model)
    set_normalization(model, {"norm_eps": spec.source_eps})
    configured = configured_normalization(detector, backbone)
    if report is not None:
        trained = {"image_mean": report.mean, "image_std": report.std, "norm_eps": report.norm_eps}
        set_normalization(model, trained)
        _warn_of_other(configured, {**normalization(model), **dict.fromkeys(report.assumed)})
    set_normalization(model, configured)
    return model


def _build_family(
    spec: DetectorSpec, pyramid: BackboneWithFPN, num_classes: int, num_keypoints: int
) -> nn.Module:
    """Build a detector of one of the families above a pyramid."""
    width, arguments = pyramid.out_channels, {**spec.anchors, **spec.arguments}
    if not issubclass(spec.kind.cls, FasterRCNN):
        return spec.kind.cls(pyramid, num_classes, **arguments)
    # RoI align does without the coarsest level.
    names = [str(level) for level in range(len(spec.backbone.levels))]
    ratio = spec.detector.roi_sampling_ratio or _SAMPLING_RATIO
    head_dim = spec.detector.head_dim or _HEAD_DIM
    parts = {
        "box_roi_pool": MultiScaleRoIAlign(names, _BOX_POOL, ratio),
        "box_head": TwoMLPHead(width * _BOX_POOL**2, head_dim),
        "box_predictor": FastRCNNPredictor(head_dim, num_classes),
    }
    pool = MultiScaleRoIAlign(names, _ROI_POOL, ratio)
    if spec.kind.cls is MaskRCNN:
        head = MaskRCNNHeads(width, (width,) * _NUM_MASK_CONVS, dilation=1)
        predictor = MaskRCNNPredictor(width, width, num_classes)
        parts |= {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
    elif spec.kind.cls is KeypointRCNN:
        head = KeypointRCNNHeads(width, (2 * width,) * _NUM_KEYPOINT_CONVS)
        predictor = KeypointRCNNPredictor(2 * width, num_keypoints)
        parts |= {"keypoint_roi_pool": pool, "keypoint_head": head, "keypoint_predictor": predictor}
    return spec.kind.cls(pyramid, **parts, **arguments)


def _stand_in(member: WeightsEnum, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Any:
    """Return what passes for one of torchvision's weights, and gives a builder tensors at hand."""
    weights: Any = object.__new__(type(member))
    weights._value_ = replace(member.value, meta=meta)
    weights.get_state_dict = lambda *_, **__: state
    return weights


def _build_by_name(
    spec: DetectorSpec, num_classes: int, num_keypoints: int, loads_body: bool
) -> tuple[nn.Module, LoadReport | None]:
    """Build a detector as torchvision's builder of that name does, and tell what was loaded."""
    kind, source = spec.kind, spec.source
    arguments = {**spec.arguments, "num_classes": num_classes}
    if kind.cls is KeypointRCNN:
        arguments["num_keypoints"] = num_keypoints
    if not kind.sets_anchors:
        arguments |= spec.anchors
    start: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if source is not None and spec.starts_whole:
        state = get_model(kind.name, **start, **arguments).state_dict()
        # The builder asks for the number of both, to check those it was given.
        meta = {"categories": range(num_classes), "keypoint_names": range(num_keypoints)}
        start["weights"] = _stand_in(kind.weights[0], state, meta)
    elif source is not None:
        if loads_body and kind.network != "resnet50":
            state = read_source(source).state
            _log.info("%s: all of %s loaded", source.what, kind.network)
        else:
            state = get_model(kind.network, weights=None).state_dict()
        member = kind.backbone_weights[0]
        start["weights_backbone"] = _stand_in(member, state, member.meta)
    if source is not None:  # torchvision warns of it without any
        arguments["trainable_backbone_layers"] = spec.backbone.trainable_layers
    model: Any = get_model(kind.name, **start, **arguments)
    if kind.sets_anchors:
        for generator in spec.anchors.values():
            getattr(model, "rpn", model).anchor_generator = generator
    report = None
    if source is not None and loads_body and kind.network == "resnet50":
        report = load_classifier(model.backbone.body, source, kind.network, "standard")
    return model, report


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
    return _build_network(config, "model.name", config.norm, num_classes)


def _build_network(
    config: ClassifierConfig | BackboneConfig, setting: str, norm: str, num_classes: int | None
) -> nn.Module:
    """Build a classifier of either library with random weights, by default for its own classes."""
    if config.name.startswith(TIMM_PREFIX):
        return create_timm_model(config.name, setting, norm, num_classes)
    resnet: nn.Module = build_resnet(config.name, norm, config.stem, num_classes or 1000)
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
    return _build_pyramid(config, backbone_source(config), load_weights)[0]


def _build_pyramid(
    config: BackboneConfig, source: Source | None, loads: bool
) -> tuple[BackboneWithFPN, LoadReport | None]:
    """Build a backbone, frozen as a pretrained one is or not, and tell what was loaded."""
    norm = config.norm
    if norm == "auto":
        norm = "batch" if source is None else "frozen"
    network = _build_network(config, "backbone.name", norm, None)
    report = None
    if source is not None and loads:
        report = load_classifier(network, source, config.name, config.stem)
    # Before the stages that the pyramid does without are dropped: they count.
    _freeze(network, config, source is not None)
    stages = sorted(config.levels)
    if isinstance(network, ResNet):
        pyramid = resnet_pyramid(network, stages, config.fpn_channels)
    else:
        pyramid = timm_pyramid(network, config.name, stages, config.fpn_channels)
    set_normalization(pyramid, {"norm_eps": config.norm_eps})
    return pyramid, report


def _freeze(network: nn.Module, config: BackboneConfig, pretrained: bool) -> None:
    """Freeze all but the trained layers of a classifier under a pyramid."""
    parts = {name.partition(".")[0] for name, _ in network.named_parameters()}
    is_resnet = parts <= {*_LAYERS, "bn1", "fc"}
    trainable = config.trainable_layers
    if trainable is None:
        trainable = _PRETRAINED_LAYERS if pretrained and is_resnet else len(_LAYERS)
    if trainable > len(_LAYERS):
        raise ValueError(
            f"backbone.trainable_layers of {config.name} must be in 0..5, got {trainable}"
        )
    if trainable < len(_LAYERS):
        trained = _LAYERS[:trainable]
        if trained and not is_resnet:
            trained = last_stages(network, config.name, trainable)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(trained))


def normalization(model: Any) -> dict[str, Any]:
    """Return how a detector normalises images and features, of which its state holds nothing."""
    frozen = (module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d))
    statistics = {name: list(getattr(model.transform, name)) for name in STATISTICS}
    return {**statistics, "norm_eps": next(frozen, None)}


def configured_normalization(detector: DetectorConfig, backbone: BackboneConfig) -> dict[str, Any]:
    """Return what configurations say of it; what they leave open is None."""
    given = {name: detector.options.get(name) for name in STATISTICS}
    return {name: value and list(value) for name, value in given.items()} | {
        "norm_eps": backbone.norm_eps
    }


def set_normalization(model: Any, wanted: Mapping[str, Any]) -> None:
    """Set how a detector, or a part of one, normalises, in place; None leaves it as it is."""
    for name in STATISTICS:
        if wanted.get(name) is not None:
            setattr(model.transform, name, list(wanted[name]))
    for module in model.modules() if wanted.get("norm_eps") is not None else ():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = wanted["norm_eps"]


def _warn_of_other(configured: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Warn where a configuration normalises otherwise than the weights were trained with."""
    for name, given in configured.items():
        if None not in (given, trained[name]) and given != trained[name]:
            setting = f"{'detector.options' if name in STATISTICS else 'backbone'}.{name}"
            told = "%s is %s, but the weights were trained with %s"
            _log.warning(told, setting, given, trained[name])
