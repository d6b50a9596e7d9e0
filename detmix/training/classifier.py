"""Pretraining a classifier with mixed images, for a detector to start from.

B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision.transforms import v2

from detmix.data import ImageClasses, eval_loader, train_loader
from detmix.detectors import build_classifier
from detmix.training.checkpoint import Normalization
from detmix.training.config import PretrainConfig
from detmix.training.inference import evaluating
from detmix.training.loop import Trainer
from detmix.training.processes import loader_share, make_accelerator
from detmix.training.progress import Evaluation

Batch = tuple[Tensor, Tensor, Tensor]
BatchMix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_TOP = 5


@dataclass(frozen=True)
class ClassificationResult:
    """How well a classifier does on a split."""

    top1: float  # share of the images whose class has the highest score
    top5: float  # share of those whose class is among the five highest
    loss: float  # mean cross-entropy, without label smoothing
    num_images: int
    num_classes: int

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.4f}, top-5 {self.top5:.4f}, loss {self.loss:.3f} "
            f"({self.num_images} images, {self.num_classes} classes)"
        )


class ClassifierTrainer(Trainer[ClassificationResult]):
    """Trains a classifier as a configuration says; `fit` runs to the end.

    Raises:
        FileExistsError: If the run's folder exists and is not to be resumed.
        FileNotFoundError, ValueError: For wrong data or settings, before the folder is made.
    """

    def __init__(self, config: PretrainConfig) -> None:
        accelerator = make_accelerator(config)
        data = config.data
        augment, resize = (build_image_transform(config, train=train) for train in (True, False))
        rest: dict[str, Any] = {"on_error": data.on_error, "seed": config.seed}
        self.train_set = ImageClasses(data.root, "train", augment, **rest)
        classes = self.train_set.classes
        val_set = ImageClasses(data.root, "val", resize, classes=classes)
        share = {**loader_share(accelerator, data.workers), "collate_fn": default_collate}
        loader = train_loader(self.train_set, data.batch_size, seed=config.seed, **share)
        self.val_loader = eval_loader(val_set, data.eval_batch_size, **share)
        self._mix = build_batch_mix(config, len(classes))
        # On the device once and for all: a copy in every step would have to be waited for.
        shape = {"dtype": torch.float32, "device": accelerator.device}
        self._mean = 255 * torch.tensor(data.mean, **shape)[:, None, None]
        self._std = 255 * torch.tensor(data.std, **shape)[:, None, None]
        self.config: PretrainConfig = config
        names = {"train": self.train_set.names, "test": val_set.names}
        super().__init__(config, accelerator, loader, classes, names)

    def build_model(self, saved: Normalization | None) -> nn.Module:
        """Build the classifier with random weights."""
        return build_classifier(self.config.model, len(self.classes))

    def normalization(self) -> Normalization:
        """Return what a detector that starts from the weights must normalise images with."""
        data = self.config.data
        return {"image_mean": list(data.mean), "image_std": list(data.std), "norm_eps": None}

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of a batch, which is mixed on the device."""
        images, labels = self._to_device(batch)
        if self._mix is not None:
            images, labels = self._mix(images, labels)
        scores = self.model(images)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        return {"loss_classifier": loss}

    def describe(self, batch: Batch) -> str:
        """Name the images of a batch."""
        return ", ".join(self.train_set.names[index] for index in batch[2].tolist())

    @torch.inference_mode()
    def evaluate(self) -> Evaluation[ClassificationResult]:
        """Score the classifier on the validation images, each of which counts once."""
        # Images, those whose class is first and among the first five, and their losses.
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        top = min(_TOP, len(self.classes))
        with evaluating(self.eval_model, self.val_loader, self.accelerator) as batches:
            for batch in batches:
                images, labels = self._to_device(batch)
                with self.accelerator.autocast():
                    scores = self.eval_model(images).float()
                hits = scores.topk(top).indices == labels[:, None]
                losses = F.cross_entropy(scores, labels, reduction="none")
                ones = torch.ones_like(losses)
                sums += torch.stack([ones, hits[:, 0], hits.any(1), losses]).double().sum(1)
                self.stop_if_asked()
        num_images, top1, top5, loss = self.accelerator.reduce(sums).tolist()
        result = ClassificationResult(
            top1 / num_images,
            top5 / num_images,
            loss / num_images,
            int(num_images),
            len(self.classes),
        )
        return Evaluation(
            result=result,
            score=result.top1,
            metrics={"top1": result.top1, "top5": result.top5, "val_loss": result.loss},
            summary=str(result),
        )

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Move a batch to the device, uint8 still, and normalise it there."""
        images, labels, _ = batch
        device = self.accelerator.device
        images = (images.to(device, non_blocking=True) - self._mean) / self._std
        if self.config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return images, labels.to(device, non_blocking=True)


def build_image_transform(config: PretrainConfig, *, train: bool) -> Callable[[Tensor], Tensor]:
    """Build what turns an image into the network's uint8 square, for training or validation."""
    augment, mixing = config.augment, config.mixing
    size = augment.size
    if not train:
        resize = v2.Resize(augment.eval_resize or size)
        return v2.Compose([resize, v2.CenterCrop(size)])  # type: ignore[no-any-return]
    # What is covered is zero after normalization, as in the papers.
    fill = [round(255 * value) for value in config.data.mean]
    steps: list[Any] = []
    if augment.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, augment.scale))
    else:
        steps += [v2.Resize(size), v2.CenterCrop(size)]  # images of this size stay as they are
        steps.append(v2.RandomCrop(size, augment.padding, fill=fill))
    if augment.flip > 0:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.jitter > 0:
        steps.append(v2.ColorJitter(augment.jitter, augment.jitter, augment.jitter))
    if config.mix == "cutout" and mixing.p > 0:
        area = (mixing.cutout_area, mixing.cutout_area)
        steps.append(v2.RandomErasing(mixing.p, scale=area, ratio=(1, 1), value=fill))
    return v2.Compose(steps)  # type: ignore[no-any-return]


def build_batch_mix(config: PretrainConfig, num_classes: int) -> BatchMix | None:
    """Build what mixes a batch on its device, drawing on the CPU; None where nothing does."""
    mixup = v2.MixUp(alpha=config.mixing.mixup_alpha, num_classes=num_classes)
    cutmix = v2.CutMix(alpha=config.mixing.cutmix_alpha, num_classes=num_classes)
    ways = {"mixup": mixup, "cutmix": cutmix, "mixup+cutmix": v2.RandomChoice([mixup, cutmix])}
    if config.mix not in ways:
        return None
    return v2.RandomApply([ways[config.mix]], config.mixing.p)  # type: ignore[no-any-return]
