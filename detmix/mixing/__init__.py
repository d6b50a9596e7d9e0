"""Mixing pairs of detection samples, each object weighted by what is left of it."""

from detmix.mixing.detection_cutmix import Cut, DetectionCutMix, cutmix
from detmix.mixing.detection_mixup import DetectionMixUp, blend, mixup
from detmix.mixing.join import union
from detmix.mixing.mixer import DetectionMixer, MixedDataset, MixParams, RandomChoice
from detmix.mixing.seeding import SharedEpoch, sample_seed, set_epoch
from detmix.mixing.target import Sample, Target, box_weights

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
    "set_epoch",
    "union",
]
