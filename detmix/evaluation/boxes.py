"""Drawing boxes with labels on an image, and finding a place for every label.

Shape legend: N boxes of one image of H x W pixels. Boxes are ``x1, y1, x2, y2`` in continuous pixel
coordinates: (0, 0) is the upper left corner of the upper left pixel. Labels are 1..C.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.figures import BOX_COLORS, DPI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

_LABEL_PAD = 0.2  # of the font size, around a label's text
_MAX_SHIFT = 3  # rows that a label may move from its box's corner to clear others
_HIDING_COST = 5.0  # of hiding an area of another label, against moving by as much
_MIN_FONT_SIZE = 2.0  # points


def draw_boxes(
    ax: "Axes",
    image: Tensor | NDArray[Any],
    boxes: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any],
    *,
    classes: Sequence[str],
    values: Sequence[float] | None = None,
    colors: Sequence[str] | None = None,
    dashed: Sequence[bool] | None = None,
    font_size: float = 8.0,
) -> None:
    """Draw an image and its boxes, each with its class name and value.

    A label goes to the box's upper left corner, or where it stays inside the image and clear of
    other labels. Its place is measured on the axes as they are: settle the figure's layout before.

    Args:
        ax: axes to draw on.
        image: ``(3, H, W)`` tensor, uint8 or float in [0, 1], or ``(H, W, 3)`` array.
        boxes: ``(N, 4)``.
        labels: ``(N,)`` in 1..C.
        classes: the C class names without the background.
        values: ``N`` numbers to write beside the names, to two decimals.
        colors: ``N`` colours; without them every class has its own.
        dashed: ``N`` flags.
        font_size: in points; a label wider than the image is made smaller.

    Raises:
        ValueError: an image of another shape, a label outside 1..C.
    """
    picture = as_picture("image", image) if isinstance(image, Tensor) else image
    boxes, labels = as_numpy(boxes).reshape(-1, 4), as_numpy(labels)
    names = class_names(labels, classes)
    if values is not None:
        names = [f"{name} {value:.2f}" for name, value in zip(names, values, strict=True)]
    if colors is None:
        colors = [BOX_COLORS[(int(label) - 1) % len(BOX_COLORS)] for label in labels]
    height, width = picture.shape[:2]
    ax.imshow(picture, extent=(0, width, height, 0))
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.apply_aspect()
    for index, box in enumerate(boxes):
        _draw_outline(ax, box, colors[index], dashed is not None and dashed[index])
    placed: list[Bbox] = []
    for name, box, color in zip(names, boxes, colors, strict=True):
        placed.append(_draw_label(ax, name, box, color, font_size, placed))


def _draw_outline(ax: "Axes", box: NDArray[Any], color: str, dashed: bool) -> None:
    """A coloured frame with a dark edge, moved inside where it lies on the image's border."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    (right, left), (bottom, top) = sorted(ax.get_xlim())[::-1], sorted(ax.get_ylim())[::-1]
    pixel = (right - left) / ax.get_window_extent().width
    x1, x2 = np.clip(box[[0, 2]], left + 1.5 * pixel, right - 1.5 * pixel)
    y1, y2 = np.clip(box[[1, 3]], top + 1.5 * pixel, bottom - 1.5 * pixel)
    ax.add_patch(
        Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=color,
            linewidth=1.6,
            linestyle=(0, (4, 2)) if dashed else "-",
            path_effects=[withStroke(linewidth=2.8, foreground="black")],
        )
    )


def _draw_label(
    ax: "Axes", name: str, box: NDArray[Any], color: str, font_size: float, placed: "list[Bbox]"
) -> "Bbox":
    """Write the label near its box; returns the place it takes in display pixels."""
    text = ax.text(
        0,
        0,
        name,
        fontsize=font_size,
        color="black" if _luminance(color) > 0.35 else "white",
        ha="left",
        va="bottom",
        bbox={"boxstyle": f"square,pad={_LABEL_PAD}", "facecolor": color, "linewidth": 0.4},
    )
    area = ax.get_window_extent()
    width, height, pad = _label_size(ax, text)
    while width > area.width and font_size > _MIN_FONT_SIZE:  # hinting: widths are not proportional
        font_size *= 0.95 * area.width / width
        text.set_fontsize(font_size)
        width, height, pad = _label_size(ax, text)
    corners = ax.transData.transform(box.reshape(2, 2))
    place = _best_place(corners, width, height, area, placed)
    x, y = ax.transData.inverted().transform((place.x0 + pad, place.y0 + pad))
    text.set_position((x, y))
    return place


def _label_size(ax: "Axes", text: "Text") -> tuple[float, float, float]:
    """Width and height of the label with its background, and the padding, in display pixels."""
    figure = ax.get_figure(root=True)
    dpi = DPI if figure is None else figure.dpi
    pad = _LABEL_PAD * float(text.get_fontsize()) * dpi / 72
    extent = text.get_window_extent()
    return extent.width + 2 * pad, extent.height + 2 * pad, pad


def _best_place(
    corners: NDArray[np.float64], width: float, height: float, area: "Bbox", placed: "list[Bbox]"
) -> "Bbox":
    """The place inside the image that hides other labels least; earlier candidates win ties.

    ``corners (2, 2)`` are the box's in display pixels, where y grows upwards.
    """
    from matplotlib.transforms import Bbox

    left, right = sorted(corners[:, 0])
    bottom, top = sorted(corners[:, 1])
    inside_left, inside_right = (left, top - height), (right - width, top - height)
    candidates = [(left, top), inside_left, (right - width, top), inside_right]
    candidates += [(left, bottom - height), (right - width, bottom - height)]
    for row in range(1, _MAX_SHIFT + 1):
        candidates += [(x, top + row * height) for x in (left, right - width)]
        candidates += [(x, top - (row + 1) * height) for x in (left, right - width)]
    best, best_cost = Bbox.null(), math.inf
    for x, y in candidates:
        inside_x = min(max(x, area.x0), area.x1 - width)
        inside_y = min(max(y, area.y0), area.y1 - height)
        place = Bbox.from_bounds(inside_x, inside_y, width, height)
        # In square pixels: how far it was pushed back, what it hides, how far off the box it is.
        cost = abs(inside_x - x) * height + abs(inside_y - y) * width
        cost += _HIDING_COST * sum(_shared_area(place, other) for other in placed)
        cost += 0.1 * width * abs(inside_y + height / 2 - top)
        if cost < best_cost - 1e-6:
            best, best_cost = place, cost
    return best


def _shared_area(a: "Bbox", b: "Bbox") -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def as_picture(name: str, image: Tensor) -> NDArray[Any]:
    """``(3, H, W)`` uint8 or float in [0, 1] as ``(H, W, 3)`` uint8."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"{name} has shape {tuple(image.shape)}, expected (3, H, W)")
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(image.permute(1, 2, 0).numpy())


def as_numpy(values: Any) -> NDArray[Any]:
    """A tensor of any device or dtype, or anything NumPy takes, as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray((values.float() if values.is_floating_point() else values).numpy())
    return np.asarray(values)


def class_names(labels: NDArray[Any], classes: Sequence[str]) -> list[str]:
    """The name for each label ``(N,)``; ValueError for one outside 1..C."""
    for index, label in enumerate(labels.tolist()):
        if not 1 <= label <= len(classes):
            raise ValueError(f"labels[{index}] is {label}, expected 1..{len(classes)}")
    return [classes[int(label) - 1] for label in labels]


def _luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb`` in [0, 1], without gamma's finer points."""
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return float(0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2)
