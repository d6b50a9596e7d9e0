"""What all pictures share: colours, matplotlib's settings, a figure, saving it.

Only matplotlib's object interface is used: pyplot's global state, backends and open-figure warnings
stay out of training runs.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import ImageFont

WIDTH = 7.5  # inches, of a chart: with these sizes of letters it can be read on a phone

# The palette of Okabe and Ito, which people with colour vision deficiencies can tell apart, without
# its black.
ORANGE, SKY_BLUE, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
# Of classes by their index. After the first six each is the farthest from all before it, in OKLab,
# for people with and without such deficiencies (Machado et al., 2009), neither pale nor near black.
CLASS_COLORS = (
    *(ORANGE, SKY_BLUE, GREEN, VERMILLION, BLUE, PURPLE, "#661133", "#2200AA", "#8800FF"),
    *("#88DD99", "#555500", "#994466", "#9977FF", "#550077", "#CC11AA", "#BBAA99", "#5511CC"),
    *("#33DDFF", "#773388", "#FF4477"),
)
GREY = "#BBBBBB"

styled = rc_context(
    {
        "text.parse_math": False,  # a name with two $ is no formula
        "figure.dpi": 120,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.wspace": 0.05,
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


def font_size(width: int) -> int:
    """The size of letters on a picture of that width, in pixels."""
    return max(14, round(width / 40))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, in pixels."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut the middle of a text until it is no wider: names differ at their ends."""
    text = fitting = " ".join(text.split())
    for length in range(len(text) - 1, 0, -1):
        if font.getlength(fitting) <= width:
            break
        tail = (length - 1) // 2
        fitting = f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"
    return fitting


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    figure = Figure((width, height))
    FigureCanvasAgg(figure)
    return figure


def save(write: Callable[[Path], object], path: str | Path) -> Path:
    """Have a picture written in the format of the path's ending and return the path."""
    path = Path(path)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path
