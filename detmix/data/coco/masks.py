"""COCO segmentations: checked and packed into one block of bytes, decoded when an image is read.

A segmentation is a list of polygons or a run-length encoding (RLE, plain or compressed). As
Python objects those of COCO's training images fill gigabytes, and forked workers would copy them
by counting references. Packed, one is ``b"R"``, its image's height and width and the compressed
counts, or ``b"P"``, the number of polygons, their lengths and all coordinates.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from detmix.segmentations import read_polygons, read_rle

__all__ = ["SegmentationBlock", "pack_item", "pack_segmentation", "rle_size", "strip_item"]

_HEADER = np.dtype(np.uint32)


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


def pack_item(item: dict[str, Any]) -> dict[str, Any]:
    """Pack the ``segmentation`` of an object of the JSON; one that cannot be used is its error."""
    if item.get("segmentation"):
        try:
            item["segmentation"] = pack_segmentation(item["segmentation"])
        except ValueError as error:  # told later: here nobody knows whether the object is used
            item["segmentation"] = error
    return item


def strip_item(item: dict[str, Any]) -> dict[str, Any]:
    """Leave the ``segmentation`` of an object of the JSON out."""
    item.pop("segmentation", None)
    return item


def pack_segmentation(value: Any) -> bytes:
    """Check one annotation's ``segmentation`` and pack it.

    Args:
        value: As in the JSON: a list of polygons ``[x1, y1, x2, y2, ...]``, or a dict of
            ``size`` (height, width) and ``counts``, a list or a compressed string. Polygons of
            fewer than three points are left out.

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
    coordinates = read_polygons(polygons)
    header = array("I", [len(coordinates), *map(len, coordinates)])
    return b"P" + header.tobytes() + b"".join(part.tobytes() for part in coordinates)


def _pack_rle(rle: dict[str, Any]) -> bytes:
    size, counts = read_rle(rle)
    return b"R" + array("I", size).tobytes() + counts


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
