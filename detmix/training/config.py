"""The typed configurations of both trainings.

All classes are frozen and check their values, wherever these come from. ``#:`` is for ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from pydantic_core import to_jsonable_python

from detmix.data import VOC_CLASSES
from detmix.data.voc.corners import Corners
from detmix.detectors import BackboneConfig, ClassifierConfig, DetectorConfig
from detmix.detectors.config import OPTIONS
from detmix.losses import LossWeighting
from detmix.pretrained.match_state import IMAGENET_MEAN, IMAGENET_STD

Share = Annotated[float, Field(ge=0, le=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "none"]
ImageSets = tuple[tuple[str, str], ...]

FREE = "detector.options"  # a mapping with whatever keys somebody gives it


@dataclass(frozen=True, config=OPTIONS)
class CocoConfig:
    """Where a data set in the COCO format lies, relative to data.root, and how it is scored."""

    train_images: Path = Path("train2017")  #: folder of the training images
    train_annotations: Path = Path("annotations/instances_train2017.json")  #: their JSON
    test_images: Path = Path("val2017")  #: folder of the images to evaluate on
    test_annotations: Path = Path("annotations/instances_val2017.json")  #: their JSON
    empty: Literal["keep", "drop"] = "drop"  #: training images without objects


@dataclass(frozen=True, config=OPTIONS)
class DataConfig:
    """Data sets, and their loading."""

    #: VOC's XML, COCO's JSON or YOLO's text labels; auto finds out, and how they lie
    format: Literal["auto", "voc", "coco", "yolo"] = "auto"
    root: Path = Path("data/VOCdevkit")  #: the folder of the data
    #: given by train and test, or coco; named by lists, folders or files; or a fifth by a hash
    split: Literal["auto", "given", "named", "hash"] = "auto"
    train: ImageSets = (("2007", "trainval"),)  #: devkit: pairs of year and split to train on
    test: ImageSets = (("2007", "test"),)  #: devkit: pairs of year and split to evaluate on
    coco: CocoConfig = CocoConfig()
    #: without background; null for those of the data, but of a devkit VOC's
    classes: tuple[str, ...] | None = None
    num_keypoints: PositiveInt | None = None  #: of an object; null for those of the COCO file
    difficult: Literal["keep", "drop"] = "keep"  #: VOC: training objects marked difficult
    #: VOC: 1-inclusive, 0-exclusive, 0-inclusive or 1-exclusive; null for their writer's, if known
    corners: Corners | None = None
    on_error: Literal["raise", "skip"] = "raise"  #: skip tries all first, and trains on the good
    batch_size: PositiveInt = 8  #: images of a training batch, in each process
    eval_batch_size: PositiveInt = 8  #: images of an evaluation batch, in each process
    workers: NonNegativeInt = 2  #: loader processes
    train_limit: PositiveInt | None = None  #: train on so many images only, the first ones
    test_limit: PositiveInt | None = None  #: evaluate on so many images only, the first ones

    def __post_init__(self) -> None:
        """Refuse what means nothing to this format, rather than to ignore it."""
        of_voc = ("train", "test", "difficult", "corners")
        useless = {"auto": (), "voc": ("coco",), "coco": of_voc, "yolo": ("coco", *of_voc)}
        for name in useless[self.format]:
            value = getattr(self, name)
            if value not in (getattr(DataConfig, name), "1-inclusive"):  # a default once
                raise ValueError(f"data.{name} is not for data.format={self.format}, got {value}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names; but for VOC's they must have been noted from the data."""
        if self.classes is None and self.format in ("coco", "yolo"):
            raise ValueError("data.classes is null, and no file that names them has been read")
        return VOC_CLASSES if self.classes is None else self.classes


