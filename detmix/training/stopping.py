"""Ending a training cleanly on Ctrl-C or a scheduler's SIGTERM."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["InterruptGuard", "Interrupted"]


class Interrupted(Exception):
    """A training ended early because of a signal, after saving a checkpoint.

    Attributes:
        signum: The signal's number.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class InterruptGuard:
    """Within its context, the first SIGINT or SIGTERM is noted instead of ending the process.

    A second SIGINT acts as if there were no guard. Another SIGTERM changes nothing: a scheduler
    and ``torchrun`` may each send one. Does nothing outside the main thread, where Python delivers
    no signals.

    Attributes:
        signum: The signal that came, or None.
    """

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked loader worker: its parent decides
            return
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signum, self._previous.pop(signum))
