"""Building a detector by the name of torchvision's own builder, backbone and all.

Torchvision's builders download what they are asked to start from. `_StandIn` lets them build the
same architecture (frozen norm, frozen layers) from tensors at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.models.detection import FCOS, KeypointRCNN, RetinaNet

from detmix.detectors.config import DetectorConfig, class_arguments, reset_flags
from detmix.detectors.families import (
    ASPECT_RATIOS,
    check_fcos_sizes,
    retinanet_anchors,
    single_anchors,
)
from detmix.detectors.names import backbone_weights, detector_class
from detmix.detectors.pyramid import BackboneConfig
from detmix.pretrained.match_state import LoadReport, SourceWeights
from detmix.pretrained.sources import (
    download,
    find_named,
    load_into_classifier,
    read_backbone_weights,
)

_SETTING = "backbone.weights"
# The fields of the backbone's section that are for a builder too.
_BACKBONE_FIELDS = {"weights", "trainable_layers", "norm_eps"}
# The one whose backbone is narrower than its classifier, where it does not start from that.
_SSDLITE = "ssdlite320_mobilenet_v3_large"
# What their builders give those that take anchors: the sizes of five levels.
_SIZES = (32, 64, 128, 256, 512)

_log = logging.getLogger(__name__)


class _StandIn:
    """Passes for one of torchvision's weights, and gives a builder the tensors it is made with."""

    def __init__(
        self,
        member: WeightsEnum,
        state: Mapping[str, Tensor],
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._kind = type(member)
        self._state = state
        self.meta = member.meta if meta is None else meta

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance asks for it, and so do torchvision's checks
        return self._kind

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Return the tensors, downloading nothing."""
        return self._state


def check_builder(detector: DetectorConfig, backbone: BackboneConfig) -> None:
    """Check what only the two configurations together can have wrong."""
    name = detector.name
    _check_backbone(detector, backbone)
    if backbone.weights is not None and name == _SSDLITE:
        raise ValueError(
            f"backbone.weights={backbone.weights!r} does not fit {name}, whose backbone has a "
            "narrower tail: start from a whole detector with --detector.weights COCO_V1"
        )
    sizes, ratios = detector.anchor_sizes, detector.aspect_ratios
    if sizes is not None and len(sizes) != len(_SIZES):
        raise ValueError(
            f"detector.anchor_sizes must have {len(_SIZES)} entries, one for each level of {name}, "
            f"got {sizes}"
        )
    if sizes is not None and detector_class(name) is FCOS:
        check_fcos_sizes(name, sizes)
    if ratios is not None and len(ratios) != len(ASPECT_RATIOS) and name.endswith("_v2"):
        raise ValueError(
            f"detector.aspect_ratios must have {len(ASPECT_RATIOS)} entries, as the head of {name} "
            f"is built for, got {ratios}"
        )


def build_by_name(
    detector: DetectorConfig,
    backbone: BackboneConfig,
    num_classes: int,
    num_keypoints: int,
    *,
    load_weights: bool = True,
) -> tuple[nn.Module, LoadReport | None]:
    """Build a detector as torchvision's builder of that name does."""
    name, own_anchors = detector.name, detector.name.endswith("_v2")
    anchors = _anchor_argument(detector)
    arguments = {**class_arguments(detector), "num_classes": num_classes}
    if detector_class(name) is KeypointRCNN:
        arguments["num_keypoints"] = num_keypoints
    if not own_anchors:  # the others give their class anchors already
        arguments |= anchors
    start: dict[str, Any] = {"weights": None, "weights_backbone": None}
    read = None
    if backbone.weights is not None:
        start["weights_backbone"], read = _backbone_start(name, backbone.weights, load_weights)
    elif detector.weights is not None:
        start["weights"] = _detector_start(name, arguments)
    if any(value is not None for value in start.values()):  # torchvision warns of it without any
        arguments["trainable_backbone_layers"] = backbone.trainable_layers
    model: Any = get_model(name, **start, **arguments)
    if own_anchors:
        _set_anchors(model, anchors)
    if read is None:
        return model, None
    report = load_into_classifier(model.backbone.body, read, _network(name))
    _log.info("%s", report)
    return model, report


def _network(name: str) -> str:
    """Return the name of the classifier that a builder's backbone is made from."""
    return type(backbone_weights(name)[0]).__name__.removesuffix("_Weights").lower()


def _backbone_start(
    name: str, source: str, load_weights: bool
) -> tuple[_StandIn, SourceWeights | None]:
    """Return what a builder's backbone starts from, and what is to be loaded into it then."""
    known, network = backbone_weights(name), _network(name)
    if network == "resnet50":
        read = None
        if load_weights:
            read = read_backbone_weights(source, _SETTING, network, "standard")
        return _random_start(name), read
    named = _named(source, known, name)
    if not load_weights:
        return _random_start(name), None
    state = download(named, network, _SETTING)
    _log.info("%s=%s: all of %s loaded", _SETTING, named, network)
    return _StandIn(named, state), None


def _random_start(name: str) -> _StandIn:
    """Return a backbone's random weights, which a builder takes for pretrained ones."""
    state = get_model(_network(name), weights=None).state_dict()
    return _StandIn(backbone_weights(name)[0], state)


def _detector_start(name: str, arguments: Mapping[str, Any]) -> _StandIn:
    """Return a whole detector's random weights, which a builder takes for trained ones."""
    state = get_model(name, weights=None, weights_backbone=None, **arguments).state_dict()
    # The builder asks for the number of both, to check those it was given.
    numbers = {"categories": "num_classes", "keypoint_names": "num_keypoints"}
    meta = {key: range(arguments.get(number, 0)) for key, number in numbers.items()}
    return _StandIn(next(iter(get_model_weights(name))), state, meta)


def _named(source: str, known: Sequence[WeightsEnum], name: str) -> WeightsEnum:
    """Return the member of torchvision's weights that a builder's backbone is to start from."""
    found = find_named(source, known)
    if found is None:
        names = ", ".join(member.name for member in known)
        raise ValueError(
            f"{_SETTING} of detector.name={name} must be one of {names} (files and timm's are for "
            f"ResNets only), got {source!r}"
        )
    return found


def _max_trainable(name: str) -> int:
    """Return the number of parts that torchvision counts in a builder's backbone."""
    return 6 if "mobilenet" in name else 5


def _check_backbone(detector: DetectorConfig, backbone: BackboneConfig) -> None:
    """Refuse at once all fields of the backbone's section that are not for a builder's own."""
    name = detector.name
    reset = {
        field.name: field.default
        for field in fields(backbone)
        if field.name not in _BACKBONE_FIELDS and getattr(backbone, field.name) != field.default
    }
    problems = []
    if reset:
        given = ", ".join(f"backbone.{field}={getattr(backbone, field)!r}" for field in reset)
        problems.append(
            f"{given} {'do' if len(reset) > 1 else 'does'} not apply to detector.name={name}, "
            "which brings a backbone of its own"
        )
    of_layers = _layers_problem(detector, backbone)
    if of_layers is not None:
        problems.append(of_layers)
        reset["trainable_layers"] = None
    if problems:
        raise ValueError(f"{'; '.join(problems)}; to reset: {reset_flags('backbone', reset)}")


def _layers_problem(detector: DetectorConfig, backbone: BackboneConfig) -> str | None:
    """Return what is wrong with ``backbone.trainable_layers``, None if nothing is."""
    layers, most = backbone.trainable_layers, _max_trainable(detector.name)
    if layers is None or layers == most:
        return None
    if not 0 <= layers <= most:
        return f"backbone.trainable_layers of {detector.name} must be in 0..{most}, got {layers}"
    if backbone.weights is None and detector.weights is None:
        return (
            f"backbone.trainable_layers={layers} of {detector.name} needs weights: torchvision "
            f"trains all {most} layers of what starts at random"
        )
    return None


def _anchor_argument(detector: DetectorConfig) -> dict[str, Any]:
    """Return the anchors that are asked for, as an argument of the class; nothing if none are."""
    sizes, ratios = detector.anchor_sizes, detector.aspect_ratios
    if sizes is None and ratios is None:
        return {}
    sizes, ratios = tuple(sizes or _SIZES), tuple(ratios or ASPECT_RATIOS)
    cls = detector_class(detector.name)
    if cls is RetinaNet:
        return {"anchor_generator": retinanet_anchors(sizes, ratios)}
    if cls is FCOS:
        return {"anchor_generator": single_anchors(sizes, (1.0,))}
    return {"rpn_anchor_generator": single_anchors(sizes, ratios)}


def _set_anchors(model: Any, anchors: Mapping[str, nn.Module]) -> None:
    """Put other anchors, as many at each location, into a model that was built with its own."""
    for argument, generator in anchors.items():
        if argument == "rpn_anchor_generator":
            model.rpn.anchor_generator = generator
        else:
            model.anchor_generator = generator
