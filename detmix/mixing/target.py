"""What a sample of a detection data set must look like, plain or of torchvision's tv_tensors.

A sample is checked where it enters the mixers, by `checked_sample`; what comes after trusts it.

Arithmetic on a tv_tensor mostly returns a plain tensor, and where it does not it keeps a canvas
size that is no longer true. So everything is computed on plain tensors, and typed at the end.

Shapes: N objects in a target; (H, W) an image or the canvas.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, TVTensor

Target = dict[str, Any]
Sample = tuple[Tensor, Target]
Size = tuple[int, int]

# Known by name, because a length says nothing when it happens to equal the number of objects.
PER_OBJECT_KEYS = frozenset(
    {"boxes", "labels", "box_weights", "difficult", "iscrowd", "area", "masks", "keypoints"}
)
PER_IMAGE_KEYS = frozenset({"image_id", "orig_size", "size"})


def is_per_object(target: Target, key: str) -> bool:
    """Tell whether ``target[key]`` is a tensor or list with one entry for each box."""
    # What a key of one's own holds for the whole image must not be as long as the boxes are many.
    value = target.get(key)
    if key in PER_IMAGE_KEYS or not isinstance(value, (Tensor, list)):
        return False
    if isinstance(value, Tensor) and value.ndim == 0:
        return False
    return len(value) == len(target["boxes"])


def box_weights(target: Target) -> Tensor:
    """Return ``target["box_weights"]``, or ones where there are none: ``(N,)`` float32."""
    weights, boxes = target.get("box_weights"), target["boxes"]
    if weights is None:
        return torch.ones(len(boxes), dtype=torch.float32, device=boxes.device)
    return torch.as_tensor(weights, dtype=torch.float32, device=boxes.device)


def with_objects(target: Target, device: torch.device | None = None) -> Target:
    """Return the target, or a copy with ``boxes`` and ``labels`` where it holds none."""
    if target.get("boxes") is not None:
        return target
    boxes = torch.zeros((0, 4), device=device)
    return {**target, "boxes": boxes, "labels": boxes.new_zeros(0, dtype=torch.int64)}


def completed(target: Target, device: torch.device | None = None) -> Target:
    """Return a copy that has ``box_weights``, and boxes and labels of none where it lacks both."""
    target = with_objects(target, device)
    return {**target, "box_weights": box_weights(target)}


def checked_sample(image: Tensor, target: Target, name: str) -> Sample:
    """Return what the mixers work on: a sample that keeps the contract, its target completed."""
    check_sample(image, target, name)
    return image, completed(target, image.device)


def check_sample(image: Any, target: Any, name: str) -> None:
    """Raise ValueError, naming the sample, the key, the row and the value, for a broken one."""
    if not isinstance(image, Tensor) or image.ndim != 3:
        is_pil = isinstance(image, Image.Image)
        remedy = ": put torchvision.transforms.v2.ToImage() among the transforms" if is_pil else ""
        raise ValueError(f"{name}: image must be a (C, H, W) tensor, got {describe(image)}{remedy}")
    if not isinstance(target, dict):
        raise ValueError(f"{name}: target must be a dict, got {describe(target)}")
    held = {key for key, value in target.items() if value is not None}
    if held <= PER_IMAGE_KEYS:  # an image without objects
        return
    boxes = target.get("boxes")
    if boxes is None:
        raise ValueError(f"{name}: target has no 'boxes', only {', '.join(sorted(map(str, held)))}")
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"{name}: 'boxes' must be an (N, 4) tensor (of a rotated object, the smallest upright "
            f"box around it), got {describe(boxes)}"
        )
    for key in sorted(PER_OBJECT_KEYS & held):
        if not is_per_object(target, key):
            raise ValueError(
                f"{name}: {key!r} must be a tensor or list of {len(boxes)} entries, one for "
                f"each box, got {describe(target[key])}"
            )
    _check_numbers(target, name)
    masks, shape = target.get("masks"), (len(boxes), *image.shape[1:])
    if masks is not None and (not isinstance(masks, Tensor) or masks.shape != shape):
        raise ValueError(
            f"{name}: 'masks' must be a {shape} tensor, the image's size, got {describe(masks)}"
        )


def _check_numbers(target: Target, name: str) -> None:
    """Raise ValueError for the first box or weight that is no number to calculate with."""
    boxes, weights = plain(target["boxes"]), box_weights(target)
    if weights.ndim != 1:
        raise ValueError(f"{name}: 'box_weights' must have one axis, got {describe(weights)}")
    for key, values, valid, expected in (
        ("boxes", boxes, torch.isfinite(boxes).all(1), "finite numbers"),
        ("box_weights", weights, torch.isfinite(weights) & (weights >= 0), "finite, not negative"),
    ):
        if not bool(valid.all()):
            row = int((~valid).nonzero()[0])
            raise ValueError(
                f"{name}: {key!r}[{row}] must be {expected}, got {values[row].tolist()}"
            )


def describe(value: object) -> str:
    """Say what a value is, for an error."""
    if isinstance(value, Tensor):
        kind = f"{value.format.value} boxes" if isinstance(value, BoundingBoxes) else "a tensor"
        return f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, Sized):
        return f"{type(value).__name__} of length {len(value)}"
    return repr(value)


def check_ratio(lam: float) -> None:
    """Raise ValueError unless λ is in [0, 1]."""
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must be in [0, 1], got {lam}")


def check_pair(image_a: Tensor, image_b: Tensor) -> None:
    """Raise ValueError for images that cannot be mixed."""
    for name, a, b in (
        ("dtype", image_a.dtype, image_b.dtype),
        ("device", image_a.device, image_b.device),
        ("number of channels", len(image_a), len(image_b)),
    ):
        if a != b:
            raise ValueError(f"images to mix must have the same {name}, got {a} and {b}")


def image_size(image: Tensor) -> Size:
    """Return (H, W) of one image or a batch of them."""
    return image.shape[-2], image.shape[-1]


def plain(tensor: Tensor) -> Tensor:
    """Return the same values without the type of a tv_tensor; anything else as it is."""
    # only where needed: it makes a new tensor object, which takes longer than the question
    return tensor.as_subclass(Tensor) if isinstance(tensor, TVTensor) else tensor


def box_format(boxes: Tensor) -> BoundingBoxFormat:
    """Return the format of `BoundingBoxes`; that of plain boxes is (x1, y1, x2, y2)."""
    return boxes.format if isinstance(boxes, BoundingBoxes) else BoundingBoxFormat.XYXY


def converted(boxes: Tensor, old: BoundingBoxFormat, new: BoundingBoxFormat) -> Tensor:
    """Convert plain boxes from one format to another; of the same format they stay as they are."""
    if old == new:
        return boxes
    result: Tensor = convert_bounding_box_format(boxes, old, new)
    return result


def xyxy(boxes: Tensor) -> Tensor:
    """Return boxes of any format as plain (x1, y1, x2, y2), ``(N, 4)``."""
    return converted(plain(boxes), box_format(boxes), BoundingBoxFormat.XYXY)


def wrap_like(values: Tensor, like: Any, size: Size) -> Tensor:
    """Give plain values the type of another tensor, on a canvas of their own."""
    if not isinstance(like, TVTensor):
        return values
    typed: Tensor = tv_tensors.wrap(values, like=like, canvas_size=size)  # where it has a canvas
    return typed
