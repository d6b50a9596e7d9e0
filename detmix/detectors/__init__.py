"""Torchvision detectors with a weight for every object's loss, and building them."""

from detmix.detectors.attach import weight_losses
from detmix.detectors.backbone import BackboneConfig, build_backbone
from detmix.detectors.backbone_weights import load_backbone_weights
from detmix.detectors.build import DetectorConfig, build_detector
from detmix.detectors.classifier import ClassifierConfig, build_classifier
from detmix.detectors.detector_names import takes_backbone, target_keys
from detmix.detectors.weight_matching import LoadReport
from detmix.detectors.weighting import LossWeighting

__all__ = [
    "BackboneConfig",
    "ClassifierConfig",
    "DetectorConfig",
    "LoadReport",
    "LossWeighting",
    "build_backbone",
    "build_classifier",
    "build_detector",
    "load_backbone_weights",
    "takes_backbone",
    "target_keys",
    "weight_losses",
]
