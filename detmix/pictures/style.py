"""What all pictures share: colours, matplotlib's settings, a figure, saving it.

Only matplotlib's object interface is used: pyplot's global state, backends and open-figure warnings
stay out of training runs.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.5  # inches, of a chart: with these sizes of letters it can be read on a phone

# The palette of Okabe and Ito, which people with colour vision deficiencies can tell apart, without
# its black.
ORANGE, SKY_BLUE, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
BOX_COLORS = (ORANGE, SKY_BLUE, GREEN, YELLOW, VERMILLION, PURPLE, BLUE)
LINE_COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE, "black")  # yellow is too pale
GREY = "#BBBBBB"  # what does not count; light enough to stand out from dark images

styled = rc_context(
    {
        "text.parse_math": False,  # a name with two $ is no formula
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.title_fontsize": 10,
        "legend.edgecolor": "none",
        "legend.labelspacing": 0.3,
    }
)
"""Decorates what draws a picture."""


def shorten(text: str, length: int) -> str:
    """Cut the middle of a text that has more characters: names differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    figure = Figure((width, height))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure in the format of the path's ending and return the path."""
    path = Path(path)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
