"""What a detector is trained and evaluated on, as configured; checks that configurations share.

Errors name the field as it is configured.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from detmix.data import VOC_CLASSES

ImageSets = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CocoConfig:
    """Where a data set in the COCO format has its files, and how it is scored.

    Paths are relative to ``data.root``.

    Attributes:
        train_images: The folder of the training images.
        train_annotations: Their instances (or person keypoints) JSON.
        test_images: The folder of the images to evaluate on.
        test_annotations: Their JSON.
        empty: Whether training keeps or drops images without objects.
        backend: What computes the AP: ``"pycocotools"``, or ``"faster-coco-eval"`` with the same
            numbers, to rounding, in a quarter of the time (an optional package); ``"auto"`` for
            that one where it is installed.
    """

    train_images: Path = Path("train2017")
    train_annotations: Path = Path("annotations/instances_train2017.json")
    test_images: Path = Path("val2017")
    test_annotations: Path = Path("annotations/instances_val2017.json")
    empty: Literal["keep", "drop"] = "drop"
    backend: Literal["auto", "pycocotools", "faster-coco-eval"] = "auto"


@dataclass(frozen=True)
class DataConfig:
    """Data sets, and their loading.

    Attributes:
        format: ``"voc"`` for the layout of the Pascal VOC devkit, ``"coco"`` for images with an
            annotation file in the COCO format.
        root: The folder that holds ``VOC2007`` and the like, or the images and annotations of
            COCO.
        train: VOC: pairs of year and split to train on.
        test: VOC: pairs of year and split to evaluate on.
        coco: COCO: the files to train and to evaluate on.
        classes: Class names without background; None for the twenty of Pascal VOC, or for all
            categories of the COCO file.
        num_keypoints: Keypoints of an object, where the detector finds any; None for as many as
            the COCO file names. A run notes the number here.
        difficult: VOC: whether training keeps or drops objects marked difficult.
        on_error: What becomes of a training image that is missing or cannot be used, or whose
            annotation cannot: ``"raise"`` stops before the training starts, or at a picture that
            does not decode when it is its turn; ``"skip"`` decodes all of them before the start
            and leaves out the bad ones. Evaluation always raises: a score without an image is
            another score. ``tools/check_data.py`` prints what cannot be used.
        batch_size: Images of a training batch, in each process.
        eval_batch_size: Images of an evaluation batch, in each process.
        workers: Loader processes.
        train_limit: Train on this many images only, the first ones; None for all.
        test_limit: Evaluate on this many images only, the first ones; None for all.
    """

    format: Literal["voc", "coco"] = "voc"
    root: Path = Path("data/VOCdevkit")
    train: ImageSets = (("2007", "trainval"),)
    test: ImageSets = (("2007", "test"),)
    coco: CocoConfig = field(default_factory=CocoConfig)
    classes: tuple[str, ...] | None = None
    num_keypoints: int | None = None
    difficult: Literal["keep", "drop"] = "keep"
    on_error: Literal["raise", "skip"] = "raise"
    batch_size: int = 8
    eval_batch_size: int = 8
    workers: int = 2
    train_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, "data", batch_size=1, eval_batch_size=1, workers=0)
        self._check_format()
        for name in ("train_limit", "test_limit", "num_keypoints"):
            if getattr(self, name) is not None:
                check_at_least(self, "data", **{name: 1})

    def _check_format(self) -> None:
        """Refuse settings that mean nothing to this format, rather than to ignore them."""
        other = {"voc": ("coco",), "coco": ("train", "test", "difficult")}[self.format]
        for item in fields(self):
            default = item.default if item.default is not MISSING else CocoConfig()
            if item.name == "coco":  # COCO's AP is computed for any data
                default = CocoConfig(backend=self.coco.backend)
            if item.name in other and getattr(self, item.name) != default:
                raise ValueError(
                    f"data.{item.name} is not for data.format={self.format}, got "
                    f"{getattr(self, item.name)}"
                )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names; those of COCO data must have been noted from its file.

        Raises:
            ValueError: If they are still open.
        """
        if self.classes is not None:
            return self.classes
        if self.format == "coco":
            raise ValueError("data.classes is null, and no annotation file has been read yet")
        return VOC_CLASSES


def check_at_least(config: Any, section: str, **minimums: int) -> None:
    """Raise `ValueError` if a field named in ``minimums`` is smaller than its value there."""
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if value < minimum:
            full = f"{section}.{name}" if section else name
            raise ValueError(f"{full} must be at least {minimum}, got {value}")


def check_in_range(config: Any, section: str, **ranges: tuple[float, float]) -> None:
    """Raise `ValueError` if a field named in ``ranges`` is not within its range there."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:  # false of NaN too
            full = f"{section}.{name}" if section else name
            raise ValueError(f"{full} must be in [{low}, {high}], got {value}")
