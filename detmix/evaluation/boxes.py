"""Drawing boxes with labels on an image, and finding a place for every label.

Shape legend: N boxes of one image of H x W pixels. Boxes are ``x1, y1, x2, y2`` in continuous pixel
coordinates: (0, 0) is the upper left corner of the upper left pixel. Labels are 1..C.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.figures import BOX_COLORS, DPI, shorten
from detmix.evaluation.overlays import contrasting, draw_keypoints, draw_masks
from detmix.evaluation.picture_inputs import as_numpy, as_picture, class_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

_LABEL_PAD = 0.2  # of the font size, around a label's text
_MAX_SHIFT = 3  # rows that a label may move from its box's corner to clear others
_HIDING_COST = 5.0  # of hiding an area of another label, against moving by as much
_MIN_FONT_SIZE = 4.5  # points
_LONGEST_NAME = 28  # characters
_FONT_SIZE, _SMALLEST_SHARE = 8.0, 0.65
_FEW = 12  # boxes whose labels are not made smaller
_LEAST_HEIGHT = 3.2  # font sizes, two labels, that even the flattest image is given


def draw_boxes(
    ax: "Axes",
    image: Tensor | NDArray[Any],
    boxes: Tensor | NDArray[Any],
    labels: Tensor | NDArray[Any],
    *,
    classes: Sequence[str],
    values: Sequence[float] | None = None,
    notes: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    dashed: Sequence[bool] | None = None,
    thick: Sequence[bool] | None = None,
    masks: Any = None,
    keypoints: Tensor | NDArray[Any] | None = None,
    font_size: float | None = None,
) -> None:
    """Draw an image and its boxes, each with its class name, its value and a note.

    A label goes to the box's upper left corner, or where it stays inside the image and clear of
    other labels. Its place is measured on the axes as they are: settle the figure's layout before.
    Below an image that is shown less high than two labels the axes go on for these, if they can.

    Args:
        ax: axes to draw on.
        image: ``(3, H, W)`` tensor, uint8 or float in [0, 1], or ``(H, W, 3)`` array.
        boxes: ``(N, 4)``.
        labels: ``(N,)`` in 1..C.
        classes: the C class names without the background.
        values: ``N`` numbers to write beside the names, to two decimals.
        notes: ``N`` texts to write after that; an empty one adds nothing.
        colors: ``N`` colours ``#rrggbb``; without them every class has its own.
        dashed: ``N`` flags.
        thick: ``N`` flags.
        masks: ``(N, H, W)`` or ``(N, 1, H, W)``, of which floats are probabilities, or ``N`` run
            lengths as `encode_masks` returns them; filled with the box's colour.
        keypoints: ``(N, K, 3)`` x, y and COCO's visibility: dots where visible, rings where
            hidden; or ``(N, K, 2)``.
        font_size: in points, by default 8, and less for many boxes; a label wider than the image is
            made smaller, and then cut.

    Raises:
        ValueError: an image of another shape, a label outside 1..C, a list that has not ``N``
            entries, masks of another size than the image's.
    """
    picture = as_picture("image", image) if isinstance(image, Tensor) else image
    boxes, labels = as_numpy(boxes).reshape(-1, 4), as_numpy(labels)
    lists = {"values": values, "notes": notes, "colors": colors, "dashed": dashed, "thick": thick}
    _check_lengths(len(boxes), labels=labels, **lists, masks=masks, keypoints=keypoints)
    if colors is None:
        colors = [BOX_COLORS[(int(label) - 1) % len(BOX_COLORS)] for label in labels]
    if font_size is None:
        share = math.sqrt(_FEW / max(_FEW, len(boxes)))
        font_size = _FONT_SIZE * max(_SMALLEST_SHARE, share)
    height, width = picture.shape[:2]
    shown_height = max(height, _least_height(ax, height, width, font_size))
    ax.imshow(picture, extent=(0, width, height, 0))
    ax.set(xlim=(0, width), ylim=(shown_height, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.apply_aspect()
    if masks is not None:
        draw_masks(ax, masks, (height, width), colors)
    for index, box in enumerate(boxes):
        is_dashed, is_thick = (flags is not None and flags[index] for flags in (dashed, thick))
        _draw_outline(ax, box, colors[index], is_dashed, 2.6 if is_thick else 1.6)
    if keypoints is not None:
        draw_keypoints(ax, keypoints, colors)
    placed: list[Bbox] = []
    texts = _label_texts(class_names(labels, classes), values, notes)
    for text, box, color in zip(texts, boxes, colors, strict=True):
        placed.append(_draw_label(ax, text, box, color, font_size, placed))


def _least_height(ax: "Axes", height: int, width: int, font_size: float) -> float:
    """The height in the image's pixels that two labels take, of no more than the axes have."""
    area = ax.get_window_extent()
    scale = min(area.width / width, area.height / height)
    return min(_LEAST_HEIGHT * font_size * _dpi(ax) / 72, area.height) / scale


