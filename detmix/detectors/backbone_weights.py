"""Loading pretrained weights into a classifier, or into the body of any torchvision detector."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from detmix.backbones.timm import head_names
from detmix.pretrained.match_state import LoadReport, SourceWeights, load_matching
from detmix.pretrained.sources import read_backbone_weights

__all__ = ["load_backbone_weights", "load_into_classifier"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")

_log = logging.getLogger(__name__)


def load_backbone_weights(module: nn.Module, source: str | Path) -> LoadReport:
    """Load pretrained weights into a ResNet or the body of a torchvision detector, in place.

    For training loops of your own: ``load_backbone_weights(model.backbone.body, "cutmix.pth")``.
    Every tensor of the module must be in the weights with its shape, and no other may be left
    over, the classifier's head excepted, which is never loaded. What was loaded is logged as one
    line. Set ``model.transform.image_mean`` and ``image_std`` to the report's ``mean`` and
    ``std``.

    Args:
        module: A torchvision ResNet or a classifier of timm, with live, frozen or any other
            normalization; or ``model.backbone.body`` of a detector with a ResNet.
        source: A file as `BackboneConfig.weights` takes it, a full name such as
            ``"ResNet50_Weights.IMAGENET1K_V2"``, or ``"timm:NAME"``.

    Returns:
        What was loaded.

    Raises:
        TypeError: If the module is a whole detector or a backbone with its pyramid.
        FileNotFoundError: If there is no such file.
        ValueError: If the weights are unknown, broken or of another network; the module is
            unchanged then.
        ConnectionError: If they cannot be downloaded.
    """
    name = type(module).__name__
    if hasattr(module, "backbone"):
        raise TypeError(
            f"expected a classifier or a detector's body, got {name}: give it model.backbone.body"
        )
    if isinstance(module, BackboneWithFPN):
        raise TypeError(
            f"expected a classifier or a detector's body, got {name}: give it its .body"
        )
    weights = read_backbone_weights(source, "source")
    report = load_into_classifier(module, weights, name)
    _log.info("%s", report)
    return report


def load_into_classifier(module: nn.Module, weights: SourceWeights, name: str) -> LoadReport:
    """Load weights that were read into a classifier or a body, all but the head.

    Args:
        module: Changed in place.
        weights: The weights.
        name: What the module is, for messages.

    Raises:
        ValueError: If they do not fit; the module is unchanged then.
    """
    absent = []
    if isinstance(module, IntermediateLayerGetter):  # it ends at the last stage that is returned
        absent = [stage for stage in _STAGES if not hasattr(module, stage)]
    return load_matching(
        module,
        weights,
        model=name,
        heads=head_names(module),
        head="the classifier head",
        absent=absent,
    )
