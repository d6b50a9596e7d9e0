"""Building a Faster R-CNN from a config: a new one, on a pretrained backbone, or a trained one.

With the defaults it is torchvision's own ``fasterrcnn_resnet50_fpn``, key for key; narrower
pyramids, fewer levels and smaller heads make detectors that train on a CPU.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from detmix.detectors.backbone import BackboneConfig, build_backbone_with_report
from detmix.detectors.detector_weights import (
    find_detector_weights,
    load_detector_weights,
    named_epsilon,
    norm_epsilon,
    set_norm_epsilon,
)
from detmix.detectors.weight_matching import LoadReport

__all__ = ["DetectorConfig", "build_detector"]

_POOL_SIZE = 7

_log = logging.getLogger(__name__)


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
            ``rpn_post_nms_top_n_train`` or ``box_score_thresh``. ``image_mean`` and ``image_std``
            are those of the pretrained weights, or ImageNet's without any, unless given here.
        weights: A whole detector to start from: ``"COCO_V1"``, torchvision's of a ResNet-50, or a
            file: a checkpoint of ``tools/train.py`` or a state dict of torchvision's Faster
            R-CNN. All of it is taken but the head, which is new for the classes of the data set.
            None for a new detector, on a backbone that may be pretrained.
    """

    min_size: int = 800
    max_size: int = 1333
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    roi_sampling_ratio: int = 2
    head_dim: int = 1024
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("min_size", "max_size", "roi_sampling_ratio", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"detector.{name} must be positive, got {getattr(self, name)}")
        for name in ("anchor_sizes", "aspect_ratios"):
            values = getattr(self, name)
            if not values or not all(value > 0 for value in values):
                raise ValueError(f"detector.{name} must be positive numbers, got {values}")
        for name in ("image_mean", "image_std"):
            value = self.options.get(name)
            if value is not None and not _are_three_numbers(value):
                raise ValueError(f"detector.options.{name} must be three numbers, got {value!r}")
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


def _are_three_numbers(value: Any) -> bool:
    is_three = isinstance(value, (list, tuple)) and len(value) == 3
    return is_three and all(isinstance(number, (int, float)) for number in value)


def build_detector(
    detector: DetectorConfig,
    backbone: BackboneConfig,
    num_classes: int,
    *,
    load_weights: bool = True,
) -> FasterRCNN:
    """Build a Faster R-CNN with torchvision's plain losses.

    Pretrained weights bring the mean and deviation that images are normalised with. What was
    loaded is logged as one line.

    Args:
        detector: The detector above the backbone.
        backbone: The backbone.
        num_classes: K, the classes with background.
        load_weights: Whether to load pretrained weights; not when a checkpoint of the whole
            detector follows. Nothing is opened or downloaded then; what is no part of a state
            dict must be in the configuration: ``image_mean`` and ``image_std`` in
            ``detector.options`` unless they are ImageNet's, ``backbone.norm_eps`` unless the
            weights' name or torchvision decides.

    Returns:
        The detector, in training mode.

    Raises:
        FileNotFoundError: If the file of the weights is not there.
        ValueError: If there is not one anchor size for each pyramid level, both the backbone and
            the detector have weights, or the weights are unknown, broken or of another network.
        ConnectionError: If pretrained weights cannot be downloaded.
    """
    _check_pair(detector, backbone)
    pyramid, report = build_backbone_with_report(
        backbone,
        load_weights=load_weights,
        pretrained=backbone.weights is not None or detector.weights is not None,
    )
    model = _build_faster_rcnn(detector, pyramid, num_classes)
    if detector.weights is not None:
        set_norm_epsilon(model, named_epsilon(detector.weights))
        if load_weights:
            report = load_detector_weights(model, detector.weights, backbone.name)
            _log.info("%s", report)
    _set_epsilon(model, backbone.norm_eps, has_weights=report is not None)
    if report is not None:
        _set_statistics(model, report, detector.options)
    return model


def _set_epsilon(model: FasterRCNN, eps: float | None, *, has_weights: bool) -> None:
    """Have the configuration's epsilon of frozen batch norm, and say if the weights differ."""
    found = norm_epsilon(model)
    if has_weights and None not in (eps, found) and eps != found:
        _log.warning("backbone.norm_eps is %g, but the weights were trained with %g", eps, found)
    set_norm_epsilon(model, eps)


def _set_statistics(model: FasterRCNN, report: LoadReport, options: Mapping[str, Any]) -> None:
    """Normalise images as the weights want it, unless the options say otherwise."""
    for name, value in (("image_mean", report.mean), ("image_std", report.std)):
        if options.get(name) is None:
            setattr(model.transform, name, list(value))
        elif tuple(options[name]) != tuple(value):
            _log.warning(
                "detector.options.%s is %s, but the weights were trained with %s",
                name, list(options[name]), list(value),
            )  # fmt: skip


def _check_pair(detector: DetectorConfig, backbone: BackboneConfig) -> None:
    """Check what only the two configurations together can have wrong."""
    if len(detector.anchor_sizes) != len(backbone.levels) + 1:
        raise ValueError(
            f"detector.anchor_sizes must have {len(backbone.levels) + 1} entries, one for each "
            f"of backbone.levels {backbone.levels} and one for the coarser level added to them, "
            f"got {detector.anchor_sizes}"
        )
    if detector.weights is None:
        return
    if backbone.weights is not None:
        raise ValueError(
            "detector.weights brings a backbone of its own: give either detector.weights or "
            f"backbone.weights, got {detector.weights!r} and {backbone.weights!r}"
        )
    is_standard = backbone.name == "resnet50" and backbone.stem == "standard"
    if find_detector_weights(detector.weights) and (not is_standard or backbone.norm == "group"):
        raise ValueError(
            f"detector.weights={detector.weights} is for backbone.name=resnet50 with batch norm "
            f"and the standard stem, got name={backbone.name}, norm={backbone.norm}, "
            f"stem={backbone.stem}"
        )


def _build_faster_rcnn(
    detector: DetectorConfig, pyramid: BackboneWithFPN, num_classes: int
) -> FasterRCNN:
    num_levels = len(detector.anchor_sizes) - 1  # RoI align does without the coarsest
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
            [str(i) for i in range(num_levels)], _POOL_SIZE, detector.roi_sampling_ratio
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
