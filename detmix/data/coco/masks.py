"""COCO segmentations: checked, and packed into one block of bytes, decoded when an image is read.

A segmentation is a list of polygons or a run-length encoding (RLE, plain or compressed). As
Python objects those of COCO's training images fill gigabytes, and forked workers would copy them
by counting references. So they are packed as the file is read; those of objects that are used
become compressed RLEs.

pycocotools relies on what it is given: of an RLE that was cut short it returns whatever was in
memory, or never returns; a polygon far outside costs memory for every fifth of a pixel. What trains
and what is scored are checked alike here. Legend: R runs, H x W pixels.
"""

from __future__ import annotations

import marshal
import math
import reprlib
from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

shorten = reprlib.repr  # as messages show a value
_CORNERS = 3
_LARGEST_COORDINATE = 1e6
# pycocotools walks along every edge in steps of 1/5 pixel and keeps them all: a million pixels take
# 40 MB. Around an object of COCO it is a few thousand.
_LONGEST_OUTLINE = 1e6
_MOST_PIXELS = 2**32 - 1  # pycocotools counts in 32 bits


class SegmentationBlock:
    """The segmentations of M objects, by the counts of their compressed RLEs."""

    def __init__(self, counts: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, counts), np.int64, len(counts))
        self._offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))  # (M + 1,)
        block = bytearray().join(counts) or bytearray(1)  # a buffer must not be empty
        self._block = torch.frombuffer(block, dtype=torch.uint8)

    def decode(self, first: int, last: int, size: tuple[int, int]) -> Tensor:
        """Return the masks of the objects from ``first`` up to ``last``, uint8 ``(N, H, W)``."""
        if first == last:
            return torch.zeros((0, *size), dtype=torch.uint8)
        import cv2
        from pycocotools import mask as coco_mask

        offsets = self._offsets[first : last + 1].tolist()
        counts = [self._block[start:end].numpy().tobytes() for start, end in pairwise(offsets)]
        columnwise = coco_mask.decode([{"size": size, "counts": each} for each in counts]).T
        masks = np.empty((last - first, *size), dtype=np.uint8)
        for mask, transposed in zip(masks, columnwise, strict=True):
            cv2.transpose(transposed, mask)  # (W, H), 7 times as fast as NumPy's copy
        return torch.from_numpy(masks)


def pack_item(item: dict[str, Any], *, masks: bool) -> dict[str, Any]:
    """Pack the ``segmentation`` of an object of the JSON, to be checked on use, or leave it out."""
    value = item.pop("segmentation", None)
    if value and masks:
        item["segmentation"] = marshal.dumps(value)
    return item


