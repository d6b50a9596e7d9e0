"""Boxes on an image with their labels, masks and keypoints.

Shape legend: N objects of one image of H x W pixels, K keypoints each. Boxes are ``x1, y1, x2, y2``
in continuous pixel coordinates: (0, 0) is the upper left corner of the upper left pixel. Labels
are 1..C.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.coco.masks import encode_masks
from detmix.pictures.style import BOX_COLORS, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

Target = Mapping[str, Any]

_LONGEST_NAME = 28  # characters
_FONT_SIZE, _SMALLEST_FONT = 8.0, 5.0  # points
_FEW = 12  # boxes whose labels are not made smaller
_LABEL_PAD = 0.2  # of the font size, around a label's text
_MASK_OPACITY = 0.45


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
    masks: Any = None,
    keypoints: Tensor | NDArray[Any] | None = None,
) -> None:
    """Draw an image and its boxes, each with its class name, its value and a note.

    A label goes to the box's upper left corner, or near it where it hides no other label. Its place
    is measured on the axes as they are: settle the figure's layout before.

    Args:
        ax: axes to draw on.
        image: ``(3, H, W)`` tensor, uint8 or float in [0, 1], or ``(H, W, 3)`` uint8 array.
        boxes: ``(N, 4)``.
        labels: ``(N,)`` in 1..C.
        classes: the C class names without the background.
        values: ``N`` numbers to write beside the names, to two decimals.
        notes: ``N`` texts to write after that; an empty one adds nothing.
        colors: ``N`` colours; without them every class has its own.
        dashed: ``N`` flags.
        masks: ``(N, H, W)`` or ``(N, 1, H, W)``, of which floats are probabilities, or ``N`` run
            lengths as `encode_masks` returns them; filled with the box's colour.
        keypoints: ``(N, K, 3)`` x, y and COCO's visibility: dots where visible, rings where
            hidden; or ``(N, K, 2)``.

    Raises:
        ValueError: a list that has not ``N`` entries, a label outside 1..C, an image of another
            shape.
    """
    from matplotlib.transforms import Bbox

    boxes, labels = as_numpy(boxes).reshape(-1, 4), as_numpy(labels).astype(int).tolist()
    if not all(1 <= label <= len(classes) for label in labels):
        raise ValueError(f"labels are {labels}, expected 1..{len(classes)}")
    if colors is None:
        colors = [BOX_COLORS[(label - 1) % len(BOX_COLORS)] for label in labels]
    picture = as_picture(image) if isinstance(image, Tensor) else image
    if masks is not None:
        picture = _tint(picture, masks, colors)
    height, width = picture.shape[:2]
    ax.imshow(picture, extent=(0, width, height, 0))
    ax.set_axis_off()
    ax.autoscale(False)  # a keypoint at the border must not widen what labels are placed in
    ax.apply_aspect()
    figure = ax.get_figure()
    assert figure is not None
    # A label wider or higher than the image may use all of the room that is kept for the axes.
    slot = ax.get_position(original=True).transformed(figure.transSubfigure)
    area = Bbox.union([slot, ax.bbox])
    font_size = max(_SMALLEST_FONT, _FONT_SIZE * math.sqrt(_FEW / max(_FEW, len(boxes))))
    pad = _LABEL_PAD * font_size * figure.dpi / 72
    texts = [shorten(classes[label - 1], _LONGEST_NAME) for label in labels]
    if values is not None:
        texts = [f"{text} {value:.2f}" for text, value in zip(texts, values, strict=True)]
    if notes is not None:
        texts = [f"{text} {note}".rstrip() for text, note in zip(texts, notes, strict=True)]
    flags = [False] * len(texts) if dashed is None else dashed
    placed: list[Bbox] = []
    for box, text, color, flag in zip(boxes, texts, colors, flags, strict=True):
        inside = np.clip(box, 0, [width, height] * 2)
        _draw_outline(ax, inside, color, flag)
        label = _write(ax, text, color, font_size)
        size = label.get_window_extent().padded(pad).size
        corners = ax.transData.transform(inside.reshape(2, 2))
        placed.append(_best_place(corners, *size, area, placed))
        x, y = ax.transData.inverted().transform(placed[-1].p0 + pad)
        label.set_position((x, y))
    if keypoints is not None:
        _draw_keypoints(ax, as_numpy(keypoints), colors)


def _tint(picture: NDArray[Any], masks: Any, colors: Sequence[str]) -> NDArray[Any]:
    from matplotlib.colors import to_rgb
    from pycocotools import mask as coco_mask

    tinted = np.array(picture, dtype=np.float32)
    for rle, color in zip(encode_masks(masks), colors, strict=True):
        mask = coco_mask.decode(rle).astype(bool)  # one at a time: each is as large as its image
        if mask.shape != tinted.shape[:2]:
            raise ValueError(f"a mask is {mask.shape}, expected {tinted.shape[:2]}, the image")
        tinted[mask] += _MASK_OPACITY * (255 * np.asarray(to_rgb(color)) - tinted[mask])
    return np.asarray(tinted.round(), dtype=np.uint8)


def _draw_outline(ax: "Axes", box: NDArray[Any], color: str, dashed: bool) -> None:
    """A coloured frame with a contrasting edge."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    frame = Rectangle(
        (box[0], box[1]),
        box[2] - box[0],
        box[3] - box[1],
        fill=False,
        edgecolor=color,
        linewidth=1.6,
        linestyle=(0, (4, 2)) if dashed else "-",
        path_effects=[withStroke(linewidth=2.8, foreground=_contrasting(color))],
        clip_on=False,
    )
    ax.add_patch(frame)


