"""What all pictures share: colours, a canvas, names written as they are, saving.

matplotlib is imported inside the functions, and only its object interface is used: pyplot's global
state, backends and open-figure warnings stay out of training runs.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

DPI = 120
# A phone shows charts of NARROW_WIDTH inches at 360 CSS pixels, which it draws with two to three
# of its own pixels each.
NARROW_DPI = 200
WIDE_WIDTH, NARROW_WIDTH = 8.0, 4.2
LEGEND_FONT = 9.0  # points

# The palette of Okabe and Ito, which people with colour vision deficiencies can tell apart, without
# its black. LINE_COLORS also leaves out the yellow, too pale for lines on white.
ORANGE, SKY_BLUE, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"
BOX_COLORS = (ORANGE, SKY_BLUE, GREEN, YELLOW, VERMILLION, PURPLE, BLUE)
LINE_COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE, "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
# Of lines with markers, which are seen whole also where they lie on an axis.
UNCLIPPED: dict[str, Any] = {"clip_on": False, "zorder": 3}


@contextmanager
def plain_text() -> Iterator[None]:
    """Write what is made within as it is: a name with two ``$`` is no formula. Also a decorator."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def shorten(text: str, length: int) -> str:
    """Cut the middle of a text that has more characters: names differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def text_width(figure: "Figure", text: str, font_size: float) -> float:
    """The inches that a text takes."""
    drawn = figure.text(0, 0, text, fontsize=font_size)
    width = drawn.get_window_extent().width / figure.dpi
    drawn.remove()
    return width


def wrap_text(figure: "Figure", text: str, width: float, font_size: float) -> list[str]:
    """Part a text into lines of at most so many inches, words only where there is no other way."""
    lines, length = [text], len(text)
    while (widest := max(text_width(figure, line, font_size) for line in lines)) > width:
        if length == 1:
            break
        length = max(1, min(length - 1, int(length * width / widest)))
        lines = textwrap.wrap(text, length) or [text]
    return lines


def new_figure(width: float, height: float, dpi: int = DPI) -> "Figure":
    """An empty figure of that size in inches, which finds room for legends and labels itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_chart(narrow: bool) -> "Figure":
    """A figure as wide as a page or a phone, whose height is still to be set."""
    size = (NARROW_WIDTH, 1.0, NARROW_DPI) if narrow else (WIDE_WIDTH, 1.0)
    figure = new_figure(*size)
    figure.set_layout_engine("none")
    return figure


def add_axes(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    """Axes at a place given in inches from the lower left corner."""
    total_width, total_height = figure.get_size_inches()
    place = (
        left / total_width,
        bottom / total_height,
        width / total_width,
        height / total_height,
    )
    return figure.add_axes(place)


def stack_axes(figure: "Figure", heights: Sequence[float]) -> list["Axes"]:
    """Panels one above the other with a common horizontal axis, named at the lowest only.

    Args:
        figure: its height is set to what the panels need.
        heights: of the panels from top to bottom, in inches.
    """
    gap, left, top, bottom = 0.22, 0.75, 0.15, 0.55
    width = figure.get_figwidth() - left - 0.2
    total = top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure.set_figheight(total)
    panels: list[Axes] = []
    place = total - top
    for height in heights:
        place -= height
        axes = add_axes(figure, left, place, width, height)
        axes.yaxis.set_label_coords(-0.55 / width, 0.5)
        if panels:
            axes.sharex(panels[0])
            panels[-1].tick_params(labelbottom=False)
        plain_frame(axes)
        panels.append(axes)
        place -= gap
    return panels


def plain_frame(axes: "Axes") -> None:
    """A pale grid, and no frame but the two axes."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_rate(axes: "Axes") -> None:
    """The vertical axis of a learning rate, from 0 and with short numbers such as 5e-4."""
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(
        lambda x, _: (
            f"{x:.1e}".replace(".0e-0", "e-").replace("e-0", "e-") if 0 < x < 0.00999 else f"{x:g}"
        )
    )


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th line of several; 28 differ."""
    return {
        "color": LINE_COLORS[index % len(LINE_COLORS)],
        "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)],
    }


def add_legend(
    figure: "Figure",
    styles: Sequence[dict[str, Any]],
    labels: Sequence[str],
    *,
    width: float | None = None,
    title: str | None = None,
) -> tuple["Legend", float, float]:
    """A legend in as many columns as fit, at most four, to be put into its place by `place_legend`.

    Args:
        figure: what to add it to.
        styles: of the lines, as `Line2D` takes them.
        labels: their names.
        width: inches to fit the legend into, if one column does; None for one column.
        title: of the legend.

    Returns:
        The legend, its width and its height in inches.
    """
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **style) for style in styles]
    most = 1 if width is None else min(len(labels), 4)
    for columns in range(most, 0, -1):
        legend = figure.legend(
            lines,
            labels,
            loc="upper left",
            ncols=columns,
            fontsize=LEGEND_FONT,
            title=title,
            title_fontsize=LEGEND_FONT,
            alignment="left",
            frameon=False,
            handlelength=2.3,
            handletextpad=0.6,
            labelspacing=0.3,
            columnspacing=1.0,
            borderpad=0.0,
            borderaxespad=0.0,
        )
        box = legend.get_window_extent()
        if columns == 1 or width is None or box.width <= width * figure.dpi:
            break
        legend.remove()
    return legend, box.width / figure.dpi, box.height / figure.dpi


def place_legend(figure: "Figure", legend: "Legend", left: float, top: float) -> None:
    """Move a legend's upper left corner to a place in inches from the figure's lower left one."""
    legend.set_bbox_to_anchor((left, top), transform=figure.dpi_scale_trans)


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write the figure in the format of the path's ending and return the path.

    Its folder is made where missing; without an ending it is a PNG file and gets ``.png``.
    """
    path = Path(path)
    if path.suffix in ("", "."):
        path = path.with_name(f"{path.name.rstrip('.')}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi="figure")
    return path


def message_figure(message: str) -> "Figure":
    """A figure that only says something, for input with nothing to draw."""
    figure = new_figure(5, 2)
    figure.text(0.5, 0.5, message, ha="center", va="center", color=GREY)
    return figure
