"""albumentations for detection targets: every per-object field follows its box.

albumentations is imported when a pipeline is built, not before: its import takes a second.
Legend: N objects come in, M of them are left.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.data.augment_fields import (
    check_fields,
    moved_fields,
    num_pixels,
    packed_fields,
    take_rows,
    to_plain,
    typed_as,
)
from detmix.data.detection import check_index
from detmix.mixing.seeding import HasEpoch, SharedEpoch, held_by, sample_seed
from detmix.mixing.target import (
    KNOWN_KEYS,
    Target,
    check_rows,
    check_sample,
    check_share,
    key_names,
    plain,
    tell_of_own,
    told_keys,
    with_objects,
)

_SEEDS = 2**32
_FILL = (124, 116, 104)  # ImageNet's mean
_MIN_AREA = 1.0  # of a box that training keeps, in square pixels


class AlbumentationsTransform:
    """Apply albumentations transforms to an image and its target.

    All entries of the target with one row for each box (``labels``, ``box_weights``, ...) follow
    their objects; what belongs to the image passes unchanged. These move with the image:

    - ``masks`` ``(N, H, W)``, uint8 or bool; a transform that resamples takes the nearest pixel,
      unless its ``mask_interpolation`` says otherwise.
    - ``keypoints`` ``(N, K, 3)``, x, y, visibility in COCO's convention: mirroring takes x to
      W - 1 - x (and a box's x to W - x), resizing multiplies. One that leaves the image, or had
      visibility 0, becomes (0, 0, 0). ``(N, K, 2)``, without a visibility, as torchvision's
      `KeyPoints` are, stay where they come to lie.
    - ``area`` grows and shrinks as the mask's number of pixels, or without masks the box.

    Torchvision's `Image`, `BoundingBoxes` (of any format that is not rotated), `Mask` and
    `KeyPoints` come back as what they were, with the new canvas size; plain tensors as plain ones.

    Args:
        transforms: albumentations transforms, applied in this order.
        min_visibility: Objects are left out of which less than this share is left in the image, in
            [0, 1], or less than a square pixel, or no pixel of the mask; with 0, as for evaluation,
            only those without area.
        check_each_transform: Clip boxes and leave them out after each transform; once at the end is
            faster, and right where none but the last moves boxes out of the image.
        keypoint_flip: The order of the K keypoints in a mirrored image, which shows a left eye
            where the right one was: the new k-th is what was the ``keypoint_flip[k]``-th. Whatever
            turns the image over counts; two such transforms cancel out.
        keys: What else than the known keys (see `detmix.mixing.union`) belongs to the objects.
    """

    def __init__(
        self,
        transforms: Sequence[Any],
        *,
        min_visibility: float = 0.1,
        check_each_transform: bool = True,
        keypoint_flip: Sequence[int] | None = None,
        keys: Collection[str] = (),
    ) -> None:
        check_share("min_visibility", min_visibility)
        order = None if keypoint_flip is None else list(keypoint_flip)
        if order is not None and sorted(order) != list(range(len(order))):
            raise ValueError(f"keypoint_flip must hold 0 to {len(order) - 1} once, got {order}")
        self.keypoint_flip = order
        self.min_visibility = min_visibility
        self.keys = key_names(keys)
        self._told = told_keys()
        alb = _import_albumentations()
        boxes = alb.BboxParams(
            format="pascal_voc",
            label_fields=["rows"],
            min_area=_MIN_AREA if min_visibility else 0.0,
            min_visibility=min_visibility,
            check_each_transform=check_each_transform,
            clip=True,
            filter_invalid_bboxes=True,
        )
        points = alb.KeypointParams(format="xy", remove_invisible=False, check_each_transform=False)
        # Without the last one albumentations warns of a pipeline that moves nothing.
        self.pipeline = alb.Compose(
            [*transforms, alb.NoOp(p=0)], bbox_params=boxes, keypoint_params=points
        )

    def __call__(
        self, image: Tensor, target: Target, seed: int | None = None
    ) -> tuple[Tensor, Target]:
        """Transform one sample; the inputs are not changed."""
        name = f"image_id {target.get('image_id', 'unknown')}"
        check_sample(image, target, name, KNOWN_KEYS | self.keys)
        objects = with_objects(target)
        labels = torch.as_tensor([] if objects.get("labels") is None else objects["labels"])
        expected = "at least 1 (0 is background)"
        check_rows([name], [objects], ("labels", [labels], expected, lambda labels: labels >= 1))
        if image.dtype != torch.uint8 or image.shape[0] != 3:
            got = f"{image.dtype} of shape {tuple(image.shape)}"
            raise ValueError(f"{name}: image must be a uint8 tensor (3, H, W), got {got}")
        check_fields(target, name, self.keypoint_flip)
        if seed is None:
            seed = int(torch.randint(0, _SEEDS, (), dtype=torch.int64))
        # One stream for all transforms: ``set_random_seed`` would start each with the same seed,
        # and an image would be flipped exactly when its colours are changed.
        seed %= _SEEDS
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        new_image, new_target = self._apply(plain(image), to_plain(target))
        size = (new_image.shape[1], new_image.shape[2])
        for key in {"boxes", "masks", "keypoints"} & target.keys():
            new_target[key] = typed_as(new_target[key], target[key], size)
        return typed_as(new_image, image, size), new_target

    def _apply(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Transform plain tensors by what the pipeline's generators draw next."""
        result = self.pipeline(
            image=_to_channels_last(image),
            bboxes=target["boxes"].numpy().copy(),
            rows=np.arange(len(target["boxes"])),
            **packed_fields(target, (image.shape[1], image.shape[2])),
        )
        new_image = _to_channels_first(result["image"])
        size = (new_image.shape[1], new_image.shape[2])
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # in float32, too
        rows = torch.from_numpy(np.asarray(result["rows"], dtype=np.int64)[has_area])
        moved = {"boxes": torch.from_numpy(boxes[has_area])}
        moved |= moved_fields(result, target, rows, size, self.keypoint_flip)
        if self.min_visibility and "masks" in moved:
            kept = num_pixels(moved["masks"]) > 0
            if not bool(kept.all()):
                moved, rows = {key: value[kept] for key, value in moved.items()}, rows[kept]
        if len(rows) < len(target["boxes"]):
            tell_of_own(self._told, [(image, target)], self.keys)
        return new_image, take_rows(target, moved, rows, KNOWN_KEYS | self.keys)


def detection_transforms(
    size: int | None = None,
    *,
    train: bool,
    flip: float = 0.5,
    photometric: float = 0.5,
    crop: float = 0.5,
    scale_jitter: tuple[float, float] | None = None,
    keypoint_flip: Sequence[int] | None = None,
    keys: Collection[str] = (),
) -> AlbumentationsTransform:
    """Build the usual pipeline for detection: crop, shrink, flip, colours.

    The crop holds every box whole; as the detector enlarges it again, it serves as a change of
    scale. For evaluation only the shrinking is left, and every object with an area is kept.

    Args:
        size: Images with a longer side than this, in pixels, are shrunk to it; None for never.
        train: Whether to augment.
        flip: The probability of a horizontal flip.
        photometric: That of changed brightness, contrast, saturation and hue.
        crop: That of a crop.
        scale_jitter: In training, resize longer sides to a length between these times ``size``, as
            torchvision's `ScaleJitter`; then cut out a random square of ``size``, or fill it up at
            the right and the bottom. (0.1, 2.0) is LSJ, of arXiv 2012.07177; None for never.
        keypoint_flip: As `AlbumentationsTransform` has it; `CocoDetection` knows it.
        keys: As `AlbumentationsTransform` has them.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel or None, got {size}")
    for name, p in (("flip", flip), ("photometric", photometric), ("crop", crop)):
        if not 0 <= p <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], got {p}")
    alb = _import_albumentations()
    transforms = [] if size is None else [_limit_longest_side(size)]
    if train:
        if scale_jitter is not None:
            transforms = _scale_jitter(size, scale_jitter)
        transforms.insert(0, alb.BBoxSafeRandomCrop(p=crop))
        transforms += [
            alb.HorizontalFlip(p=flip),
            alb.ColorJitter(
                brightness=(0.8, 1.2),
                contrast=(0.75, 1.25),
                saturation=(0.7, 1.3),
                hue=(-0.03, 0.03),
                p=photometric,
            ),
        ]
    return AlbumentationsTransform(
        transforms,
        min_visibility=0.1 if train else 0.0,
        check_each_transform=scale_jitter is not None,  # no other moves a box out of the image
        keypoint_flip=keypoint_flip,
        keys=keys,
    )


class AugmentedDataset(HasEpoch, Dataset[tuple[Tensor, Target]]):
    """A data set whose samples are augmented as a function of (seed, epoch, index) alone.

    Args:
        dataset: Yields ``(image, target)`` by index and has a length.
        transform: Called as ``transform(image, target, seed=...)``.
        seed: The run's seed. One within another draws its own of the same seed, side by side alike.
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
        # Several one within the other must not draw the same numbers of the same seed.
        depth = sum(isinstance(p, AugmentedDataset) and p.seed == seed for p in held_by(self))
        self._stream = f"augment/{depth}" if depth else "augment"

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        index = check_index(index, len(self))
        image, target = self.dataset[index]
        seed = sample_seed(self.seed, self._epoch.value, index, self._stream)
        return self.transform(image, target, seed=seed)


def _import_albumentations() -> ModuleType:
    # It asks the network for a newer release at its first import: seconds, where there is none.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    return import_module("albumentations")


def _scale_jitter(size: int | None, limits: tuple[float, float]) -> list[Any]:
    """Return transforms that resize an image at random, and cut or fill a square of ``size``."""
    import cv2

    if size is None or not 0 < limits[0] <= limits[1]:
        raise ValueError(f"scale_jitter must ascend, and needs a size, got {limits}, size={size}")
    alb = _import_albumentations()
    shortest, longest = (max(1, round(limit * size)) for limit in limits)
    how = {"mask_interpolation": cv2.INTER_NEAREST_EXACT, "area_for_downscale": "image"}
    resize = alb.LongestMaxSize([*range(shortest, longest + 1)], **how)
    return [resize, alb.RandomCrop(size, size, True, pad_position="top_left", fill=_FILL)]


def _limit_longest_side(longest: int) -> Any:
    """Return a transform that shrinks larger images to a longest side; it enlarges none."""
    # Enlarging is left to the detector: here it would only slow down what follows. Shrinking
    # averages over areas, which does not alias; masks take the pixel in the middle of each.
    import cv2

    return _import_albumentations().Lambda(
        image=partial(_shrink, longest=longest, interpolation=cv2.INTER_AREA),
        mask=partial(_shrink, longest=longest, interpolation=cv2.INTER_NEAREST_EXACT),
        keypoints=partial(_shrink_keypoints, longest=longest),
    )


def _shrink(
    image: npt.NDArray[np.uint8], *, longest: int, interpolation: int, **_: Any
) -> npt.NDArray[np.uint8]:
    import cv2

    height, width = _shrunk_size(image.shape[:2], longest)
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation))


def _shrink_keypoints(
    keypoints: npt.NDArray[np.float64], *, longest: int, shape: tuple[int, ...], **_: Any
) -> npt.NDArray[np.float64]:
    """Return keypoints ``(P, 2+)``, x and y first, in the shrunk image."""
    height, width = _shrunk_size(shape[:2], longest)
    moved: npt.NDArray[np.float64] = keypoints.copy()
    moved[:, :2] *= (width / shape[1], height / shape[0])
    return moved


def _shrunk_size(size: tuple[int, ...], longest: int) -> list[int]:
    scale = min(1.0, longest / max(size))
    return [max(1, round(side * scale)) for side in size]


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
