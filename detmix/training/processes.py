"""What the processes of a run tell each other, so that they do the same at the same step.

P is the number of processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from detmix.training.config import LoopConfig, flat_options

# What may differ between the machines of a run: places, and what they can do.
_LOCAL = re.compile(r"run_dir|resume|threads|data\.(root|workers|coco\..*)|.*\.weights")


class StepNews(NamedTuple):
    """What a process learns of a step in all processes."""

    means: dict[str, Tensor]
    are_finite: list[bool]
    is_broken: bool
    signum: int | None


def share_step(
    accelerator: Accelerator, losses: Mapping[str, Tensor], is_broken: bool, signum: int | None
) -> StepNews:
    """Exchange what a step came to; its last loss is the sum of the others."""
    # Waits for the device once a step, as torchvision's detectors do throughout their forward pass.
    flags = torch.tensor([is_broken, signum or 0], dtype=torch.float32, device=accelerator.device)
    values = [loss.detach().float() for loss in losses.values()]
    news = accelerator.gather(torch.stack([*values, *flags])).view(-1, len(losses) + 2)  # (P, ...)
    columns = news.T.tolist()
    return StepNews(
        means=dict(zip(losses, news[:, :-2].mean(dim=0), strict=True)),
        are_finite=[math.isfinite(total) for total in columns[-3]] if losses else [],
        is_broken=any(columns[-2]),
        signum=int(max(columns[-1])) or None,
    )


def gather_causes(own: str | None) -> list[str]:
    """Return what keeps processes from going on, in the order of these; None where nothing does."""
    return list(gather_object([] if own is None else [own]))


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise `ValueError` in all processes unless options and more are the same in all of them."""
    options = flat_options(facts).items()
    own = {name: value for name, value in options if not _LOCAL.fullmatch(name)}
    first, *others = gather_object([own])
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            values = first.get(name), other.get(name)
            if values[0] != values[1]:
                raise ValueError(
                    f"the processes must agree on {name}: process 0 has {values[0]}, process "
                    f"{rank} has {values[1]}"
                )


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Return the engine for the configuration's device and precision, and set the threads."""
    # Else accelerate would take an accelerator that is neither, such as Apple's.
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=config.precision, cpu=cpu)
    if config.threads:  # last: over several processes on CPUs accelerate sets them, too
        torch.set_num_threads(config.threads)
    return accelerator


def loader_share(accelerator: Accelerator, workers: int) -> dict[str, Any]:
    """Return what a loader must be told for this process to read its share of the data."""
    return {
        "workers": workers,
        "rank": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "pin_memory": accelerator.device.type == "cuda",
    }