def read_segmentation(item: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the compressed RLE of an object, which must fit an image of (height, width)."""
    if "segmentation" not in item:
        raise ValueError("segmentation is missing or empty")
    value = marshal.loads(item["segmentation"])
    try:
        if 0 in size:
            raise ValueError("the size of the image is not known")
        if isinstance(value, list):
            return read_polygons(value, size)
        if not isinstance(value, dict):
            raise ValueError("expected a list of polygons or an RLE with size and counts")
        rle = read_rle(value)
        if rle["size"] != [*size]:
            told = ["{} x {}".format(*each) for each in (rle["size"], size)]
            raise ValueError(f"its size (height x width) is {told[0]}, but the image is {told[1]}")
        return rle
    except ValueError as error:
        raise ValueError(f"{error}; segmentation is {shorten(value)}") from None


def read_polygons(value: list[Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the compressed RLE of polygons; those of fewer than three points have no area."""
    from pycocotools import mask as coco_mask

    read = [_read_polygon(polygon, number) for number, polygon in enumerate(value)]
    kept = [(polygon, largest) for polygon, largest in read if len(polygon) >= 2 * _CORNERS]
    if not kept:
        raise ValueError("no polygon of the segmentation has three points or more")
    # Only where the coordinates leave room for too long an outline is it measured.
    if sum(len(polygon) * largest for polygon, largest in kept) > _LONGEST_OUTLINE:
        length = sum(_outline(polygon) for polygon, _ in kept)
        if length > _LONGEST_OUTLINE:
            expected = f"expected at most {_LONGEST_OUTLINE:.0f}"
            raise ValueError(f"the polygons have {length:.0f} pixels of outline, {expected}")
    rles = coco_mask.frPyObjects([polygon for polygon, _ in kept], *size)
    return coco_mask.merge(rles)  # type: ignore[no-any-return]


def read_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run-length encoding (RLE) with its counts compressed."""
    height, width = _read_size(rle.get("size"))
    counts = rle.get("counts")
    if isinstance(counts, list):
        wrong = [n for n in counts if not _is_integer(n) or n < 0]
        if wrong:
            raise ValueError(f"the RLE's counts must be integers from 0, got {shorten(wrong[0])}")
        total = int(sum(counts))
    elif isinstance(counts, str | bytes):
        # A surrogate has no UTF-8; passed as it is, it is refused as any other wrong character.
        counts = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
        total = int(_read_runs(counts).sum())
    else:
        raise ValueError(f"the RLE's counts must be a list or a string, got {shorten(counts)}")
    if total != height * width:
        raise ValueError(f"the RLE's counts cover {total} pixels, expected {height} x {width}")
    if isinstance(counts, list):
        from pycocotools import mask as coco_mask

        rle = {"size": [height, width], "counts": counts}
        counts = coco_mask.frPyObjects(rle, height, width)["counts"]
    return {"size": [height, width], "counts": counts}


def _read_size(size: Any) -> tuple[int, int]:
    if isinstance(size, list | tuple) and len(size) == 2 and all(map(_is_integer, size)):
        height, width = map(int, size)
        if min(height, width) > 0 and height * width <= _MOST_PIXELS:
            return height, width
    raise ValueError(f"the RLE's size must be height, width in whole pixels, got {shorten(size)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _read_runs(text: bytes) -> npt.NDArray[np.int64]:
    """Read the run lengths ``(R,)`` of a compressed RLE, as pycocotools' ``rleFrString`` does."""
    # Runs are groups of five bits, the lowest first, as characters from ``0`` on; bit 5 says that
    # another group follows, the top bit of the last is the sign. From the fourth on, what is
    # written is the difference from the run two before.
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((groups & 32) == 0)
    lengths = np.diff(ends, prepend=-1)
    is_whole = len(ends) and ends[-1] == len(groups) - 1
    # No run has more than 7 groups, 35 bits.
    if not is_whole or groups.min() < 0 or groups.max() > 63 or lengths.max() > 7:
        raise ValueError("the RLE's counts are not a compressed RLE")
    starts = ends - lengths + 1
    place = np.arange(len(groups)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 31) << 5 * place, starts)
    runs -= np.where(groups[ends] & 16, 1 << 5 * lengths, 0)
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    if runs.min() < 0:
        raise ValueError("the RLE's counts have a negative run")
    return runs


def _read_polygon(polygon: Any, number: int) -> tuple[array[float], float]:
    """Return a polygon's coordinates and the largest of them, without its sign."""
    where = f"polygon {number} of the segmentation"
    try:
        coordinates = array("d", polygon)
    except (TypeError, OverflowError):
        raise ValueError(f"{where} must be a list of numbers, got {shorten(polygon)}") from None
    if len(coordinates) % 2:
        raise ValueError(f"{where} has {len(coordinates)} coordinates, expected x1, y1, x2, y2, …")
    largest = max(max(coordinates, default=0), -min(coordinates, default=0))
    # A sum is NaN where one of its terms is; a comparison alone may pass it over.
    if not largest <= _LARGEST_COORDINATE or math.isnan(sum(coordinates)):
        wrong = next(value for value in coordinates if not abs(value) <= _LARGEST_COORDINATE)
        raise ValueError(f"{where} has {wrong}, expected at most {_LARGEST_COORDINATE:g} pixels")
    return coordinates, largest


def _outline(coordinates: array[float]) -> float:
    """Return the length of a polygon's outline, of each edge the longer side."""
    points = np.frombuffer(coordinates).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
