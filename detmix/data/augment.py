"""albumentations for detection targets: every per-object field follows its box.

albumentations is imported when a pipeline is built, not before: its import takes a second.
Legend: N objects come in, K of them are left.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.mixing.epoch import SharedEpoch
from detmix.mixing.ground_truth import Target, check_sample, is_per_object
from detmix.mixing.seeding import sample_seed

__all__ = [
    "AlbumentationsTransform",
    "AugmentedDataset",
    "detection_transforms",
]

_NOT_CARRIED = ("masks", "keypoints")
_SEEDS = 2**32


class AlbumentationsTransform:
    """Apply albumentations transforms to an image and its target.

    Only a row number travels with each box; afterwards every per-object entry of the target
    (``labels``, ``box_weights``, ``difficult``, ``iscrowd``, and whatever else has one row for
    each box) is taken from the rows that are left. ``area``, where present, is computed anew
    from the boxes. Keys that belong to the image pass unchanged.

    Args:
        transforms: albumentations transforms, applied in this order.
        min_area: Boxes with less area than this, in square pixels, are left
            out together with all their fields.
        min_visibility: So are boxes of which less than this share is left in the image, in [0, 1].
        check_each_transform: Clip boxes and leave them out after each transform, instead of
            once at the end, where ``min_visibility`` then refers to the whole box. Once is
            faster, and right where no transform but the last moves boxes out of the image.

    Raises:
        ValueError: ``min_area`` or ``min_visibility`` is out of its range.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        *,
        min_area: float = 1.0,
        min_visibility: float = 0.1,
        check_each_transform: bool = True,
    ) -> None:
        if not min_area >= 0:
            raise ValueError(f"min_area must not be negative, got {min_area}")
        if not 0 <= min_visibility <= 1:
            raise ValueError(f"min_visibility must be in [0, 1], got {min_visibility}")
        alb = _import_albumentations()
        boxes = alb.BboxParams(
            format="pascal_voc",
            label_fields=["rows"],
            min_area=min_area,
            min_visibility=min_visibility,
            check_each_transform=check_each_transform,
            clip=True,
            filter_invalid_bboxes=True,
        )
        # albumentations warns of a pipeline that does nothing at all.
        self.pipeline = alb.Compose(list(transforms) or [alb.NoOp()], bbox_params=boxes)

    def __call__(
        self, image: Tensor, target: Target, seed: int | None = None
    ) -> tuple[Tensor, Target]:
        """Transform one sample; the inputs are not changed.

        Args:
            image: uint8 ``(3, H, W)`` on the CPU.
            target: ``boxes`` ``(N, 4)`` in pixels and per-object fields of N rows.
            seed: All randomness is a function of it. Without one it is drawn from torch's
                global generator, so that ``torch.manual_seed`` governs and workers differ.

        Returns:
            The new image, uint8 and contiguous ``(3, H', W')``, and the new target with K rows:
            ``boxes`` float32, inside the image and never without area.

        Raises:
            ValueError: The sample breaks the contract above, or has masks or keypoints, which
                are not carried along; names the image_id, the key and the value.
        """
        _check_sample(image, target)
        if seed is None:
            seed = int(torch.randint(0, _SEEDS, (), dtype=torch.int64))
        self._seed(seed % _SEEDS)
        boxes = target["boxes"].detach().as_subclass(Tensor).to(torch.float32)
        result = self.pipeline(
            image=_to_channels_last(image),
            bboxes=boxes.numpy().copy(),
            rows=np.arange(len(boxes)),
        )
        new_image = _to_channels_first(result["image"])
        boxes, rows = _clean(result["bboxes"], result["rows"], new_image.shape[-2:])
        return new_image, _take_rows(target, boxes, rows)

    def _seed(self, seed: int) -> None:
        """Let all transforms draw from one stream.

        ``set_random_seed`` would start each of them with the same seed: their first draws would
        be equal, and an image be flipped exactly when its colours are changed.
        """
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))


