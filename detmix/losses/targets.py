"""Which targets the losses take: those that torchvision computes losses of.

They are checked where they come to the first loss, before anything is sampled: in an R-CNN's RPN,
in the head of a one-stage detector. Labels may be of any whole dtype, and without an object of any
dtype and shape: torchvision's heads differ in which they refuse, or get wrong without a word.

Shapes: N objects of one image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detmix.losses.object_weights import Targets
from detmix.mixing import box_weights

Dtypes = tuple[torch.dtype, ...]
#: a key, each target's values, what they must be, and the rule for each row of them
Column = tuple[str, list[Tensor], str, Callable[[Tensor], Tensor]]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# What RoI heads need of a target: dtypes (none for any) and axes after that of the objects.
_FIELDS: dict[str, tuple[Dtypes, tuple[int | str, ...]]] = {
    "boxes": ((torch.float32, torch.float64, torch.float16), (4,)),
    "masks": ((), ("H", "W")),
    "keypoints": ((torch.float32,), ("J", 3)),
}


def check_roi_targets(targets: Targets, num_classes: float, branches: list[str]) -> None:
    """Raise ValueError or TypeError for the first target of which RoI heads get no right loss."""
    targets = with_empty_branches(targets)
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


def with_empty_branches(targets: Targets) -> Targets:
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
    target: dict[str, Tensor],
    index: int,
    key: str,
    dtypes: Dtypes = (),
    axes: tuple[int | str, ...] = (),
) -> None:
    """Raise ValueError or TypeError but for a row of such axes for each box; a name is any size."""
    if key not in target:
        raise ValueError(f"target {index} must have {key!r}, one for each box")
    value, count = target[key], len(target["boxes"])
    if count == 0 and isinstance(value, Tensor) and value.numel() == 0:
        return
    dtype = getattr(value, "dtype", type(value).__name__)
    if dtypes and dtype not in dtypes:
        raise TypeError(
            f"{key!r} of target {index} must be a tensor of one of {dtypes}, got {dtype}"
        )
    shape, expected = value.shape, (count, *axes)
    if len(shape) != len(expected) or any(
        isinstance(size, int) and size != found for size, found in zip(expected, shape, strict=True)
    ):
        told = str(expected).replace("'", "")
        raise ValueError(
            f"{key!r} of target {index} must have shape {told}, one row for each box, got "
            f"{tuple(shape)}"
        )


def check_objects(targets: Targets, *more: Column) -> None:
    """Raise ValueError for the first weight, box or row of more that no loss is computed with."""
    weights = [box_weights(target) for target in targets]
    for index, (target, own) in enumerate(zip(targets, weights, strict=True)):
        check_field(target | {"box_weights": own}, index, "box_weights")
    boxes = [target["boxes"] for target in targets]
    columns: list[Column] = [
        ("box_weights", weights, "finite and not negative", lambda w: torch.isfinite(w) & (w >= 0)),
        ("boxes", boxes, "finite", lambda boxes: torch.isfinite(boxes).all(1)),
        *more,
    ]
    valid = [is_valid(torch.cat(values)) for _, values, _, is_valid in columns]
    if bool(torch.cat(valid).all()):  # asked once, as it waits for the device
        return
    for key, values, expected, is_valid in columns:
        for index, own in enumerate(values):
            for row in (~is_valid(own)).nonzero()[:, 0].tolist():
                raise ValueError(
                    f"{key!r} of target {index} must be {expected}, got {own[row].tolist()} "
                    f"for box {row}"
                )