def _check_lengths(num_boxes: int, **lists: Any) -> None:
    for name, given in lists.items():
        if given is not None and len(given) != num_boxes:
            raise ValueError(f"{name} has {len(given)} entries for {num_boxes} boxes")


def _label_texts(
    names: Sequence[str], values: Sequence[float] | None, notes: Sequence[str] | None
) -> list[str]:
    texts = [shorten(name, _LONGEST_NAME) for name in names]
    if values is not None:
        texts = [f"{text} {value:.2f}" for text, value in zip(texts, values, strict=True)]
    if notes is not None:
        texts = [f"{text} {note}".rstrip() for text, note in zip(texts, notes, strict=True)]
    return texts


def _draw_outline(
    ax: "Axes", box: NDArray[Any], color: str, dashed: bool, line_width: float
) -> None:
    """A coloured frame with a contrasting edge, moved inside where it is on the image's border."""
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
            linewidth=line_width,
            linestyle=(0, (4, 2)) if dashed else "-",
            path_effects=[withStroke(linewidth=line_width + 1.2, foreground=contrasting(color))],
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
        color=contrasting(color),
        ha="left",
        va="bottom",
        parse_math=False,
        bbox={"boxstyle": f"square,pad={_LABEL_PAD}", "facecolor": color, "linewidth": 0.4},
    )
    area = ax.get_window_extent()
    width, height, pad = _label_size(ax, text)
    while width > area.width and font_size > _MIN_FONT_SIZE:  # hinting: widths are not proportional
        font_size *= 0.95 * area.width / width
        text.set_fontsize(font_size)
        width, height, pad = _label_size(ax, text)
    if width > area.width:
        cut_to_width(text, area.width - 2 * pad)
        width, height, pad = _label_size(ax, text)
    corners = ax.transData.transform(box.reshape(2, 2))
    place = _best_place(corners, width, height, area, placed)
    x, y = ax.transData.inverted().transform((place.x0 + pad, place.y0 + pad))
    text.set_position((x, y))
    return place


def cut_to_width(text: "Text", width: float) -> None:
    """Cut the start of a text, of which the end says more, until it is so many pixels wide."""
    content = text.get_text()
    if text.get_window_extent().width <= width:
        return

    def fits(kept: int) -> bool:
        text.set_text("…" + content[len(content) - kept :])
        return text.get_window_extent().width <= width

    # Every measurement takes as long as drawing the text.
    fits(bisect_right(range(1, len(content)), False, key=lambda kept: not fits(kept)))


def _label_size(ax: "Axes", text: "Text") -> tuple[float, float, float]:
    """Width and height of the label with its background, and the padding, in display pixels."""
    pad = _LABEL_PAD * float(text.get_fontsize()) * _dpi(ax) / 72
    extent = text.get_window_extent()
    return extent.width + 2 * pad, extent.height + 2 * pad, pad


def _dpi(ax: "Axes") -> float:
    figure = ax.get_figure(root=True)
    return DPI if figure is None else figure.dpi


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
