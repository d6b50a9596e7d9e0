"""The typed configurations of both trainings, and what changed between two of them.

All classes are frozen and check their values, wherever these come from. ``#:`` is for ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, GetPydanticSchema, StrictBool
from pydantic.dataclasses import dataclass
from pydantic_core import to_jsonable_python

from detmix.backbones.timm import TIMM_PREFIX
from detmix.data import VOC_CLASSES
from detmix.detectors import BackboneConfig, ClassifierConfig, DetectorConfig, target_keys
from detmix.losses import LossWeighting
from detmix.pretrained.match_state import IMAGENET_MEAN, IMAGENET_STD

OPTIONS = ConfigDict(extra="forbid", allow_inf_nan=False)
# Numbers are neither texts nor true or false.
Number = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
NotNegative = Annotated[float, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1)]
Byte = Annotated[float, Field(strict=True, ge=0, le=255)]
ImageSets = tuple[tuple[str, str], ...]

# A mapping with whatever keys somebody gives it.
FREE = "detector.options"
# Compared as a whole; the loss may be null.
_WHOLE = (FREE, "loss")
# Options that say where a run lies and not what it does.
PLACES = ("run_dir", "resume")


def _strictly(source: Any, handler: Any) -> Any:
    """Let pydantic check a plain dataclass as strictly as the others, or a mapping in its place."""
    schema = handler(source)
    inner = handler.resolve_ref_schema(schema)
    inner["config"]["strict"], inner["strict"] = True, False
    return schema


STRICTLY = GetPydanticSchema(_strictly)


@dataclass(frozen=True, config=OPTIONS)
class CocoConfig:
    """Where a data set in the COCO format lies, relative to data.root, and how it is scored."""

    train_images: Path = Path("train2017")  #: folder of the training images
    train_annotations: Path = Path("annotations/instances_train2017.json")  #: their JSON
    test_images: Path = Path("val2017")  #: folder of the images to evaluate on
    test_annotations: Path = Path("annotations/instances_val2017.json")  #: their JSON
    empty: Literal["keep", "drop"] = "drop"  #: training images without objects
    #: What computes the AP; the optional faster-coco-eval, which auto prefers, to the same numbers.
    backend: Literal["auto", "pycocotools", "faster-coco-eval"] = "auto"


@dataclass(frozen=True, config=OPTIONS)
class DataConfig:
    """Data sets, and their loading."""

    format: Literal["voc", "coco"] = "voc"  #: VOC's devkit, or images with a file as COCO has it
    root: Path = Path("data/VOCdevkit")  #: holds VOC2007 and the like, or the files of COCO
    train: ImageSets = (("2007", "trainval"),)  #: VOC: pairs of year and split to train on
    test: ImageSets = (("2007", "test"),)  #: VOC: pairs of year and split to evaluate on
    coco: CocoConfig = CocoConfig()
    classes: tuple[str, ...] | None = None  #: without background; null for VOC's, or all of COCO's
    num_keypoints: Count | None = None  #: of an object; null for as many as the COCO file names
    difficult: Literal["keep", "drop"] = "keep"  #: VOC: training objects marked difficult
    on_error: Literal["raise", "skip"] = "raise"  #: skip tries all first, and trains on the good
    batch_size: Count = 8  #: images of a training batch, in each process
    eval_batch_size: Count = 8  #: images of an evaluation batch, in each process
    workers: Number = 2  #: loader processes
    train_limit: Count | None = None  #: train on so many images only, the first ones
    test_limit: Count | None = None  #: evaluate on so many images only, the first ones

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing to this format, rather than to ignore them."""
        unused: dict[str, Any] = {"coco": CocoConfig(backend=self.coco.backend)}
        if self.format == "coco":
            unused = {"train": DataConfig.train, "test": DataConfig.test, "difficult": "keep"}
        for name, default in unused.items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(f"data.{name} is not for data.format={self.format}, got {value}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names; those of COCO data must have been noted from its file."""
        if self.classes is None and self.format == "coco":
            raise ValueError("data.classes is null, and no annotation file has been read yet")
        return VOC_CLASSES if self.classes is None else self.classes


@dataclass(frozen=True, config=OPTIONS)
class AugmentConfig:
    """Augmentation before mixing."""

    size: Count | None = None  #: longer sides are shrunk to it, in pixels, for evaluation too
    flip: Share = 0.5  #: probability of a horizontal flip
    photometric: Share = 0.0  #: probability of changed brightness, contrast, saturation and hue
    crop: Share = 0.0  #: probability of a crop that holds every box whole


@dataclass(frozen=True, config=OPTIONS)
class MixingConfig:
    """Mixing of image pairs: mixup as in arXiv 1902.04103, section 3.1, CutMix after 1905.04899."""

    name: Literal["mixup", "cutmix", "mixup+cutmix", "none"] = "mixup"  #: + is one or the other
    alpha: Positive = 1.5  #: ratios of mixup are drawn from Beta(alpha, alpha)
    cutmix_alpha: Positive = 1.0  #: the same of CutMix
    p: Share = 0.5  #: chance that an image is mixed
    fill: Byte = 0.0  #: value of pixels that mixup leaves uncovered
    min_visibility: Share = 0.1  #: an object of which CutMix leaves less than this is dropped
    off_epochs: Number = 0  #: epochs at the end without mixing
    #: Within a loader's batch, with any image of the dataset, decoded again, or on the device.
    place: Literal["batch", "dataset", "device"] = "batch"


@dataclass(frozen=True, config=OPTIONS)
class OptimConfig:
    """The optimizer."""

    name: Literal["sgd", "adamw"] = "sgd"  #: the algorithm
    lr: Positive = 0.01  #: learning rate after the warm-up, for the batches of all processes
    momentum: Share = 0.9  #: of SGD
    nesterov: StrictBool = False  #: whether SGD's momentum is Nesterov's
    weight_decay: NotNegative = 1e-4  #: of all parameters
    clip_norm: Positive | None = None  #: what the gradient is scaled down to; null for never
    ema_decay: Fraction | None = None  #: per step, of averaged weights, then used and saved too

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov=true needs a positive optim.momentum")


@dataclass(frozen=True, config=OPTIONS)
class ScheduleConfig:
    """The learning rate over the training: a linear warm-up, then a decay."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"  #: the decay; cosine goes to zero
    warmup_steps: Number = 500  #: steps of the warm-up
    warmup_start: Share = 0.001  #: share of the learning rate to start from
    milestones: tuple[Number, ...] = ()  #: epochs at which multistep multiplies the rate
    gamma: NotNegative = 0.1  #: what by

    def __post_init__(self) -> None:
        if self.name == "multistep" and not self.milestones:
            raise ValueError("schedule.milestones must name epochs for schedule.name=multistep")


@dataclass(frozen=True, config=OPTIONS)
class LoopConfig:
    """What every training loop needs, whatever it trains."""

    run_dir: Path = Path("runs/train")  #: folder of the run; must be new, or resumed
    resume: Literal["never", "auto"] = "never"  #: auto: from the last checkpoint in run_dir, if any
    epochs: Count = 20  #: epochs to train
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval_every: Count = 1  #: evaluate every so many epochs, and after the last
    save_every: Count = 1  #: save a checkpoint every so many epochs, and with every evaluation
    save_minutes: Positive | None = 10.0  #: and when the last is so old: all that a kill loses
    log_every: Count = 20  #: write metrics every so many steps
    seed: Number = 0  #: all randomness is a function of it
    precision: Literal["no", "bf16", "fp16"] = "no"  #: no is float32, the others are mixed
    channels_last: StrictBool = False  #: whether convolutions use the channels-last memory format
    device: Literal["auto", "cpu"] = "auto"  #: auto takes a GPU where there is one
    threads: Count | None = None  #: CPU threads of each process; null for torch's default

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
    loss: Annotated[LossWeighting, STRICTLY] | None = LossWeighting()
    backbone: Annotated[BackboneConfig, STRICTLY] = BackboneConfig()
    detector: Annotated[DetectorConfig, STRICTLY] = DetectorConfig()

    def __post_init__(self) -> None:
        mixing, detector = self.mixing, self.detector
        if mixing.name != "none" and mixing.off_epochs >= self.epochs:
            raise ValueError(
                f"mixing.off_epochs={mixing.off_epochs} of epochs={self.epochs} would never mix "
                "at all: it must be smaller than epochs"
            )
        needed = " and ".join(target_keys(detector.name))
        if needed and self.data.format == "voc":
            raise ValueError(
                f"detector.name={detector.name} needs {needed}, which data.format=voc has not: "
                "set data.format=coco"
            )
        on_batch = mixing.name != "none" and mixing.place != "dataset" and mixing.p > 0
        if on_batch and self.data.batch_size == 1:
            raise ValueError(
                f"mixing.place={mixing.place} finds no partner with data.batch_size=1: "
                "mixing.place=dataset does"
            )


@dataclass(frozen=True, config=OPTIONS)
class ImageDataConfig:
    """Images sorted into classes, and their loading."""

    root: Path = Path("data/imagenet")  #: holds train and val, each with a folder for each class
    on_error: Literal["raise", "skip"] = "raise"  #: skip tries all first, and trains on the good
    mean: tuple[Share, Share, Share] = IMAGENET_MEAN  #: subtracted from channels in [0, 1]
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD  #: divided by then
    batch_size: Count = 256  #: images of a training batch, in each process
    eval_batch_size: Count = 256  #: images of a validation batch, in each process
    workers: Number = 2  #: loader processes


@dataclass(frozen=True, config=OPTIONS)
class ImageAugmentConfig:
    """Cropping, and augmentation before mixing."""

    size: Count = 224  #: side of the square that the network sees, in pixels
    crop: Literal["resized", "padded"] = "resized"  #: a part as large as the image, or a shift
    scale: tuple[Share, Share] = (0.08, 1.0)  #: share of the area that a resized crop covers
    padding: Number = 4  #: pixels added at each side before a padded crop
    flip: Share = 0.5  #: probability of a horizontal flip
    jitter: Share = 0.0  #: strength of random brightness, contrast and saturation
    eval_resize: Count | None = None  #: shorter side before validation's central crop; null: size

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"augment.scale must ascend within (0, 1], got {self.scale}")
        if self.eval_resize is not None and self.eval_resize < self.size:
            raise ValueError(f"augment.eval_resize={self.eval_resize} is less than {self.size}")


@dataclass(frozen=True, config=OPTIONS)
class ImageMixingConfig:
    """How mix mixes or cuts: mixup as in arXiv 1710.09412, Cutout 1708.04552, CutMix 1905.04899."""

    p: Share = 1.0  #: of a batch, of an image for Cutout; CutMix's: 1 for ImageNet, 0.5 for CIFAR
    mixup_alpha: Positive = 0.2  #: ratios are drawn from Beta(alpha, alpha); 0.2 for ImageNet
    cutmix_alpha: Positive = 1.0  #: the same of CutMix
    cutout_area: Fraction = 0.25  #: share of the image, in a square, that Cutout takes away


@dataclass(frozen=True, config=OPTIONS)
class PretrainConfig(LoopConfig):
    """A whole training of a classifier, whose backbone a detector may start from."""

    run_dir: Path = Path("runs/pretrain")  #: folder of the run; must be new, or resumed
    mix: Literal["none", "mixup", "cutout", "cutmix", "mixup+cutmix"] = "cutmix"  #: + is either
    mixing: ImageMixingConfig = ImageMixingConfig()
    label_smoothing: Share = 0.0  #: share of each target that is spread evenly over all classes
    data: ImageDataConfig = ImageDataConfig()
    augment: ImageAugmentConfig = ImageAugmentConfig()
    model: Annotated[ClassifierConfig, STRICTLY] = ClassifierConfig()

    def __post_init__(self) -> None:
        side, area = self.augment.size, self.mixing.cutout_area
        if self.mix == "cutout" and not 0 < round(area**0.5 * side) < side:
            raise ValueError(
                f"mixing.cutout_area={area} erases nothing or all of augment.size={side}"
            )
        if self.data.batch_size > 1:
            return
        if self.mix not in ("none", "cutout") and self.mixing.p > 0:
            raise ValueError(f"mix={self.mix} finds no partner with data.batch_size=1")
        if self.model.norm == "batch" and not self.model.name.startswith(TIMM_PREFIX):
            raise ValueError("data.batch_size=1 is too few for batch norm: use model.norm=group")


def flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = isinstance(value, Mapping) and name not in _WHOLE
        flat |= flat_options(value, f"{name}.") if is_section else {name: value}
    return flat


def changed_options(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return the options, but for places, that two configurations set differently."""
    old, new = flat_options(before), flat_options(now)
    names = sorted(old.keys() & new.keys() - set(PLACES))
    return {name: (old[name], new[name]) for name in names if old[name] != new[name]}
