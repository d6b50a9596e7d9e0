"""Joining the ground truth of two images, each object weighted by its image's blend ratio.

Shapes: N_a and N_b objects in the two targets; (H, W) the canvas.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detmix.mixing.pixels import check_ratio

__all__ = [
    "PER_IMAGE_KEYS",
    "PER_OBJECT_KEYS",
    "Target",
    "box_weights",
    "check_sample",
    "is_per_object",
    "union",
    "with_box_weights",
]

Target = dict[str, Any]

# Known by name, because a length says nothing when it happens to equal the number of objects.
PER_OBJECT_KEYS = frozenset(
    {"boxes", "labels", "box_weights", "difficult", "iscrowd", "area", "masks", "keypoints"}
)
PER_IMAGE_KEYS = frozenset({"image_id", "orig_size", "size"})

# What an object has where its target does not say.
_DEFAULTS = {"box_weights": (1.0, torch.float32), "difficult": (0, None), "iscrowd": (0, None)}


def is_per_object(target: Target, key: str) -> bool:
    """Tell whether ``target[key]`` is a tensor or list with one entry for each box."""
    value = target.get(key)
    if key in PER_IMAGE_KEYS or not isinstance(value, (Tensor, list)):
        return False
    if isinstance(value, Tensor) and value.ndim == 0:
        return False
    return len(value) == len(target["boxes"])


def box_weights(target: Target) -> Tensor:
    """Return ``target["box_weights"]``, or ones where there are none: ``(N,)`` float32."""
    weights = target.get("box_weights")
    if weights is None:
        boxes = target["boxes"]
        return torch.ones(len(boxes), dtype=torch.float32, device=boxes.device)
    return torch.as_tensor(weights, dtype=torch.float32, device=target["boxes"].device)


def with_box_weights(target: Target) -> Target:
    """Return a shallow copy of ``target`` that has ``box_weights``."""
    return {**target, "box_weights": box_weights(target)}


def check_sample(image: Tensor, target: Target, name: str) -> None:
    """Check one sample against the contract of the mixers.

    Args:
        image: ``(C, H, W)``.
        target: A target as torchvision detection has it; ``boxes`` are ``(N, 4)``, per-object
            keys have N rows, masks have the image's size.
        name: What to call the sample in an error.

    Raises:
        ValueError: Naming the sample, the key and the value, for a wrong shape, a box with NaN
            or infinity, or a weight that is negative or not finite.
    """
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise ValueError(f"{name}: image must be a (C, H, W) tensor, got {_describe(image)}")
    if not isinstance(target, dict):
        raise ValueError(f"{name}: target must be a dict, got {_describe(target)}")
    boxes = target.get("boxes")
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: 'boxes' must be an (N, 4) tensor, got {_describe(boxes)}")
    for key in sorted(PER_OBJECT_KEYS & target.keys()):
        if target[key] is not None and not is_per_object(target, key):
            raise ValueError(
                f"{name}: {key!r} must be a tensor or list of {len(boxes)} entries, one for "
                f"each box, got {_describe(target[key])}"
            )
    _check_rows(boxes, torch.isfinite(boxes).all(1), f"{name}: 'boxes'", "four finite numbers")
    weights = box_weights(target)
    if weights.ndim != 1:
        raise ValueError(f"{name}: 'box_weights' must have one axis, got {_describe(weights)}")
    valid = torch.isfinite(weights) & (weights >= 0)
    _check_rows(weights, valid, f"{name}: 'box_weights'", "a finite number, not negative")
    masks = target.get("masks")
    if masks is not None and (
        not isinstance(masks, Tensor) or masks.shape != (len(boxes), *image.shape[1:])
    ):
        raise ValueError(
            f"{name}: 'masks' must be a {(len(boxes), *image.shape[1:])} tensor, the image's "
            f"size, got {_describe(masks)}"
        )


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


def union(target_a: Target, target_b: Target, lam: float, size: tuple[int, int]) -> Target:
    r"""Join two targets; A's weights become :math:`\lambda w`, B's :math:`(1 - \lambda) w`.

    Per-object keys are concatenated, A's objects first; masks are padded to the canvas. Where
    only one target holds ``box_weights``, ``difficult`` or ``iscrowd``, the other's are 1, 0
    and 0. Every other key is A's. An object whose weight comes to 0 is left out, so that a
    ratio of exactly 0 or 1 yields one image's objects alone.

    Args:
        target_a: The first target, N_a objects.
        target_b: The second target, N_b objects.
        lam: The blend ratio λ of the first image, in [0, 1].
        size: (H, W) of the canvas.

    Returns:
        A new target with N_a + N_b objects, or fewer.

    Raises:
        ValueError: For λ outside [0, 1], or if only one of the targets has a per-object key that
            has no default.
    """
    check_ratio(lam)
    parts = [_scaled(target, ratio) for target, ratio in ((target_a, lam), (target_b, 1.0 - lam))]
    joined = dict(target_a)
    for key in dict.fromkeys([*parts[0], *parts[1]]):
        if _joins(parts, key):
            joined[key] = _join(parts, key, size)
    return joined


def _scaled(target: Target, ratio: float) -> Target:
    """Scale the weights of a target and leave out what they make 0."""
    weights = box_weights(target) * ratio
    scaled = {**target, "box_weights": weights}
    if not bool((weights == 0).any()):
        return scaled
    kept = weights > 0
    rows = kept.nonzero()[:, 0].tolist()
    for key in target.keys() | {"box_weights"}:
        if key == "box_weights" or is_per_object(target, key):
            value = scaled[key]
            scaled[key] = value[kept] if isinstance(value, Tensor) else [value[i] for i in rows]
    return scaled


def _joins(parts: list[Target], key: str) -> bool:
    """Tell whether ``key`` has a row for each object in every part that holds it."""
    holders = [part for part in parts if part.get(key) is not None]
    return bool(holders) and all(is_per_object(part, key) for part in holders)


def _join(parts: list[Target], key: str, size: tuple[int, int]) -> Any:
    """Concatenate ``key`` of both parts, with defaults where one does not hold it."""
    held = [part.get(key) for part in parts]
    if key == "masks":
        held = [value if value is None else _pad_masks(value, size) for value in held]
    template = next(value for value in held if value is not None)
    values = [
        _default(part, key, template) if value is None else value
        for part, value in zip(parts, held, strict=True)
    ]
    if isinstance(template, list):
        return [*values[0], *values[1]]
    # An image without objects often comes without the extra axes that its partner's have.
    filled = [value for value in values if len(value)] or values[:1]
    return torch.cat(filled)


def _pad_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad ``(N, H', W')`` masks with background at the bottom and right to (H, W)."""
    return F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))


def _default(part: Target, key: str, template: Tensor | list[Any]) -> Any:
    """Return what the objects of ``part`` have for a ``key`` that it does not hold."""
    count = len(part["boxes"])
    if isinstance(template, list):
        if count == 0:
            return []
    elif count == 0:
        return template[:0]
    elif key in _DEFAULTS:
        value, dtype = _DEFAULTS[key]
        return torch.full((count,), value, dtype=dtype or template.dtype, device=template.device)
    raise ValueError(
        f"one target has the per-object key {key!r}, the other with {count} objects does not "
        f"(its keys: {', '.join(sorted(part))})"
    )
