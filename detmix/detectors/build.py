"""Building a detector from a config: a new one, on a pretrained backbone, or a trained one.

With the defaults it is torchvision's own ``fasterrcnn_resnet50_fpn``, key for key; narrower
pyramids, fewer levels and smaller heads make detectors that train on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision.models import WeightsEnum, get_model_weights

from detmix.detectors.config import STATISTICS, DetectorConfig
from detmix.detectors.families import build_family, check_family
from detmix.detectors.half_precision import keep_boxes_in_float32
from detmix.detectors.names import builder_names, detector_class, takes_backbone
from detmix.detectors.new_head import (
    detector_weights,
    find_detector_weights,
    load_detector_weights,
    named_epsilon,
)
from detmix.detectors.pyramid import (
    BackboneConfig,
    build_backbone_with_report,
    norm_epsilon,
    set_norm_epsilon,
)
from detmix.detectors.torchvision_builder import build_by_name, check_builder
from detmix.pretrained.match_state import LoadReport
from detmix.pretrained.sources import find_named

_log = logging.getLogger(__name__)


def build_detector(
    detector: DetectorConfig,
    backbone: BackboneConfig,
    num_classes: int,
    *,
    num_keypoints: int = 17,
    load_weights: bool = True,
) -> nn.Module:
    """Build a detector with torchvision's plain losses.

    Pretrained weights bring the mean and deviation that images are normalised with. What was
    loaded is logged as one line. Under autocast, boxes are decoded in float32.

    Args:
        detector: The detector above the backbone, or with a backbone of its own.
        backbone: The backbone.
        num_classes: K, the classes with background.
        num_keypoints: Keypoints of each object, for Keypoint R-CNN; 17 in COCO.
        load_weights: Whether to load pretrained weights; not when a checkpoint of the whole
            detector follows. Nothing is opened or downloaded then; what is no part of a state
            dict must be in the configuration: ``image_mean`` and ``image_std`` in
            ``detector.options`` unless they are torchvision's, and ``backbone.norm_eps`` unless
            the weights' name or torchvision decides.

    Returns:
        One of torchvision's detectors, in training mode.

    Raises:
        FileNotFoundError: If the file of the weights is not there.
        ValueError: If the two configurations do not fit each other (such as a number of anchor
            sizes that is not that of the pyramid's levels, or a field that must be at its default
            for a detector with a backbone of its own), both have weights, or the weights are
            unknown, broken or of another network.
        ConnectionError: If pretrained weights cannot be downloaded.
    """
    _check_weights(detector, backbone)
    name = detector.name
    if takes_backbone(name):
        check_family(detector, backbone)
        pyramid, report = build_backbone_with_report(
            backbone,
            load_weights=load_weights,
            pretrained=backbone.weights is not None or detector.weights is not None,
        )
        model = build_family(detector, backbone, pyramid, num_classes, num_keypoints)
        model_name = f"{_FAMILY_NAMES[name]} on {backbone.name}"
    else:
        check_builder(detector, backbone)
        model, report = build_by_name(
            detector, backbone, num_classes, num_keypoints, load_weights=load_weights
        )
        model_name = name
    keep_boxes_in_float32(model)
    if detector.weights is not None:
        set_norm_epsilon(model, named_epsilon(detector.weights, name))
        if load_weights:
            report = load_detector_weights(model, detector.weights, name, model_name)
            _log.info("%s", report)
    _set_epsilon(model, backbone.norm_eps, has_weights=report is not None)
    _set_statistics(model, report, detector.options)
    return model


_FAMILY_NAMES = {
    "fasterrcnn": "Faster R-CNN",
    "maskrcnn": "Mask R-CNN",
    "keypointrcnn": "Keypoint R-CNN",
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
}


def _set_epsilon(model: nn.Module, eps: float | None, *, has_weights: bool) -> None:
    """Have the configuration's epsilon of frozen batch norm, and say if the weights differ."""
    found = norm_epsilon(model)
    if has_weights and None not in (eps, found) and eps != found:
        _log.warning("backbone.norm_eps is %g, but the weights were trained with %g", eps, found)
    set_norm_epsilon(model, eps)


def _set_statistics(model: Any, report: LoadReport | None, options: Mapping[str, Any]) -> None:
    """Normalise images as the options say, else as the weights want it."""
    wanted = (report.mean, report.std) if report else (None, None)
    for name, expected in zip(STATISTICS, wanted, strict=True):
        given = options.get(name)
        if given is not None and expected is not None and tuple(given) != tuple(expected):
            _log.warning(
                "detector.options.%s is %s, but the weights were trained with %s",
                name, list(given), list(expected),
            )  # fmt: skip
        value = expected if given is None else given
        if value is not None:
            setattr(model.transform, name, list(value))


def _check_weights(detector: DetectorConfig, backbone: BackboneConfig) -> None:
    """Check that the weights of a whole detector have no rival and fit the backbone by name."""
    if detector.weights is None:
        return
    if backbone.weights is not None:
        raise ValueError(
            "detector.weights brings a backbone of its own: give either detector.weights or "
            f"backbone.weights, got {detector.weights!r} and {backbone.weights!r}"
        )
    if not takes_backbone(detector.name):
        return
    is_standard = backbone.name == "resnet50" and backbone.stem == "standard"
    named = find_detector_weights(detector.weights, detector.name)
    if named and (not is_standard or backbone.norm == "group"):
        raise ValueError(
            f"detector.weights={detector.weights} is for backbone.name=resnet50 with batch norm "
            f"and the standard stem, got name={backbone.name}, norm={backbone.norm}, "
            f"stem={backbone.stem}"
        )
    if not detector_weights(detector.name):
        _refuse_names(detector.weights, detector.name)


def _refuse_names(source: str, family: str) -> None:
    """Refuse the name of weights for a family that is built otherwise than torchvision's."""
    builders = [name for name in builder_names() if detector_class(name) is detector_class(family)]
    known: list[WeightsEnum] = [member for name in builders for member in get_model_weights(name)]
    if find_named(source, known):
        raise ValueError(
            f"detector.weights of {family} must be a file, got {source!r}: torchvision's weights "
            f"are for detector.name={' or '.join(builders)}, whose pyramid is another"
        )
