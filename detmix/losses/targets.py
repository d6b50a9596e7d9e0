"""Which targets the losses take: those that torchvision computes losses of.

They are checked where they come to the first loss, before anything is sampled: in an R-CNN's RPN,
in the head of a one-stage detector. Labels may be of any whole dtype, and without an object of any
dtype and shape: torchvision's heads differ in which they refuse, or get wrong without a word.

Shapes: N objects of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detmix.losses.object_weights import Targets, TensorDict
from detmix.mixing.target import Column, box_weights, check_rows

Dtypes = tuple[torch.dtype, ...]
Axes = tuple[int | str, ...]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# What RoI heads need of a target: dtypes (none for any) and axes after that of the objects.
_FIELDS: dict[str, tuple[Dtypes, Axes]] = {
    "boxes": ((torch.float32, torch.float64, torch.float16), (4,)),
    "masks": ((), ("H", "W")),
    "keypoints": ((torch.float32,), ("J", 3)),
}


def check_roi(targets: Targets, num_classes: float, branches: list[str]) -> None:
    """Raise ValueError or TypeError for the first target of which RoI heads get no right loss."""
    targets = with_branches(targets)
    for index, target in enumerate(targets):
        for key in ("boxes", *branches):
            check_field(target, index, key, *_FIELDS[key])
    columns: list[Column] = []
    if "masks" in branches:
        # Of 255 the loss runs off to -infinity. Of each mask least and greatest are looked at.
        masks = [target["masks"].flatten(1) for target in targets]
        ends = [torch.stack([own.amin(1), own.amax(1)], dim=1) for own in masks]
        expected = "0 or 1 (`masks > 0` is)"
        columns = [("masks", ends, expected, lambda ends: ((ends >= 0) & (ends <= 1)).all(1))]
    checked(targets, num_classes, *columns)


def with_branches(targets: Targets) -> Targets:
    """Give targets without objects the masks and keypoints of none of them."""
    # torchvision's wrapped data sets leave all keys out for an image of COCO without annotations,
    # and its own heads then fail; its tests have keypoints of shape (17, 0, 3).
    none = {"masks": torch.zeros(0, 1, 1), "keypoints": torch.zeros(0, 1, 3)}
    return [
        target
        | {
            key: value.to(target["boxes"].device)
            for key, value in none.items()
            if len(target["boxes"]) == 0 and target.get(key, value).numel() == 0
        }
        for target in targets
    ]


def checked(targets: Targets, num_classes: float, *more: Column) -> Targets:
    """Return targets with ``(N,)`` int64 labels, or raise for the first of no right loss."""
    for index, target in enumerate(targets):
        check_field(target, index, "labels", _WHOLE)
    labels = [target["labels"].flatten().to(torch.int64) for target in targets]
    expected = f"in 1..{num_classes - 1} (0 is background)"
    # On a GPU others would be fatal.
    column: Column = ("labels", labels, expected, lambda y: (y >= 1) & (y < num_classes))
    check_objects(targets, column, *more)
    return [target | {"labels": own} for target, own in zip(targets, labels, strict=True)]


def check_field(
    target: TensorDict, index: int, key: str, dtypes: Dtypes = (), axes: Axes = ()
) -> None:
    """Raise ValueError or TypeError but for a row of such axes for each box; a name is any size."""
    if key not in target:
        raise ValueError(f"target {index}: expected {key!r}, one for each box")
    value, count = target[key], len(target["boxes"])
    if count == 0 and isinstance(value, Tensor) and value.numel() == 0:
        return
    dtype = getattr(value, "dtype", type(value).__name__)
    if dtypes and dtype not in dtypes:
        raise TypeError(f"target {index}: {key!r} must be a tensor of one of {dtypes}, got {dtype}")
    shape, expected = value.shape, (count, *axes)
    if len(shape) != len(expected) or any(
        isinstance(size, int) and size != found for size, found in zip(expected, shape, strict=True)
    ):
        told = str(expected).replace("'", "")
        raise ValueError(f"target {index}: {key!r} must have shape {told}, got {tuple(shape)}")


def check_objects(targets: Targets, *more: Column) -> None:
    """Raise ValueError for the first weight, box or row of more that no loss is computed with."""
    for index, target in enumerate(targets):
        check_field(target | {"box_weights": box_weights(target)}, index, "box_weights")
    check_rows([f"target {index}" for index in range(len(targets))], targets, *more)
