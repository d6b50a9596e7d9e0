"""Images sorted into a folder for each class, as a function of (seed, epoch, index) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from detmix.data.detection import check_index, read_usable
from detmix.data.images import read_image
from detmix.mixing.seeding import HasEpoch, SharedEpoch, sample_seed


class ImageClasses(HasEpoch, Dataset[tuple[Tensor, int, int]]):
    """The images of one split and their classes, as torchvision's ``ImageFolder`` finds them.

    A sample is ``(image, label, index)``: the image uint8 ``(3, H, W)`` RGB as it is stored (an
    EXIF orientation is not applied) and then transformed, the label an integer from 0 (there is
    no background class here), the index by which ``names`` names the image.

    Args:
        root: The folder of the splits.
        split: The split's folder in it, with a folder for each class and the images in these.
        transform: Called with each image; may draw from torch's global CPU generator, as
            torchvision's transforms do, which is seeded for it and afterwards put back.
        classes: The classes in the order of their labels; by default those of this split, sorted.
        on_error: As `VOCDetection` has it.
        seed: The run's seed.

    Attributes:
        names: Every image's name, such as ``"train/n02124075/n02124075_0.JPEG"``.
        skipped: The images that were left out, each a `SkippedImage`.

    Raises:
        FileNotFoundError: There is no such folder, no class or no image of a class in it.
        ValueError: Of a class not among ``classes`` or, on access, an image that is broken.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        transform: Callable[[Tensor], Tensor] | None = None,
        *,
        classes: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int = 0,
    ) -> None:
        folder = Path(root) / split
        files = ImageFolder(folder)
        self.classes = tuple(files.classes if classes is None else classes)
        for name in files.classes:
            if name not in self.classes:
                expected = f"one of {', '.join(self.classes[:3])}, ..."
                raise ValueError(f"{folder / name}: expected {expected}, got class {name!r}")
        labels = [self.classes.index(name) for name in files.classes]
        names = [Path(path).relative_to(folder.parent).as_posix() for path, _ in files.samples]
        samples = [(path, labels[number]) for path, number in files.samples]
        found, self.skipped = read_usable(
            names, samples.__getitem__, lambda _, sample: read_image(sample[0]), on_error, folder
        )
        self.names = tuple(names[index] for index in found)
        self._samples = list(found.values())
        self.transform = transform
        self.seed = seed
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        index = check_index(index, len(self))  # the same image from the end gets the same seed
        path, label = self._samples[index]
        image = read_image(path)
        if self.transform is not None:
            seed = sample_seed(self.seed, self._epoch.value, index, "augment")
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the GPUs' generators as well.
                torch.default_generator.manual_seed(seed)
                image = self.transform(image)
        return image, label, index
