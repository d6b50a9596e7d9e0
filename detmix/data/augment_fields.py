"""Masks, keypoints and other fields through albumentations: what goes in, and what comes out.

Nothing goes in where a target has none of them, so that they cost nothing then.
Legend: N objects come in, M of them are left; K keypoints each, in COCO's convention: whole
numbers are the centres of pixels, so that x runs from 0 to W - 1 where a box runs from 0 to W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from detmix.mixing.target import Target, converted, describe, plain, with_objects, wrap_like, xyxy

_MASK_DTYPES = (torch.uint8, torch.bool)
# Points that travel ahead of the keypoints and tell whether the image was mirrored, as shares of
# its width and height: far apart, for transforms that round, and not on its edge.
_PROBES = np.array([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75]])

Array = npt.NDArray[Any]


def check_fields(target: Target, name: str, keypoint_flip: list[int] | None) -> None:
    """Check masks and keypoints of a target whose per-object fields have N rows."""
    masks, keypoints = target.get("masks"), target.get("keypoints")
    if masks is not None and masks.dtype not in _MASK_DTYPES:
        raise ValueError(f"{name}: 'masks' must be uint8 or bool, got {masks.dtype}")
    if keypoints is None or not len(target["boxes"]):  # then it often lacks some of the axes
        return
    shape = tuple(keypoints.shape) if isinstance(keypoints, Tensor) else ()
    num = "K" if keypoint_flip is None else len(keypoint_flip)
    if len(shape) != 3 or num not in ("K", shape[1]) or shape[2] not in (2, 3):
        raise ValueError(
            f"{name}: 'keypoints' must be a tensor (N, {num}, 3) or (N, {num}, 2), "
            f"got {describe(keypoints)}"
        )
    valid = torch.isfinite(keypoints).all(2) | ~_is_labelled(keypoints)
    if not bool(valid.all()):
        row, column = (~valid).nonzero()[0].tolist()
        value = keypoints[row, column].tolist()
        raise ValueError(f"{name}: 'keypoints'[{row}, {column}] must be finite, got {value}")


def to_plain(target: Target) -> Target:
    """Return a copy in which all that moves is plain tensors, boxes float32 (x1, y1, x2, y2)."""
    moving = [key for key in ("masks", "keypoints") if target.get(key) is not None]
    target = with_objects(target)
    boxes = xyxy(target["boxes"].detach().to(torch.float32))
    return target | {key: plain(target[key]).detach() for key in moving} | {"boxes": boxes}


def typed_as(values: Tensor, like: Any, size: tuple[int, int]) -> Tensor:
    """Give plain values the type and, to boxes, the format of another tensor; undoes `to_plain`."""
    if isinstance(like, BoundingBoxes):
        values = converted(values, BoundingBoxFormat.XYXY, like.format)
    return wrap_like(values, like, size)


def packed_fields(target: Target, size: tuple[int, int]) -> dict[str, Array]:
    """Return what albumentations is to move besides image and boxes."""
    packed = {}
    masks, keypoints = target.get("masks"), target.get("keypoints")
    if masks is not None and len(masks):
        packed["masks"] = masks.to(torch.uint8, copy=True).numpy()  # it may work in place
    if keypoints is not None and len(keypoints):
        is_labelled = _is_labelled(keypoints)
        if bool(is_labelled.any()):
            positions = keypoints[..., :2][is_labelled].numpy().astype(np.float64)
            positions = np.concatenate([_PROBES * (size[1], size[0]), positions])
            numbers = np.flatnonzero(is_labelled.numpy())
            numbers = np.concatenate([np.arange(-len(_PROBES), 0), numbers])
            # x and y move, and what follows them travels along: a number and where it was.
            packed["keypoints"] = np.column_stack([positions, numbers, positions])
    return packed


def moved_fields(
    result: Mapping[str, Any],
    target: Target,
    rows: Tensor,
    size: tuple[int, int],
    keypoint_flip: list[int] | None,
) -> dict[str, Tensor]:
    """Return the new ``masks`` and ``keypoints``, each only where the target has them."""
    fields: dict[str, Tensor] = {}
    masks, keypoints = target.get("masks"), target.get("keypoints")
    if masks is not None or keypoints is not None:
        _check_unique(rows.numpy(), "objects")
    if masks is not None:
        new_masks = result.get("masks", np.zeros((0, *size), np.uint8))
        # Rows are taken by NumPy: 30 times as fast as by torch for these.
        fields["masks"] = torch.from_numpy(new_masks[rows.numpy()]).to(masks.dtype)
    if keypoints is not None:
        new_keypoints = torch.zeros_like(keypoints)
        if "keypoints" in result:
            points = np.asarray(result["keypoints"], dtype=np.float64).reshape(-1, 5)
            new_keypoints = _moved_keypoints(points, keypoints, size, keypoint_flip)
        fields["keypoints"] = new_keypoints[rows]
    return fields


def take_rows(
    target: Target, moved: Mapping[str, Tensor], rows: Tensor, keys: frozenset[str]
) -> Target:
    """Return a new target with the fields that have moved, and the given rows of other ``keys``."""
    taken = {**target, **moved}
    for key, value in target.items():
        if key in keys - moved.keys() and value is not None:
            is_list = isinstance(value, list)
            taken[key] = [value[row] for row in rows.tolist()] if is_list else value[rows]
    if target.get("area") is not None:
        taken["area"] = _scaled_area(target, moved, rows)
    return taken


def num_pixels(masks: Tensor) -> Tensor:
    """Return how many pixels each mask has, ``(N,)`` float64."""
    import cv2

    arrays = masks.to(torch.uint8).numpy()  # 60 times as fast as torch's count
    return torch.tensor([cv2.countNonZero(mask) for mask in arrays], dtype=torch.float64)


def _scaled_area(target: Target, moved: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Return ``(M,)`` areas, grown and shrunk as the masks are, or the boxes without any."""
    scale = _box_area(moved["boxes"]) / _box_area(target["boxes"][rows])
    if "masks" in moved:
        pixels = num_pixels(target["masks"])[rows]
        scale = torch.where(pixels > 0, num_pixels(moved["masks"]) / pixels, scale)
    old_area = torch.as_tensor(target["area"])[rows]
    area = old_area * scale
    return (area if old_area.is_floating_point() else area.round()).to(old_area.dtype)


