"""Curves of a run: precision over recall of an evaluation, loss and score over the steps.

Shape legend: K records of one kind in a run's metrics file.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.figures import (
    BLUE,
    GREEN,
    GREY,
    LINE_COLORS,
    VERMILLION,
    add_axes,
    message_figure,
    new_figure,
    save_figure,
)
from detmix.evaluation.voc_result import VOCResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE_STYLES = ("-", "--", ":", "-.")
_LEGEND_ROWS = 24
# The moving average spans this share of the records.
_SMOOTHING = 1 / 25


def plot_precision_recall(result: VOCResult, path: str | Path) -> Path:
    """Draw every class's precision over recall, with its AP in the legend, best class first.

    Args:
        result: of `VOCEvaluator.compute`. Classes without objects appear in the legend only.
        path: picture to write; its ending chooses the format.

    Returns:
        The path written.
    """
    order = sorted(result.classes, key=lambda name: (-_or_minus_one(result.ap[name]), name))
    columns = math.ceil(len(order) / _LEGEND_ROWS)
    column_width = 1.2 + 0.075 * max(len(name) for name in order)
    figure = new_figure(7.2 + columns * column_width, 6)
    axes = add_axes(figure, 0.75, 0.65, 6.2, 4.8)
    for index, name in enumerate(order):
        curve, ap = result.curves[name], result.ap[name]
        axes.plot(
            [] if math.isnan(ap) else curve.recall,
            [] if math.isnan(ap) else curve.precision,
            color=LINE_COLORS[index % len(LINE_COLORS)],
            linestyle=_LINE_STYLES[index // len(LINE_COLORS) % len(_LINE_STYLES)],
            linewidth=1.5,
            label=f"{name}  {_ap_text(ap)}",
        )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title(
        f"mean AP {_ap_text(result.mean_ap)}  "
        f"({result.interpolation}, IoU > {result.iou_threshold:g}, {result.num_images} images)",
        fontsize=11,
    )
    _plain_frame(axes)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        ncols=columns,
        fontsize=9,
        frameon=False,
        handlelength=3.2,
        title="class and AP",
        alignment="left",
    )
    return save_figure(figure, path)


def plot_learning_curve(metrics_path: str | Path, path: str | Path) -> Path:
    """Draw loss, learning rate and mAP or top-1 accuracy over the optimizer steps of a run.

    Args:
        metrics_path: a run's ``metrics.jsonl``, see `read_metrics`.
        path: picture to write; its ending chooses the format.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if there is no metrics file.
        ValueError: if a line of it is broken; the message names file and line.
    """
    metrics = read_metrics(metrics_path)
    panels: list[tuple[Callable[[Axes, Series], None], Series, float]] = []
    if len(metrics.loss.steps):
        panels.append((_draw_loss, metrics.loss, 2.6))
    if len(metrics.lr.steps):
        panels.append((_draw_lr, metrics.lr, 1.3))
    for series, name in ((metrics.mean_ap, "mAP"), (metrics.top1, "top-1 accuracy")):
        if len(series.steps):
            panels.append((partial(_draw_score, name=name), series, 2.2))
    if not panels:
        return save_figure(message_figure("no metrics recorded yet"), path)
    gap, bottom = 0.25, 0.65
    figure = new_figure(8, bottom + sum(height + gap for *_, height in panels) + 0.1)
    last_step = max(int(series.steps[-1]) for _, series, _ in panels)
    for draw, series, height in reversed(panels):
        axes = add_axes(figure, 0.95, bottom, 6.8, height)
        draw(axes, series)
        _plain_frame(axes)
        axes.set_xlim(0, max(last_step, 1) * 1.01)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if figure.axes[0] is axes:
            axes.set_xlabel("optimizer step")
        else:
            axes.tick_params(labelbottom=False)
        bottom += height + gap
    return save_figure(figure, path)


@dataclass(frozen=True)
class Series:
    """One quantity over a run: ``steps (K,)`` int64, increasing, and ``values (K,)`` float64."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """What `plot_learning_curve` draws."""

    loss: Series
    lr: Series
    mean_ap: Series
    top1: Series


def read_metrics(path: str | Path) -> Metrics:
    """Read a run's ``metrics.jsonl``, one JSON object a line.

    Lines with ``"event": "train"`` give ``step``, ``loss`` and ``lr``; those with ``"event":
    "eval"`` give ``step`` and a detector's ``mean_ap`` (null where no class had objects) or a
    classifier's ``top1``. Other events and keys are ignored, and so are empty lines. Where a
    resumed run has repeated a step, the later line counts.

    Args:
        path: the file.

    Returns:
        Loss, learning rate, mAP and top-1 accuracy over steps; empty what the run has not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a line is not a JSON object or lacks a number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such metrics file")
    series: dict[str, dict[int, float]] = {"loss": {}, "lr": {}, "mean_ap": {}, "top1": {}}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _json_object(line, where)
        for key in _series_keys(record):
            step = int(_number(record, "step", where))
            series[key][step] = _number(record, key, where, null_is_nan=key == "mean_ap")
    return Metrics(*(_series(values) for values in series.values()))


