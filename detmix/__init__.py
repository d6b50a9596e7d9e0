"""Mixup that really works for object detection: every box weighted by its blend ratio."""

from importlib.metadata import version

from detmix.losses import unweight_losses, weight_losses
from detmix.mixing import (
    DetectionCutMix,
    DetectionMixUp,
    MixedDataset,
    RandomChoice,
    cutmix,
    mixup,
    set_epoch,
)

__all__ = [
    "DetectionCutMix",
    "DetectionMixUp",
    "MixedDataset",
    "RandomChoice",
    "__version__",
    "cutmix",
    "mixup",
    "set_epoch",
    "unweight_losses",
    "weight_losses",
]

__version__ = version("detmix")
