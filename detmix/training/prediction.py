"""A trained detector as its user has it: pictures in, objects by name out.

Shape legend: D objects found in one image of H x W pixels; C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.models import detection, get_model, get_model_weights, list_models

from detmix.data import detection_transforms
from detmix.data.images import read_upright
from detmix.training.inference import Prediction, in_pixels, load_detector, to_device
from detmix.training.processes import usable_device

Picture = str | PathLike[str] | Image | Tensor
Pictures = list[Picture] | tuple[Picture, ...]
_TORCHVISION_PREFIX = "torchvision:"


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one image, best first; printed, the count and best of each class.

    Attributes:
        boxes: ``(D, 4)`` float32, ``x1, y1, x2, y2`` in pixels of the upright image.
        labels: ``(D,)`` int64 in 1..C; of torchvision's detectors, COCO's category ids.
        scores: ``(D,)`` float32.
        names: The D names of the classes.
        masks: Of Mask R-CNN, D run lengths that ``pycocotools.mask.decode`` makes arrays of.
        keypoints: Of Keypoint R-CNN, ``(D, K, 3)``, its last number always 1.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    names: tuple[str, ...]
    masks: list[dict[str, Any]] | None = None
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        best = dict(zip(reversed(self.names), reversed(self.scores.tolist()), strict=True))
        counts = Counter(self.names).most_common()
        texts = [f"{number} {name} ({best[name]:.2f})" for name, number in counts]
        return ", ".join(texts) or "nothing"


class Detector:
    """A trained detector and the names of its classes; `load` makes one.

    Args:
        model: A torchvision detector; it is moved and left in evaluation mode.
        classes: The C class names without the background.
        size: Images with a longer side than this are shrunk to it first; None for never.
        device: As `load` has it.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        *,
        size: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.size = size
        self.device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device)
        self.classes = tuple(classes)
        self._transform = detection_transforms(size, train=False)

    @overload
    def predict(self, images: Picture, score: float = ...) -> Detections: ...
    @overload
    def predict(self, images: Pictures, score: float = ...) -> list[Detections]: ...

    @torch.no_grad()
    def predict(
        self, images: Picture | Pictures, score: float = 0.5
    ) -> Detections | list[Detections]:
        """Find objects, in float32. Images of one size go through the detector together, no others.

        Args:
            images: One image or a list: paths, PIL images, or uint8 tensors ``(3, H, W)``, RGB.
                Files and PIL images are turned upright, as their EXIF orientation says.
            score: Objects of a lower score are left out.

        Returns:
            What was found in the image, or in each of the list.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If an image is broken or none of these, or ``score`` is not in [0, 1].
        """
        if not 0 <= score <= 1:
            raise ValueError(f"score must be in [0, 1], got {score}")
        if not isinstance(images, list | tuple):
            return self.predict([images], score)[0]
        read = [_pixels(image, f"images[{index}]") for index, image in enumerate(images)]
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        found: dict[int, Detections] = {}
        # Padding to a common size would change what is found by what else is given.
        for size in {(image.shape[1], image.shape[2]) for image in read}:
            places = [place for place, image in enumerate(read) if image.shape[1:] == size]
            seen = [self._transform(read[place], nothing, seed=0)[0] for place in places]
            predictions = self.model(to_device(seen, [], self.device)[0])
            for place, image, prediction in zip(places, seen, predictions, strict=True):
                found[place] = self._named(in_pixels(prediction, image, size), score)
        return [found[place] for place in range(len(read))]

    def _named(self, prediction: Prediction, score: float) -> Detections:
        """Name what has the score; torchvision's detectors return the best first."""
        num = int((prediction["scores"] >= score).sum())
        keys = prediction.keys() & {"boxes", "labels", "scores", "masks", "keypoints"}
        chosen = {key: prediction[key][:num] for key in keys}
        names = tuple(self.classes[label - 1] for label in chosen["labels"].tolist())
        return Detections(**chosen, names=names)


def load(source: str | Path, device: str | torch.device | None = None) -> Detector:
    """Load a trained detector to predict with.

    Args:
        source: ``best.pt`` or ``last.pt`` of a run, of which averaged weights are taken where there
            are some; or, such as ``"torchvision:fasterrcnn_resnet50_fpn"``, a detector of
            torchvision's, which is downloaded with its weights of COCO.
        device: Such as ``"cpu"`` or ``"cuda:1"``; by default a GPU where there is one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a detector, or there is no such detector or device.
        ConnectionError: If torchvision's weights cannot be downloaded.
    """
    device = None if device is None else usable_device(device)  # told before a download
    if isinstance(source, str) and source.startswith(_TORCHVISION_PREFIX):
        return Detector(*_torchvision_detector(source), device=device)
    model, config = load_detector(source)
    return Detector(model, config.data.class_names, size=config.augment.size, device=device)


def _torchvision_detector(source: str) -> tuple[nn.Module, list[str]]:
    """Download a detector, with its weights and the names of its classes."""
    name, known = source.removeprefix(_TORCHVISION_PREFIX), list_models(module=detection)
    if name not in known:
        raise ValueError(f"{source}: torchvision has no such detector, only {', '.join(known)}")
    weights = get_model_weights(name).DEFAULT
    try:
        model: nn.Module = get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # no connection; another hash, a broken file
        raise ConnectionError(
            f"cannot load {weights} ({error}); put the file of {weights.url} into torch's hub "
            "folder (torch.hub.get_dir()/checkpoints) by hand"
        ) from error
    return model, weights.meta["categories"][1:]


def _pixels(image: Picture, name: str) -> Tensor:
    """Read an image as uint8 ``(3, H, W)``, upright."""
    if isinstance(image, str | PathLike | Image):
        try:
            return read_upright(image)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    got = type(image).__name__
    if isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
            return image.cpu()
        got = f"{image.dtype} of shape {tuple(image.shape)}"
    raise ValueError(
        f"{name} is {got}, expected a path, a PIL image or an RGB tensor of torch.uint8 (3, H, W)"
    )
