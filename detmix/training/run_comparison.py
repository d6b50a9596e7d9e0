"""Runs compared: how they came out, and what differed between them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from detmix.evaluation.figures import shorten
from detmix.evaluation.metrics import SCORE_NAMES, Metrics, check_same_task
from detmix.evaluation.voc_result import align, none_if_nan
from detmix.training.options import flat_options
from detmix.training.runs import Run

__all__ = ["RunComparison", "RunSummary", "compare_runs"]

# The final loss is the mean of this share of the records.
_FINAL = 0.1
# Numbers of an evaluation that the table shows, by the name that it gives them.
_SHOWN = {
    "mean_ap_11point": "11-point mAP",
    "ap50": "AP50",
    "mask_ap": "mask AP",
    "keypoint_ap": "keypoint AP",
    "top5": "top-5 accuracy",
}
_ABSENT = "–"
# Characters of a cell, fewer where that makes lines short enough; of a line.
_WIDTHS, _MAX_LINE = (25, 18, 13), 120


@dataclass(frozen=True)
class RunSummary:
    """How a run came out.

    Attributes:
        steps: Optimizer steps taken.
        epochs: Epochs trained, with a fraction where the run is under way or was stopped.
        planned_epochs: Epochs that its configuration asks for, None where it does not say.
        loss: Mean of the last tenth of the training's records; NaN where there is none.
        best: What the evaluation with the highest mAP or top-1 accuracy came to, by name; empty
            where there is none.
        best_epoch: When that was, NaN where there is none.
        last: What the last evaluation came to.
        score: What the best is chosen by: ``"mAP"``, ``"AP"`` of COCO or ``"top-1 accuracy"``;
            None before the first evaluation.
    """

    steps: int
    epochs: float
    planned_epochs: int | None
    loss: float
    best: Mapping[str, float]
    best_epoch: float
    last: Mapping[str, float]
    score: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; None stands for NaN."""
        return {
            name: {key: none_if_nan(number) for key, number in value.items()}
            if isinstance(value, Mapping)
            else (none_if_nan(value) if isinstance(value, float) else value)
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class RunComparison:
    """How runs came out and what differed between them; ``print`` shows it as tables.

    Attributes:
        runs: By the name of the run.
        options: Options whose values differ, by dotted name: the value by the name of the run,
            which is missing where its configuration has no such option.
        versions: The same of the packages.
    """

    runs: Mapping[str, RunSummary]
    options: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, Mapping[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; None stands for NaN."""
        return {
            "runs": {name: summary.as_dict() for name, summary in self.runs.items()},
            "options": {name: dict(values) for name, values in self.options.items()},
            "versions": {name: dict(values) for name, values in self.versions.items()},
        }

    def __str__(self) -> str:
        """The tables, a column a run; runs that do not fit beside the others come below them."""
        names = list(self.runs)
        lines = self._lines(names, _WIDTHS[0])
        if len(names) == 1 or _fits(lines):
            return "\n".join(lines)
        numbers = [f"({number})" for number in range(1, len(names) + 1)]
        legend = [f"{number} {name}" for number, name in zip(numbers, names, strict=True)]
        return "\n".join([*legend, *(line for b in self._blocks(numbers) for line in ("", *b))])

    def _blocks(self, heads: list[str]) -> list[list[str]]:
        """Return the lines of the tables, in as few blocks of runs as fit."""
        blocks: list[list[str]] = []
        for most in range(len(heads), 0, -1):
            starts = range(0, len(heads), most)
            for width in _WIDTHS:
                blocks = [self._lines(heads, width, slice(at, at + most)) for at in starts]
                if all(map(_fits, blocks)):
                    return blocks
        return blocks

    def _lines(self, heads: list[str], width: int, chosen: slice = slice(None)) -> list[str]:
        """Return the lines of the tables of the chosen runs under their heads."""
        sections = [self._summary_rows()]
        if len(self.runs) > 1:
            sections.append(self._difference_rows("option", self.options, width))
            sections.append(self._difference_rows("version", self.versions, width))
        rows = [("run", *heads), *(row for rows in sections for row in rows)]
        lines = align([(first, *rest[chosen]) for first, *rest in rows])
        out, rest = [lines[0]], lines[1:]
        for rows in sections:
            out += ["-" * len(lines[0]), *rest[: len(rows)]]
            rest = rest[len(rows) :]
        return [line.rstrip() for line in out]

    def _summary_rows(self) -> list[tuple[str, ...]]:
        runs = list(self.runs.values())
        rows = [
            ("steps", *(f"{run.steps:,}" for run in runs)),
            ("epochs", *(_epochs_text(run) for run in runs)),
            ("final loss", *(_number_text(run.loss) for run in runs)),
        ]
        rows += _score_rows("best", [run.best for run in runs], runs)
        rows.append(("  at epoch", *(_number_text(run.best_epoch, "g") for run in runs)))
        rows += _score_rows("last", [run.last for run in runs], runs)
        return rows

    def _difference_rows(
        self, what: str, differences: Mapping[str, Mapping[str, Any]], width: int
    ) -> list[tuple[str, ...]]:
        title = f"{what}s that differ:" if differences else f"no {what} differs"
        rows: list[tuple[str, ...]] = [(title, *("" for _ in self.runs))]
        for name, values in differences.items():
            full = [_text(values[run]) if run in values else _ABSENT for run in self.runs]
            rows.append((f"  {name}", *_shorten_apart(full, width)))
        return rows


def compare_runs(runs: Sequence[Run]) -> RunComparison:
    """Say how runs came out and what differed between them.

    Args:
        runs: Of different names, see `read_runs`.

    Raises:
        ValueError: If two runs have one name, or classifiers are among detectors.
    """
    by_name = {run.name: run for run in runs}
    if len(by_name) < len(runs):
        raise ValueError(
            f"{len(runs)} runs have the names {', '.join(by_name)} only: read_runs tells them apart"
        )
    check_same_task({name: run.metrics for name, run in by_name.items()})
    configs = {name: flat_options(run.config) for name, run in by_name.items()}
    return RunComparison(
        runs={name: _summarize(run) for name, run in by_name.items()},
        options=_differences(configs),
        versions=_differences({name: run.versions for name, run in by_name.items()}),
    )


def _summarize(run: Run) -> RunSummary:
    metrics = run.metrics
    score = metrics.score
    best = None if score is None else score.best()
    loss = math.nan
    if metrics.train:
        losses = metrics.train["loss"].values
        loss = float(np.mean(losses[-math.ceil(_FINAL * len(losses)) :]))
    return RunSummary(
        steps=metrics.last_step,
        epochs=metrics.last_epoch,
        planned_epochs=run.config.get("epochs"),
        loss=loss,
        best={} if score is None or best is None else _evaluation(metrics, score.steps[best]),
        best_epoch=math.nan if score is None or best is None else float(score.epochs[best]),
        last={} if score is None else _evaluation(metrics, score.steps[-1]),
        score=None if metrics.kind is None else SCORE_NAMES[metrics.kind],
    )


def _evaluation(metrics: Metrics, step: int) -> dict[str, float]:
    """Return what the evaluation after a step came to, by name."""
    return {
        name: float(series.values[series.steps == step][0])
        for name, series in metrics.eval.items()
        if name != "seconds" and step in series.steps
    }


def _differences(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is not the same, or not there, in all runs: by option, then by run."""
    options = dict.fromkeys(option for mapping in values.values() for option in mapping)
    found = {}
    for option in options:
        column = {run: mapping[option] for run, mapping in values.items() if option in mapping}
        first, *others = column.values()
        if len(column) < len(values) or any(other != first for other in others):
            found[option] = column
    return found


def _score_rows(
    title: str, evaluations: list[Mapping[str, float]], runs: list[RunSummary]
) -> list[tuple[str, ...]]:
    """Return a row for each kind of score among the runs, and one for each further number."""
    rows = []
    for score in dict.fromkeys(run.score for run in runs if run.score is not None):
        key = "top1" if score == SCORE_NAMES["classifier"] else "mean_ap"
        values = [
            evaluation.get(key, math.nan) if run.score == score else math.nan
            for run, evaluation in zip(runs, evaluations, strict=True)
        ]
        rows.append((f"{title} {score}", *map(_number_text, values)))
    for key, label in _SHOWN.items():
        values = [evaluation.get(key, math.nan) for evaluation in evaluations]
        if any(key in evaluation for evaluation in evaluations):
            rows.append((f"  {label}", *map(_number_text, values)))
    return rows


def _epochs_text(run: RunSummary) -> str:
    text = f"{run.epochs:.4g}"
    is_whole = run.planned_epochs is None or run.epochs >= run.planned_epochs
    return text if is_whole else f"{text} of {run.planned_epochs}"


def _number_text(value: float, spec: str = ".4f") -> str:
    return _ABSENT if math.isnan(value) else f"{value:{spec}}"


def _text(value: Any) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _shorten_apart(texts: list[str], width: int) -> list[str]:
    """Shorten texts so that those that differ still do; they stay whole where that fails."""
    columns = zip(*(text for text in texts if text != _ABSENT), strict=False)
    same = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    for skipped in (0, max(0, same - width // 4)):
        parts = [text if text == _ABSENT or not skipped else f"…{text[skipped:]}" for text in texts]
        short = [shorten(part, width) for part in parts]
        if len(set(short)) == len(set(texts)):
            return short
    return texts


def _fits(lines: list[str]) -> bool:
    return max(map(len, lines)) <= _MAX_LINE
