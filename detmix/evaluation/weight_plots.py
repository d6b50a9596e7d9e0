"""The weights that mixing gives to boxes, as a histogram.

Shape legend: N boxes.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detmix.evaluation.figures import (
    BLUE,
    GREY,
    SKY_BLUE,
    VERMILLION,
    add_axes,
    message_figure,
    new_chart,
    plain_frame,
    plain_text,
    save_figure,
    wrap_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 25
_FONT_SIZE, _LINE = 10.0, 0.2  # points, inches
# Drawn to know the share that is expected in a bin, of some per cent, to a fiftieth of one.
_DRAWS = 1_000_000


@plain_text()
def plot_box_weights(
    weights: npt.ArrayLike,
    path: str | Path,
    *,
    title: str | None = None,
    alpha: float | None = None,
    narrow: bool = False,
) -> Path:
    """Draw how often boxes have which weight, and apart from that how many have weight 1.

    Boxes that are not mixed weigh 1, and so do those that CutMix leaves whole.

    Args:
        weights: ``(N,)`` box weights in (0, 1], an array or a CPU tensor.
        path: picture to write; its ending chooses the format.
        title: put before the number of boxes.
        alpha: draw what mixup with a ratio from Beta(alpha, alpha) is expected to give. A box of
            the first image weighs λ, one of the second 1 - λ, and both are distributed alike
            whatever the images hold, Beta(alpha, alpha) being symmetric. Not for CutMix, whose
            weights are visible shares.
        narrow: lay it out for a phone.

    Returns:
        The path written.

    Raises:
        ValueError: if ``weights`` is not one-dimensional, one of them lies outside (0, 1], or
            ``alpha`` is not positive.
    """
    values = _checked(weights)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if len(values) == 0:
        return save_figure(message_figure("no boxes to weigh"), path)
    figure = new_chart(narrow)
    heading = [f"{len(values):,} boxes, mean weight {values.mean():.3f}"]
    if title is not None:
        lines = [title, *heading] if narrow else [f"{title}: {heading[0]}"]
        room = figure.get_figwidth() - 0.3
        heading = [part for line in lines for part in wrap_text(figure, line, room, _FONT_SIZE)]
    height, left = 4.0 + _LINE * max(2, len(heading)), 0.75
    figure.set_figheight(height)
    width = figure.get_figwidth() - left - 0.2
    place = (0.15 / figure.get_figwidth(), 1 - 0.12 / height)
    figure.text(*place, "\n".join(heading), va="top", fontsize=_FONT_SIZE)
    _draw_shares(add_axes(figure, left, 3.3, width, 0.3), float((values < 1).mean()))
    axes = add_axes(figure, left, 0.55, width, 2.5)
    _draw_histogram(axes, values[values < 1], alpha)
    axes.yaxis.set_label_coords(-0.55 / width, 0.5)
    return save_figure(figure, path)


def _checked(weights: npt.ArrayLike) -> npt.NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"weights have shape {values.shape}, expected (N,)")
    bad = np.flatnonzero(~((values > 0) & (values <= 1)))
    if len(bad):
        raise ValueError(f"weights[{bad[0]}] is {values[bad[0]]:g}, expected above 0, at most 1")
    return values


def _draw_shares(axes: "Axes", share_below: float) -> None:
    """Draw all boxes as one bar, parted into those below weight 1 and those of weight 1."""
    parts = ((0.0, share_below, BLUE), (share_below, 1.0 - share_below, SKY_BLUE))
    for left, width, color in parts:
        axes.barh(0, width, left=left, height=1, color=color, edgecolor="white")
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.set_axis_off()
    for place, side, name, share in (
        (0.0, "left", "weight below 1", share_below),
        (1.0, "right", "weight 1", 1.0 - share_below),
    ):
        axes.text(place, 0.65, f"{name}: {100 * share:.1f} %", ha=side, va="bottom", fontsize=10)


def _draw_histogram(axes: "Axes", values: npt.NDArray[np.float64], alpha: float | None) -> None:
    shares, edges = _shares(values)
    axes.stairs(shares, edges, fill=True, color=BLUE)
    highest = shares.max()
    if alpha is not None:
        expected, _ = _shares(np.random.default_rng(0).beta(alpha, alpha, _DRAWS))
        label = f"mixup: Beta({alpha:g}, {alpha:g})"
        axes.stairs(expected, edges, baseline=None, color=VERMILLION, linewidth=2, label=label)
        highest = max(highest, expected.max())
        axes.legend(loc="upper right", fontsize=9, frameon=False)
    axes.set(xlim=(0, 1), ylim=(0, min(1.25 * highest, 1.02) or 1.02))
    axes.set_xlabel("weight below 1")
    axes.set_ylabel("share of these boxes")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    plain_frame(axes)
    if len(values) == 0:
        axes.text(0.5, 0.5, "no box weighs less than 1", ha="center", color=GREY)


def _shares(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return what share of the values lies in each bin, and the bins' edges."""
    counts, edges = np.histogram(values, bins=_BINS, range=(0, 1))
    return counts / max(len(values), 1), edges
