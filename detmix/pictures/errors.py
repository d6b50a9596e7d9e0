"""One chart of where a detector fails: its best detections, the price of errors, what it misses."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detmix.evaluation.errors.result import KINDS, SIZES, ErrorAnalysis, label_of
from detmix.evaluation.voc.result import ap_text
from detmix.pictures.style import (
    BLUE,
    GREEN,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    YELLOW,
    message_figure,
    new_figure,
    plain_text,
    save_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CLASSES, _LEAST_ROWS = 24, 12  # rows of the panel of classes
_ROW = 0.235  # inches
_LONGEST_NAME = 20  # characters
_FONT = 9
_COLORS = {
    "correct": GREEN,
    "localization": ORANGE,
    "duplicate": YELLOW,
    "similar_class": SKY_BLUE,
    "other_class": BLUE,
    "background": "#BBBBBB",
}
_BAR: dict[str, Any] = {"height": 0.78, "edgecolor": "white", "linewidth": 0.6}


@plain_text()
def plot_errors(analysis: ErrorAnalysis, path: str | Path) -> Path:
    """Draw what each class's best N detections are, what each kind of error costs, what is missed.

    N is the number of the class's objects, difficult ones left out; a class without is not drawn,
    and one with fewer detections than N has a shorter bar. Classes are sorted by their share of
    correct detections. Of more than 24 only those are drawn that lack most correct detections, by
    number.

    Args:
        analysis: of `analyze_errors`.
        path: picture to write; its ending chooses the format.

    Returns:
        The path written.
    """
    num = {name: num for name, num in analysis.num_objects.items() if num}
    if not num:
        return save_figure(message_figure("no objects to detect"), path)
    correct = {name: analysis.counts["top_n"][name]["correct"] for name in num}
    lacking = sorted(num, key=lambda name: (correct[name] - num[name], name))[:_MAX_CLASSES]
    names = sorted(lacking, key=lambda name: (-correct[name] / num[name], name))
    title = "best N detections of each class (N: its objects)"
    if len(names) < len(num):
        title = f"best N detections (N: objects) of the {len(names)} classes"
        title += f"\nwith most errors out of {len(num)}"
    rows = max(len(names), _LEAST_ROWS)
    figure = new_figure(9, _ROW * rows + 1.3)
    panels = figure.subplot_mosaic(
        [["classes", "gains"], ["classes", "missed"]], width_ratios=[1.4, 1], height_ratios=[5, 6]
    )
    panels["classes"].set_title(title, loc="left", fontsize=10)
    _draw_classes(panels["classes"], analysis, names, rows)
    _draw_gains(panels["gains"], analysis)
    _draw_missed(panels["missed"], analysis)
    return save_figure(figure, path)


def _draw_classes(axes: "Axes", analysis: ErrorAnalysis, names: Sequence[str], rows: int) -> None:
    """A stacked bar for each class, its share of correct detections and N beside it."""
    counts = [analysis.counts["top_n"][name] for name in names]
    num = np.array([analysis.num_objects[name] for name in names])
    start = np.zeros(len(names))
    for outcome, color in _COLORS.items():
        share = np.array([of_class[outcome] for of_class in counts]) / num
        label = label_of(outcome)
        axes.barh(range(len(names)), share, left=start, color=color, label=label, **_BAR)
        start += share
    _name_rows(axes, [shorten(name, _LONGEST_NAME) for name in names], rows)
    axes.set(xlim=(0, 1), xticks=[])
    for row, of_class in enumerate(counts):
        _write(axes, row, f"{of_class['correct'] / num[row]:.0%} of {num[row]:,}")
    axes.legend(ncols=3, **_legend_below(axes, len(names)))


def _draw_gains(axes: "Axes", analysis: ErrorAnalysis) -> None:
    """How much mean AP would gain without each kind of error."""
    title = f"mean AP {ap_text(analysis.mean_ap)} would gain without"
    axes.set_title(title, loc="left", fontsize=10)
    gains = [analysis.ap_gain[kind] for kind in KINDS]
    bars = axes.barh(range(len(KINDS)), gains, color=[_COLORS[kind] for kind in KINDS], **_BAR)
    axes.bar_label(bars, [f"{gain:.3f}" for gain in gains], padding=4, fontsize=_FONT)
    _name_rows(axes, list(map(label_of, KINDS)), len(KINDS))
    axes.set(xlim=(0, 1.25 * max(*gains, 0.01)), xticks=[])


def _draw_missed(axes: "Axes", analysis: ErrorAnalysis) -> None:
    """The share of objects missed by size, of sizes of which there are objects."""
    axes.set_title("objects missed, by size", loc="left", fontsize=10)
    kinds = (("", analysis.missed), (", difficult", analysis.missed_difficult))
    missed = {
        size + suffix: by_size[size]
        for suffix, by_size in kinds
        for size in SIZES
        if by_size[size].objects
    }
    rows = range(len(missed))
    shown, all_found = (
        [getattr(one, share) for one in missed.values()] for share in ("share_at_best_f1", "share")
    )
    axes.barh(rows, shown, color="#F3C9AE", label="found only below the best F1", **_BAR)
    axes.barh(rows, all_found, color=VERMILLION, label="found by no detection", **_BAR)
    for row, one in enumerate(missed.values()):
        _write(axes, row, f"{one.share_at_best_f1:.0%} of {one.objects:,}")
    _name_rows(axes, list(missed), len(missed))
    axes.set(xlim=(0, 1), xticks=[])
    axes.legend(reverse=True, **_legend_below(axes, len(missed)))


def _name_rows(axes: "Axes", labels: Sequence[str], rows: int) -> None:
    """Name the rows, the first above; there is room for so many."""
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=_FONT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_bounds(-0.5, len(labels) - 0.5)


def _legend_below(axes: "Axes", rows: int) -> dict[str, Any]:
    place = {"bbox_to_anchor": (0, rows - 0.4), "bbox_transform": axes.transData}
    look = {"fontsize": _FONT, "frameon": False, "handlelength": 1.3, "columnspacing": 1.2}
    return {"loc": "upper left", "borderpad": 0, "borderaxespad": 0.3, **place, **look}


def _write(axes: "Axes", row: int, text: str) -> None:
    """Write to the right of where a bar of the length 1 ends."""
    axes.annotate(
        text, (1, row), (4, 0), textcoords="offset points", va="center_baseline", fontsize=_FONT
    )
