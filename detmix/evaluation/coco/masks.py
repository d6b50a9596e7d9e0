"""Masks as COCO's compressed run-length encoding (RLE), a hundredth of their size or less.

Shape legend: N masks of one image of H x W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detmix.data.coco.masks import read_rle, shorten

# {"size": [H, W], "counts": str}: plain values that JSON and every process take.
Rle: TypeAlias = dict[str, Any]

_THRESHOLD = 0.5  # of a mask's probability (Mask R-CNN, arXiv 1703.06870, section 3.1)


def encode_masks(masks: Tensor | NDArray[Any] | Sequence[Mapping[str, Any]]) -> list[Rle]:
    """Encode an image's masks as COCO's compressed RLE.

    So a whole data set's predictions fit into memory (100 masks of a 480 x 640 image take 123 MB as
    float32) and pass between processes; `COCOEvaluator` takes them in place of the dense masks.

    Args:
        masks: ``(N, H, W)`` or ``(N, 1, H, W)``, a tensor on any device or an array: floats are
            probabilities, of which those above 0.5 belong to the object; of bools and integers
            those that are not 0. Or a list of RLE dicts, compressed or not.

    Returns:
        A dict for each mask: ``size`` ``[H, W]`` and ``counts``, a str.
    """
    if isinstance(masks, Sequence):
        return [_compressed(index, mask) for index, mask in enumerate(masks)]
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}, expected (N, H, W) or (N, 1, H, W)"
        )
    if len(masks) == 0:
        return []
    from pycocotools import mask as coco_mask

    inside: Any
    if isinstance(masks, Tensor):  # a byte for each pixel is less to move to the CPU than a float
        chosen = masks > _THRESHOLD if masks.is_floating_point() else masks != 0
        inside = chosen.numpy(force=True)
    else:
        inside = masks > _THRESHOLD if masks.dtype.kind == "f" else masks != 0
    # In the memory order that RLE counts in.
    columnwise = np.asfortranarray(inside.transpose(1, 2, 0), np.uint8)  # (H, W, N)
    return [
        {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        for rle in coco_mask.encode(columnwise)
    ]


def mask_area(mask: Rle) -> float:
    """The number of pixels."""
    from pycocotools import mask as coco_mask

    return float(coco_mask.area(mask))


def _compressed(index: int, mask: Any) -> Rle:
    """One RLE with its counts as str; ValueError for what is none."""
    try:
        if not isinstance(mask, Mapping):
            raise ValueError("expected a dict of size [H, W] and counts")
        rle = read_rle(mask)
    except ValueError as error:
        raise ValueError(f"masks[{index}] is {shorten(mask)}: {error}") from None
    return rle | {"counts": rle["counts"].decode("ascii")}
