"""Torchvision detectors with a weight for every object's loss, and building them."""

from detmix.detectors.attach import weight_losses
from detmix.detectors.build import BackboneConfig, DetectorConfig, build_backbone, build_detector
from detmix.detectors.weighting import LossWeighting

__all__ = [
    "BackboneConfig",
    "DetectorConfig",
    "LossWeighting",
    "build_backbone",
    "build_detector",
    "weight_losses",
]
