"""What the processes of a run tell each other, so that they do the same at the same step.

And what they run on. P is the number of processes.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from detmix.training.config import LoopConfig, flat_options

# What may differ between the machines of a run: places, and what they can do.
_LOCAL = re.compile(r"run_dir|resume|threads|data\.(root|workers|coco\..*)|.*\.weights")
_WORTH_IT = 0.8  # a convolution is not all: bfloat16 must take less than this share of the time
_log = logging.getLogger(__name__)


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
    state = PartialState(cpu=cpu)
    if config.device.startswith("cuda"):  # of several processes each has its own already
        torch.cuda.set_device(usable_device(config.device if state.num_processes == 1 else "cuda"))
    if config.threads:  # only now: over several processes on CPUs accelerate sets them, too
        torch.set_num_threads(config.threads)
    precision = config.precision
    if precision == "auto":
        precision = broadcast_object_list([_choose_precision(config, cpu=cpu)])[0]
    return Accelerator(mixed_precision=precision, cpu=cpu)


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device, or raise `ValueError` if there is no such one here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError of torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={device} cannot be used here: {reason}") from error


def _choose_precision(config: LoopConfig, *, cpu: bool) -> str:
    """Return "bf16" or "no", and say why; of a run that goes on what it was trained with."""
    noted = config.run_dir / "config.yaml"
    text = noted.read_text("utf-8") if config.resume == "auto" and noted.is_file() else ""
    if before := re.search(r"(?m)^precision: '?(no|bf16|fp16)\b", text):
        precision, why = before[1], "as before"
    elif cpu:
        full, half = time_precisions()
        precision = "bf16" if half < _WORTH_IT * full else "no"
        why = f"a convolution takes {1e3 * half:.1f} ms in bfloat16, {1e3 * full:.1f} in float32"
    else:
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        precision, why = ("bf16", "the GPU has it") if has_units else ("no", "the GPU has no bf16")
    _log.info("precision %s: %s", precision, why)
    return precision


@cache
def time_precisions() -> tuple[float, float]:
    """Return the seconds of a convolution, there and back, on the CPU in float32 and bfloat16."""
    # The size of a coarse pyramid level: under a second where bfloat16 is emulated.
    images = torch.ones(4, 64, 20, 20, requires_grad=True)
    kernel = torch.ones(64, 64, 3, 3, requires_grad=True)
    seconds = {False: math.inf, True: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    for is_half in [False, True] * 6:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            torch.autograd.backward(torch.conv2d(images, kernel).sum())
        # Not the median: whatever else runs on the machine only adds.
        seconds[is_half] = min(seconds[is_half], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return seconds[False], seconds[True]


def loader_share(accelerator: Accelerator, workers: int) -> dict[str, Any]:
    """Return what a loader must be told for this process to read its share of the data."""
    return {
        "workers": workers,
        "rank": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "pin_memory": accelerator.device.type == "cuda",
    }
