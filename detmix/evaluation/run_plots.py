"""Several runs in one chart: what they were trained by and how well they came out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detmix.evaluation.figures import (
    LEGEND_FONT,
    UNCLIPPED,
    add_legend,
    line_style,
    name_rate,
    new_chart,
    place_legend,
    plain_text,
    save_figure,
    stack_axes,
    text_width,
    wrap_text,
)
from detmix.evaluation.metrics import (
    SCORE_NAMES,
    Metrics,
    Series,
    check_same_task,
    moving_average,
    odd_window,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The moving average of the loss spans this share of a run's records.
_SMOOTHING = 1 / 10
# Losses of which one ends at so many times another are drawn on a logarithmic axis.
_FAR_APART = 10.0
# Scores as close as this are not to look different.
_NO_DIFFERENCE = 0.01
_HANDLE = 0.4  # inches, of a legend's line beside a label
_LOSS, _RATE = "training loss", "learning rate"
_PART_NAMES = {"mask_ap": "mask AP", "keypoint_ap": "keypoint AP"}


@plain_text()
def plot_runs(runs: Mapping[str, Metrics], path: str | Path, *, narrow: bool = False) -> Path:
    """Draw loss, learning rate and scores of several runs over the epochs, for comparison.

    The loss is a moving average. Scores that mean different things, such as VOC's mAP and COCO's
    AP, have panels of their own. The legend names each run's best score.

    Args:
        runs: by name, what `read_metrics` returned; up to 10 are easy to tell apart.
        path: picture to write; its ending chooses the format.
        narrow: lay it out for a phone.

    Returns:
        The path written.

    Raises:
        ValueError: if there are no runs or none has recorded anything, or if classifiers are
            among detectors.
    """
    panels = _panels(runs)
    figure = new_chart(narrow)
    width = figure.get_figwidth() - 0.3
    legend, _, height = add_legend(
        figure,
        [_style(index, marker=True) for index in range(len(runs))],
        [_label(figure, name, metrics, width) for name, metrics in runs.items()],
        width=width,
    )
    heights = [1.3 if label == _RATE else 2.4 for label in panels]
    all_axes = stack_axes(figure, heights, bottom=height + 0.75)
    for axes, (label, series) in zip(all_axes, panels.items(), strict=True):
        for index, name in enumerate(runs):
            if name in series:
                # One record has no line to be seen by.
                marked = label not in (_LOSS, _RATE) or len(series[name].values) == 1
                style = _style(index, marker=marked) | (UNCLIPPED if marked else {})
                axes.plot(series[name].epochs, series[name].values, **style)
        _name_axis(axes, label, list(series.values()))
    all_axes[-1].set_xlim(0, max(metrics.last_epoch for metrics in runs.values()) * 1.02)
    all_axes[-1].set_xlabel("epoch")
    place_legend(figure, legend, 0.15, height + 0.15)
    return save_figure(figure, path)


def _panels(runs: Mapping[str, Metrics]) -> dict[str, dict[str, Series]]:
    """Return for each quantity, by its label, the runs that have it."""
    check_same_task(runs)
    panels: dict[str, dict[str, Series]] = {}
    for name, metrics in runs.items():
        if metrics.train:
            loss = metrics.train["loss"]
            smooth = moving_average(loss.values, odd_window(len(loss.values), _SMOOTHING))
            smoothed = Series(loss.steps, loss.epochs, smooth)
            panels.setdefault(_LOSS, {})[name] = smoothed
            panels.setdefault(_RATE, {})[name] = metrics.train["lr"]
    for name, metrics in runs.items():
        if metrics.kind is not None and metrics.score is not None:
            panels.setdefault(SCORE_NAMES[metrics.kind], {})[name] = metrics.score
        for key, label in _PART_NAMES.items():
            if key in metrics.eval:
                panels.setdefault(label, {})[name] = metrics.eval[key]
    if not panels:
        raise ValueError(f"nothing to draw: {len(runs)} runs without any metrics")
    return panels


def _name_axis(axes: "Axes", label: str, series: list[Series]) -> None:
    axes.set_ylabel(label)
    if label == _RATE:
        name_rate(axes)
    elif label == _LOSS:
        finals = [one.values[-1] for one in series]
        if 0 < _FAR_APART * min(finals) < max(finals):
            axes.set_yscale("log")
            for tick in axes.get_yticklabels() + axes.get_yticklabels(minor=True):
                tick.set_parse_math(True)  # powers of ten
        else:
            axes.set_ylim(bottom=0)
    else:
        values = np.concatenate([one.values for one in series])
        high = np.nanmax(values, initial=0.0)
        low = np.nanmin(values, initial=high)
        if low < high / 2 or high - low < _NO_DIFFERENCE:
            axes.set_ylim(bottom=0)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))  # a marker at 1 is seen whole


def _style(index: int, *, marker: bool) -> dict[str, Any]:
    return {**line_style(index, marker=marker), "linewidth": 1.6, "markersize": 5}


def _label(figure: "Figure", name: str, metrics: Metrics, width: float) -> str:
    """Return a run's name and best score, in lines that fit into a legend of so many inches."""
    score = metrics.score
    best = None if score is None else score.best()
    if score is None or metrics.kind is None:
        text = "not evaluated"
    elif best is None:
        text = f"{SCORE_NAMES[metrics.kind]} n/a"
    else:
        text = f"best {SCORE_NAMES[metrics.kind]} {score.values[best]:.3f}"
        text += f" (epoch {score.epochs[best]:g})"
    room = width - _HANDLE
    lines = wrap_text(figure, name, room, LEGEND_FONT)
    gap = "  " if text_width(figure, f"{lines[-1]}  {text}", LEGEND_FONT) <= room else "\n"
    return "\n".join(lines) + gap + text
