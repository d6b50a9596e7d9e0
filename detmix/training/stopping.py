"""What ends a training before its time, a signal or a failure, as a person is told it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import Tensor

from detmix.training.progress import Position


class Interrupted(Exception):
    """A training ended early because of a signal, ``signum``, after saving a checkpoint."""

    def __init__(self, signum: int, position: Position) -> None:
        where = f"after step {position.step}"
        super().__init__(f"stopped by signal {signum} {where}; go on with --resume auto")
        self.signum = signum


class InterruptGuard:
    """Within its context, the first SIGINT or SIGTERM is noted instead of ending the process."""

    # A second SIGINT acts as if there were no guard. Another SIGTERM changes nothing: a scheduler
    # and ``torchrun`` may each send one.

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> InterruptGuard:
        self.signum = None
        try:
            for signum in self._SIGNALS:
                self._previous[signum] = signal.signal(signum, self._note)
        except ValueError:  # not in the main thread
            self._previous.clear()
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked loader worker: its parent decides
            return
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signum, self._previous.pop(signum))


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the message names the images of the step."""

    def __init__(self, what: str, position: Position, more: str) -> None:
        super().__init__(
            f"{what} not finite at step {position.step} (epoch {position.epoch}): {more}. A lower "
            "optim.lr, a longer warm-up or optim.clip_norm often helps"
        )


class OtherProcessError(RuntimeError):
    """This process is well, but another one has stopped; the message tells why."""


def describe_losses(losses: Mapping[str, Tensor], images: str) -> str:
    """Return the losses of a step, scalars by name, and its images."""
    values = ", ".join(f"{name} {float(loss.detach()):g}" for name, loss in losses.items())
    return f"{values}; images of the step: {images}"


def one_line(error: BaseException) -> str:
    """Return an error's message as one line; of one out of a loader's worker only its last."""
    text = str(error).strip() or type(error).__name__
    if "DataLoader worker process" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split())