def _box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:].double() - boxes[:, :2].double()).prod(dim=1)


def _is_labelled(keypoints: Tensor) -> Tensor:
    """Tell of each keypoint whether it has a position: ``(N, K)``. Without a visibility it has."""
    if keypoints.shape[2] == 2:
        return torch.ones(keypoints.shape[:2], dtype=torch.bool)
    return keypoints[..., 2] > 0


def _moved_keypoints(
    points: Array, keypoints: Tensor, size: tuple[int, int], keypoint_flip: list[int] | None
) -> Tensor:
    """Return ``(N, K, 2 or 3)`` from points ``(P, 5)`` as in `packed_fields`."""
    numbers = points[:, 2].round().astype(np.int64)
    _check_unique(numbers, "keypoints")
    is_mirrored = _is_mirrored(old=points[:, 3:], new=points[:, :2])
    is_keypoint = numbers >= 0
    numbers, points = numbers[is_keypoint], points[is_keypoint, :2]
    new = torch.zeros(keypoints.shape).flatten(0, 1)
    if keypoints.shape[2] == 3:
        # Shrinking takes W - 1 to less than W' and mirroring this to more than -1, where it is
        # still a point of the edge; a point of the next pixel is at -1 or beyond, or from W' on.
        is_inside = ((points > -1) & (points < (size[1], size[0]))).all(axis=1)
        numbers, points = numbers[is_inside], points[is_inside].clip(min=0)
        new[numbers, 2] = keypoints.flatten(0, 1)[numbers, 2].float()
    new[numbers, :2] = torch.from_numpy(points).float()
    new = new.reshape(keypoints.shape).to(keypoints.dtype)
    return new[:, keypoint_flip] if is_mirrored and keypoint_flip is not None else new


def _is_mirrored(old: Array, new: Array) -> bool:
    """Tell whether the map from old to new points ``(P, 2)`` mirrors."""
    # For an affine map A the covariance of old and new points is C A', with C, that of the old
    # ones, positive definite: the signs of the two determinants are equal.
    if len(old) < len(_PROBES):  # a distortion has lost them
        return False
    return bool(np.linalg.det((old - old.mean(axis=0)).T @ (new - new.mean(axis=0))) < 0)


def _check_unique(numbers: Array, name: str) -> None:
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError(
            f"a transform has copied {name}, as padding that reflects the image does: masks and "
            f"keypoints need a constant border"
        )
