"""Building torchvision's detectors from a configuration."""

from detmix.detectors.build import build_backbone, build_classifier, build_detector
from detmix.detectors.config import (
    BackboneConfig,
    ClassifierConfig,
    DetectorConfig,
    takes_backbone,
    target_keys,
)
from detmix.pretrained.match_state import LoadReport, load_backbone_weights

__all__ = [
    "BackboneConfig",
    "ClassifierConfig",
    "DetectorConfig",
    "LoadReport",
    "build_backbone",
    "build_classifier",
    "build_detector",
    "load_backbone_weights",
    "takes_backbone",
    "target_keys",
]
