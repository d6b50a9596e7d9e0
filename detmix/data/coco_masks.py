"""COCO segmentations: checked and packed into one block of bytes, decoded when an image is read.

A segmentation is a list of polygons or a run-length encoding (RLE, plain or compressed). As
Python objects those of COCO's training images fill gigabytes, and forked workers would copy them
by counting references. Packed, one is ``b"R"``, its image's height and width and the compressed
counts, or ``b"P"``, the number of polygons, their lengths and all coordinates.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

__all__ = ["SegmentationBlock", "pack_segmentation", "rle_size"]

_HEADER = np.dtype(np.uint32)
# pycocotools walks along every edge in steps of 1/5 pixel and keeps them all.
_LARGEST_COORDINATE = 1e6


class SegmentationBlock:
    """The segmentations of M objects.

    Args:
        segmentations: M packed ones, of :func:`pack_segmentation`.
    """

    def __init__(self, segmentations: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, segmentations), np.int64, len(segmentations))
        self._offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))  # (M + 1,)
        block = bytearray().join(segmentations) or bytearray(1)  # a buffer must not be empty
        self._block = torch.frombuffer(block, dtype=torch.uint8)

    def decode(self, first: int, last: int, size: tuple[int, int]) -> Tensor:
        """Return the masks of the objects from ``first`` up to ``last``, uint8 ``(N, H, W)``.

        Args:
            first: The first object.
            last: The one after the last.
            size: Height and width of their image.
        """
        if first == last:
            return torch.zeros((0, *size), dtype=torch.uint8)
        import cv2

        offsets = self._offsets[first : last + 1].tolist()
        block = self._block.numpy()
        rles = [_to_rle(block[start:end].tobytes(), size) for start, end in pairwise(offsets)]
        columnwise = coco_mask.decode(rles).T  # (N, W, H), contiguous
        masks = np.empty((last - first, *size), dtype=np.uint8)
        for mask, transposed in zip(masks, columnwise, strict=True):
            cv2.transpose(transposed, mask)  # 7 times as fast as NumPy's copy
        return torch.from_numpy(masks)


def pack_segmentation(value: Any) -> bytes:
    """Check one annotation's ``segmentation`` and pack it.

    Args:
        value: As in the JSON: a list of polygons ``[x1, y1, x2, y2, ...]``, or a dict of
            ``size`` (height, width) and ``counts``, a list or a compressed string.

    Raises:
        ValueError: It is neither, or one of its values cannot be used; says which.
    """
    if isinstance(value, dict):
        return _pack_rle(value)
    if isinstance(value, list) and value:
        return _pack_polygons(value)
    raise ValueError(
        f"segmentation must be a list of polygons or an RLE with size and counts, got {value!r}"
    )


def rle_size(packed: bytes) -> tuple[int, int] | None:
    """Return height and width that a packed RLE is of; None for polygons, which have none."""
    if packed[:1] == b"P":
        return None
    height, width = np.frombuffer(packed, _HEADER, 2, 1).tolist()
    return height, width


def _pack_polygons(polygons: list[Any]) -> bytes:
    """Pack polygons; those of fewer than three points have no area and are left out."""
    coordinates = [_read_polygon(polygon, number) for number, polygon in enumerate(polygons)]
    coordinates = [polygon for polygon in coordinates if len(polygon) >= 6]
    if not coordinates:
        raise ValueError(
            f"no polygon of the segmentation has three points or more, got {polygons!r}"
        )
    header = array("I", [len(coordinates), *map(len, coordinates)])
    return b"P" + header.tobytes() + b"".join(part.tobytes() for part in coordinates)


def _read_polygon(polygon: Any, number: int) -> array[float]:
    where = f"polygon {number} of the segmentation"
    try:
        coordinates = array("d", polygon)
    except (TypeError, OverflowError):
        raise ValueError(f"{where} must be a list of numbers, got {polygon!r}") from None
    if len(coordinates) % 2:
        raise ValueError(
            f"{where} must have an even number of coordinates (x1, y1, x2, ...), got "
            f"{len(coordinates)}"
        )
    largest = max(max(coordinates, default=0), -min(coordinates, default=0))
    # A sum is NaN where one of its terms is; a comparison alone may pass it over.
    if not largest <= _LARGEST_COORDINATE or math.isnan(sum(coordinates)):
        wrong = next(value for value in coordinates if not abs(value) <= _LARGEST_COORDINATE)
        raise ValueError(
            f"{where} has the coordinate {wrong}; expected finite numbers of at most "
            f"{_LARGEST_COORDINATE:g} pixels"
        )
    return coordinates


def _pack_rle(rle: dict[str, Any]) -> bytes:
    size: Any = rle.get("size")
    counts: Any = rle.get("counts")
    if not _is_size(size):
        raise ValueError(f"the RLE's size must be height and width in whole pixels, got {size!r}")
    if isinstance(counts, list):
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("the RLE's counts must be whole numbers, not negative")
        total, packed = sum(counts), b""
    elif isinstance(counts, str):
        packed = counts.encode()
        total = int(_read_counts(packed).sum())
    else:
        raise ValueError(f"the RLE's counts must be a list or a string, got {counts!r}")
    height, width = size
    if total != height * width:
        raise ValueError(
            f"the RLE's counts cover {total} pixels, but its size is {height} x {width} (height x "
            f"width), {height * width} pixels"
        )
    if not packed:
        packed = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)["counts"]
    return b"R" + array("I", size).tobytes() + packed


def _is_size(size: Any) -> bool:
    is_pair = isinstance(size, list) and len(size) == 2
    return is_pair and all(type(side) is int and 0 < side < 2**31 for side in size)


def _read_counts(text: bytes) -> npt.NDArray[np.int64]:
    """Read the run lengths of a compressed RLE, as pycocotools' ``rleFrString`` does.

    A run is written in groups of five bits, the lowest first, as the characters from ``0`` on;
    bit 5 says that another group follows, and the top bit of the last is the sign. From the
    fourth run on, what is written is the difference from the run two before. pycocotools relies
    on the text: one cut short makes it return whatever was in memory.
    """
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    is_last = (groups & 32) == 0
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or not is_last[-1]:
        raise ValueError(f"the RLE's counts are not a compressed RLE, got {_shorten(text)!r}")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: no run is that long
        raise ValueError(f"the RLE's counts are not a compressed RLE, got {_shorten(text)!r}")
    place = np.arange(len(groups)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((groups & 31) << 5 * place, starts)
    runs -= np.where(groups[ends] & 16, 1 << 5 * lengths, 0)
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    if runs.min() < 0:
        raise ValueError(f"the RLE's counts have a negative run, got {_shorten(text)!r}")
    return runs


def _shorten(text: bytes) -> str:
    return text[:20].decode(errors="replace") + ("..." if len(text) > 20 else "")


def _to_rle(packed: bytes, size: tuple[int, int]) -> Any:
    """Return what pycocotools takes: a dict of size and compressed counts."""
    if packed[:1] == b"R":
        return {"size": list(size), "counts": packed[1 + 2 * _HEADER.itemsize :]}
    num_polygons = int(np.frombuffer(packed, _HEADER, 1, 1)[0])
    lengths = np.frombuffer(packed, _HEADER, num_polygons, 1 + _HEADER.itemsize)
    start = 1 + (1 + num_polygons) * _HEADER.itemsize
    coordinates = np.frombuffer(packed, np.float64, offset=start)
    polygons = np.split(coordinates, np.cumsum(lengths)[:-1])
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
