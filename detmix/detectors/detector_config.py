"""The typed configuration of a detector above its backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from detmix.detectors.detector_names import check_name, inapplicable_fields, option_names

__all__ = ["STATISTICS", "DetectorConfig", "class_arguments"]

STATISTICS = ("image_mean", "image_std")
"""The options that say how images are normalised."""


@dataclass(frozen=True)
class DetectorConfig:
    """A detector: a family on the configured backbone, or one that torchvision builds whole.

    What is None is as torchvision has it for that name. What means nothing to a detector, such as
    ``head_dim`` to a RetinaNet, must be None.

    Attributes:
        name: A family above the configured backbone and its feature pyramid: ``"fasterrcnn"``,
            ``"maskrcnn"``, ``"keypointrcnn"``, ``"retinanet"`` or ``"fcos"``. Or one of
            torchvision's builders, such as ``"ssdlite320_mobilenet_v3_large"``, which brings a
            backbone of its own: of the backbone's section only ``weights`` (a name of
            torchvision's; with a ResNet-50 whatever a backbone starts from), ``trainable_layers``
            and ``norm_eps`` are for it.
        min_size: What the shorter side of an image is resized to, in pixels. SSD and SSDlite
            have images of a fixed size.
        max_size: What the longer side must not exceed, in pixels.
        anchor_sizes: Side of the square anchor at each pyramid level, in pixels of the resized
            image: one more than the backbone has levels. None for 8 times the stride of a level
            (an R-CNN: 32 to 512 on all four levels), 4 times (RetinaNet, which has 2^(1/3) and
            2^(2/3) of each size too) or the stride (FCOS: a location learns of objects that
            reach 4 to 8 times this far).
        aspect_ratios: Height over width of the anchors at every level; None for 0.5, 1 and 2.
        roi_sampling_ratio: Points per side that RoI align samples in each bin of a proposal; a
            quarter of the work on a CPU with 1 instead of 2 (None). R-CNN families only.
        head_dim: Width of the two fully connected layers of the box head, 1024 (None). R-CNN
            families only. The heads of masks and keypoints are as wide as the pyramid and twice
            as wide.
        options: Further keyword arguments of torchvision's class, such as
            ``rpn_post_nms_top_n_train`` or ``score_thresh``. ``image_mean`` and ``image_std``
            are those of the pretrained weights, or torchvision's without any, unless given here.
        weights: A whole detector to start from: a name of torchvision's weights, such as
            ``"COCO_V1"``, for one of its builders, or for an R-CNN family on a ResNet-50; or a
            file: a checkpoint of ``tools/train.py`` or a state dict of torchvision's. All of it
            is taken but what depends on the classes, which is new for those of the data set (and
            the keypoints' predictor where their number differs). None for a new detector, on a
            backbone that may be pretrained.
    """

    name: str = "fasterrcnn"
    min_size: int | None = None
    max_size: int | None = None
    anchor_sizes: tuple[int, ...] | None = None
    aspect_ratios: tuple[float, ...] | None = None
    roi_sampling_ratio: int | None = None
    head_dim: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        for name, reason in inapplicable_fields(self.name).items():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"detector.{name} does not apply to {self.name} ({reason}), got "
                    f"{getattr(self, name)}"
                )
        for name in ("min_size", "max_size", "roi_sampling_ratio", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"detector.{name} must be positive, got {value}")
        for name in ("anchor_sizes", "aspect_ratios"):
            values = getattr(self, name)
            if values is not None and not (values and all(value > 0 for value in values)):
                raise ValueError(f"detector.{name} must be positive numbers, got {values}")
        self._check_options()

    def _check_options(self) -> None:
        for name in STATISTICS:
            value = self.options.get(name)
            if value is not None and not _are_three_numbers(value):
                raise ValueError(f"detector.options.{name} must be three numbers, got {value!r}")
        known = option_names(self.name)
        for name in self.options:
            if name not in known:
                raise ValueError(
                    f"detector.options.{name} is not an option of {self.name}; there are "
                    f"{', '.join(known)}"
                )


def class_arguments(detector: DetectorConfig) -> dict[str, Any]:
    """Return the keyword arguments of a detector's class that its configuration gives as such.

    All but the image statistics: what they are by default must be known when weights bring others.
    """
    sizes = {"min_size": detector.min_size, "max_size": detector.max_size}
    given = {name: value for name, value in sizes.items() if value is not None}
    return {**given, **_without_statistics(detector.options)}


def _without_statistics(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in STATISTICS}


def _are_three_numbers(value: Any) -> bool:
    is_three = isinstance(value, (list, tuple)) and len(value) == 3
    return is_three and all(isinstance(number, (int, float)) for number in value)