@dataclass(frozen=True, config=OPTIONS)
class AugmentConfig:
    """Augmentation before mixing."""

    size: PositiveInt | None = None  #: longer sides are shrunk to it, in pixels, for evaluation too
    #: longer sides are resized to size times what is drawn between these, [0.1, 2.0] for LSJ, and
    #: a square of size is cut out, or filled up; null for never
    scale_jitter: tuple[PositiveFloat, PositiveFloat] | None = None
    flip: Share = 0.5  #: probability of a horizontal flip
    photometric: Share = 0.0  #: probability of changed brightness, contrast, saturation and hue
    crop: Share = 0.0  #: probability of a crop that holds every box whole


@dataclass(frozen=True, config=OPTIONS)
class MixingConfig:
    """Mixing of image pairs: mixup as in arXiv 1902.04103, section 3.1, CutMix after 1905.04899."""

    name: Literal["mixup", "cutmix", "mixup+cutmix", "none"] = "mixup"  #: + is one or the other
    alpha: PositiveFloat = 1.5  #: ratios of mixup are drawn from Beta(alpha, alpha)
    cutmix_alpha: PositiveFloat = 1.0  #: the same of CutMix
    p: Share = 0.5  #: chance that an image is mixed
    fill: Annotated[float, Field(ge=0, le=255)] = 0.0  #: of pixels that mixup leaves uncovered
    min_visibility: Share = 0.1  #: an object of which CutMix leaves less than this is dropped
    off_epochs: NonNegativeInt = 0  #: epochs at the end without mixing
    #: Within a loader's batch, with any image of the dataset, decoded again, or on the device.
    place: Literal["batch", "dataset", "device"] = "batch"


@dataclass(frozen=True, config=OPTIONS)
class OptimConfig:
    """The optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"  #: the algorithm
    lr: PositiveFloat = 0.01  #: learning rate after the warm-up, for all the batches of a step
    accumulate: PositiveInt = 1  #: batches, in each process, whose mean gradient makes a step
    momentum: Share = 0.9  #: of SGD
    nesterov: bool = False  #: whether SGD's momentum is Nesterov's
    weight_decay: NonNegativeFloat = 1e-4  #: of all parameters
    clip_norm: PositiveFloat | None = None  #: what the gradient is scaled down to; null for never
    #: per step, of averaged weights, which are then used and saved too; null for none
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclass(frozen=True, config=OPTIONS)
class ScheduleConfig:
    """The learning rate over the training: a linear warm-up, then a decay."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"  #: the decay; cosine goes to zero
    warmup_steps: NonNegativeInt = 500  #: steps of the warm-up
    warmup_start: Share = 0.001  #: share of the learning rate to start from
    milestones: tuple[NonNegativeInt, ...] = ()  #: epochs at which multistep multiplies the rate
    gamma: NonNegativeFloat = 0.1  #: what by

    def __post_init__(self) -> None:
        if self.name == "multistep" and not self.milestones:
            raise ValueError("schedule.milestones must name epochs for multistep, got none")


