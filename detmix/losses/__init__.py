"""One call gives a built torchvision detector weighted losses, another gives back its own."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from detmix.losses.fcos import WeightedFCOSHead
from detmix.losses.object_weights import LossWeighting, Normalizer
from detmix.losses.rcnn import WeightedRegionProposalNetwork, WeightedRoIHeads
from detmix.losses.retinanet import WeightedRetinaNetHead
from detmix.losses.ssd import WeightedSSD

__all__ = ["LossWeighting", "unweight_losses", "weight_losses"]

Model = TypeVar("Model", bound=nn.Module)

# The parts of each detector that compute losses.
_PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    GeneralizedRCNN: ("rpn", "roi_heads"),
    RetinaNet: ("head",),
    FCOS: ("head",),
    SSD: ("",),  # the model itself
}
# torchvision's class of a part, exactly, and what takes its place.
_WEIGHTED: dict[type[nn.Module], type[nn.Module]] = {
    RegionProposalNetwork: WeightedRegionProposalNetwork,
    RoIHeads: WeightedRoIHeads,
    RetinaNetHead: WeightedRetinaNetHead,
    FCOSHead: WeightedFCOSHead,
    SSD: WeightedSSD,
}
_PLAIN = {weighted: plain for plain, weighted in _WEIGHTED.items()}
# Their own losses are not called any more: those of a subclass would be lost.
_REPLACED = (RetinaNetClassificationHead, RetinaNetRegressionHead)


def weight_losses(
    model: Model, background_weight: float = 1.0, normalizer: Normalizer = "samples"
) -> Model:
    """Make a detector scale every object's losses by its ``box_weights``.

    Each sampled anchor or proposal i with loss ``l_i`` gets the weight ``w_i`` of its
    matched object (``target["box_weights"]``, ones where absent) when it is foreground, and
    ``background_weight`` when it is background. Each loss (of an R-CNN: RPN objectness and box,
    RoI class and box, mask, keypoints; of RetinaNet, FCOS and SSD: class, box and, for FCOS,
    centerness) becomes ``sum_i w_i l_i / n`` with torchvision's own n (after Bag of
    Freebies, arXiv 1902.04103, section 3.1, which defines the weights but not the normalizer). So
    it is linear in the weights, and with all weights 1 values and gradients equal torchvision's
    bit for bit, from the same random numbers. Gradients reach ``box_weights`` that ask for them.

    Targets are those that torchvision computes losses of, with weights from 0 up and labels of any
    whole dtype. What it refuses or gets wrong without a word (labels of another shape or number, or
    no class; masks that are not 0 or 1) raises ValueError or TypeError by target and key, before
    anything is sampled.

    Parameter names, state dict, device, hooks and everything in evaluation stay as they are;
    other models in the process are not touched. Call it before the model is wrapped for
    distributed training. Called again it changes the settings, and weights parts that were
    replaced. The model exports, traces and scripts as without; a scripted one evaluates only, and
    raises in training.

    Args:
        model: Any Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS, SSD or SSDlite that torchvision
            builds, whatever its backbone, trained or not.
        background_weight: Weight of anchors and proposals that match no object.
        normalizer: ``"samples"``, or ``"weights"`` to divide by the sum of the samples' weights
            instead of their number (at least by 1 where torchvision counts foreground only).

    Returns:
        The same model.

    Raises:
        TypeError: Naming the class of a model or a part that is not supported; the model is
            unchanged then.
        ValueError: For settings out of range.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
        >>> model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
        >>> model = weight_losses(model)
    """
    weighting = LossWeighting(background_weight, normalizer)
    for part in _weighable_parts(model):
        part.__class__ = _WEIGHTED.get(type(part), type(part))
        part.loss_weighting = weighting  # type: ignore[assignment]
    if isinstance(model, GeneralizedRCNN):
        model.rpn.heads = (model.roi_heads,)
    return model


def unweight_losses(model: Model) -> Model:
    """Give a detector torchvision's own classes and losses back; one that has them stays as it is.

    All else stays: parameters, state dict, hooks, mode.

    Args:
        model: Any detector that `weight_losses` takes.

    Returns:
        The same model.

    Raises:
        TypeError: Naming the class of a model or a part that is not supported; the model is
            unchanged then.
    """
    for part in _weighable_parts(model):
        part.__class__ = _PLAIN.get(type(part), type(part))
        for added in ("loss_weighting", "heads"):
            vars(part).pop(added, None)
    return model


def _weighable_parts(model: nn.Module) -> list[nn.Module]:
    """Return the parts of the model that compute losses, all of known types."""
    name = type(model).__name__
    paths = next((paths for kind, paths in _PARTS.items() if isinstance(model, kind)), None)
    if paths is None:
        raise TypeError(
            f"the losses of {name} cannot be weighted; supported: torchvision's Faster, Mask and "
            "Keypoint R-CNN, RetinaNet, FCOS, SSD and SSDlite (before the model is wrapped for "
            "distributed training, compiled or scripted)"
        )
    parts = [model.get_submodule(path) for path in paths]
    strange = [part for part in parts if type(part) not in {*_WEIGHTED, *_WEIGHTED.values()}]
    if isinstance(model, RetinaNet):
        heads = (model.head.classification_head, model.head.regression_head)
        strange += [head for head in heads if type(head) not in _REPLACED]
    if strange:
        kind = type(strange[0]).__name__
        raise TypeError(f"the losses of {name} cannot be weighted: {kind} is not torchvision's")
    return parts
