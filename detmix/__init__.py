"""Mixup that really works for object detection: every box weighted by its blend ratio."""

from importlib.metadata import version

from detmix.detectors import weight_losses
from detmix.mixing import DetectionMixUp, MixedDataset, mixup

__all__ = ["DetectionMixUp", "MixedDataset", "__version__", "mixup", "weight_losses"]

__version__ = version("detmix")
