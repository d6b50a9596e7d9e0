"""One chart of where a detector fails: its best detections, the price of errors, what it misses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from detmix.evaluation.errors.result import KINDS, SIZES, ErrorAnalysis, label_of
from detmix.evaluation.results import ap_text
from detmix.pictures import style

_MAX_CLASSES, _LEAST_ROWS = 24, 12  # of the panel of classes
_ROW = 0.235  # inches
_LONGEST_NAME = 20  # characters
_FONT = 9
_COLORS = {
    "correct": style.GREEN,
    "localization": style.ORANGE,
    "duplicate": style.YELLOW,
    "similar_class": style.SKY_BLUE,
    "other_class": style.BLUE,
    "background": style.GREY,
}
_BAR: dict[str, Any] = {"height": 0.78, "edgecolor": "white", "linewidth": 0.6}
_LEGEND: dict[str, Any] = {  # above the panel, with its title
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "alignment": "left",
    "borderaxespad": 0.3,
    "handlelength": 1.3,
    "columnspacing": 1.2,
}


@style.styled
def plot_errors(analysis: ErrorAnalysis, path: str | Path) -> Path:
    """Draw kinds of errors by class, what each costs and what is missed.

    Of each class the best N detections are drawn, N being its objects, difficult ones left out; a
    class with fewer detections has a shorter bar, one without objects none. Of more than 24 classes
    only those are drawn that lack most correct detections, by number.
    """
    num = {name: num for name, num in analysis.num_objects.items() if num}
    correct = {name: analysis.counts["top_n"][name]["correct"] for name in num}
    lacking = sorted(num, key=lambda name: (correct[name] - num[name], name))[:_MAX_CLASSES]
    names = sorted(lacking, key=lambda name: (-correct[name] / num[name], name))
    title = "best N detections of each class (N: its objects)"
    if len(names) < len(num):
        title += f",\nof the {len(names)} classes with most errors out of {len(num)}"
    figure = style.new_figure(9, _ROW * max(len(names), _LEAST_ROWS) + 1.1)
    panels = figure.subplot_mosaic("CG;CM", width_ratios=[1.4, 1], height_ratios=[5, 6])
    _draw_classes(panels["C"], analysis, names)
    panels["C"].legend(title=title, ncols=3, **_LEGEND)
    _draw_gains(panels["G"], analysis)
    _draw_missed(panels["M"], analysis)
    return style.save_figure(figure, path)


def _draw_classes(axes: Axes, analysis: ErrorAnalysis, names: Sequence[str]) -> None:
    """A stacked bar for each class, its share of correct detections and N beside it."""
    counts = [analysis.counts["top_n"][name] for name in names]
    num = np.array([analysis.num_objects[name] for name in names])
    start = np.zeros(len(names))
    for outcome, color in _COLORS.items():
        share = np.array([of_class[outcome] for of_class in counts]) / num
        label = label_of(outcome)
        axes.barh(range(len(names)), share, left=start, color=color, label=label, **_BAR)
        start += share
    texts = [f"{c['correct'] / n:.0%} of {n:,}" for c, n in zip(counts, num, strict=True)]
    _name_rows(axes, [style.shorten(name, _LONGEST_NAME) for name in names], texts, _LEAST_ROWS)


def _draw_gains(axes: Axes, analysis: ErrorAnalysis) -> None:
    """How much mean AP would gain without each kind of error."""
    axes.set_title(f"mean AP {ap_text(analysis.mean_ap)} would gain without")
    gains = [analysis.ap_gain[kind] for kind in KINDS]
    longest = max(*gains, 0.01)
    shares = [gain / longest for gain in gains]
    axes.barh(range(len(KINDS)), shares, color=[_COLORS[kind] for kind in KINDS], **_BAR)
    _name_rows(axes, list(map(label_of, KINDS)), [f"{gain:.3f}" for gain in gains])


def _draw_missed(axes: Axes, analysis: ErrorAnalysis) -> None:
    """The share of objects missed by size, of sizes of which there are objects."""
    missed = {
        size + suffix: by_size[size]
        for suffix, by_size in (("", analysis.missed), (", difficult", analysis.missed_difficult))
        for size in SIZES
        if by_size[size].objects
    }
    of_size, rows = missed.values(), range(len(missed))
    by_all, shown = [m.share for m in of_size], [m.share_at_best_f1 for m in of_size]
    axes.barh(rows, shown, color="#F3C9AE", label="found only below the best F1", **_BAR)
    axes.barh(rows, by_all, color=style.VERMILLION, label="found by no detection", **_BAR)
    axes.legend(title="objects missed, by size", reverse=True, **_LEGEND)
    _name_rows(axes, list(missed), [f"{m.share_at_best_f1:.0%} of {m.objects:,}" for m in of_size])


def _name_rows(axes: Axes, names: Sequence[str], texts: Sequence[str], least: int = 1) -> None:
    """Name the rows of bars up to a length of 1, the first above, and write a text after each."""
    axes.set(xlim=(0, 1), xticks=[], ylim=(max(len(names), least) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names, fontsize=_FONT)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    after: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
    for row, text in enumerate(texts):
        axes.annotate(text, (1, row), **after, va="center_baseline", fontsize=_FONT)
