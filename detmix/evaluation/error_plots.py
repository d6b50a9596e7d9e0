"""One chart of where a detector fails: its best detections, the price of errors, what it misses.

Places and lengths are in inches; ``top`` counts from the figure's upper edge downwards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detmix.evaluation.error_result import (
    KINDS,
    SIZES,
    ErrorAnalysis,
    MissedObjects,
    label_of,
)
from detmix.evaluation.figures import (
    BLUE,
    DPI,
    GREEN,
    NARROW_DPI,
    NARROW_WIDTH,
    ORANGE,
    SKY_BLUE,
    VERMILLION,
    YELLOW,
    add_axes,
    message_figure,
    new_figure,
    plain_text,
    save_figure,
    shorten,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE_WIDTH = 9.0
_MAX_CLASSES = 24
_MAX_BELOW = 8  # with more classes than this the other panels stand beside theirs, not below
_MARGIN, _GAP, _ROW, _LINE, _AXIS = 0.12, 0.3, 0.235, 0.19, 0.33
_MAX_NAME = 0.3  # of the panel's width
_FONT = 9

# Hatching keeps apart what colours alone might not.
_STYLES: dict[str, dict[str, Any]] = {
    "correct": {"facecolor": GREEN},
    "localization": {"facecolor": ORANGE},
    "duplicate": {"facecolor": YELLOW, "hatch": "xxxx"},
    "similar_class": {"facecolor": SKY_BLUE, "hatch": "////"},
    "other_class": {"facecolor": BLUE},
    "background": {"facecolor": "#BBBBBB", "hatch": "...."},
}
_NEVER_FOUND: dict[str, Any] = {"facecolor": VERMILLION}
_FOUND_BELOW: dict[str, Any] = {"facecolor": "#F3C9AE", "hatch": "////"}
_BAR: dict[str, Any] = {"height": 0.78, "edgecolor": "white", "linewidth": 0.6}

Place = tuple[float, float, float]  # left, top, width
MissedRows = list[tuple[str, MissedObjects]]


@plain_text()
def plot_errors(analysis: ErrorAnalysis, path: str | Path, *, narrow: bool = False) -> Path:
    """Draw what each class's best N detections are, what each kind of error costs, what is missed.

    N is the number of the class's objects, difficult ones left out; a class without is not drawn,
    and one with fewer detections than N has a shorter bar. Classes are sorted by their share of
    correct detections. Of more than 24 only those are drawn that lack most correct detections, by
    number.

    Args:
        analysis: of `analyze_errors`.
        path: picture to write; its ending chooses the format.
        narrow: lay it out for a phone, all panels below one another.

    Returns:
        The path written.
    """
    num_with_objects = sum(num > 0 for num in analysis.num_objects.values())
    if not num_with_objects:
        return save_figure(message_figure("no objects to detect"), path)
    names = _chosen(analysis)
    title = "best N detections of each class (N: its objects)"
    if len(names) < num_with_objects:
        title = f"best N detections (N: objects) of the {len(names)} classes"
        title += f"\nwith most errors out of {num_with_objects}"
    missed = _missed_rows(analysis)
    side_by_side = len(names) > _MAX_BELOW
    legend_lines = 3 if narrow else 2 if side_by_side else 1
    heights = (
        _ROW * len(names) + _AXIS + _LINE * (title.count("\n") + 2.3 + legend_lines),
        _ROW * len(KINDS) + _LINE * 1.4,
        _ROW * len(missed) + _LINE * 3.7,
    )
    (width, height), places = _layout(*heights, narrow, side_by_side)
    figure = new_figure(width, height, NARROW_DPI if narrow else DPI)
    _draw_classes(figure, places[0], analysis, names, title)
    _draw_gains(figure, places[1], analysis)
    _draw_missed(figure, places[2], missed)
    return save_figure(figure, path)


def _layout(
    classes: float, gains: float, missed: float, narrow: bool, side_by_side: bool
) -> tuple[tuple[float, float], tuple[Place, Place, Place]]:
    """The figure's size and the places of its panels, which are so high."""
    left, top = _MARGIN, _MARGIN
    if narrow:
        width = NARROW_WIDTH - 2 * _MARGIN
        second = top + classes + _GAP
        third = second + gains + _GAP
        places = (left, top, width), (left, second, width), (left, third, width)
        return (NARROW_WIDTH, third + missed + _MARGIN), places
    if side_by_side:
        width, right = 5.1, 5.4
        second = top + gains + _GAP
        rest = _WIDE_WIDTH - right - _MARGIN
        places = (left, top, width), (right, top, rest), (right, second, rest)
        return (_WIDE_WIDTH, max(top + classes, second + missed) + _MARGIN), places
    width, half = _WIDE_WIDTH - 2 * _MARGIN, _WIDE_WIDTH / 2 - 2 * _MARGIN
    second = top + classes + _GAP
    right = left + half + 2 * _MARGIN
    places = (left, top, width), (left, second, half), (right, second, half)
    return (_WIDE_WIDTH, second + max(gains, missed) + _MARGIN), places


def _chosen(analysis: ErrorAnalysis) -> list[str]:
    """The classes to draw, by decreasing share of correct detections."""
    correct = {name: counts["correct"] for name, counts in analysis.counts["top_n"].items()}
    num = {name: num for name, num in analysis.num_objects.items() if num}
    lacking = sorted(num, key=lambda name: (correct[name] - num[name], name))
    return sorted(lacking[:_MAX_CLASSES], key=lambda name: (-correct[name] / num[name], name))


