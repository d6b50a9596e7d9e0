"""What a person is told: a run's plan, what can be done after it, errors and signals."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError

from detmix.detectors.config import find_detector
from detmix.training.checkpoint import LAST
from detmix.training.config import PretrainConfig
from detmix.training.stopping import Interrupted, NonFiniteLossError, OtherProcessError, one_line

_log = logging.getLogger(__name__)
# ImportError: an optional package is not installed.
_USER_ERRORS = (ValueError, IndexError, OSError, ImportError, NonFiniteLossError, OtherProcessError)
# Characters of an error of torch's, whose messages may hold a stack.
_MOST = 500
# How gloo and nccl tell that the process at the other end has gone.
_LOST = re.compile(r"(?i)connection (closed|reset) by peer|remote process (has )?exited")


def run_tool(main: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> int:
    """Run a tool's ``main`` and turn what a user can mend into one line on standard error."""
    args = sys.argv[1:] if args is None else args
    try:
        with _shown():
            main(args)
    except _USER_ERRORS as error:
        return _tell(one_line(error))
    except RuntimeError as error:
        is_lost = _LOST.search(str(error))
        if not is_lost and not isinstance(error, DistError):
            raise
        hint = "lost another process, whose own error tells why: " if is_lost else ""
        return _tell(hint + one_line(error)[:_MOST])
    except Interrupted as stop:
        tool = ("python " if sys.argv[0].endswith(".py") else "") + sys.argv[0]
        # First: a run that is named there already is still the one.
        print(f"{stop}:\n  {tool} --resume auto {shlex.join(args)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _tell(error: str) -> int:
    """Print an error, of several processes with the number of this one, and return the status."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    prefix = f"error in process {os.environ.get('RANK', '0')}" if several else "error"
    print(f"{prefix}: {error}", file=sys.stderr)
    return 2


@contextmanager
def _shown() -> Iterator[None]:
    """Show what detmix logs and warns of, without the line of code, once for all processes."""
    is_first = os.environ.get("RANK", "0") == "0"
    log, full = logging.getLogger("detmix"), warnings.formatwarning
    package = str(Path(__file__).parents[1])
    handler, level = logging.StreamHandler(), log.level

    def short(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> str:
        if not filename.startswith(package):
            return full(message, category, filename, *args, **kwargs)
        return f"warning: {message}\n" if is_first else ""

    warnings.formatwarning = short
    if is_first:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        warnings.formatwarning = full


def tell_plan(trainer: Any) -> None:
    """Log what a trainer is about to do, a line for each topic."""
    config, device, frozen = trainer.config, trainer.accelerator.device, list[str]()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if isinstance(config, PretrainConfig):
        what, start, mix, more = config.model.name, None, config.mix, ""
    else:
        kind = find_detector(config.detector.name)
        start = config.detector.weights or config.backbone.weights
        what = f"{kind.name} on {config.backbone.name}" if kind.is_family else kind.name
        mix, last = config.mixing.name, max(1, config.epochs - config.mixing.off_epochs)
        more = f", until epoch {last}, losses {'weighted' if config.loss else 'plain'}"
    for name, part in trainer.plain_model.named_modules():
        grads = [parameter.requires_grad for parameter in part.parameters()]
        if grads and not any(grads) and not name.startswith(tuple(f"{each}." for each in frozen)):
            frozen.append(name)
    start = f"step {trainer.position.step}" if trainer.position.step else start
    steps = config.epochs * trainer.epoch_steps
    parts = {"processes": trainer.accelerator.num_processes, "batches": config.optim.accumulate}
    batch = "".join(f"{number} {what} x " for what, number in parts.items() if number > 1)
    batch += str(trainer.sampler.batch_size)
    ramp = " (all in the warm-up)" if config.schedule.warmup_steps >= steps else ""
    # That of the test loader is a process's share.
    sets = trainer.loader.dataset, trainer.test_loader.dataset.dataset, trainer.classes
    train, test, classes = map(len, sets)
    facts = {
        "device": gpu or f"CPU (threads: {torch.get_num_threads()})",
        "precision": trainer.accelerator.mixed_precision.replace("no", "float32"),
        "model": f"{what}, from {start or 'random weights'}",
        "frozen": ", ".join(frozen) or "nothing",
        "data": f"{config.data.root}: {train} images to train, {test} to test, {classes} classes",
        "training": f"{config.epochs} epochs, {steps} steps{ramp}, batch {batch}",
        "mixing": "none" if mix == "none" else f"{mix}, p {config.mixing.p:g}{more}",
        "run folder": str(config.run_dir),
    }
    for topic, fact in facts.items():
        _log.info("%-10s  %s", topic, fact)


def next_commands(run_dir: Path, image: Path) -> str:
    """Return what to do with a trained detector, as commands of a shell."""
    checkpoint = run_dir / ("best.pt" if (run_dir / "best.pt").exists() else LAST)
    commands: list[tuple[Any, ...]] = [
        ("evaluate", checkpoint, "--report"),
        ("predict", checkpoint, image, "--out", run_dir / "predictions"),
        ("visualize", "predictions", checkpoint, "--out", run_dir / "predictions.png"),
    ]
    lines = "".join(f"\n  detmix {shlex.join(map(str, words))}" for words in commands)
    return f"run folder: {run_dir}; what to do next:{lines}"
