"""Building a detector from a config: a new one, on a pretrained backbone, or a trained one.

With the defaults it is torchvision's own ``fasterrcnn_resnet50_fpn``, key for key; narrower
pyramids, fewer levels and smaller heads make detectors that train on a CPU.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from detmix.detectors.config import BackboneConfig, DetectorConfig
from detmix.detectors.construct import build_by_name, build_family, keep_boxes_in_float32
from detmix.detectors.pyramid import build_pyramid, norm_epsilon, set_norm_epsilon
from detmix.detectors.spec import resolve
from detmix.pretrained.match_state import LoadReport, load_matching
from detmix.pretrained.read_state import STATISTICS
from detmix.pretrained.sources import Source, read_source

# What depends on the classes: SSDlite has a convolution of each channel before that into them.
_CLASS_HEAD = re.compile(
    r"roi_heads\.(box_predictor|mask_predictor\.mask_fcn_logits)\."
    r"|head\.classification_head\.(cls_logits|module_list\.\d+(\.1)?)\.(weight|bias)$"
)
_KEYPOINT_HEAD = "roi_heads.keypoint_predictor"
_KEYPOINTS = f"{_KEYPOINT_HEAD}.kps_score_lowres.bias"
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
    if spec.kind.is_family:
        start = spec.backbone_source if load_weights else None
        pyramid, report = build_pyramid(backbone, start, pretrained=spec.is_pretrained)
        model = build_family(spec, pyramid, num_classes, num_keypoints)
    else:
        model, report = build_by_name(spec, num_classes, num_keypoints, load_weights=load_weights)
    keep_boxes_in_float32(model)
    if spec.source is not None and load_weights:
        report = _load_detector(model, spec.source, spec.title, num_classes)
    trained: dict[str, Any] = {"norm_eps": spec.source_eps}
    if report is not None:
        trained |= {"image_mean": report.mean, "image_std": report.std}
        trained |= {} if report.norm_eps is None else {"norm_eps": report.norm_eps}
    set_normalization(model, detector, backbone, trained)
    return model


def _load_detector(model: Any, source: Source, title: str, num_classes: int) -> LoadReport:
    """Load a trained detector into another, all but what depends on the classes."""
    transform = model.transform
    weights = read_source(source, tuple(transform.image_mean), tuple(transform.image_std))
    own, state = model.state_dict(), weights.state
    if not any(key.startswith("backbone.") for key in state):
        raise ValueError(
            f"{source.what} holds no detector: no key starts with 'backbone.'; for a "
            "classifier set backbone.weights instead"
        )
    head = [key for key in own if _CLASS_HEAD.match(key)]
    bias = next(key for key in head if key.endswith(".bias"))
    anchors = len(own[bias]) // num_classes
    before = state[bias].numel() // anchors if bias in state else "no"
    text = f"the head of {before} classes, which is new for {num_classes}, background included"
    if _KEYPOINTS in own and _KEYPOINTS in state:
        expected, found = len(own[_KEYPOINTS]), state[_KEYPOINTS].numel()
        if found != expected:
            head.append(_KEYPOINT_HEAD)
            text += f"; that of {found} keypoints, which is new for {expected}"
    return load_matching(model, weights, model=title, heads=head, head=text)


def set_normalization(
    model: Any, detector: DetectorConfig, backbone: BackboneConfig, trained: Mapping[str, Any]
) -> None:
    """Normalise as the configuration says, else as trained weights want it, else as it is."""
    for name in STATISTICS:
        chosen = _choose(name, detector.options.get(name), trained.get(name))
        if chosen is not None:
            setattr(model.transform, name, list(chosen))
    if norm_epsilon(model) is not None:
        set_norm_epsilon(model, _choose("norm_eps", backbone.norm_eps, trained.get("norm_eps")))


def _choose(name: str, given: Any, trained: Any) -> Any:
    if None not in (given, trained) and not np.array_equal(given, trained):
        _log.warning("%s is %s, but the weights were trained with %s", name, given, trained)
    return trained if given is None else given