def detection_transforms(
    size: int | None = None,
    *,
    train: bool,
    flip: float = 0.5,
    photometric: float = 0.5,
    crop: float = 0.5,
) -> AlbumentationsTransform:
    """Build the usual pipeline for detection: crop, shrink, flip, colours.

    The crop holds every box whole; as the detector enlarges it again, it serves as a change of
    scale. For evaluation only the shrinking is left, so that training and test images come at
    the same scale, and no box is ever dropped.

    Args:
        size: Images with a longer side than this, in pixels, are shrunk to it; None for never.
        train: Whether to augment.
        flip: The probability of a horizontal flip.
        photometric: The probability of changed brightness, contrast, saturation and hue.
        crop: The probability of a crop.

    Raises:
        ValueError: ``size`` is less than 1 or a probability is outside [0, 1].
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel or None, got {size}")
    for name, p in (("flip", flip), ("photometric", photometric), ("crop", crop)):
        if not 0 <= p <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], got {p}")
    shrink = []
    alb = _import_albumentations()
    if size is not None:
        from detmix.data.limit_side import LimitLongestSide

        shrink = [LimitLongestSide(size)]
    if not train:
        return AlbumentationsTransform(
            shrink, min_area=0.0, min_visibility=0.0, check_each_transform=False
        )
    return AlbumentationsTransform(
        [
            alb.BBoxSafeRandomCrop(p=crop),
            *shrink,
            alb.HorizontalFlip(p=flip),
            alb.ColorJitter(
                brightness=(0.8, 1.2),
                contrast=(0.75, 1.25),
                saturation=(0.7, 1.3),
                hue=(-0.03, 0.03),
                p=photometric,
            ),
        ],
        check_each_transform=False,  # none of these moves a box out of the image
    )


class AugmentedDataset(Dataset[tuple[Tensor, Target]]):
    """A data set whose samples are augmented as a function of (seed, epoch, index) alone.

    Args:
        dataset: Yields ``(image, target)`` by index and has a length.
        transform: Called as ``transform(image, target, seed=...)``, such as
            :class:`AlbumentationsTransform`.
        seed: The run's seed.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, Target]],
        transform: Callable[..., tuple[Tensor, Target]],
        seed: int = 0,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, here, in running workers and in the data set below."""
        self._epoch.value = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        image, target = self.dataset[index]
        seed = sample_seed(self.seed, self._epoch.value, index, "augment")
        return self.transform(image, target, seed=seed)


def _import_albumentations() -> ModuleType:
    # It asks the network for a newer release at its first import: seconds, where there is none.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    module: ModuleType = albumentations
    return module


def _check_sample(image: Tensor, target: Target) -> None:
    name = f"image_id {target.get('image_id', 'unknown')}"
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"{name}: image must be uint8 of shape (3, H, W), "
            f"got {image.dtype} of shape {tuple(image.shape)}"
        )
    check_sample(image, target, name)
    for key in _NOT_CARRIED:
        if target.get(key) is not None:
            raise ValueError(f"{name}: {key!r} cannot be carried through albumentations here")
    labels = target.get("labels")
    if labels is not None and len(labels) and int(labels.min()) < 1:
        row = int((labels < 1).nonzero()[0])
        raise ValueError(
            f"{name}: 'labels'[{row}] must be at least 1 (0 is background), got {int(labels[row])}"
        )


def _to_channels_last(image: Tensor) -> npt.NDArray[np.uint8]:
    """Copy ``(3, H, W)`` to ``(H, W, 3)``; always a copy, as a transform may work in place."""
    import cv2

    array = image.numpy()
    if image.permute(1, 2, 0).is_contiguous():  # as decoded
        return np.array(array.transpose(1, 2, 0), dtype=np.uint8)
    return np.asarray(cv2.merge(list(array)))  # 15 times as fast as torch's copy


def _to_channels_first(image: npt.NDArray[np.uint8]) -> Tensor:
    """Copy ``(H, W, 3)`` to a contiguous ``(3, H, W)``."""
    import cv2

    planes = torch.empty((image.shape[2], *image.shape[:2]), dtype=torch.uint8)
    cv2.split(np.ascontiguousarray(image), list(planes.numpy()))
    return planes


def _clean(boxes: Any, rows: Any, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return ``(K, 4)`` boxes inside an image of ``size`` (H, W), and the rows they come from."""
    height, width = size
    new_boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    # albumentations works in fractions of the image: back in pixels a rounding may stick out.
    limits = np.array([width, height, width, height], dtype=np.float32)
    new_boxes = np.minimum(np.maximum(new_boxes, 0), limits)
    has_area = (new_boxes[:, 2:] > new_boxes[:, :2]).all(axis=1)
    new_rows = np.asarray(rows, dtype=np.int64).reshape(-1)
    return torch.from_numpy(new_boxes[has_area]), torch.from_numpy(new_rows[has_area])


def _take_rows(target: Target, boxes: Tensor, rows: Tensor) -> Target:
    """Return a new target with the given boxes and the given rows of all other fields."""
    taken = dict(target)
    for key, value in target.items():
        if isinstance(value, Tensor) and is_per_object(target, key):
            taken[key] = value[rows]
        elif is_per_object(target, key):
            taken[key] = [value[row] for row in rows.tolist()]
    taken["boxes"] = boxes
    if target.get("area") is not None:
        taken["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).to(target["area"].dtype)
    return taken
