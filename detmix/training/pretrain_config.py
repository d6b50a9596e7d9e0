"""The typed configuration of a classifier's pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detmix.backbones.timm import TIMM_PREFIX
from detmix.detectors import ClassifierConfig
from detmix.pretrained.match_state import IMAGENET_MEAN, IMAGENET_STD
from detmix.training.config import LoopConfig
from detmix.training.data_config import check_at_least, check_in_range

Mix = Literal["none", "mixup", "cutout", "cutmix", "mixup+cutmix"]


@dataclass(frozen=True)
class ImageDataConfig:
    """Images sorted into classes, and their loading.

    Attributes:
        root: The folder that holds the splits, each a folder with a folder for each class.
        train: The split to train on.
        val: The split to validate on.
        on_error: What becomes of a training image that does not decode: ``"raise"`` stops when it
            is its turn; ``"skip"`` decodes all of them before the start and leaves out the bad
            ones. Validation always raises.
        mean: What is subtracted from an image's channels in [0, 1]; a detector that starts from
            the weights does the same.
        std: What the channels are divided by then.
        batch_size: Images of a training batch, in each process.
        eval_batch_size: Images of a validation batch, in each process.
        workers: Loader processes.
    """

    root: Path = Path("data/imagenet")
    train: str = "train"
    val: str = "val"
    on_error: Literal["raise", "skip"] = "raise"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    batch_size: int = 256
    eval_batch_size: int = 256
    workers: int = 2

    def __post_init__(self) -> None:
        check_at_least(self, "data", batch_size=1, eval_batch_size=1, workers=0)
        if len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"data.mean must be three numbers in [0, 1], got {self.mean}")
        if len(self.std) != 3 or not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"data.std must be three positive numbers, got {self.std}")


@dataclass(frozen=True)
class ImageAugmentConfig:
    """Cropping, and augmentation before mixing.

    Attributes:
        size: Side of the square that the network sees, in pixels.
        crop: ``"resized"`` for a random part of the image brought to the size, as is usual for
            ImageNet; ``"padded"`` for a shift by up to ``padding`` pixels, as for small images.
        scale: Share of the image's area that a resized crop covers, lowest and highest.
        padding: Pixels added at each side before a padded crop.
        flip: The probability of a horizontal flip.
        jitter: Strength of random brightness, contrast and saturation; 0 for none.
        eval_resize: What the shorter side is resized to before the central crop of validation,
            in pixels; None for ``size``.
    """

    size: int = 224
    crop: Literal["resized", "padded"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    padding: int = 4
    flip: float = 0.5
    jitter: float = 0.0
    eval_resize: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, "augment", size=1, padding=0)
        check_in_range(self, "augment", flip=(0, 1), jitter=(0, 1))
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"augment.scale must be two ascending shares in (0, 1], got {low, high}"
            )
        if self.eval_resize is not None:
            check_at_least(self, "augment", eval_resize=self.size)


@dataclass(frozen=True)
class ImageMixingConfig:
    """How `PretrainConfig.mix` mixes or cuts.

    Attributes:
        p: The chance that a batch is mixed, or an image cut out of. CutMix has 1 for ImageNet and
            0.5 for CIFAR (arXiv 1905.04899, official code).
        mixup_alpha: Mixup's ratio of a batch is drawn from Beta(alpha, alpha); 0.2 for ImageNet
            in the mixup paper (arXiv 1710.09412), 1 in the comparisons of the CutMix paper.
        cutmix_alpha: CutMix's share of a batch is drawn from Beta(alpha, alpha).
        cutout_area: Share of the image that Cutout (arXiv 1708.04552) takes away, a square; a
            quarter for ImageNet in the CutMix paper.
    """

    p: float = 1.0
    mixup_alpha: float = 0.2
    cutmix_alpha: float = 1.0
    cutout_area: float = 0.25

    def __post_init__(self) -> None:
        check_in_range(self, "mixing", p=(0, 1))
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"mixing.{name} must be positive and finite, got {value}")
        if not 0 < self.cutout_area < 1:
            raise ValueError(f"mixing.cutout_area must be in (0, 1), got {self.cutout_area}")


@dataclass(frozen=True)
class PretrainConfig(LoopConfig):
    """A whole training of a classifier, whose backbone a detector may start from.

    Attributes:
        mix: ``"none"``, ``"mixup"``, ``"cutout"``, ``"cutmix"``, or ``"mixup+cutmix"``, which
            draws one of the two for each batch.
        mixing: How it mixes.
        label_smoothing: Share of each target that is spread evenly over all classes.
        data: Data sets.
        augment: Cropping and augmentation.
        model: The classifier.
    """

    run_dir: Path = Path("runs/pretrain")
    mix: Mix = "cutmix"
    mixing: ImageMixingConfig = field(default_factory=ImageMixingConfig)
    label_smoothing: float = 0.0
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    augment: ImageAugmentConfig = field(default_factory=ImageAugmentConfig)
    model: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_in_range(self, "", label_smoothing=(0, 1))
        erased = round(self.mixing.cutout_area**0.5 * self.augment.size)
        if self.mix == "cutout" and not 0 < erased < self.augment.size:
            raise ValueError(
                f"mixing.cutout_area={self.mixing.cutout_area} erases nothing or all of "
                f"augment.size={self.augment.size}"
            )
        in_batch = self.mix in ("mixup", "cutmix", "mixup+cutmix") and self.mixing.p > 0
        if in_batch and self.data.batch_size == 1:
            raise ValueError(f"mix={self.mix} finds no partner with data.batch_size=1")
        has_batch_norm = self.model.norm == "batch" and not self.model.name.startswith(TIMM_PREFIX)
        if has_batch_norm and self.data.batch_size == 1:
            raise ValueError("data.batch_size=1 is too few for batch norm: use model.norm=group")
