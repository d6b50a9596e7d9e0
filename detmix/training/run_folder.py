"""The folder of a run: configuration, versions, metrics and checkpoints.

::

    run_dir/config.yaml      the resolved configuration
            versions.json    what it ran with
            metrics.jsonl    one JSON object a line
            tensorboard/     the same for TensorBoard
            last.pt          the newest checkpoint
            previous.pt      the one before it, should it be broken
            best.pt          the one with the highest score: a detector's mAP, a classifier's top-1
            .lock            held by the process that writes here
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import weakref
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter

from detmix.files import temporary_path, write_errors, write_text
from detmix.training.checkpoint import LAST, PREVIOUS, Newest, save_checkpoint
from detmix.training.config import LoopConfig, flat_options
from detmix.training.progress import Position

_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # not every file system has them

_PACKAGES = ("detmix", "torch", "torchvision", "numpy", "albumentations", "accelerate")


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages at the heart of a run."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    found |= {name: version(name) for name in _PACKAGES}
    with suppress(PackageNotFoundError):  # optional
        found["timm"] = version("timm")
    return found | {"torch": str(torch.__version__)}  # with the build, such as +cpu


def check_run_dir(path: Path, *, resume: bool) -> None:
    """Raise `FileExistsError` if a folder holds something and is not to be resumed."""
    if not resume and any(file.name != _LOCK for file in path.glob("*")):
        raise FileExistsError(
            f"{path} exists and is never overwritten: choose another run_dir, or go on in it "
            "with --resume auto"
        )


def lock_folder(path: Path) -> AcquireReturnProxy[FileLock]:
    """Keep other processes from a folder until this one ends, or has released all it acquired."""
    file = path.resolve() / _LOCK
    # A soft lock would outlive a process that is killed.
    lock = FileLock(file, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"{path}: another process is training there") from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return AcquireReturnProxy(lock)


class RunFolder:
    """The files of a run; closed at the end of a ``with`` block."""

    def __init__(self, path: Path, config: dict[str, Any], *, resume: bool = False) -> None:
        check_run_dir(path, resume=resume)
        self._config, self._name = config, config.get("tracker", "tensorboard")
        if self._name != "none" and find_spec(self._name) is None:
            raise ImportError(f"tracker={self._name} is not installed: pip install {self._name}")
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.metrics = path, path / "metrics.jsonl"
        self.last, self.previous, self.best = path / LAST, path / PREVIOUS, path / "best.pt"
        self._take()
        for file in (self.last, self.best, self.metrics):
            temporary_path(file).unlink(missing_ok=True)  # of a killed run
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_text(path / "config.yaml", text)
        write_text(path / "versions.json", json.dumps(versions(), indent=2) + "\n")
        self._board: SummaryWriter | None = None
        self._tracker: GeneralTracker | None = None
        self._purge_step: int | None = None
        self._kept: list[dict[str, Any]] = []  # lines of that step

    def _take(self) -> None:
        # Until it is closed, or nobody has it any more.
        self._release = weakref.finalize(self, lock_folder(self.path).lock.release)

    def save_last(self, state: dict[str, Any]) -> None:
        """Save the newest checkpoint and keep the one before."""
        if self.metrics.exists():  # what the checkpoint takes for written must outlive a power cut
            with write_errors(self.metrics), open(self.metrics, "ab") as file:
                os.fsync(file.fileno())
        save_checkpoint(self.last, state, keep=self.previous)

    def take_previous(self) -> None:
        """Put the checkpoint before the newest in the place of that one, which is broken."""
        os.replace(self.previous, self.last)

    def forget_after(self, step: int, *, evaluation: bool = False) -> None:
        """Drop the metrics of what a resumed run does again."""
        if not self.metrics.exists():
            return
        lines = []
        for text in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # half a line, of a killed run
                line = json.loads(text)
                is_again = evaluation and line["event"] == "eval" and line["step"] == step
                if line["step"] <= step and not is_again:
                    lines.append(line)
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))
        # TensorBoard forgets whole steps.
        self._purge_step = step if evaluation else step + 1
        self._kept = [line for line in lines if line["step"] == self._purge_step]

    def log(self, event: str, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Append a line of metrics, and hand its numbers to TensorBoard or the other tracker."""
        line = {"event": event, "step": step, "epoch": round(epoch, 4), **values}
        with write_errors(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._tracker is not None:
            numbers = {f"{event}/{n}": value for n, value in values.items() if value is not None}
            self._tracker.log(numbers, step=step)
        if self._name != "tensorboard":
            return
        folder = self.path / "tensorboard"
        with write_errors(folder):
            if self._board is None:
                self._board = SummaryWriter(str(folder), purge_step=self._purge_step)
                self._purge_step = None
            for shown in (*self._kept, line):
                for name, value in list(shown.items())[3:]:  # after event, step and epoch
                    if value is not None:
                        self._board.add_scalar(f"{shown['event']}/{name}", value, shown["step"])
            self._kept = []

    def close(self) -> None:
        """Write out what is still held back, and let others write."""
        self._release()
        board, self._board = self._board, None
        if board is not None:
            with write_errors(self.path / "tensorboard"):
                board.close()
        if self._tracker is not None:
            self._tracker.finish()

    def __enter__(self) -> RunFolder:
        if not self._release.alive:  # as of a trainer that goes on
            self._take()
        if self._name not in ("tensorboard", "none"):
            self._tracker = LOGGER_TYPE_TO_CLASS[self._name](self.path.name)
            self._tracker.start()
            self._tracker.store_init_configuration(flat_options(self._config))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Of two errors the first one tells more.
        with suppress(OSError) if error is not None else nullcontext():
            self.close()


def open_folder(config: LoopConfig, newest: Newest | None, position: Position) -> RunFolder:
    """Open a run's folder, without what the run does again."""
    folder = RunFolder(config.run_dir, config.as_dict(), resume=config.resume == "auto")
    if newest is not None and newest.problem is not None:
        folder.take_previous()
    folder.forget_after(position.step, evaluation=position.evaluation_due)
    return folder
