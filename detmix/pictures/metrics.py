"""The metrics of a run, read back: losses, learning rate and scores over its steps.

Shape legend: K records of one kind.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detmix.files import read_file

# What a run is scored by, as a chart's axis names it.
SCORE_NAMES = {"voc": "mAP", "coco": "AP", "classifier": "top-1 accuracy"}

_MAX_STEP = 2**53  # above it a float holds not every whole number


@dataclass(frozen=True, eq=False)
class Series:
    """One quantity over a run."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def best(self) -> int | None:
        """Index of the highest value, of equal ones the first; None where all are undefined."""
        return None if np.isnan(self.values).all() else int(np.nanargmax(self.values))

    @property
    def highest(self) -> float:
        """The highest value; NaN where all are undefined."""
        best = self.best()
        return math.nan if best is None else float(self.values[best])


@dataclass(frozen=True, eq=False)
class Metrics:
    """All that a run has recorded."""

    train: Mapping[str, Series]
    eval: Mapping[str, Series]

    @property
    def kind(self) -> Literal["voc", "coco", "classifier"] | None:
        """What the run is scored by, which scores of another kind say nothing about."""
        if "top1" in self.eval:
            return "classifier"
        if "mean_ap" in self.eval:
            return "coco" if "ap50" in self.eval else "voc"
        return None

    @property
    def score(self) -> Series | None:
        """What the best checkpoint is chosen by; None before the first evaluation."""
        return self.eval.get("top1", self.eval.get("mean_ap"))

    @property
    def last_step(self) -> int:
        """Optimizer steps of the newest record; 0 where there is none."""
        series = (*self.train.values(), *self.eval.values())
        return max((int(one.steps[-1]) for one in series), default=0)


def read_metrics(path: str | Path) -> Metrics:
    """Read a run's ``metrics.jsonl``, one JSON object a line."""
    # Where a resumed run has repeated a step, the later line counts.
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such metrics file")
    points: dict[str, dict[str, dict[int, float]]] = {"train": {}, "eval": {}}
    lines = read_file(path).decode(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _json_object(line, where)
        if record.get("event") not in points:
            continue
        step, values = _values(record, where)
        for key, value in values.items():
            points[record["event"]].setdefault(key, {})[step] = value
    train, evaluations = (
        {key: _series(by_step) for key, by_step in group.items()} for group in points.values()
    )
    return Metrics(train, evaluations)


def moving_average(values: Sequence[float] | NDArray[np.float64], window: int) -> NDArray[Any]:
    """Mean over ``window`` neighbours centred on each value; fewer at the ends."""
    kernel = np.ones(window)
    values = np.asarray(values, dtype=np.float64)
    half = window // 2
    total = np.convolve(values, kernel)[half : half + len(values)]
    count = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return total / count


def odd_window(num_records: int, share: float) -> int:
    """Odd length of a `moving_average` that spans about this share of the records."""
    return 2 * int(num_records * share / 2) + 1


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{where}: {line[:80]!r} is not JSON ({reason})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {line[:80]!r} is not a JSON object")
    return record


def _values(record: dict[str, Any], where: str) -> tuple[int, dict[str, float]]:
    """Return the step and all other numbers of a record, NaN for null."""
    needed = ["loss", "lr"]
    if record["event"] == "eval":
        needed = ["top1" if "top1" in record else "mean_ap"]
    for key in ("step", *needed):
        if key not in record:
            raise ValueError(
                f"{where}: the {record['event']} event has no {key!r}, expected a number"
            )
        if not (_is_number(record[key]) or (key == "mean_ap" and record[key] is None)):
            raise ValueError(f"{where}: {key!r} is {record[key]!r}, expected a number")
    step = float(record["step"])
    if not step.is_integer() or abs(step) > _MAX_STEP:
        raise ValueError(f"{where}: 'step' is {record['step']!r}, expected a whole number")
    values = {
        key: math.nan if value is None else float(value)
        for key, value in record.items()
        if key not in ("step", "epoch") and (value is None or _is_number(value))
    }
    return int(step), values


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def _series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    values = [points[step] for step in steps]
    return Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
