"""What all figures share: colours, a canvas of exact size, saving.

matplotlib is imported inside the functions, and only its object interface is used: pyplot's global
state, backends and open-figure warnings stay out of training runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120

# The palette of Okabe and Ito, which people with colour vision deficiencies can tell apart, without
# its black. LINE_COLORS also leaves out the yellow, too pale for lines on white.
ORANGE, SKY_BLUE, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#666666"
BOX_COLORS = (ORANGE, SKY_BLUE, GREEN, YELLOW, VERMILLION, PURPLE, BLUE)
LINE_COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE, "#000000")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
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


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write the figure in the format of the path's ending; its folder is made where missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi="figure")
    return path


def message_figure(message: str) -> "Figure":
    """A figure that only says something, for input with nothing to draw."""
    figure = new_figure(5, 2)
    figure.text(0.5, 0.5, message, ha="center", va="center", color=GREY)
    return figure
