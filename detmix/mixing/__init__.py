"""Mixing pairs of detection samples, each object weighted by what is left of it."""

from detmix.mixing.cutmix_transform import Cut, DetectionCutMix, cutmix
from detmix.mixing.dataset import MixedDataset
from detmix.mixing.epoch import SharedEpoch
from detmix.mixing.ground_truth import Target, box_weights
from detmix.mixing.joining import union
from detmix.mixing.mixer import DetectionMixer, MixParams, Sample
from detmix.mixing.mixup_transform import DetectionMixUp, mixup
from detmix.mixing.pixels import blend
from detmix.mixing.random_choice import RandomChoice
from detmix.mixing.seeding import sample_seed

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
