"""Clip boxes to their images and find those that lose their area; or leave all as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CleanBoxes:
    """Boxes within their images, M of them; of :func:`keep_boxes` as they were."""

    boxes: npt.NDArray[np.float32]
    has_area: npt.NDArray[np.bool_]
    is_clipped: npt.NDArray[np.bool_]

    def message(self, describe: Callable[[int], str]) -> str | None:
        """Return what to warn of, or None where all boxes were good."""
        parts = []
        for mask, what in (
            (self.is_clipped, "clipped: they reached beyond their image"),
            (~self.has_area, "dropped: they have no area inside their image"),
        ):
            if mask.any():
                first = describe(int(np.argmax(mask)))
                parts.append(f"{mask.sum()} of {len(mask)} boxes were {what} (first: {first})")
        return "; ".join(parts) or None


def clean_boxes(boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]) -> CleanBoxes:
    """Clip boxes to their images."""
    # All is compared in float32, in which boxes are kept: what is lost in the rounding is no area.
    limits = np.tile(sizes[:, ::-1], 2)  # (M, 4): W, H, W, H
    clipped: npt.NDArray[np.float32] = np.clip(boxes, 0, limits).astype(np.float32)
    has_area = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    with np.errstate(over="ignore"):  # what does not fit into float32 is beyond the image
        moved = np.any(clipped != boxes.astype(np.float32), axis=1)
    return CleanBoxes(clipped, has_area, moved & has_area)


def keep_boxes(boxes: npt.NDArray[np.float64]) -> CleanBoxes:
    """Clip and drop nothing; a side of negative length becomes 0, which overlaps no more."""
    with np.errstate(over="ignore"):
        kept = boxes.astype(np.float32)
    kept[:, 2:] = np.maximum(kept[:, 2:], kept[:, :2])
    everyone = np.ones(len(boxes), dtype=np.bool_)
    return CleanBoxes(kept, everyone, ~everyone)
