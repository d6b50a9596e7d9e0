"""Mixup that really works for object detection: every box weighted by its blend ratio."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from detmix.training import Detector

__all__ = [
    "DetectionCutMix",
    "DetectionMixUp",
    "MixedDataset",
    "RandomChoice",
    "__version__",
    "cutmix",
    "load",
    "mixup",
    "set_epoch",
    "unweight_losses",
    "weight_losses",
]

__version__ = version("detmix")


def load(source: str | Path, device: str | torch.device | None = None) -> Detector:
    """Load a trained detector to predict with; all is as `detmix.training.load` has it."""
    from detmix.training import load as load_it  # heavy, and mixing needs none of it

    return load_it(source, device)
