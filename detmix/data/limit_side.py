"""An albumentations resize that only ever shrinks. Importing this file imports albumentations."""

from __future__ import annotations

from typing import Any

import albumentations
import cv2
import numpy.typing as npt


class LimitLongestSide(albumentations.LongestMaxSize):  # type: ignore[misc]
    """Shrink an image so that its longest side is at most ``max_size``; never enlarge it."""

    # Enlarging is left to the detector: here it would only slow down what follows. Shrinking
    # averages over areas, which does not alias; masks take the pixel in the middle of each.

    def __init__(self, max_size: int) -> None:
        super().__init__(
            max_size=max_size,
            interpolation=cv2.INTER_AREA,
            mask_interpolation=cv2.INTER_NEAREST_EXACT,
            p=1.0,
        )

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the scale, as albumentations asks of its resizing transforms."""
        return {"scale": min(1.0, self.max_size / max(params["shape"][:2]))}

    def apply_to_keypoints(
        self, keypoints: npt.NDArray[Any], scale: float, **params: Any
    ) -> npt.NDArray[Any]:
        """Return keypoints ``(P, 2+)``, x and y first, in the shrunk image."""
        moved: npt.NDArray[Any] = keypoints.copy()
        for axis, side in enumerate(reversed(params["shape"][:2])):
            moved[:, axis] *= max(1, round(side * scale)) / side
        return moved