@dataclass(frozen=True, config=OPTIONS)
class LoopConfig:
    """What every training loop needs, whatever it trains."""

    run_dir: Path = Path("runs/train")  #: folder of the run; must be new, or resumed
    resume: Literal["never", "auto"] = "never"  #: auto: from the last checkpoint in run_dir, if any
    epochs: PositiveInt = 20  #: epochs to train
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval_every: PositiveInt = 1  #: evaluate every so many epochs, and after the last
    #: end after so many evaluations in a row without a better score; null for never
    early_stopping: PositiveInt | None = None
    save_every: PositiveInt = 1  #: save a checkpoint every so many epochs, and to evaluate
    save_minutes: PositiveFloat | None = 10.0  #: and when the last is so old: all that a kill loses
    log_every: PositiveInt = 20  #: write metrics every so many steps
    seed: NonNegativeInt = 0  #: all randomness is a function of it
    #: metrics also go to tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, or none
    tracker: Tracker = "tensorboard"
    #: no is float32, the others are mixed; auto: bf16 on a GPU that has it, on a CPU by a trial
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    channels_last: bool = False  #: whether convolutions use the channels-last memory format
    #: auto (a GPU where there is one), cpu, cuda, or cuda:1; of several processes each has its own
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: PositiveInt | None = None  #: CPU threads of each process; null for torch's default

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that JSON, YAML and a checkpoint can hold."""
        plain: dict[str, Any] = to_jsonable_python(self)
        return plain


@dataclass(frozen=True, config=OPTIONS)
class TrainConfig(LoopConfig):
    """A whole training of a detector."""

    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    mixing: MixingConfig = MixingConfig()
    #: null for torchvision's own losses, which ignore the ratios
    loss: LossWeighting | None = LossWeighting()
    backbone: BackboneConfig = BackboneConfig()
    detector: DetectorConfig = DetectorConfig()


@dataclass(frozen=True, config=OPTIONS)
class ImageDataConfig:
    """Images sorted into classes, and their loading."""

    root: Path = Path("data/imagenet")  #: holds train and val, each with a folder for each class
    on_error: Literal["raise", "skip"] = "raise"  #: skip tries all first, and trains on the good
    mean: tuple[Share, Share, Share] = IMAGENET_MEAN  #: subtracted from channels in [0, 1]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD  #: divided by then
    #: images of a training batch, in each process; one would have no partner, nor a variance
    batch_size: Annotated[int, Field(ge=2)] = 256
    eval_batch_size: PositiveInt = 256  #: images of a validation batch, in each process
    workers: NonNegativeInt = 2  #: loader processes


@dataclass(frozen=True, config=OPTIONS)
class ImageAugmentConfig:
    """Cropping, and augmentation before mixing."""

    size: PositiveInt = 224  #: side of the square that the network sees, in pixels
    crop: Literal["resized", "padded"] = "resized"  #: a part as large as the image, or a shift
    scale: tuple[Share, Share] = (0.08, 1.0)  #: share of the area that a resized crop covers
    padding: NonNegativeInt = 4  #: pixels added at each side before a padded crop
    flip: Share = 0.5  #: probability of a horizontal flip
    jitter: Share = 0.0  #: strength of random brightness, contrast and saturation
    eval_resize: PositiveInt | None = None  #: validation's shorter side before a crop; or size

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"augment.scale must not descend, got {self.scale}")
        if (side := self.eval_resize) is not None and side < self.size:
            raise ValueError(f"augment.eval_resize={side} is less than augment.size={self.size}")


@dataclass(frozen=True, config=OPTIONS)
class ImageMixingConfig:
    """How mix mixes or cuts: mixup as in arXiv 1710.09412, Cutout 1708.04552, CutMix 1905.04899."""

    p: Share = 1.0  #: of a batch, of an image for Cutout; CutMix's: 1 for ImageNet, 0.5 for CIFAR
    mixup_alpha: PositiveFloat = 0.2  #: ratios are drawn from Beta(alpha, alpha); 0.2 for ImageNet
    cutmix_alpha: PositiveFloat = 1.0  #: the same of CutMix
    #: share of the image, in a square, that Cutout takes away
    cutout_area: Annotated[float, Field(ge=0.01, le=0.8)] = 0.25


@dataclass(frozen=True, config=OPTIONS)
class PretrainConfig(LoopConfig):
    """A whole training of a classifier, whose backbone a detector may start from."""

    run_dir: Path = Path("runs/pretrain")  #: folder of the run; must be new, or resumed
    mix: Literal["none", "mixup", "cutout", "cutmix", "mixup+cutmix"] = "cutmix"  #: + is either
    mixing: ImageMixingConfig = ImageMixingConfig()
    label_smoothing: Share = 0.0  #: share of each target that is spread evenly over all classes
    data: ImageDataConfig = ImageDataConfig()
    augment: ImageAugmentConfig = ImageAugmentConfig()
    model: ClassifierConfig = ClassifierConfig()


def flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        # The loss is compared as a whole, since it may be null.
        is_section = isinstance(value, Mapping) and name not in (FREE, "loss")
        flat |= flat_options(value, f"{name}.") if is_section else {name: value}
    return flat
