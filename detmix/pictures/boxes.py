"""Boxes on an image with their labels, masks and keypoints.

Shape legend: N objects of one image of H x W pixels, K keypoints each. Boxes are ``x1, y1, x2, y2``
in continuous pixel coordinates: (0, 0) is the upper left corner of the upper left pixel.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from detmix.evaluation.coco.masks import encode_masks

_FONT_SIZE, _SMALLEST_FONT = 8.0, 5.0  # points
_FEW = 12  # boxes whose labels are not made smaller
_LABEL_PAD = 0.2  # of the font size, around a label's text
_MASK_OPACITY = 0.45


def draw_boxes(
    axes: Axes,
    image: Tensor,
    boxes: NDArray[Any],
    texts: Sequence[str],
    colors: Sequence[str],
    *,
    dashed: Sequence[bool],
    masks: Any,
    keypoints: NDArray[Any] | None,
) -> None:
    """Draw an image ``(3, H, W)`` and its boxes ``(N, 4)``, each with its text and colour.

    A text goes to the box's upper left corner, or near it where it hides no other one, on axes that
    stay where they are. Masks are what `encode_masks` takes, keypoints ``(N, K, 2 or 3)``.
    """
    image = _as_uint8(image)
    rles = [] if masks is None else encode_masks(masks)
    if rles:
        dense = torch.from_numpy(coco_mask.decode(rles)).permute(2, 0, 1).bool()
        image = draw_segmentation_masks(image, dense, _MASK_OPACITY, list(colors))
    height, width = image.shape[1:]
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    axes.set_axis_off()
    axes.autoscale(False)  # a keypoint at the border must not widen what texts are placed in
    axes.apply_aspect()
    # A text wider or higher than the image may use all of the room that is kept for the axes.
    area = axes.get_position(original=True).transformed(axes.figure.transSubfigure)
    font_size = max(_SMALLEST_FONT, _FONT_SIZE * math.sqrt(_FEW / max(_FEW, len(boxes))))
    pad = _LABEL_PAD * font_size * axes.figure.dpi / 72
    placed: list[Bbox] = []
    for box, text, color, dash in zip(boxes, texts, colors, dashed, strict=True):
        low, high = box.clip(0, [width, height] * 2).reshape(2, 2)
        contrast = contrasting(color)
        frame = Rectangle(low, *(high - low), fill=False, color=color, linewidth=1.6, clip_on=False)
        frame.set(linestyle=(0, (4, 2)) if dash else "-")
        frame.set_path_effects([withStroke(linewidth=2.8, foreground=contrast)])
        axes.add_patch(frame)
        look = {"boxstyle": f"square,pad={_LABEL_PAD}", "facecolor": color, "linewidth": 0.4}
        label = axes.text(0, 0, text, size=font_size, color=contrast, va="bottom", bbox=look)
        size = label.get_window_extent().padded(pad).size
        placed.append(_best_place(axes.transData.transform([low, high]), *size, area, placed))
        x, y = axes.transData.inverted().transform(placed[-1].p0 + pad)
        label.set_position((x, y))
    if keypoints is not None:
        _draw_keypoints(axes, keypoints, colors)


def _best_place(
    corners: NDArray[Any], width: float, height: float, area: Bbox, placed: Sequence[Bbox]
) -> Bbox:
    """Where a text of that size hides least near a box; display pixels, y grows upwards."""
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


def _draw_keypoints(axes: Axes, keypoints: NDArray[Any], colors: Sequence[str]) -> None:
    """A dot for each visible keypoint, a ring for each hidden one, nothing where not labelled."""
    for points, color in zip(keypoints, colors, strict=True):
        seen = points[:, 2] if points.shape[1] == 3 else np.full(len(points), 2)
        x, y = points[seen > 0, :2].T + 0.5  # whole numbers are the centres of pixels
        axes.scatter(
            x,
            y,
            s=25,
            facecolors=[color if visibility > 1 else "none" for visibility in seen[seen > 0]],
            edgecolors=color,
            linewidths=1.3,
            path_effects=[withStroke(linewidth=2.1, foreground=contrasting(color))],
        )


def contrasting(color: str) -> str:
    """Black or white, whichever stands out."""
    luminance = np.dot(np.power(to_rgb(color), 2.2), (0.2126, 0.7152, 0.0722))
    return "black" if luminance > 0.35 else "white"


def _as_uint8(image: Tensor) -> Tensor:
    """An image of uint8, or of floats in [0, 1], as uint8 on the CPU."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the image has shape {tuple(image.shape)}, expected (3, H, W)")
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return image
