"""A grid of panels for pictures of any shape, with room for a title and a legend over each.

matplotlib is imported inside the functions, as in `detmix.evaluation.figures`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from detmix.evaluation.boxes import cut_to_width
from detmix.evaluation.figures import DPI, NARROW_DPI, add_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

LINE = 0.17  # inches, of a title
HEADER = 0.2  # inches
_PANEL_WIDTH = 3.9  # inches
_MARGIN, _GAP, _TITLE_GAP = 0.12, 0.12, 0.1
_MOST_HEIGHT = 1.34  # of a panel in its widths: 4:3 upright just fits
_LEAST_HEIGHT = 0.36  # inches, of a panel: two labels
_FONT_SIZE = 9.0
_KEY_STYLE: dict[str, Any] = {
    "frameon": False,
    "fontsize": _FONT_SIZE,
    "handlelength": 0.9,
    "handleheight": 0.8,
    "handletextpad": 0.5,
    "labelspacing": 0.25,
}


def make_grid(
    pictures: Sequence[NDArray[Any]],
    columns: int,
    title_lines: Sequence[int],
    *,
    header: float = 0.0,
) -> "tuple[Figure, list[Axes]]":
    """A figure with one panel for each picture; a row is as high as its highest picture needs.

    Args:
        pictures: ``(H, W, 3)`` each.
        columns: how many panels side by side.
        title_lines: for each panel how many lines go above it.
        header: inches to leave above all.
    """
    columns = min(columns, len(pictures))
    aspects = [picture.shape[0] / picture.shape[1] for picture in pictures]
    starts = range(0, len(pictures), columns)
    heights = [
        max(_PANEL_WIDTH * min(max(aspects[at : at + columns]), _MOST_HEIGHT), _LEAST_HEIGHT)
        for at in starts
    ]
    titles = [LINE * max(title_lines[at : at + columns]) + _TITLE_GAP for at in starts]
    figure = new_figure(
        2 * _MARGIN + columns * _PANEL_WIDTH + (columns - 1) * _GAP,
        2 * _MARGIN + header + sum(heights) + sum(titles) + (len(starts) - 1) * _GAP,
        NARROW_DPI if columns == 1 else DPI,
    )
    panels, top = [], figure.get_size_inches()[1] - _MARGIN - header
    for start, height, title in zip(starts, heights, titles, strict=True):
        bottom = top - title - height
        for column in range(len(pictures[start : start + columns])):
            left = _MARGIN + column * (_PANEL_WIDTH + _GAP)
            axes = add_axes(figure, left, bottom, _PANEL_WIDTH, height)
            axes.set_anchor("NW")
            panels.append(axes)
        top = bottom - _GAP
    return figure, panels


def check_columns(columns: int | None, default: int, *, step: int = 1) -> int:
    """Return how many panels go side by side.

    Args:
        columns: what the caller asked for, None for the default.
        default: what to take then.
        step: of which the number must be a multiple, unless it is 1.

    Raises:
        ValueError: any other number.
    """
    if columns is None:
        return default
    if columns < 1 or (columns > 1 and columns % step):
        expected = "at least 1" if step == 1 else f"1 or a multiple of {step}"
        raise ValueError(f"columns must be {expected}, got {columns}")
    return columns


def set_title(ax: "Axes", title: str, *, heading: str = "", heading_panels: int = 1) -> None:
    """Write above the upper left corner of a panel; what is too long loses its start.

    Args:
        ax: the panel.
        title: one line.
        heading: a bold line above it.
        heading_panels: how many panels wide that may be.
    """
    figure = _figure_of(ax)
    title_text = ax.set_title(title, loc="left", pad=4, fontsize=_FONT_SIZE)
    cut_to_width(title_text, _PANEL_WIDTH * figure.dpi)
    if not heading:
        return
    place = ax.get_position(original=True)
    above = (place.y1 * figure.get_size_inches()[1] + LINE + 4 / 72) / figure.get_size_inches()[1]
    text = figure.text(place.x0, above, heading, fontsize=_FONT_SIZE, fontweight="bold")
    width = heading_panels * _PANEL_WIDTH + (heading_panels - 1) * _GAP
    cut_to_width(text, width * figure.dpi)


def add_key(ax: "Axes", entries: Sequence[tuple[str, str | None]]) -> None:
    """Write a line for each entry above a panel, with a square of its colour before it.

    Args:
        ax: the panel.
        entries: pairs of a text and a colour; None for no square.
    """
    legend = ax.legend(
        handles=[_patch(*entry) for entry in entries],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderpad=0.25,
        borderaxespad=0,
        **_KEY_STYLE,
    )
    for text in legend.get_texts():
        cut_to_width(text, (_PANEL_WIDTH - 0.25) * _figure_of(ax).dpi)


def add_header(figure: "Figure", entries: Sequence[tuple[str, str | None]]) -> None:
    """Write what the colours stand for along the figure's upper edge, `HEADER` inches high."""
    width, height = figure.get_size_inches()
    figure.legend(
        handles=[_patch(*entry) for entry in entries],
        loc="upper left",
        bbox_to_anchor=(_MARGIN / width, 1 - _MARGIN / height),
        ncols=len(entries),
        columnspacing=1.2,
        borderpad=0,
        borderaxespad=0,
        **_KEY_STYLE,
    )


def _patch(label: str, color: str | None) -> "Patch":
    from matplotlib.patches import Patch

    if color is None:
        return Patch(facecolor="none", edgecolor="none", label=label)
    return Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=label)


def _figure_of(ax: "Axes") -> "Figure":
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
