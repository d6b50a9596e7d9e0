"""An image with boxes on it, their labels, masks and keypoints, drawn by Pillow.

Shape legend: N objects of one image of H x W pixels, K keypoints each. Boxes are ``x1, y1, x2, y2``
in continuous pixel coordinates: (0, 0) is the upper left corner of the upper left pixel.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_segmentation_masks

from detmix.evaluation.coco.masks import encode_masks
from detmix.pictures import style

Array = NDArray[Any]

_LOWEST, _HIGHEST = 0.12, 1.34  # of a panel in its widths: two labels, 3:4
_LINE = 1 / 190  # of the panel's width
_FEW, _SMALLEST_FONT = 12, 9  # boxes whose labels are not made smaller; pixels
_ROWS = (-1, 0, -2, 1, -3, 2, -4)  # where a label may be, in its heights from the top of its box
_MASK_OPACITY = 0.45


@dataclass
class Objects:
    """What is drawn of an image's objects; masks are what `encode_masks` takes."""

    boxes: Array  # (N, 4)
    texts: list[str]
    colors: list[str]
    is_dashed: Array  # (N,)
    masks: Any
    keypoints: Array | None  # (N, K, 2 or 3)


def draw_boxes(image: Tensor, objects: Objects, width: int) -> Image.Image:
    """Draw an image ``(3, H, W)`` and its objects, ``width`` pixels wide.

    A label goes to its box's upper left corner, or near it where it hides no other one.
    """
    image = _as_uint8(image)
    rles = [] if objects.masks is None else encode_masks(objects.masks)
    if rles:
        dense = torch.from_numpy(coco_mask.decode(rles)).permute(2, 0, 1).bool()
        image = draw_segmentation_masks(image, dense, _MASK_OPACITY, objects.colors)
    shape = np.array(image.shape[:0:-1])  # width, height
    scale = width * min(1 / shape[0], _HIGHEST / shape[1])
    size = (shape * scale).round().astype(int).clip(1)
    panel = Image.new("RGB", (width, max(size[1], round(width * _LOWEST))), "white")
    panel.paste(to_pil_image(image).resize(tuple(size)))
    line = round(width * _LINE)
    corners = (np.nan_to_num(objects.boxes).reshape(-1, 2, 2) * scale).round().clip(0, size - 1)
    corners = np.sort(corners.astype(int), axis=1)
    y, x = np.indices(panel.size[::-1])
    stripes = Image.fromarray((x + y) % (6 * line) < 3 * line)
    for dashed, mask in ((True, stripes), (False, None)):
        layer = panel.copy()
        draw = ImageDraw.Draw(layer)
        for index in np.flatnonzero(objects.is_dashed == dashed).tolist():
            (left, top), (right, bottom) = corners[index].tolist()
            color = objects.colors[index]
            around = (left - 1, top - 1, right + 1, bottom + 1)
            draw.rectangle(around, outline=contrasting(color), width=line + 2)
            draw.rectangle((left, top, right, bottom), outline=color, width=line)
        panel.paste(layer, mask=mask)
    if objects.keypoints is not None:
        _draw_keypoints(panel, objects.keypoints, scale, objects.colors, 2 * line)
    _draw_labels(panel, corners, objects)
    return panel


def _draw_labels(panel: Image.Image, corners: Array, objects: Objects) -> None:
    """Write each text near the corners ``(N, 2, 2)`` of its box."""
    smaller = math.sqrt(_FEW / max(_FEW, len(corners)))
    font = style.font(max(_SMALLEST_FONT, round(style.font_size(panel.width) * smaller)))
    pad, height = max(2, round(font.size / 5)), sum(font.getmetrics())
    draw, area, placed = ImageDraw.Draw(panel), np.array(panel.size), np.zeros((0, 2, 2))
    for box, text, color in zip(corners, objects.texts, objects.colors, strict=True):
        size = np.array([math.ceil(font.getlength(text)) + 2 * pad, height])
        low = _best_place(box, size, area, placed)
        placed = np.concatenate([placed, [[low, low + size]]])
        contrast = contrasting(color)
        draw.rectangle((*low, *(low + size - 1)), fill=color, outline=contrast)
        draw.text((low[0] + pad, low[1]), text, fill=contrast, font=font)


def _best_place(corners: Array, size: Array, area: Array, placed: Array) -> Array:
    """Where a label of that size hides least of those ``placed (M, 2, 2)``, near a box."""
    (left, top), (right, bottom) = corners
    width, height = size
    rows = [*(top + row * height for row in _ROWS), bottom]
    wanted = np.array([(x, y) for x in (left, right - width) for y in rows])  # (P, 2)
    low = wanted.clip(0, area - size)
    shared = np.minimum(low[:, None] + size, placed[:, 1]) - np.maximum(low[:, None], placed[:, 0])
    hidden = shared.clip(0).prod(axis=2).sum(axis=1)
    far = np.abs(low - wanted) @ (height, width) + 0.1 * width * np.abs(low[:, 1] - top + height)
    place: Array = low[np.argmin(5 * hidden + far)]
    return place


def _draw_keypoints(
    panel: Image.Image, keypoints: Array, scale: float, colors: list[str], radius: int
) -> None:
    """A dot for each visible keypoint, a ring for each hidden one, nothing where not labelled."""
    draw = ImageDraw.Draw(panel)
    for points, color in zip(keypoints, colors, strict=True):
        for x, y, *seen in points.tolist():
            if seen != [0]:
                fill, outline = (None, color) if seen == [1] else (color, contrasting(color))
                center = np.array([x + 0.5, y + 0.5]) * scale  # whole numbers: pixels' centres
                circle = (*(center - radius), *(center + radius))
                draw.ellipse(circle, fill=fill, outline=outline, width=max(1, radius // 3))


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
