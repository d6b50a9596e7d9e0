"""What the configurations of a detector and of its backbone ask for together, decided once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detmix.backbones.timm import TIMM_PREFIX
from detmix.detectors.config import (
    BackboneConfig,
    DetectorConfig,
    DetectorKind,
    find_detector,
    refuse,
)
from detmix.pretrained.read_state import STATISTICS, Source, find_source

_ASPECT_RATIOS = (0.5, 1.0, 2.0)
# What torchvision's builders give those that take anchors: the sizes of five levels.
_BUILDER_SIZES = (32, 64, 128, 256, 512)
# Side of the default anchor over the stride of its level: as in the pyramid's paper
# (arXiv 1612.03144, section 4.1), RetinaNet's (1708.02002, section 4) and torchvision's FCOS.
_SIZE_OVER_STRIDE = {RetinaNet: 4, FCOS: 1}
_RCNN_SIZE_OVER_STRIDE = 8
_FCOS_GROUPS = 32  # of the group norm in its heads
# The fields of the backbone's section that are for a builder too.
_BUILDER_FIELDS = {"weights", "weights_prefix", "trainable_layers", "norm_eps"}
# The one whose backbone is narrower than its classifier, where it does not start from that.
_SSDLITE = "ssdlite320_mobilenet_v3_large"
# From before frozen batch norm had any epsilon (pytorch/vision#2933); torchvision's builders set 0
# for them too. It is no part of the state dict.
_FILES_WITHOUT_EPSILON = {
    Path(get_model_weights(f"{family}_resnet50_fpn")["COCO_V1"].url).name
    for family in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
}


@dataclass(frozen=True)
class DetectorSpec:
    """A detector as it is to be built; whoever builds it has nothing left to decide."""

    kind: DetectorKind
    detector: DetectorConfig
    backbone: BackboneConfig
    # What it starts from: as a whole, or with its backbone alone.
    source: Source | None
    starts_whole: bool
    # The epsilon of frozen batch norm that the name of the source tells.
    source_eps: float | None
    # Anchors, under the name of the class's argument; none for those that a builder chooses.
    anchors: Mapping[str, AnchorGenerator]
    # Keyword arguments of the class beside those, its modules and the number of classes.
    arguments: Mapping[str, Any]


def resolve(detector: DetectorConfig, backbone: BackboneConfig) -> DetectorSpec:
    """Decide what two configurations ask for, and refuse what does not fit each other."""
    kind = find_detector(detector.name)
    if not kind.is_family:
        _check_builder(kind, detector, backbone)
    anchors = _anchors(kind, detector, backbone)
    source = _find_start(kind, detector, backbone)
    place = None if source is None else source.place
    file = Path(place.url if isinstance(place, WeightsEnum) else place or "").name
    given = {"min_size": detector.min_size, "max_size": detector.max_size}
    # Not the image statistics: what they are by default must be known when weights bring others.
    options = {key: value for key, value in detector.options.items() if key not in STATISTICS}
    return DetectorSpec(
        kind=kind,
        detector=detector,
        backbone=backbone,
        source=source,
        starts_whole=detector.weights is not None,
        source_eps=0.0 if file in _FILES_WITHOUT_EPSILON else None,
        anchors=anchors,
        arguments={key: value for key, value in given.items() if value is not None} | options,
    )


def _check_builder(kind: DetectorKind, detector: DetectorConfig, backbone: BackboneConfig) -> None:
    """Refuse at once all fields of the backbone's section that are not for a builder's own."""
    problems = {
        field.name: f"={getattr(backbone, field.name)!r} does not apply to detector.name="
        f"{kind.name}, which brings a backbone of its own"
        for field in fields(backbone)
        if field.name not in _BUILDER_FIELDS and getattr(backbone, field.name) != field.default
    }
    layers, is_pretrained = backbone.trainable_layers, detector.weights or backbone.weights
    most = 6 if "mobilenet" in kind.name else 5  # the parts that torchvision counts
    if layers is not None and layers not in (range(most + 1) if is_pretrained else (most,)):
        expected = f"in 0..{most}" if is_pretrained else f"{most} without pretrained weights"
        problems["trainable_layers"] = f" of {kind.name} must be {expected}, got {layers}"
    refuse("backbone", backbone, problems)


def _find_start(
    kind: DetectorKind, detector: DetectorConfig, backbone: BackboneConfig
) -> Source | None:
    """Decide what a detector, or its backbone alone, starts from; None for a random start."""
    if detector.weights is None:
        return backbone_source(backbone) if kind.is_family else _builder_source(kind, backbone)
    if backbone.weights is not None:
        raise ValueError(
            "detector.weights brings a backbone of its own: give either detector.weights or "
            f"backbone.weights, got {detector.weights!r} and {backbone.weights!r}"
        )
    setting = "detector.weights"
    prefix = detector.weights_prefix
    source = find_source(detector.weights, prefix, setting, kind.weights, kind.name, timm=False)
    if not (kind.is_family and source.is_torchvisions):
        return source
    if not issubclass(kind.cls, FasterRCNN):
        # Their builders' pyramids have two convolutions on top that the configured one has not.
        raise ValueError(
            f"{setting} of {kind.name} must be a file, got {source.text!r}: torchvision's "
            f"are for detector.name={kind.name}_resnet50_fpn, whose pyramid is another"
        )
    if (backbone.name, backbone.stem) != ("resnet50", "standard") or backbone.norm == "group":
        raise ValueError(
            f"{source.what} is for backbone.name=resnet50 with batch norm and the standard stem, "
            f"got name={backbone.name}, norm={backbone.norm}, stem={backbone.stem}"
        )
    return source


def backbone_source(config: BackboneConfig) -> Source | None:
    """Decide what a configured backbone starts from; None for a random start."""
    if config.weights is None:
        return None
    is_timm = config.name.startswith(TIMM_PREFIX)
    known = () if is_timm else tuple(get_model_weights(config.name))
    setting, prefix = "backbone.weights", config.weights_prefix
    source = find_source(config.weights, prefix, setting, known, config.name)
    if source.is_torchvisions and (config.norm == "group" or config.stem == "small"):
        raise ValueError(
            f"backbone.weights={config.weights!r} is with batch norm and the standard stem, got "
            f"backbone.norm={config.norm}, backbone.stem={config.stem}"
        )
    return source


def _builder_source(kind: DetectorKind, backbone: BackboneConfig) -> Source | None:
    """Decide what a builder's backbone starts from; None for a random start."""
    if backbone.weights is None:
        return None
    setting, prefix = "backbone.weights", backbone.weights_prefix
    source = find_source(backbone.weights, prefix, setting, kind.backbone_weights, kind.network)
    if kind.name == _SSDLITE:
        raise ValueError(
            f"{source.what} does not fit {kind.name}, whose backbone has a narrower tail: start "
            "from a whole detector with --detector.weights COCO_V1"
        )
    if not (source.is_torchvisions or kind.network == "resnet50"):
        names = ", ".join(member.name for member in kind.backbone_weights)
        raise ValueError(
            f"backbone.weights of detector.name={kind.name} must be one of {names} (files and "
            f"timm's are for ResNets only), got {source.text!r}"
        )
    return source


