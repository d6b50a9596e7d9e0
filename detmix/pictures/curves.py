"""Charts: precision over recall, loss and score over a run, the weights of mixed boxes.

Shape legend: K points of a class's curve, N boxes.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detmix.evaluation.voc.result import VOCResult, ap_text
from detmix.pictures.metrics import (
    SCORE_NAMES,
    Metrics,
    Series,
    moving_average,
    odd_window,
    read_metrics,
)
from detmix.pictures.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    UNCLIPPED,
    VERMILLION,
    WIDE_WIDTH,
    line_style,
    message_figure,
    new_figure,
    plain_frame,
    plain_text,
    save_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CURVES = 20  # more cannot be told apart in one panel
_LONGEST_NAME = 28  # characters
_SMOOTHING = 1 / 25  # of the records, for the moving average of the loss
# What else is drawn of an evaluation, and how.
_MORE_SCORES = {
    "mean_ap_11point": ("11-point mAP", SKY_BLUE, "s"),
    "ap50": ("AP50", SKY_BLUE, "s"),
    "mask_ap": ("mask AP", PURPLE, "D"),
    "keypoint_ap": ("keypoint AP", ORANGE, "^"),
    "top5": ("top-5 accuracy", SKY_BLUE, "s"),
}
_BINS = 25
# Drawn to know the share that is expected in a bin, of some per cent, to a fiftieth of one.
_DRAWS = 1_000_000


@plain_text()
def plot_precision_recall(result: VOCResult, path: str | Path) -> Path:
    """Draw every class's precision over recall, with its AP in the legend, best class first.

    A dot marks the point of highest F1. More than 20 classes are spread over several panels.

    Args:
        result: of `VOCEvaluator.compute`. Classes without objects appear in the legend only.
        path: picture to write; its ending chooses the format.

    Returns:
        The path written.
    """
    order = sorted(result.classes, key=lambda name: (-np.nan_to_num(result.ap[name], nan=-1), name))
    num_panels = math.ceil(len(order) / _MAX_CURVES)
    figure = new_figure(WIDE_WIDTH, 4.6 * num_panels + 0.3)
    figure.suptitle(
        f"mean AP {ap_text(result.mean_ap)}  ({result.interpolation}, "
        f"IoU > {result.iou_threshold:g}, {result.num_images:,} images)",
        fontsize=10,
    )
    panels = figure.subplots(num_panels, 1, squeeze=False).flat
    for axes, names in zip(panels, np.array_split(order, num_panels), strict=True):
        for index, name in enumerate(names):
            curve, style = result.curves[name], line_style(index)
            label = f"{shorten(name, _LONGEST_NAME)}  {ap_text(result.ap[name])}"
            axes.plot(curve.recall, curve.precision, linewidth=1.5, label=label, **style)
            best = curve.best_f1()
            axes.plot(best.recall, best.precision, "o", ms=6, mec="white", color=style["color"])
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        plain_frame(axes)
        title = "class and AP\n(dot: highest F1)"
        _add_legend(axes, title=title, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)


@plain_text()
def plot_learning_curve(metrics_path: str | Path, path: str | Path) -> Path:
    """Draw loss, learning rate and mAP or top-1 accuracy over the optimizer steps of a run.

    Beside VOC's mAP the 11-point one is drawn; beside COCO's AP that at IoU 0.5, and that of masks
    or keypoints.

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
    heights = [2.6, 1.3] * bool(metrics.train) + [2.2] * (metrics.kind is not None)
    if not heights:
        return save_figure(message_figure("no metrics recorded yet"), path)
    figure = new_figure(WIDE_WIDTH, sum(heights) + 0.6)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes in panels.flat:
        plain_frame(axes)
    if metrics.train:
        _draw_loss(panels[0, 0], metrics.train["loss"])
        _draw_rate(panels[1, 0], metrics.train["lr"])
    if metrics.kind is not None:
        _draw_scores(panels[-1, 0], metrics)
    panels[-1, 0].set(xlim=(0, max(metrics.last_step, 1) * 1.01), xlabel="optimizer step")
    panels[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    panels[-1, 0].xaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
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
    _add_legend(axes)


def _draw_rate(axes: "Axes", series: Series) -> None:
    axes.plot(series.steps, series.values, color=GREEN, linewidth=1.8, **_marker(series))
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))


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
    axes.plot(score.steps, score.values, "o-", color=VERMILLION, ms=4, label=name, **UNCLIPPED)
    highest = [score.highest]
    for key, (label, color, marker) in _MORE_SCORES.items():
        if key in metrics.eval:
            more = metrics.eval[key]
            style = {"color": color, "lw": 1, "ms": 4, "label": label, **UNCLIPPED}
            axes.plot(more.steps, more.values, f"{marker}--", **style)
            highest.append(more.highest)
    # Room for the legend; a marker at 1 is seen whole.
    axes.set_ylim(0, min(1.02, 1.4 * np.nanmax([0.0, *highest])) or 1.02)
    _add_legend(axes)


def _add_legend(axes: "Axes", **more: Any) -> None:
    font = {"fontsize": 9, "title_fontsize": 9, "alignment": "left", "labelspacing": 0.3}
    axes.legend(framealpha=0.8, edgecolor="none", handlelength=2.3, **{**font, **more})


@plain_text()
def plot_box_weights(
    weights: npt.ArrayLike, path: str | Path, *, alpha: float | None = None
) -> Path:
    """Draw how often boxes have which weight below 1, and say how many have weight 1.

    Boxes that are not mixed weigh 1, and so do those that CutMix leaves whole.

    Args:
        weights: ``(N,)`` box weights in (0, 1], an array or a CPU tensor.
        path: picture to write; its ending chooses the format.
        alpha: draw what mixup with a ratio from Beta(alpha, alpha) is expected to give. A box of
            the first image weighs λ, one of the second 1 - λ, and both are distributed alike
            whatever the images hold, Beta(alpha, alpha) being symmetric. Not for CutMix, whose
            weights are visible shares.

    Returns:
        The path written.

    Raises:
        ValueError: if ``weights`` is not one-dimensional, or one of them lies outside (0, 1].
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"weights must be (N,) and in (0, 1], got {values}")
    if len(values) == 0:
        return save_figure(message_figure("no boxes to weigh"), path)
    figure = new_figure(WIDE_WIDTH, 3.4)
    axes = figure.subplots()
    mixed = values[values < 1]
    shares, edges = _shares(mixed)
    axes.stairs(shares, edges, fill=True, color=BLUE, label=f"{len(mixed):,} boxes below 1")
    highest = shares.max()
    if alpha is not None:
        expected, _ = _shares(np.random.default_rng(0).beta(alpha, alpha, _DRAWS))
        label = f"mixup: Beta({alpha:g}, {alpha:g})"
        axes.stairs(expected, edges, baseline=None, color=VERMILLION, linewidth=2, label=label)
        highest = max(highest, expected.max())
    share_of_ones = 1 - len(mixed) / len(values)
    axes.set_title(
        f"{len(values):,} boxes, mean weight {values.mean():.3f}; {share_of_ones:.1%} weigh 1",
        loc="left",
        fontsize=10,
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.3 * highest or 1))
    axes.set(xlabel="weight below 1", ylabel="share of these boxes")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    plain_frame(axes)
    _add_legend(axes, loc="upper right")
    return save_figure(figure, path)


def _shares(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What share of the values lies in each bin, and the bins' edges."""
    counts, edges = np.histogram(values, bins=_BINS, range=(0, 1))
    return counts / max(len(values), 1), edges
