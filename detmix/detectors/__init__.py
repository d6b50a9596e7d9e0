"""Building torchvision's detectors from a configuration."""

from detmix.detectors.backbone_weights import load_backbone_weights
from detmix.detectors.build import DetectorConfig, build_detector
from detmix.detectors.classifier import ClassifierConfig, build_classifier
from detmix.detectors.names import takes_backbone, target_keys
from detmix.detectors.pyramid import BackboneConfig, build_backbone
from detmix.pretrained.match_state import LoadReport

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
