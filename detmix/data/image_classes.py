"""Images sorted into a folder for each class, as a map-style data set for classification.

The images of a split are files in folders, or members of tar shards that are read in place.
Legend: I images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detmix.data.image_file import decode_image_bytes
from detmix.data.image_index import StoredImage, list_images, read_image_bytes
from detmix.data.skipping import SkippedImage, check_on_error, find_unusable, skip_message

__all__ = ["ImageClasses"]


class ImageClasses(Dataset[tuple[Tensor, int]]):
    """The images of one split and their classes.

    A sample is ``(image, label)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an EXIF
    orientation is not applied), the label an integer from 0: there is no background class here.

    ``root/<split>/`` is a tree as torchvision's ``ImageFolder`` takes it: one folder a class,
    images in it or in folders below. Where there is none, ``root/<split>.tar`` and
    ``root/<split>-*.tar`` are uncompressed tar archives with members ``.../<class>/<file>``;
    they are indexed once and images are read from where they lie, without unpacking. The same
    tree as a folder and as archives of ``<split>/...`` gives the same samples. Hidden files and
    folders (``._a.jpg`` of macOS) and what is no image by its extension are left out.

    Args:
        root: The folder of the splits.
        split: Names the folder or the archives.
        class_limit: Use only so many classes, the first ones in order.
        in_memory: Decode all images at once and hold them, for data sets of small images. Forked
            workers share them.
        classes: The classes in the order of their labels, usually those of the training split;
            by default those of this split, sorted.
        on_error: ``"skip"`` leaves out images that cannot be decoded, as
            :class:`detmix.data.VOCDetection` does; not for validation.

    Attributes:
        classes: The class names; label ``k`` is ``classes[k]``.
        labels: Every image's label.
        names: Every image's name, such as ``"train/n02124075/n02124075_0.webp"``.
        skipped: The images that ``on_error="skip"`` left out, and why.

    Raises:
        FileNotFoundError: There is neither a folder nor an archive for the split.
        ValueError: An argument is out of its range, the split has no class, no image or a class
            that is not among ``classes``, or an archive cannot be used. On access, and at
            construction with ``in_memory``, also for an image that cannot be decoded. The
            message names the file.
        IndexError: On access, the index is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        class_limit: int | None = None,
        in_memory: bool = False,
        classes: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_on_error(on_error)
        if class_limit is not None and class_limit < 1:
            raise ValueError(f"class_limit must be at least 1 or None, got {class_limit}")
        images = list_images(root, split)
        where = f"split {split!r} in {root}"
        self.classes = _choose_classes({image.class_name for image in images}, classes, class_limit)
        if class_limit is None:
            _check_known(images, self.classes, where)
        to_label = {name: label for label, name in enumerate(self.classes)}
        images = [image for image in images if image.class_name in to_label]
        if not images:
            raise ValueError(
                f"{where}: no image is of the classes {', '.join(self.classes[:3])}, ..."
            )
        self.skipped: tuple[SkippedImage, ...] = ()
        if on_error == "skip":
            images, self.skipped = _leave_out(images, where)
        self._images = images
        self.labels = tuple(to_label[image.class_name] for image in images)
        self.names = tuple(image.name for image in images)
        self._decoded = _DecodedImages(map(_decode, images), len(images)) if in_memory else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        index %= len(self)
        if self._decoded is not None:
            return self._decoded[index], self.labels[index]
        return _decode(self._images[index]), self.labels[index]


class _DecodedImages:
    """I decoded images of any sizes in one flat tensor.

    A tensor for each would cost a file descriptor for each where workers are spawned.
    """

    def __init__(self, images: Iterable[Tensor], num_images: int) -> None:
        from tqdm import tqdm

        pixels = bytearray()
        sizes = []
        # disable=None: only where standard error is a terminal.
        bar = tqdm(images, "decoding", num_images, leave=False, disable=None, delay=2)
        for image in bar:
            pixels += image.permute(1, 2, 0).contiguous().numpy().data
            sizes.append(image.shape[-2:])
        self._pixels = torch.frombuffer(pixels, dtype=torch.uint8)
        self._sizes = torch.tensor(sizes)  # (I, 2) height, width
        self._ends = (3 * self._sizes.prod(dim=1)).cumsum(dim=0)  # (I,)

    def __getitem__(self, index: int) -> Tensor:
        """Return a copy ``(3, H, W)`` in channels last, as the decoder gives it."""
        height, width = self._sizes[index].tolist()
        end = int(self._ends[index])
        pixels = self._pixels[end - 3 * height * width : end].clone()
        return pixels.view(height, width, 3).permute(2, 0, 1)


def _choose_classes(
    found: set[str], expected: Sequence[str] | None, class_limit: int | None
) -> tuple[str, ...]:
    if expected is None:
        return tuple(sorted(found)[:class_limit])
    names = () if isinstance(expected, str) else tuple(expected)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"classes must be a sequence of different class names, got {expected!r}")
    return names[:class_limit]


def _check_known(images: Sequence[StoredImage], classes: tuple[str, ...], where: str) -> None:
    known = set(classes)
    unknown = next((image for image in images if image.class_name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"{where}: class {unknown.class_name!r}, of {unknown.name}, is not among the "
            f"{len(classes)} expected classes {', '.join(classes[:3])}, ..."
        )


def _leave_out(
    images: list[StoredImage], where: str
) -> tuple[list[StoredImage], tuple[SkippedImage, ...]]:
    """Leave out images that cannot be decoded; warn once of them."""
    names = [image.name for image in images]
    unusable = find_unusable(names, [("unusable image", lambda index: _decode(images[index]))])
    skipped = tuple(unusable.values())
    if skipped:
        message = skip_message(skipped, len(images), where)
        warnings.warn(message, UserWarning, stacklevel=3)  # of who makes the data set
    return [image for index, image in enumerate(images) if index not in unusable], skipped


def _decode(image: StoredImage) -> Tensor:
    return decode_image_bytes(read_image_bytes(image), image.where)