def _series_keys(record: dict[str, Any]) -> tuple[str, ...]:
    if record.get("event") == "train":
        return ("loss", "lr")
    if record.get("event") == "eval":
        return ("top1",) if "top1" in record else ("mean_ap",)
    return ()


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {line[:80]!r} is not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {line[:80]!r} is not a JSON object")
    return record


def _number(record: dict[str, Any], key: str, where: str, null_is_nan: bool = False) -> float:
    if key not in record:
        raise ValueError(f"{where}: the {record['event']} event has no {key!r}, expected a number")
    value = record[key]
    if value is None and null_is_nan:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key!r} is {value!r}, expected a number")
    return float(value)


def _series(values: dict[int, float]) -> Series:
    steps = sorted(values)
    return Series(
        np.array(steps, dtype=np.int64),
        np.array([values[step] for step in steps], dtype=np.float64),
    )


def moving_average(values: Sequence[float] | NDArray[np.float64], window: int) -> NDArray[Any]:
    """Mean over ``window`` neighbours centred on each value; fewer at the ends.

    Args:
        values: ``(K,)``.
        window: odd, at least 1.

    Returns:
        ``(K,)`` float64.
    """
    kernel = np.ones(window)
    values = np.asarray(values, dtype=np.float64)
    half = window // 2
    total = np.convolve(values, kernel)[half : half + len(values)]
    count = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return total / count


def _draw_loss(axes: "Axes", series: Series) -> None:
    window = 2 * int(len(series.values) * _SMOOTHING / 2) + 1
    smooth = moving_average(series.values, window)
    axes.plot(series.steps, series.values, color=BLUE, alpha=0.25, linewidth=0.8)
    label = f"mean of {window} records" if window > 1 else "loss"
    axes.plot(series.steps, smooth, color=BLUE, linewidth=1.8, label=label)
    finite = smooth[np.isfinite(smooth)]
    if len(finite) and finite.max() > 0:
        axes.set_ylim(0, 1.25 * finite.max())  # single peaks may leave the frame
    axes.set_ylabel("training loss")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _draw_lr(axes: "Axes", series: Series) -> None:
    axes.plot(series.steps, series.values, color=GREEN, linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter("{x:.2g}")


def _draw_score(axes: "Axes", series: Series, name: str) -> None:
    axes.plot(
        series.steps, series.values, color=VERMILLION, marker="o", markersize=4, linewidth=1.5
    )
    axes.set_ylim(0, 1.02)  # a marker at 1 is seen whole
    axes.set_ylabel(name)
    if np.isnan(series.values).all():
        return
    best = int(np.nanargmax(series.values))
    axes.axhline(series.values[best], color=GREY, linewidth=0.8, linestyle=":")
    high = series.values[best] > 0.85
    axes.annotate(
        f"best {series.values[best]:.3f} at step {series.steps[best]:,}",
        (0.01, series.values[best]),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4 if high else 4),
        textcoords="offset points",
        va="top" if high else "bottom",
        fontsize=9,
        color=GREY,
    )


def _plain_frame(axes: "Axes") -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _or_minus_one(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _ap_text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
