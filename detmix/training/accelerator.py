"""The engine that runs a model on its device, alone or in several processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from detmix.training.config import LoopConfig

__all__ = ["make_accelerator"]


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Return the engine for the configuration's device and precision, and set the threads."""
    if config.threads:
        torch.set_num_threads(config.threads)
    # Else accelerate would take an accelerator that is neither, such as Apple's.
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    return Accelerator(mixed_precision=config.precision, cpu=cpu)
