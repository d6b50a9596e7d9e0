"""What pictures are made of, as arrays, checked.

Shape legend: N boxes of one image of H x W pixels; C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Target = Mapping[str, Any]

_PER_OBJECT = (
    "labels",
    "scores",
    "box_weights",
    "source",
    "difficult",
    "iscrowd",
    "masks",
    "keypoints",
)


def as_picture(name: str, image: Tensor) -> NDArray[Any]:
    """``(3, H, W)`` uint8 or float in [0, 1] as ``(H, W, 3)`` uint8."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"{name} has shape {tuple(image.shape)}, expected (3, H, W)")
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(image.permute(1, 2, 0).numpy())


def as_numpy(values: Any) -> NDArray[Any]:
    """A tensor of any device or dtype, or anything NumPy takes, as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray((values.float() if values.is_floating_point() else values).numpy())
    return np.asarray(values)


def class_names(labels: NDArray[Any], classes: Sequence[str]) -> list[str]:
    """The name for each label ``(N,)``; ValueError for one outside 1..C."""
    for index, label in enumerate(labels.tolist()):
        if not 1 <= label <= len(classes):
            raise ValueError(f"labels[{index}] is {label}, expected 1..{len(classes)}")
    return [classes[int(label) - 1] for label in labels]


def check_records(name: str, records: Sequence[Target], classes: Sequence[str]) -> None:
    """Raise ValueError, naming the record, for what cannot be drawn.

    That is a label outside 1..C, a box that is not finite, and a row too many or too few.

    Args:
        name: what to call the list in an error.
        records: predictions or targets.
        classes: the C class names.
    """
    for index, record in enumerate(records):
        num_boxes = len(record["boxes"])
        for key in _PER_OBJECT:
            value = record.get(key)
            if value is not None and len(value) != num_boxes:
                raise ValueError(
                    f"{name}[{index}]: {key!r} has {len(value)} entries for {num_boxes} boxes"
                )
        try:
            class_names(as_numpy(record["labels"]), classes)
        except ValueError as error:
            raise ValueError(f"{name}[{index}]: {error}") from None
        boxes = as_numpy(record["boxes"]).reshape(-1, 4)
        for row in np.flatnonzero(~np.isfinite(boxes).all(axis=1))[:1]:
            raise ValueError(
                f"{name}[{index}]: boxes[{row}] is {boxes[row].tolist()}, expected finite numbers"
            )


def check_equal_lengths(**lists: Sequence[Any] | None) -> None:
    """Raise ValueError unless all lists that are given are equally long."""
    lengths = {name: len(values) for name, values in lists.items() if values is not None}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"got {got}, expected as many of each")
