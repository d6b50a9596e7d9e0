"""Starting a whole detector from one trained before, with a new head for other classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD

from detmix.detectors.names import takes_backbone
from detmix.detectors.pyramid import set_norm_epsilon
from detmix.pretrained.match_state import LoadReport, SourceWeights, load_matching
from detmix.pretrained.sources import download, find_named, open_path

_SETTING = "detector.weights"
_KEYPOINTS = "roi_heads.keypoint_predictor"
# Whose architecture a family has on a ResNet-50 with all defaults. RetinaNet's and FCOS's pyramids
# have two convolutions on top that the configured backbone's has not.
_BUILDERS = {
    "fasterrcnn": "fasterrcnn_resnet50_fpn",
    "maskrcnn": "maskrcnn_resnet50_fpn",
    "keypointrcnn": "keypointrcnn_resnet50_fpn",
}
# From before frozen batch norm had any epsilon (pytorch/vision#2933); their builders set 0 too.
_WITHOUT_EPSILON = (
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
    RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)


@dataclass(frozen=True)
class _Head:
    """What depends on the classes."""

    names: tuple[str, ...]
    bias: str
    anchors: int

    def num_classes(self, state: Mapping[str, Tensor]) -> int | str:
        bias = state.get(self.bias)
        return "no" if bias is None else len(bias) // self.anchors


def detector_weights(name: str) -> list[WeightsEnum]:
    """Return torchvision's weights of whole detectors that fit a detector."""
    builder = _BUILDERS.get(name) if takes_backbone(name) else name
    return [] if builder is None else list(get_model_weights(builder))


def find_detector_weights(source: str, name: str) -> WeightsEnum | None:
    """Return the torchvision weights that ``detector.weights`` names, None if it names none."""
    return find_named(source, detector_weights(name))


def load_detector_weights(
    model: nn.Module, source: str, name: str, model_name: str | None = None
) -> LoadReport:
    """Load a trained detector into another, all but what depends on the classes."""
    weights, eps = _read(model, source, name)
    own, state = model.state_dict(), weights.state
    head = _class_head(model)
    text = (
        f"the head of {head.num_classes(state)} classes, which is new for {head.num_classes(own)}, "
        "background included"
    )
    names = list(head.names)
    bias = f"{_KEYPOINTS}.kps_score_lowres.bias"
    if bias in own and bias in state and len(own[bias]) != len(state[bias]):
        names.append(_KEYPOINTS)
        text += f"; that of {len(state[bias])} keypoints, which is new for {len(own[bias])}"
    report = load_matching(model, weights, model=model_name or name, heads=names, head=text)
    set_norm_epsilon(model, eps)
    return report


def named_epsilon(source: str, name: str) -> float | None:
    """Return the epsilon of frozen batch norm that goes with a name; None if none does."""
    # Some of torchvision's COCO weights are from before its frozen batch norm had any, and its own
    # builders set 0 for them. It is no part of the state dict.
    files = {Path(member.url).name for member in _WITHOUT_EPSILON}
    found = find_detector_weights(source, name)
    return 0.0 if found in _WITHOUT_EPSILON or Path(source).name in files else None


def _class_head(model: Any) -> _Head:
    """Return what depends on the classes in one of torchvision's detectors."""
    if isinstance(model, GeneralizedRCNN):
        names = ["roi_heads.box_predictor"]
        if model.roi_heads.has_mask():
            names.append("roi_heads.mask_predictor.mask_fcn_logits")
        return _Head(tuple(names), f"{names[0]}.cls_score.bias", 1)
    part = "head.classification_head"
    if not isinstance(model, SSD):
        head = model.head.classification_head
        return _Head((f"{part}.cls_logits",), f"{part}.cls_logits.bias", head.num_anchors)
    blocks = model.head.classification_head.module_list
    # SSDlite has a convolution of each channel by itself before that into the classes.
    last = [f".{len(block) - 1}" if isinstance(block, nn.Sequential) else "" for block in blocks]
    names = [f"{part}.module_list.{index}{suffix}" for index, suffix in enumerate(last)]
    anchors = model.anchor_generator.num_anchors_per_location()[0]
    return _Head(tuple(names), f"{names[0]}.bias", anchors)


def _read(model: Any, source: str, name: str) -> tuple[SourceWeights, float | None]:
    """Return weights, and the epsilon that the training which wrote them had noted."""
    what = f"{_SETTING}={source}"
    mean, std = tuple(model.transform.image_mean), tuple(model.transform.image_std)
    named = find_detector_weights(source, name)
    if named is not None:
        state = download(named, name, _SETTING)
        return SourceWeights(what, _rename_old(model, state), mean, std), None
    file = open_path(source, _SETTING, [member.name for member in detector_weights(name)])
    if not any(key.startswith("backbone.") for key in file.state):
        raise ValueError(
            f"{what} holds no detector: no key starts with 'backbone.', as in torchvision's; for a "
            "classifier set backbone.weights instead"
        )
    mean = file.statistic("detector", "options", "image_mean") or mean
    std = file.statistic("detector", "options", "image_std") or std
    weights = SourceWeights(what, _rename_old(model, file.state), mean, std)
    eps = file.setting("backbone", "norm_eps")
    return weights, float(eps) if isinstance(eps, (int, float)) else None


def _rename_old(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give keys of before torchvision 0.13 their present names, as its modules do on loading."""
    own, copied = model.state_dict(), copy.deepcopy(model).to("meta")
    with suppress(RuntimeError):  # of another shape a key keeps its old name
        copied.load_state_dict(state, strict=False, assign=True)
    found = copied.state_dict().items()
    present = {value.data_ptr(): key for key, value in found if not value.is_meta}
    return {
        key if key in own else present.get(value.data_ptr(), key): value
        for key, value in state.items()
    }