def _missed_rows(analysis: ErrorAnalysis) -> MissedRows:
    """Sizes of which there are objects."""
    return [
        (size + suffix, by_size[size])
        for suffix, by_size in (
            ("", analysis.missed),
            (", difficult", analysis.missed_difficult),
        )
        for size in SIZES
        if by_size[size].objects
    ]


def _draw_classes(
    figure: "Figure", place: Place, analysis: ErrorAnalysis, names: list[str], title: str
) -> None:
    """A stacked bar for each class, its share of correct detections and N beside it."""
    left, top, width = place
    _title(figure, place, title)
    top += _LINE * (title.count("\n") + 2.3)
    counts = [analysis.counts["top_n"][name] for name in names]
    num = np.array([analysis.num_objects[name] for name in names])
    after_correct = _width(figure, ["correct"]) + 0.1
    after_num = after_correct + max(_width(figure, [f"{n:,}" for n in num]) + 0.1, 0.45)
    labels = [_shortened(figure, name, _MAX_NAME * width) for name in names]
    axes = _rows(figure, (left, top, width), labels, after_num)
    start = np.zeros(len(names))
    for outcome, style in _STYLES.items():
        share = np.array([of_class[outcome] for of_class in counts]) / num
        axes.barh(range(len(names)), share, left=start, **_BAR, **style)
        start += share
    for row, of_class in enumerate(counts):
        _write(axes, 1, row, f"{of_class['correct'] / num[row]:.0%}", after_correct, "right")
        _write(axes, 1, row, f"{num[row]:,}", after_num, "right")
    _write(axes, 1, -0.95, "correct", after_correct, "right")
    _write(axes, 1, -0.95, "N", after_num, "right")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"], fontsize=_FONT)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    styles = {label_of(outcome): style for outcome, style in _STYLES.items()}
    _legend(figure, left, top + _ROW * len(names) + _AXIS, styles, max(2, int(width / 1.4)))


def _draw_gains(figure: "Figure", place: Place, analysis: ErrorAnalysis) -> None:
    """How much mean AP would gain without each kind of error."""
    left, top, width = place
    _title(figure, place, f"mean AP {analysis.mean_ap:.3f} would gain without")
    labels = [label_of(kind) for kind in KINDS]
    axes = _rows(figure, (left, top + _LINE * 1.4, width), labels, 0.5)
    axes.set_xlim(0, max(*analysis.ap_gain.values(), 0.01))
    for row, kind in enumerate(KINDS):
        gain = analysis.ap_gain[kind]
        axes.barh(row, gain, **_BAR, **_STYLES[kind])
        _write(axes, gain, row, f"{gain:.3f}", 0.06)


def _draw_missed(figure: "Figure", place: Place, rows: MissedRows) -> None:
    """The share of objects missed by size."""
    left, top, width = place
    _title(figure, place, "objects missed, by size")
    top += _LINE * 1.4
    texts = [f"{missed.share_at_best_f1:.0%} of {missed.objects:,}" for _, missed in rows]
    labels, room = [label for label, _ in rows], max(_width(figure, texts) + 0.06, 1)
    axes = _rows(figure, (left, top, width), labels, room)
    for row, (_, missed) in enumerate(rows):
        axes.barh(row, missed.share_at_best_f1, **_BAR, **_FOUND_BELOW)
        axes.barh(row, missed.share, **_BAR, **_NEVER_FOUND)
        _write(axes, 1, row, texts[row], 0.06)
    axes.axvline(1, color="#dddddd", linewidth=0.6)
    styles = {
        "found by no detection": _NEVER_FOUND,
        "found only below the best-F1 score": _FOUND_BELOW,
    }
    _legend(figure, left, top + _ROW * len(rows) + 0.08, styles, 1)


def _title(figure: "Figure", place: Place, text: str) -> None:
    left, top, _ = place
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, fontsize=10, va="top", linespacing=1.3)


def _width(figure: "Figure", texts: Sequence[str]) -> float:
    """What the longest of some texts takes."""
    return max((text_width(figure, text, _FONT) for text in texts), default=0.0)


def _shortened(figure: "Figure", text: str, width: float) -> str:
    length = len(text)
    while length > 1 and _width(figure, [shorten(text, length)]) > width:
        length -= 1
    return shorten(text, length)


def _rows(figure: "Figure", place: Place, labels: Sequence[str], room: float) -> "Axes":
    """Axes with a row for each label, the first above, that leave room for texts beside them."""
    left, top, width = place
    label_width = _width(figure, labels) + 0.06
    height = _ROW * len(labels)
    bottom = figure.get_figheight() - top - height
    axes = add_axes(figure, left + label_width, bottom, width - label_width - room, height)
    axes.set(xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(labels)), labels, fontsize=_FONT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return axes


def _write(
    axes: "Axes", x: float, row: float, text: str, inches: float, align: str = "left"
) -> None:
    """Write beside a place of a row, so far to its right."""
    axes.annotate(
        text,
        (x, row),
        xytext=(72 * inches, 0),
        textcoords="offset points",
        ha=align,
        va="center_baseline",
        fontsize=_FONT,
        annotation_clip=False,
    )


def _legend(
    figure: "Figure", left: float, top: float, styles: dict[str, dict[str, Any]], columns: int
) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        [Patch(**style, edgecolor="white") for style in styles.values()],
        list(styles),
        loc="upper left",
        bbox_to_anchor=(left, figure.get_figheight() - top),
        bbox_transform=figure.dpi_scale_trans,
        ncols=columns,
        fontsize=_FONT,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.2,
        borderpad=0.0,
        borderaxespad=0.0,
    )