def _write(ax: "Axes", content: str, color: str, font_size: float) -> "Text":
    return ax.text(
        0,
        0,
        content,
        fontsize=font_size,
        color=_contrasting(color),
        va="bottom",
        parse_math=False,
        bbox={"boxstyle": f"square,pad={_LABEL_PAD}", "facecolor": color, "linewidth": 0.4},
    )


def _best_place(
    corners: NDArray[Any], width: float, height: float, area: "Bbox", placed: "Sequence[Bbox]"
) -> "Bbox":
    """Where a label of that size hides least near a box; display pixels, y grows upwards."""
    from matplotlib.transforms import Bbox

    (left, top), (right, bottom) = corners
    best, least = Bbox.null(), math.inf
    for x in (left, right - width):
        for y in (*(top + row * height for row in (0, -1, 1, -2, 2, -3, 3)), bottom - height):
            x0 = max(min(x, area.x1 - width), area.x0)
            y0 = max(min(y, area.y1 - height), area.y0)
            place = Bbox.from_bounds(x0, y0, width, height)
            shared = [Bbox.intersection(place, other) for other in placed]
            cost = 5 * sum(part.width * part.height for part in shared if part is not None)
            cost += abs(x0 - x) * height + (abs(y0 - y) + 0.1 * abs(y0 - top)) * width
            if cost < least:
                best, least = place, cost
    return best


def _draw_keypoints(ax: "Axes", keypoints: NDArray[Any], colors: Sequence[str]) -> None:
    """A dot for each visible keypoint, a ring for each hidden one, nothing where not labelled."""
    from matplotlib.patheffects import withStroke

    for points, color in zip(keypoints, colors, strict=True):
        seen = points[:, 2] if points.shape[1] == 3 else np.full(len(points), 2)
        for chosen, face in ((seen > 1, color), (seen == 1, "none")):
            ax.scatter(
                points[chosen, 0] + 0.5,  # whole numbers are the centres of pixels
                points[chosen, 1] + 0.5,
                s=25,
                facecolors=face,
                edgecolors=color,
                linewidths=1.3,
                path_effects=[withStroke(linewidth=2.1, foreground=_contrasting(color))],
            )


def _contrasting(color: str) -> str:
    """Black or white, whichever stands out."""
    from matplotlib.colors import to_rgb

    luminance = np.dot(np.power(to_rgb(color), 2.2), (0.2126, 0.7152, 0.0722))
    return "black" if luminance > 0.35 else "white"


def as_picture(image: Tensor) -> NDArray[Any]:
    """``(3, H, W)`` uint8 or float in [0, 1] as ``(H, W, 3)`` uint8."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected (3, H, W)")
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(image.permute(1, 2, 0).numpy())


def as_numpy(values: Any) -> NDArray[Any]:
    """A tensor of any device or dtype, or anything NumPy takes, as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
