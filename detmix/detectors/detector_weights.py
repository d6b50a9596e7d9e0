"""Starting a whole detector from one trained before, with a new head for other classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

from detmix.detectors.weight_matching import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LoadReport,
    SourceWeights,
    load_matching,
)
from detmix.detectors.weight_source import download, find_named, open_path

__all__ = [
    "find_detector_weights",
    "load_detector_weights",
    "named_epsilon",
    "norm_epsilon",
    "set_norm_epsilon",
]

_SETTING = "detector.weights"
_HEAD = "roi_heads.box_predictor"
_KNOWN = list(FasterRCNN_ResNet50_FPN_Weights)

# Keys of torchvision's detectors before 0.13, whose own file of COCO weights still has them.
_OLD_KEYS = (
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
)


def find_detector_weights(source: str) -> FasterRCNN_ResNet50_FPN_Weights | None:
    """Return the torchvision weights that ``detector.weights`` names, None if it names none."""
    return find_named(source, _KNOWN)


def load_detector_weights(model: FasterRCNN, source: str, name: str) -> LoadReport:
    """Load a trained detector into another, all but the classes' head.

    Args:
        model: The detector, changed in place.
        source: The name of torchvision's weights, or a file: a checkpoint of ``tools/train.py``
            or a state dict of torchvision's Faster R-CNN.
        name: What its backbone is, for messages.

    Returns:
        What was loaded, with the mean and deviation that the weights expect.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights are unknown, broken, a classifier's or of another detector; the
            model is unchanged then.
        ConnectionError: If they cannot be downloaded.
    """
    weights, eps = _read(source)
    num_classes = model.roi_heads.box_predictor.cls_score.out_features
    report = load_matching(
        model,
        weights,
        model=f"Faster R-CNN on {name}",
        heads=[_HEAD],
        head=f"the head of {_num_classes(weights.state)} classes, which is new for {num_classes}, "
        "background included",
    )
    set_norm_epsilon(model, eps)
    return report


def named_epsilon(source: str) -> float | None:
    """Return the epsilon of frozen batch norm that goes with a name; None if none does.

    Torchvision's COCO weights of the ResNet-50 are from before its frozen batch norm had any
    (pytorch/vision#2933), and its own builder sets 0 for them too. It is no part of the state
    dict, hence set whether weights are loaded or not.

    Args:
        source: ``detector.weights``.
    """
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    is_coco = find_detector_weights(source) is coco or Path(source).name == Path(coco.url).name
    return 0.0 if is_coco else None


def norm_epsilon(model: nn.Module) -> float | None:
    """Return the epsilon of a model's frozen batch norm, None if it has none."""
    found = (module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d))
    return next(found, None)


def set_norm_epsilon(model: nn.Module, eps: float | None) -> None:
    """Set the epsilon of a model's frozen batch norm, in place; None leaves it as it is."""
    for module in model.modules():
        if eps is not None and isinstance(module, FrozenBatchNorm2d):
            module.eps = eps


def _read(source: str) -> tuple[SourceWeights, float | None]:
    """Return weights, and the epsilon that the training which wrote them had noted."""
    what = f"{_SETTING}={source}"
    named = find_detector_weights(source)
    if named is not None:
        state = download(named, "Faster R-CNN", _SETTING)
        return SourceWeights(what, _rename_old(state)), None
    file = open_path(source, _SETTING, [member.name for member in _KNOWN])
    if not any(key.startswith("backbone.") for key in file.state):
        raise ValueError(
            f"{what} holds no detector: no key starts with 'backbone.', as in torchvision's; for a "
            "classifier set backbone.weights instead"
        )
    mean = file.statistic("detector", "options", "image_mean")
    std = file.statistic("detector", "options", "image_std")
    weights = SourceWeights(
        what, _rename_old(file.state), mean or IMAGENET_MEAN, std or IMAGENET_STD
    )
    eps = file.setting("backbone", "norm_eps")
    return weights, float(eps) if isinstance(eps, (int, float)) else None


def _rename_old(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = dict(state)
    for pattern, new in _OLD_KEYS:
        renamed = {pattern.sub(new, key): value for key, value in renamed.items()}
    return renamed


def _num_classes(state: Mapping[str, Tensor]) -> int | str:
    score = state.get(f"{_HEAD}.cls_score.weight")
    return "no" if score is None else len(score)
