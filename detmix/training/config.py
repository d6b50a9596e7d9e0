"""The typed configuration of a detector's training, and what changed between two of them.

All classes are frozen: after it is read nothing changes a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from detmix.detectors import BackboneConfig, DetectorConfig, target_keys
from detmix.losses import LossWeighting
from detmix.training.data_config import DataConfig, check_at_least, check_in_range

# Options that say where a run lies and not what it does.
_PLACES = ("run_dir", "resume")
# A mapping with whatever keys somebody gives it: compared as a whole.
_FREE = "detector.options"


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation before mixing.

    Attributes:
        size: Images with a longer side than this, in pixels, are shrunk to it, for evaluation
            too; None for never.
        flip: The probability of a horizontal flip.
        photometric: The probability of changed brightness, contrast, saturation and hue.
        crop: The probability of a crop that holds every box whole.
    """

    size: int | None = None
    flip: float = 0.5
    photometric: float = 0.0
    crop: float = 0.0

    def __post_init__(self) -> None:
        if self.size is not None:
            check_at_least(self, "augment", size=1)
        check_in_range(self, "augment", flip=(0, 1), photometric=(0, 1), crop=(0, 1))


@dataclass(frozen=True)
class MixingConfig:
    """Mixing of image pairs.

    Attributes:
        name: ``"mixup"`` (Bag of Freebies, arXiv 1902.04103, section 3.1), ``"cutmix"`` (after
            arXiv 1905.04899), ``"mixup+cutmix"`` for one or the other with equal chance, image by
            image, or ``"none"``.
        alpha: The ratios of mixup are drawn from Beta(alpha, alpha).
        cutmix_alpha: The same of CutMix.
        p: The chance that an image is mixed.
        fill: Value of pixels that mixup leaves uncovered, from 0 to 255.
        min_visibility: An object of which CutMix leaves less than this share is dropped.
        off_epochs: Epochs at the end without mixing.
        place: Where: on the ``"batch"`` in the loader's workers, on the ``"dataset"`` with an
            independent partner and a second decode, or on the ``"device"`` after transfer.
    """

    name: Literal["mixup", "cutmix", "mixup+cutmix", "none"] = "mixup"
    alpha: float = 1.5
    cutmix_alpha: float = 1.0
    p: float = 0.5
    fill: float = 0.0
    min_visibility: float = 0.1
    off_epochs: int = 0
    place: Literal["batch", "dataset", "device"] = "batch"

    def __post_init__(self) -> None:
        for name in ("alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"mixing.{name} must be positive and finite, got {value}")
        check_in_range(self, "mixing", p=(0, 1), fill=(0, 255), min_visibility=(0, 1))
        check_at_least(self, "mixing", off_epochs=0)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Attributes:
        name: ``"sgd"`` or ``"adamw"``.
        lr: Learning rate after the warm-up, for the batches of all processes together.
        momentum: Momentum of SGD.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: Weight decay.
        clip_norm: The gradient is scaled down to this norm; None for never.
        ema_decay: Decay per step of a moving average of the weights, which is then evaluated
            and saved as well; None for none.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be positive and finite, got {self.lr}")
        check_in_range(self, "optim", momentum=(0, 1), weight_decay=(0, math.inf))
        if self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov=true needs a positive optim.momentum")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm must be positive or null, got {self.clip_norm}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay must be in (0, 1) or null, got {self.ema_decay}")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the training: a linear warm-up, then a decay.

    Attributes:
        name: ``"cosine"`` to zero, ``"multistep"``, or ``"constant"``.
        warmup_steps: Steps of the warm-up.
        warmup_start: Share of the learning rate to start from.
        milestones: Epochs at which multistep multiplies the rate.
        gamma: What by.
    """

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: int = 500
    warmup_start: float = 0.001
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(self, "schedule", warmup_steps=0)
        check_in_range(self, "schedule", warmup_start=(0, 1), gamma=(0, math.inf))
        if self.name == "multistep" and not self.milestones:
            raise ValueError("schedule.milestones must name epochs for schedule.name=multistep")


@dataclass(frozen=True)
class LoopConfig:
    """What every training loop needs, whatever it trains.

    Attributes:
        run_dir: Folder of the run; must not exist unless ``resume`` says so.
        resume: ``"never"``; ``"auto"`` to go on from the last checkpoint in ``run_dir`` if there
            is one.
        epochs: Epochs to train.
        optim: The optimizer.
        schedule: The learning rate.
        eval_every: Evaluate every so many epochs, and after the last.
        save_every: Save a checkpoint every so many epochs, and with every evaluation.
        save_minutes: Save one also when the last is so many minutes old, which is all that a run
            that is killed loses; null for never.
        log_every: Write metrics every so many steps.
        seed: All randomness is a function of it.
        precision: ``"no"`` for float32, or mixed ``"bf16"`` or ``"fp16"``.
        channels_last: Whether convolutions use the channels-last memory format.
        device: ``"auto"`` takes a GPU where there is one.
        threads: Threads of each process's CPU operations; None for torch's default.
    """

    run_dir: Path = Path("runs/train")
    resume: Literal["never", "auto"] = "never"
    epochs: int = 20
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: int = 1
    save_every: int = 1
    save_minutes: float | None = 10.0
    log_every: int = 20
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, "", epochs=1, eval_every=1, save_every=1, log_every=1, seed=0)
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"save_minutes must be positive or null, got {self.save_minutes}")
        if self.threads is not None:
            check_at_least(self, "", threads=1)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values that JSON, YAML and a checkpoint can hold."""
        return dict(_plain(asdict(self)))


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A whole training of a detector.

    Attributes:
        data: Data sets.
        augment: Augmentation.
        mixing: Mixing.
        loss: How the losses are weighted; null for torchvision's own, which ignore the ratios.
        backbone: The backbone.
        detector: The detector.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    loss: LossWeighting | None = field(default_factory=LossWeighting)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    detector: DetectorConfig = field(default_factory=DetectorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing.name != "none" and self.mixing.off_epochs >= self.epochs:
            raise ValueError(
                f"mixing.off_epochs={self.mixing.off_epochs} of epochs={self.epochs} would "
                "never mix at all: it must be smaller than epochs"
            )
        needed = target_keys(self.detector.name)
        if needed and self.data.format == "voc":
            raise ValueError(
                f"detector.name={self.detector.name} needs {' and '.join(needed)}, which "
                "data.format=voc has not: set data.format=coco"
            )
        on_batch = self.mixing.name != "none" and self.mixing.place != "dataset"
        if on_batch and self.mixing.p > 0 and self.data.batch_size == 1:
            raise ValueError(
                f"mixing.place={self.mixing.place} finds no partner with data.batch_size=1: "
                "mixing.place=dataset does"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values by dotted name, without those that say where a run lies."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_options(value, f"{prefix}{key}.")
        elif key not in _PLACES:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_options(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return the options that two configurations set differently."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in before.keys() & now.keys() - set(_PLACES):
        values = before[name], now[name]
        is_section = f"{prefix}{name}" != _FREE
        if is_section and all(isinstance(value, Mapping) for value in values):
            changed |= changed_options(*values, prefix=f"{prefix}{name}.")
        elif values[0] != values[1]:
            changed[f"{prefix}{name}"] = values
    return dict(sorted(changed.items()))
