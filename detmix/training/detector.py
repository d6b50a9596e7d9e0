"""Training a detector with weighted mixing, on Pascal VOC or COCO data."""

from __future__ import annotations

from torch import Tensor, nn

from detmix.data.loaders import MixCollate, eval_loader
from detmix.detectors.build import normalization
from detmix.mixing import MixedDataset, Target
from detmix.training.build import (
    Score,
    build_evaluator,
    build_mixer,
    build_model,
    build_test_set,
    build_train_loader,
    open_datasets,
    summarize,
)
from detmix.training.checkpoint import Normalization
from detmix.training.config import TrainConfig
from detmix.training.inference import Prediction, detect, score, to_device
from detmix.training.loop import Trainer
from detmix.training.processes import loader_share, make_accelerator
from detmix.training.progress import Evaluation

Batch = tuple[list[Tensor], list[Target]]


class DetectorTrainer(Trainer[Score]):
    """Trains a detector as a configuration says; `fit` runs to the end.

    Raises:
        FileExistsError: If the run's folder exists and is not to be resumed.
        FileNotFoundError, ValueError: For wrong data or settings, before the folder is made.
    """

    def __init__(self, config: TrainConfig) -> None:
        accelerator = make_accelerator(config)
        config, self._data, self.test_data = open_datasets(config)
        self._mix, is_late = build_mixer(config), config.mixing.place == "device"
        self._mix_on_device = MixCollate(self._mix, config.seed) if self._mix and is_late else None
        share = loader_share(accelerator, config.data.workers)
        loader = build_train_loader(config, self._data, self._mix, **share)
        test_set = build_test_set(config, self.test_data)
        self.test_loader = eval_loader(test_set, config.data.eval_batch_size, **share)
        self.config: TrainConfig = config
        self.found: list[tuple[int, Prediction]] = []  # by the last evaluation
        names = {"train": self._data.names, "test": self.test_data.names}
        super().__init__(config, accelerator, loader, config.data.class_names, names)

    def build_model(self, saved: Normalization | None) -> nn.Module:
        """Build the detector, from its pretrained weights where no checkpoint follows."""
        return build_model(self.config, saved)

    def normalization(self) -> Normalization:
        """Return what the detector normalises images with, and its frozen batch norm's epsilon."""
        return normalization(self.plain_model)

    def begin_epoch(self, epoch: int) -> None:
        """Tell a mixer on the device the epoch, too."""
        super().begin_epoch(epoch)
        if self._mix is not None:
            self._mix.set_epoch(epoch)

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the detector's losses of a batch, which is mixed on the device if so asked."""
        images, targets = to_device(*batch, self.accelerator.device)
        if self._mix_on_device is not None:
            images, targets = self._mix_on_device.mix_batch(images, targets)
        losses: dict[str, Tensor] = self.model(images, targets)
        return losses

    def describe(self, batch: Batch) -> str:
        """Name the images of a batch, with partners from outside it."""
        names = []
        for target in batch[1]:
            index = self._data.index_of(target["image_id"])
            name = self._data.names[index]
            if isinstance(self.loader.dataset, MixedDataset):
                params = self.loader.dataset.draw_params(index)
                name += f" mixed with {self._data.names[params.partner]}" if params else ""
            names.append(name)
        return ", ".join(names)

    def evaluate(self) -> Evaluation[Score]:
        """Score the detector on the test images by the rule of the VOC devkit, or by COCO's."""
        evaluator = build_evaluator(self.config, self.test_data)
        self.found = self.detect()
        score(self.found, [evaluator], self.test_data)
        return summarize(evaluator)

    def detect(self) -> list[tuple[int, Prediction]]:
        """Return the index of each test image with what the detector finds in it."""
        return detect(
            self.eval_model,
            self.test_loader,
            self.accelerator,
            truth=self.test_data,
            after_batch=self.stop_if_asked,
        )
