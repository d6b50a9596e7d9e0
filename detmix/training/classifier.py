"""Pretraining a classifier with mixed images, for a detector to start from.

B images of a batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from detmix.data import (
    ImageClasses,
    TransformedImages,
    classification_transforms,
    eval_loader,
    train_loader,
)
from detmix.detectors import build_classifier
from detmix.training.accelerator import make_accelerator
from detmix.training.image_mixing import build_batch_mix
from detmix.training.inference import evaluating
from detmix.training.loop import Trainer
from detmix.training.pretrain_config import PretrainConfig
from detmix.training.progress import Evaluation

__all__ = ["ClassificationResult", "ClassifierTrainer"]

Batch = tuple[Tensor, Tensor, Tensor]

_TOP = 5


@dataclass(frozen=True)
class ClassificationResult:
    """How well a classifier does on a split.

    Attributes:
        top1: Share of the images whose class has the highest score.
        top5: Share of those whose class is among the five highest.
        loss: Mean cross-entropy, without label smoothing.
        num_images: Images of the split.
        num_classes: K.
    """

    top1: float
    top5: float
    loss: float
    num_images: int
    num_classes: int

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.4f}, top-5 {self.top5:.4f}, loss {self.loss:.3f} "
            f"({self.num_images} images, {self.num_classes} classes)"
        )


class ClassifierTrainer(Trainer[ClassificationResult]):
    """Trains a classifier as a configuration says; `fit` runs to the end.

    Everything that can be wrong with the input is met here, before the run's folder is made.

    Args:
        config: The configuration.

    Raises:
        FileExistsError: If the run's folder exists and is not to be resumed.
        FileNotFoundError, ValueError: For data or settings that are wrong.
    """

    def __init__(self, config: PretrainConfig) -> None:
        accelerator = make_accelerator(config)
        data = config.data
        options: dict[str, Any] = {"class_limit": data.class_limit, "in_memory": data.in_memory}
        images = ImageClasses(data.root, data.train, on_error=data.on_error, **options)
        val_images = ImageClasses(data.root, data.val, classes=images.classes, **options)
        self._names = images.names
        self.train_set = TransformedImages(
            images, build_image_transform(config, train=True), seed=config.seed
        )
        share: dict[str, Any] = {
            "workers": data.workers,
            "rank": accelerator.process_index,
            "num_processes": accelerator.num_processes,
            "pin_memory": accelerator.device.type == "cuda",
            "collate_fn": default_collate,
        }
        loader = train_loader(self.train_set, data.batch_size, seed=config.seed, **share)
        val_set = TransformedImages(
            val_images, build_image_transform(config, train=False), seed=config.seed
        )
        self.val_loader = eval_loader(val_set, data.eval_batch_size, **share)
        self._label_smoothing = config.label_smoothing
        self._mix = build_batch_mix(config.mix, config.mixing, len(images.classes))
        self._statistics = {"mean": data.mean, "std": data.std}
        # On the device once and for all: a copy in every step would have to be waited for.
        shape = {"dtype": torch.float32, "device": accelerator.device}
        self._mean = 255 * torch.tensor(data.mean, **shape)[:, None, None]
        self._std = 255 * torch.tensor(data.std, **shape)[:, None, None]
        torch.manual_seed(config.seed)
        model = build_classifier(config.model, len(images.classes))
        names = {"train": images.names, "test": val_images.names}
        super().__init__(config, accelerator, model, loader, images.classes, names)

    def begin_epoch(self, epoch: int) -> None:
        """Tell the data set the epoch, in running workers too."""
        self.train_set.set_epoch(epoch)

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of a batch, which is mixed on the device."""
        images, labels = self._to_device(batch)
        if self._mix is not None:
            images, labels = self._mix(images, labels)
        scores = self.model(images)
        loss = F.cross_entropy(scores, labels, label_smoothing=self._label_smoothing)
        return {"loss_classifier": loss}

    def describe(self, batch: Batch) -> str:
        """Name the images of a batch."""
        return ", ".join(self._names[index] for index in batch[2].tolist())

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

    def _restore_state(self, state: dict[str, Any]) -> None:
        # A detector that starts from the weights relies on what their checkpoint says.
        for name, now in self._statistics.items():
            before = state["config"]["data"][name]
            if tuple(before) != now:
                raise ValueError(f"data.{name} was {before}, got {list(now)}")
        super()._restore_state(state)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Move a batch to the device, uint8 still, and normalise it there."""
        images, labels, _ = batch
        device = self.accelerator.device
        images = (images.to(device, non_blocking=True) - self._mean) / self._std
        if self.config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return images, labels.to(device, non_blocking=True)


def build_image_transform(config: PretrainConfig, *, train: bool) -> Any:
    """Build what turns an image into the network's uint8 square, for training or validation."""
    augment = config.augment
    return classification_transforms(
        augment.size,
        train=train,
        crop=augment.crop,
        scale=augment.scale,
        padding=augment.padding,
        flip=augment.flip,
        jitter=augment.jitter,
        cutout=config.mixing.p if config.mix == "cutout" else 0.0,
        cutout_area=config.mixing.cutout_area,
        # What is covered is zero after normalization, as in the papers.
        fill=[round(255 * value) for value in config.data.mean],
        eval_resize=augment.eval_resize,
    )
