"""Mixing pairs of detection samples, each object weighted by what is left of it."""

from detmix.mixing.dataset import MixedDataset
from detmix.mixing.epoch import SharedEpoch
from detmix.mixing.ground_truth import Target, box_weights, union
from detmix.mixing.mixer import DetectionMixer, MixParams, Sample
from detmix.mixing.mixup_transform import DetectionMixUp, mixup
from detmix.mixing.pixels import blend
from detmix.mixing.seeding import sample_seed

__all__ = [
    "DetectionMixUp",
    "DetectionMixer",
    "MixParams",
    "MixedDataset",
    "Sample",
    "SharedEpoch",
    "Target",
    "blend",
    "box_weights",
    "mixup",
    "sample_seed",
    "union",
]
