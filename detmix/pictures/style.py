"""What all pictures share: colours, a canvas, names written as they are, saving.

matplotlib is imported inside the functions, and only its object interface is used: pyplot's global
state, backends and open-figure warnings stay out of training runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
WIDE_WIDTH = 8.0  # inches

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


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches, which finds room for legends and labels itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_frame(axes: "Axes") -> None:
    """A pale grid, and no frame but the two axes."""
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th line of several; 28 differ."""
    return {
        "color": LINE_COLORS[index % len(LINE_COLORS)],
        "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)],
    }


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write the figure in the format of the path's ending and return the path."""
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
