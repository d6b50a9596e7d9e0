"""The folder of a run: configuration, versions, metrics and checkpoints.

::

    run_dir/config.yaml      the resolved configuration
            versions.json    what it ran with
            metrics.jsonl    one JSON object a line
            tensorboard/     the same for TensorBoard
            last.pt          the newest checkpoint
            best.pt          the one with the highest score: a detector's mAP, a classifier's top-1
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from detmix.training.checkpoint import write_atomically

__all__ = ["RunFolder", "check_run_dir", "versions"]

_PACKAGES = (
    "detmix",
    "torch",
    "torchvision",
    "numpy",
    "albumentations",
    "accelerate",
)


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages at the heart of a run."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    found |= {name: version(name) for name in _PACKAGES}
    with suppress(PackageNotFoundError):  # optional
        found["timm"] = version("timm")
    return found | {"torch": str(torch.__version__)}  # with the build, such as +cpu


def check_run_dir(path: Path, *, resume: bool) -> None:
    """Raise `FileExistsError` if a folder holds something and is not to be resumed."""
    if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists and is never overwritten: choose another run_dir, or go on in it "
            "with --resume auto"
        )


class RunFolder:
    """The files of a run.

    Args:
        path: The folder. One that holds anything is never overwritten.
        config: The resolved configuration as plain values.
        resume: Whether to go on in a folder that exists.

    Raises:
        FileExistsError: If the folder holds something and ``resume`` is not set.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, resume: bool = False) -> None:
        check_run_dir(path, resume=resume)
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_atomically(path / "config.yaml", lambda file: _write(file, text))
        text = json.dumps(versions(), indent=2) + "\n"
        write_atomically(path / "versions.json", lambda file: _write(file, text))
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = None

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint with the highest score."""
        return self.path / "best.pt"

    @property
    def metrics(self) -> Path:
        """The metrics, a JSON object a line."""
        return self.path / "metrics.jsonl"

    def forget_after(self, step: int, *, evaluation: bool = False) -> None:
        """Drop the metrics of what a resumed run does again.

        Args:
            step: Steps that are not done again.
            evaluation: Whether the evaluation after these steps is.
        """
        if not self.metrics.exists():
            return
        self._purge_step = step + 1
        kept = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                again = evaluation and line["event"] == "eval" and line["step"] == step
                if line["step"] <= step and not again:
                    kept.append(text + "\n")
            except (ValueError, KeyError):  # a line that a killed run left half-written
                continue
        write_atomically(self.metrics, lambda file: _write(file, "".join(kept)))

    def log(self, event: str, step: int, epoch: float, values: Mapping[str, float | None]) -> None:
        """Append a line of metrics, and hand its numbers to TensorBoard.

        Args:
            event: ``"train"`` or ``"eval"``.
            step: Optimizer steps taken so far.
            epoch: Epochs trained so far, with a fraction.
            values: The metrics by name; None for what is undefined.
        """
        line = {"event": event, "step": step, "epoch": round(epoch, 4), **values}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is None:
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge_step)
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Write out what is still held back."""
        if self._board is not None:
            self._board.close()
            self._board = None


def _write(file: Any, text: str) -> None:
    file.write(text.encode())
