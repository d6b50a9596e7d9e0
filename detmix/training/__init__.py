"""Training detectors, and the classifiers they start from: configurations, loop, checkpoints."""

from detmix.training.checkpoint import load_checkpoint, save_checkpoint
from detmix.training.classifier import ClassificationResult, ClassifierTrainer
from detmix.training.config import (
    AugmentConfig,
    CocoConfig,
    DataConfig,
    ImageAugmentConfig,
    ImageDataConfig,
    ImageMixingConfig,
    MixingConfig,
    OptimConfig,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from detmix.training.detector import DetectorTrainer
from detmix.training.inference import load_detector, predict
from detmix.training.parse import parse_args
from detmix.training.prediction import Detections, Detector, load
from detmix.training.stopping import Interrupted, NonFiniteLossError

__all__ = [
    "AugmentConfig",
    "ClassificationResult",
    "ClassifierTrainer",
    "CocoConfig",
    "DataConfig",
    "Detections",
    "Detector",
    "DetectorTrainer",
    "ImageAugmentConfig",
    "ImageDataConfig",
    "ImageMixingConfig",
    "Interrupted",
    "MixingConfig",
    "NonFiniteLossError",
    "OptimConfig",
    "PretrainConfig",
    "ScheduleConfig",
    "TrainConfig",
    "load",
    "load_checkpoint",
    "load_detector",
    "parse_args",
    "predict",
    "save_checkpoint",
]
