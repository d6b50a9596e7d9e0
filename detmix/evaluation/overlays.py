"""Masks and keypoints over an image.

Shape legend: N objects of one image of H x W pixels, K keypoints each.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.coco_masks import encode_masks
from detmix.evaluation.picture_inputs import as_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILL = 0.4  # opacity
_VISIBLE = 2  # COCO: 0 not labelled, 1 labelled but hidden, 2 visible


def draw_masks(ax: "Axes", masks: Any, size: tuple[int, int], colors: Sequence[str]) -> None:
    """Fill each mask with a translucent colour, within an outline.

    Args:
        ax: axes on which the image lies from 0 to its width and height.
        masks: ``(N, H, W)`` or ``(N, 1, H, W)``, or N run lengths, as `encode_masks` takes them.
        size: H, W of the image.
        colors: N.

    Raises:
        ValueError: masks of another size than the image's, or that `encode_masks` refuses.
    """
    from pycocotools import mask as coco_mask

    # Finer than the screen would only cost time.
    step = max(1, int(abs(np.diff(ax.get_xlim())[0]) / ax.get_window_extent().width))
    for index, (rle, color) in enumerate(zip(encode_masks(masks), colors, strict=True)):
        mask = coco_mask.decode(rle)  # one at a time: each is as large as its image
        if mask.shape != size:
            raise ValueError(f"masks[{index}] is of size {mask.shape}, the image of {size}")
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        part = mask[rows[0] : rows[-1] + 1 : step, columns[0] : columns[-1] + 1 : step]
        values = np.pad(part.astype(np.float32), 1)  # closes the outline at the image's border
        y, x = (
            start + step * (np.arange(length) - 1) + 0.5
            for start, length in zip((rows[0], columns[0]), values.shape, strict=True)
        )
        ax.contourf(x, y, values, levels=[0.5, 1.5], colors=[color], alpha=_FILL, zorder=1)
        ax.contour(x, y, values, levels=[0.5], colors=[color], linewidths=1.2, zorder=1)


def draw_keypoints(
    ax: "Axes", keypoints: Tensor | NDArray[Any], colors: Sequence[str], *, size: float = 5.0
) -> None:
    """Draw a dot for each visible keypoint and a ring for each hidden one.

    Args:
        ax: axes on which the image lies from 0 to its width and height.
        keypoints: ``(N, K, 3)``: x, y and the visibility, 0 for not labelled, 1 for hidden, 2 for
            visible; whole numbers are the centres of pixels. ``(N, K, 2)``: all are visible.
        colors: N.
        size: diameter in points.

    Raises:
        ValueError: keypoints of another shape.
    """
    points = as_numpy(keypoints)
    if not len(points):
        return
    if points.ndim != 3 or points.shape[2] not in (2, 3):
        raise ValueError(f"keypoints have shape {points.shape}, expected (N, K, 3) or (N, K, 2)")
    from matplotlib.patheffects import withStroke

    for of_object, color in zip(points, colors, strict=True):
        seen = of_object[:, 2] if points.shape[2] == 3 else np.full(len(of_object), _VISIBLE)
        for chosen, face in ((seen >= _VISIBLE, color), ((seen > 0) & (seen < _VISIBLE), "none")):
            ax.scatter(
                of_object[chosen, 0] + 0.5,
                of_object[chosen, 1] + 0.5,
                s=size**2,
                facecolors=face,
                edgecolors=color,
                linewidths=1.3,
                path_effects=[withStroke(linewidth=2.1, foreground=contrasting(color))],
                zorder=2,
            )


def contrasting(color: str) -> str:
    """Black or white, whichever stands out from the ``#rrggbb``."""
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    # Relative luminance, without gamma's finer points.
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "black" if luminance > 0.35 else "white"
