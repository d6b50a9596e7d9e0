"""Mixing pairs of detection samples, each object weighted by what is left of it."""

from detmix.mixing.dataset import MixedDataset
from detmix.mixing.detection_cutmix import Cut, DetectionCutMix, cutmix
from detmix.mixing.detection_mixup import DetectionMixUp, mixup
from detmix.mixing.epoch import SharedEpoch
from detmix.mixing.joining import union
from detmix.mixing.mixer import DetectionMixer, MixParams, Sample
from detmix.mixing.pixels import blend
from detmix.mixing.random_choice import RandomChoice
from detmix.mixing.seeding import sample_seed
from detmix.mixing.target import Target, box_weights

__all__ = [
    "Cut",
    "DetectionCutMix",
    "DetectionMixUp",
    "DetectionMixer",
    "MixParams",
    "MixedDataset",
    "RandomChoice",
    "Sample",
    "SharedEpoch",
    "Target",
    "blend",
    "box_weights",
    "cutmix",
    "mixup",
    "sample_seed",
    "union",
]
