"""Training detectors: configurations, the loop, checkpoints, evaluation of what was trained."""

from detmix.training.checkpoint import load_checkpoint, save_checkpoint
from detmix.training.config import (
    AugmentConfig,
    DataConfig,
    MixingConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from detmix.training.detector import DetectorTrainer
from detmix.training.inference import evaluate, load_detector, predict
from detmix.training.interrupt import Interrupted
from detmix.training.loop import NonFiniteLossError
from detmix.training.parsing import parse_args

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "DetectorTrainer",
    "Interrupted",
    "MixingConfig",
    "NonFiniteLossError",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
    "evaluate",
    "load_checkpoint",
    "load_detector",
    "parse_args",
    "predict",
    "save_checkpoint",
]