def _anchors(
    kind: DetectorKind, detector: DetectorConfig, backbone: BackboneConfig
) -> dict[str, AnchorGenerator]:
    """Return anchors at every level, as an argument of the class; {} for those of a builder."""
    sizes, ratios = detector.anchor_sizes, detector.aspect_ratios
    if kind.is_family:
        defaults = _family_sizes(kind, backbone)
        levels = f"of backbone.levels {backbone.levels} and one for the coarser level added to them"
    elif sizes is None and ratios is None:
        return {}
    else:
        defaults, levels = _BUILDER_SIZES, f"level of {kind.name}"
    sizes = sizes or defaults
    if len(sizes) != len(defaults):
        raise ValueError(
            f"detector.anchor_sizes must have {len(defaults)} entries, one for each {levels}, "
            f"got {sizes}"
        )
    if ratios is not None and len(ratios) != len(_ASPECT_RATIOS) and kind.sets_anchors:
        raise ValueError(
            f"detector.aspect_ratios must have {len(_ASPECT_RATIOS)} entries, as the head of "
            f"{kind.name} is built for, got {ratios}"
        )
    if kind.cls is FCOS:
        ratios = (1.0,)
        if any(coarse > 2 * fine for fine, coarse in itertools.pairwise(sizes)):
            raise ValueError(
                f"detector.anchor_sizes of {kind.name} (a stride for each of backbone.levels if "
                "null) must at most double from level to level, or no location learns of the "
                f"objects between two levels; got {sizes}"
            )
    # RetinaNet's are a third of an octave apart (1708.02002, section 4).
    steps = [2 ** (third / 3) for third in range(3)] if kind.cls is RetinaNet else [1]
    shapes = tuple(tuple(int(size * step) for step in steps) for size in sizes)
    generator = AnchorGenerator(shapes, (tuple(ratios or _ASPECT_RATIOS),) * len(sizes))
    is_rcnn = issubclass(kind.cls, FasterRCNN)
    return {"rpn_anchor_generator" if is_rcnn else "anchor_generator": generator}


def _family_sizes(kind: DetectorKind, backbone: BackboneConfig) -> tuple[int, ...]:
    """Return the default size of the anchors at each level of a pyramid, from its stride."""
    if kind.cls is FCOS and backbone.fpn_channels % _FCOS_GROUPS:
        raise ValueError(
            f"backbone.fpn_channels must be a multiple of {_FCOS_GROUPS} for fcos, which has group "
            f"norm in its heads, got {backbone.fpn_channels}"
        )
    first = 0 if backbone.stem == "small" else 2  # log2 of the stride before the first stage
    strides = [2 ** (first + level - 1) for level in sorted(backbone.levels)]
    strides.append(strides[-1] * 2)
    factor = _SIZE_OVER_STRIDE.get(kind.cls, _RCNN_SIZE_OVER_STRIDE)
    return tuple(factor * stride for stride in strides)
