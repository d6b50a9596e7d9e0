"""Torchvision detectors with a weight for every object's loss."""

from detmix.detectors.weight_losses import weight_losses
from detmix.detectors.weighting import LossWeighting

__all__ = ["LossWeighting", "weight_losses"]
