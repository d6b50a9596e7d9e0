"""Curves: precision over recall of an evaluation, loss and score over a run.

Shape legend: K points of a class's curve.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.figures import (
    BLUE,
    GREEN,
    NARROW_WIDTH,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    UNCLIPPED,
    VERMILLION,
    add_axes,
    add_legend,
    line_style,
    message_figure,
    name_rate,
    new_chart,
    place_legend,
    plain_frame,
    plain_text,
    save_figure,
    stack_axes,
)
from detmix.evaluation.metrics import (
    SCORE_NAMES,
    Metrics,
    Series,
    moving_average,
    odd_window,
    read_metrics,
)
from detmix.evaluation.voc_result import VOCResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More curves than this cannot be told apart in one panel.
_MAX_CURVES = 20
# Curves are thinned out to what can be seen at this many places along the recall; a panel has
# fewer pixels.
_PLACES = 1000
# The moving average of the loss spans this share of the records.
_SMOOTHING = 1 / 25
# What else is drawn of an evaluation, and how.
_MORE_SCORES = {
    "mean_ap_11point": ("11-point mAP", SKY_BLUE, "s"),
    "ap50": ("AP50", SKY_BLUE, "s"),
    "mask_ap": ("mask AP", PURPLE, "D"),
    "keypoint_ap": ("keypoint AP", ORANGE, "^"),
    "top5": ("top-5 accuracy", SKY_BLUE, "s"),
}


@plain_text()
def plot_precision_recall(result: VOCResult, path: str | Path, *, narrow: bool = False) -> Path:
    """Draw every class's precision over recall, with its AP in the legend, best class first.

    A dot marks the point of highest F1. More than 20 classes are spread over several panels.

    Args:
        result: of `VOCEvaluator.compute`. Classes without objects appear in the legend only.
        path: picture to write; its ending chooses the format.
        narrow: lay it out for a phone, legends below instead of beside.

    Returns:
        The path written.
    """
    order = sorted(result.classes, key=lambda name: (-_or_minus_one(result.ap[name]), name))
    size = math.ceil(len(order) / math.ceil(len(order) / _MAX_CURVES))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    figure = new_chart(narrow)
    legends = [
        add_legend(
            figure,
            [line_style(index) for index in range(len(group))],
            [f"{name}  {_ap_text(result.ap[name])}" for name in group],
            width=NARROW_WIDTH - 0.3 if narrow else None,
            title="class and AP; dot: highest F1" if narrow else "class and AP\n(dot: highest F1)",
        )
        for group in groups
    ]
    width, height = (max(size[side] for _, *size in legends) for side in (0, 1))
    places = _place_panels(figure, len(groups), width, height, narrow)
    for group, (legend, *_), (axes, *place) in zip(groups, legends, places, strict=True):
        _draw_curves(axes, result, group)
        place_legend(figure, legend, *place)
    left, top = 0.15 / figure.get_figwidth(), 1 - 0.12 / figure.get_figheight()
    figure.text(left, top, _title(result, narrow), va="top")
    return save_figure(figure, path)


def _place_panels(
    figure: "Figure", count: int, legend_width: float, legend_height: float, narrow: bool
) -> list[tuple["Axes", float, float]]:
    """Add the panels; return each with the upper left corner of its legend, in inches."""
    columns = 1 if narrow or count == 1 else 2
    left, top = 0.65, 0.65 if narrow else 0.5
    if narrow:
        width, height = NARROW_WIDTH - left - 0.2, 3.0
        cell_width, cell_height = NARROW_WIDTH, height + legend_height + 0.8
    else:
        width, height = (5.2, 4.6) if columns == 1 else (2.4, 3.3)
        cell_width = left + width + legend_width + 0.3
        cell_height = max(height + 0.6, legend_height + 0.3)
    total = top + math.ceil(count / columns) * cell_height
    figure.set_size_inches(columns * cell_width, total)
    places = []
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = column * cell_width + left, total - top - row * cell_height
        axes = add_axes(figure, x, y - height, width, height)
        legend = (0.15, y - height - 0.55) if narrow else (x + width + 0.15, y)
        places.append((axes, *legend))
    return places


def _draw_curves(axes: "Axes", result: VOCResult, names: list[str]) -> None:
    for index, name in enumerate(names):
        curve, style = result.curves[name], line_style(index)
        if math.isnan(result.ap[name]):
            continue
        axes.plot(*thin_out(curve.recall, curve.precision), linewidth=1.5, **style)
        best = curve.best_f1()
        if not math.isnan(best.score):
            axes.scatter(
                best.recall,
                best.precision,
                s=24,
                color=style["color"],
                edgecolors="white",
                zorder=3,
            )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    plain_frame(axes)


def thin_out(
    recall: NDArray[np.float64], precision: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points that look the same: of each place along the recall first, lowest, highest and last.

    Args:
        recall: ``(K,)`` in [0, 1], never decreasing.
        precision: ``(K,)``.

    Returns:
        Recall and precision, at most 4 points for each of 1,000 places; all of a shorter curve.
    """
    if len(recall) <= 4 * _PLACES:
        return recall, precision
    place = (recall * _PLACES).astype(np.int64)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    ends = np.append(starts[1:], len(place)) - 1
    by_precision = np.lexsort((precision, place))
    kept = np.unique([starts, by_precision[starts], by_precision[ends], ends])
    return recall[kept], precision[kept]


