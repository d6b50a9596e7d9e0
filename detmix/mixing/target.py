"""What a sample of a detection data set must look like, and what an object has by default.

Shapes: N objects in a target; (H, W) its image.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from detmix.mixing.tv import box_format, is_rotated, plain

__all__ = [
    "PER_IMAGE_KEYS",
    "PER_OBJECT_KEYS",
    "Target",
    "box_weights",
    "check_sample",
    "completed",
    "is_per_object",
    "with_objects",
]

Target = dict[str, Any]

# Known by name, because a length says nothing when it happens to equal the number of objects.
PER_OBJECT_KEYS = frozenset(
    {"boxes", "labels", "box_weights", "difficult", "iscrowd", "area", "masks", "keypoints"}
)
PER_IMAGE_KEYS = frozenset({"image_id", "orig_size", "size"})


def is_per_object(target: Target, key: str) -> bool:
    """Tell whether ``target[key]`` is a tensor or list with one entry for each box.

    A value of the whole image under a key of one's own must therefore not be a tensor or list whose
    length could be that: a number, a string or a tuple never is.
    """
    value = target.get(key)
    if key in PER_IMAGE_KEYS or not isinstance(value, (Tensor, list)):
        return False
    if isinstance(value, Tensor) and value.ndim == 0:
        return False
    boxes = target.get("boxes")
    return len(value) == (0 if boxes is None else len(boxes))


def box_weights(target: Target) -> Tensor:
    """Return ``target["box_weights"]``, or ones where there are none: ``(N,)`` float32."""
    weights, boxes = target.get("box_weights"), target["boxes"]
    if weights is None:
        return torch.ones(len(boxes), dtype=torch.float32, device=boxes.device)
    return torch.as_tensor(weights, dtype=torch.float32, device=boxes.device)


def with_objects(target: Target, device: torch.device | None = None) -> Target:
    """Return the target, or a copy with ``boxes`` and ``labels`` where it holds none.

    Args:
        target: A target as `check_sample` takes it.
        device: Where to make the ``boxes`` ``(0, 4)`` and ``labels`` ``(0,)``; None for the CPU.
    """
    if target.get("boxes") is not None:
        return target
    boxes = torch.zeros((0, 4), device=device)
    return {**target, "boxes": boxes, "labels": boxes.new_zeros(0, dtype=torch.int64)}


def completed(target: Target, device: torch.device | None = None) -> Target:
    """Return a copy of ``target`` that has ``boxes``, ``labels`` and ``box_weights``.

    Args:
        target: A target as `check_sample` takes it.
        device: Where to make those of an image without objects; None for the CPU.
    """
    target = with_objects(target, device)
    return {**target, "box_weights": box_weights(target)}


def check_sample(image: Tensor, target: Target, name: str) -> None:
    """Check one sample against the contract of the mixers.

    Args:
        image: ``(C, H, W)``.
        target: A target as torchvision detection has it; ``boxes`` are ``(N, 4)``, per-object
            keys have N rows, masks have the image's size. tv_tensors may hold them, boxes in
            any format that is not rotated. A target with nothing but ``image_id`` (or a size) is
            that of an image without objects, as
            ``torchvision.datasets.wrap_dataset_for_transforms_v2`` leaves it.
        name: What to call the sample in an error.

    Raises:
        ValueError: Naming the sample, the key and the value, for a wrong shape, rotated boxes, a
            box with NaN or infinity, or a weight that is negative or not finite.
    """
    _check_image(image, name)
    if not isinstance(target, dict):
        raise ValueError(f"{name}: target must be a dict, got {_describe(target)}")
    boxes = target.get("boxes")
    held = {key for key, value in target.items() if value is not None}
    if held <= PER_IMAGE_KEYS:
        return
    if boxes is None:
        raise ValueError(f"{name}: target has no 'boxes', only {', '.join(sorted(map(str, held)))}")
    if isinstance(boxes, Tensor) and is_rotated(boxes):
        raise ValueError(
            f"{name}: 'boxes' must not be rotated (put the smallest upright box around each "
            f"object), got the format {box_format(boxes).value}"
        )
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: 'boxes' must be an (N, 4) tensor, got {_describe(boxes)}")
    for key in sorted(PER_OBJECT_KEYS & target.keys()):
        if target[key] is not None and not is_per_object(target, key):
            raise ValueError(
                f"{name}: {key!r} must be a tensor or list of {len(boxes)} entries, one for "
                f"each box, got {_describe(target[key])}"
            )
    _check_values(target, name)
    masks = target.get("masks")
    if masks is not None and (
        not isinstance(masks, Tensor) or masks.shape != (len(boxes), *image.shape[1:])
    ):
        raise ValueError(
            f"{name}: 'masks' must be a {(len(boxes), *image.shape[1:])} tensor, the image's "
            f"size, got {_describe(masks)}"
        )


def _check_image(image: Any, name: str) -> None:
    """Raise ValueError unless ``image`` is a tensor (C, H, W)."""
    if isinstance(image, Tensor) and image.ndim == 3:
        return
    remedy = ""
    if isinstance(image, Image.Image):
        remedy = ": put torchvision.transforms.v2.ToImage() among the transforms"
    raise ValueError(f"{name}: image must be a (C, H, W) tensor, got {_describe(image)}{remedy}")


def _check_values(target: Target, name: str) -> None:
    """Raise ValueError for a box or a weight that is no number to calculate with."""
    boxes, weights = plain(target["boxes"]), box_weights(target)
    _check_rows(boxes, torch.isfinite(boxes).all(1), f"{name}: 'boxes'", "finite numbers")
    if weights.ndim != 1:
        raise ValueError(f"{name}: 'box_weights' must have one axis, got {_describe(weights)}")
    valid = torch.isfinite(weights) & (weights >= 0)
    _check_rows(weights, valid, f"{name}: 'box_weights'", "a finite number, not negative")


def _describe(value: object) -> str:
    """Say what a value is, for an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Sized):
        return f"{type(value).__name__} of length {len(value)}"
    return repr(value)


def _check_rows(values: Tensor, valid: Tensor, name: str, expected: str) -> None:
    """Raise ValueError for the first row that is not valid."""
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise ValueError(f"{name}[{row}] must be {expected}, got {values[row].tolist()}")
