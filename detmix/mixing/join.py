"""Joining the ground truth of two images, each object's weight multiplied by its image's ratio.

Shapes: N_a and N_b objects in the two targets; (H, W) the canvas.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.tv_tensors import TVTensor

from detmix.mixing.target import (
    KNOWN_KEYS,
    ZERO_BY_DEFAULT,
    Keys,
    Size,
    Target,
    box_format,
    check_share,
    checked_samples,
    converted,
    key_names,
    plain,
    wrap_like,
)

Pair = tuple[Target, Target]
Ratios = tuple[float | Tensor, float | Tensor]


def union(
    target_a: Target, target_b: Target, lam: float, size: Size, *, keys: Collection[str] = ()
) -> Target:
    """Join two targets; A's weights are multiplied by λ, B's by 1 - λ.

    The objects' keys, tensors or lists with an entry for each box, are concatenated, A's first:
    ``boxes``, ``labels``, ``box_weights``, the declared ``keys``; and ``difficult``, ``iscrowd``,
    ``area``, ``masks`` (padded to the canvas) and ``keypoints``, which are left out with a warning
    where not every object has an entry. Where only one target holds ``box_weights``, ``difficult``
    or ``iscrowd``, the other's are 1, 0 and 0. Every other key is A's; a warning names one with as
    many entries as boxes. An object whose weight comes to 0 is left out, so that a ratio of exactly
    0 or 1 yields one image's objects alone.

    tv_tensors come out as such, on the new canvas. The type and the box format are A's; B's
    where A's target does not hold the key, or holds a plain tensor without rows. Integer boxes
    that come from or to a centre format become float32.

    Args:
        target_a: A, with N_a objects.
        target_b: B, with N_b objects.
        lam: λ, in [0, 1].
        size: (H, W) of the canvas.
        keys: What else belongs to the objects, or must not be left out.

    Raises:
        ValueError: For another λ, a target that breaks the contract, or a key that is neither
            left out nor has a default in one target only.
    """
    check_share("lam", lam)
    declared = key_names(keys)
    samples = [(_blank(target, size), target) for target in (target_a, target_b)]
    (_, target_a), (_, target_b) = checked_samples(samples, declared, ("target a", "target b"))
    return join((target_a, target_b), (lam, 1.0 - lam), size, declared)


def join(targets: Pair, ratios: Ratios, size: Size, keys: Keys) -> Target:
    """Multiply completed targets' weights by a ratio, or one for each object; `union` says how."""
    joined = [
        key
        for key in dict.fromkeys([*targets[0], *targets[1]])
        if key in KNOWN_KEYS | keys and any(target.get(key) is not None for target in targets)
    ]
    parts = (_kept(targets[0], joined, ratios[0]), _kept(targets[1], joined, ratios[1]))
    return {**targets[0], **{key: _concatenate(targets, parts, key, size) for key in joined}}


def _blank(target: Any, size: Size) -> Tensor:
    """Stand in for a target's image: of its masks' size, as far as the canvas holds that."""
    masks = target.get("masks") if isinstance(target, dict) else None
    if isinstance(masks, Tensor) and masks.ndim == 3:
        size = min(masks.shape[1], size[0]), min(masks.shape[2], size[1])
    return torch.empty((0, *size))


def _kept(target: Target, keys: list[str], ratio: float | Tensor) -> Target:
    """Return the objects' ``keys``, plain, of those that keep a weight above 0."""
    part = {key: plain(target[key]) for key in keys if target.get(key) is not None}
    part["box_weights"] = weights = target["box_weights"] * ratio
    if not bool((weights == 0).any()):
        return part
    kept = weights > 0
    rows = kept.nonzero()[:, 0].tolist()
    return {
        key: value[kept] if isinstance(value, Tensor) else [value[row] for row in rows]
        for key, value in part.items()
    }


def _concatenate(targets: Pair, parts: Pair, key: str, size: Size) -> Any:
    """Concatenate ``key`` of both parts, with defaults where one does not hold it."""
    like = _typed_like(targets[0].get(key), targets[1].get(key))
    rows = [_rows(target, part, key, like) for target, part in zip(targets, parts, strict=True)]
    if isinstance(like, list):
        return [*rows[0], *rows[1]]
    # An image without objects often comes without the extra axes that its partner's have.
    filled = [value for value in rows if len(value)] or [plain(like)[:0]]
    if key == "masks":
        filled = [_pad_masks(value, size) for value in filled]
    if len({value.shape[1:] for value in filled}) > 1:
        shapes = " and ".join(str(tuple(value.shape)) for value in filled)
        raise ValueError(f"the targets' {key!r} do not fit each other, having shapes {shapes}")
    return wrap_like(torch.cat(filled), like, size)


def _typed_like(value_a: Any, value_b: Any) -> Any:
    """Return that one of two values (one may be None) after whose kind both are joined."""
    # A's, unless it has no rows and B's says more: a type, or the rows to come.
    held = [value for value in (value_a, value_b) if value is not None]
    telling = [value for value in held if len(value) or isinstance(value, TVTensor)]
    return (telling or held)[0]


def _rows(target: Target, part: Target, key: str, like: Any) -> Any:
    """Return the rows of one part as a list where ``like`` is one, else as a plain tensor."""
    value = part.get(key)
    if value is None:
        count = len(part["boxes"])
        if count and key not in ZERO_BY_DEFAULT:
            raise ValueError(f"one target has {key!r}, the other with {count} objects has not")
        return [0] * count if isinstance(like, list) else plain(like).new_zeros(count)
    if isinstance(like, list):
        return value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, list):
        rows = torch.as_tensor(value, device=like.device)
        return rows.to(torch.promote_types(rows.dtype, like.dtype) if value else like.dtype)
    if key == "boxes" and len(value):
        return converted(value, box_format(target[key]), box_format(like))
    return value


def _pad_masks(masks: Tensor, size: Size) -> Tensor:
    """Pad ``(N, H', W')`` masks with background at the bottom and right to (H, W)."""
    if masks.shape[-2:] == size:  # padding by nothing would copy
        return masks
    return F.pad(masks, (0, size[1] - masks.shape[-1], 0, size[0] - masks.shape[-2]))