def _title(result: VOCResult, narrow: bool) -> str:
    return (
        f"mean AP {_ap_text(result.mean_ap)}{chr(10) if narrow else '  '}"
        f"({result.interpolation}, IoU > {result.iou_threshold:g}, {result.num_images:,} images)"
    )


def plot_learning_curve(
    metrics_path: str | Path, path: str | Path, *, narrow: bool = False
) -> Path:
    """Draw loss, learning rate and mAP or top-1 accuracy over the optimizer steps of a run.

    Beside VOC's mAP the 11-point one is drawn; beside COCO's AP that at IoU 0.5, and that of masks
    or keypoints.

    Args:
        metrics_path: a run's ``metrics.jsonl``, see `read_metrics`.
        path: picture to write; its ending chooses the format.
        narrow: lay it out for a phone.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if there is no metrics file.
        ValueError: if a line of it is broken; the message names file and line.
    """
    metrics = read_metrics(metrics_path)
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if metrics.train:
        panels.append((2.6, partial(_draw_loss, series=metrics.train["loss"])))
        panels.append((1.3, partial(_draw_lr, series=metrics.train["lr"])))
    if metrics.kind is not None:
        panels.append((2.2, partial(_draw_scores, metrics=metrics)))
    if not panels:
        return save_figure(message_figure("no metrics recorded yet"), path)
    figure = new_chart(narrow)
    heights = [height for height, _ in panels]
    all_axes = stack_axes(figure, heights)
    for axes, (_, draw) in zip(all_axes, panels, strict=True):
        draw(axes)
    all_axes[-1].set_xlim(0, max(metrics.last_step, 1) * 1.01)
    all_axes[-1].xaxis.set_major_formatter(
        (lambda x, _: f"{x / 1000:,g}k") if metrics.last_step >= 10_000 else "{x:,.0f}"
    )
    all_axes[-1].set_xlabel("optimizer step")
    return save_figure(figure, path)


def _draw_loss(axes: "Axes", series: Series) -> None:
    window = odd_window(len(series.values), _SMOOTHING)
    smooth = moving_average(series.values, window)
    axes.plot(series.steps, series.values, color=BLUE, alpha=0.25, linewidth=0.8)
    label = f"mean of {window} records" if window > 1 else "loss"
    axes.plot(series.steps, smooth, color=BLUE, linewidth=1.8, label=label, **_marker(series))
    finite = smooth[np.isfinite(smooth)]
    if len(finite) and finite.max() > 0:
        axes.set_ylim(0, 1.25 * finite.max())  # single peaks may leave the frame
    axes.set_ylabel("training loss")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _draw_lr(axes: "Axes", series: Series) -> None:
    axes.plot(series.steps, series.values, color=GREEN, linewidth=1.8, **_marker(series))
    name_rate(axes)


def _marker(series: Series) -> dict[str, Any]:
    """How a line is drawn beside its colour: one record has no line to be seen by."""
    return {"marker": "o", "markersize": 4, **UNCLIPPED} if len(series.values) == 1 else {}


def _draw_scores(axes: "Axes", metrics: Metrics) -> None:
    assert metrics.kind is not None
    assert metrics.score is not None
    score, name = metrics.score, SCORE_NAMES[metrics.kind]
    axes.set_ylabel(name)
    best = score.best()
    if best is not None:
        name += f", best {score.values[best]:.3f} at step {score.steps[best]:,}"
    look: dict[str, Any] = {"markersize": 4, **UNCLIPPED}
    axes.plot(score.steps, score.values, "o-", color=VERMILLION, lw=1.8, label=name, **look)
    highest = [score.highest]
    for key, (name, color, marker) in _MORE_SCORES.items():
        if key in metrics.eval:
            more = metrics.eval[key]
            axes.plot(more.steps, more.values, f"{marker}--", color=color, lw=1, label=name, **look)
            highest.append(more.highest)
    # Room for the legend; a marker at 1 is seen whole.
    axes.set_ylim(0, min(1.02, 1.4 * np.nanmax([0.0, *highest])) or 1.02)
    axes.legend(fontsize=9, framealpha=0.8, edgecolor="none")


def _or_minus_one(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _ap_text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
