"""The keypoints of a COCO file: their names, their order in a mirrored image, their values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["common_keypoints", "mirrored_order", "read_keypoints"]

_LARGEST = float(np.finfo(np.float32).max)
_SIDE = re.compile("left|right", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}


def common_keypoints(names: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
    """Return the keypoints' names that all categories share; one without any does not count.

    Args:
        names: The categories' names, each with the names of its keypoints.

    Raises:
        ValueError: No category has keypoints, or two have others: a tensor ``(N, K, 3)`` and
            one order for mirrored images cannot hold both.
    """
    with_keypoints = [(category, keypoints) for category, keypoints in names if keypoints]
    if not with_keypoints:
        raise ValueError("keypoints=True, but no category names keypoints")
    first, expected = with_keypoints[0]
    for category, keypoints in with_keypoints[1:]:
        if keypoints != expected:
            raise ValueError(
                f"category {category!r} has {len(keypoints)} keypoints ({', '.join(keypoints)}), "
                f"but {first!r} has {len(expected)} ({', '.join(expected)}); expected the same "
                "for all categories that have any"
            )
    return expected


def mirrored_order(names: Sequence[str]) -> tuple[int, ...]:
    """Return which keypoint takes each one's place when the image is mirrored left to right.

    ``"left_eye"`` and ``"right_eye"`` change places; a name without such a partner stays.
    """
    partners = [_SIDE.sub(lambda side: _OTHER_SIDE.get(side[0], side[0]), name) for name in names]
    indices = {name: index for index, name in enumerate(names)}
    return tuple(indices.get(partner, index) for index, partner in enumerate(partners))


def read_keypoints(value: Any, num_keypoints: int) -> npt.NDArray[np.float32]:
    """Check one annotation's ``keypoints`` and return them as ``(K, 3)``: x, y, visibility.

    Args:
        value: As in the JSON: ``[x1, y1, v1, x2, ...]``; None, where an annotation has none,
            gives zeros, COCO's sign of a keypoint that is not labelled.
        num_keypoints: How many are expected.

    Raises:
        ValueError: It is no list of so many finite numbers, or a visibility is not 0, 1 or 2.
    """
    if value is None:
        return np.zeros((num_keypoints, 3), dtype=np.float32)
    if not isinstance(value, list) or len(value) != 3 * num_keypoints:
        got = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise ValueError(
            f"keypoints must be a list of 3 x {num_keypoints} = {3 * num_keypoints} numbers, "
            f"got {got}"
        )
    for number in value:
        if type(number) not in (int, float) or not abs(number) <= _LARGEST:  # false of NaN too
            raise ValueError(f"keypoints must be finite numbers, got {number!r}")
    keypoints = np.array(value, dtype=np.float32).reshape(num_keypoints, 3)
    for visibility in keypoints[:, 2].tolist():
        if visibility not in (0, 1, 2):
            raise ValueError(f"a keypoint's visibility must be 0, 1 or 2, got {visibility:g}")
    return keypoints
