"""From what ``backbone.weights`` says, a name, timm or a file, to a classifier that has them.

Or to the body of any torchvision detector.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from detmix.backbones.resnet import resnet_names
from detmix.backbones.timm import TIMM_PREFIX, head_names, plain_name, read_timm_weights
from detmix.pretrained.match_state import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LoadReport,
    SourceWeights,
    load_matching,
)
from detmix.pretrained.read_state import WeightFile, read_weight_file

# What a torchvision detector has beside its backbone.
_DETECTOR_KEYS = ("rpn.", "roi_heads.", "head.classification_head.")
_FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl"}
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_log = logging.getLogger(__name__)


def resnet_weights(name: str | None) -> list[WeightsEnum]:
    """Return torchvision's weights of a ResNet; of all ResNets for None."""
    names = resnet_names() if name is None else [name] if name in resnet_names() else []
    return [member for each in names for member in get_model_weights(each)]


def find_named(
    source: str, known: Iterable[WeightsEnum], *, bare: bool = True
) -> WeightsEnum | None:
    """Return the member of torchvision's weights that a string names, if any."""
    for enum in {type(member): None for member in known}:
        name = source.removeprefix(f"{enum.__name__}.")
        if name in enum.__members__ and (bare or name != source):
            return enum[name]
    return None


def read_backbone_weights(
    source: str | Path, setting: str, model: str | None = None, stem: str | None = None
) -> SourceWeights:
    """Read pretrained weights of a classifier."""
    what = f"{setting}={source}"
    text = os.fspath(source)
    if text.startswith(TIMM_PREFIX):
        return SourceWeights(what, *read_timm_weights(text, setting, model))
    known = resnet_weights(model)
    named = find_named(text, known, bare=model is not None) if isinstance(source, str) else None
    if named is not None:
        transforms = named.transforms()
        state = download(named, model or type(named).__name__, setting)
        return SourceWeights(what, state, tuple(transforms.mean), tuple(transforms.std))
    names = [member.name for member in known] if model else [str(member) for member in known]
    of = f"{setting} of {model}" if model else setting
    file = open_path(source, of, [*dict.fromkeys(names), f"{TIMM_PREFIX}NAME"])
    _check_classifier(what, file, model, stem)
    mean, std = file.statistic("data", "mean"), file.statistic("data", "std")
    return SourceWeights(what, file.state, mean or IMAGENET_MEAN, std or IMAGENET_STD)


def download(weights: WeightsEnum, model: str, setting: str) -> dict[str, Tensor]:
    """Return torchvision's weights, from its folder of downloads where they are there already."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(
            check_hash=True, map_location="cpu", weights_only=True
        )
    # OSError is URLError and whatever else a broken connection gives; the others, a broken file.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "its file holds more than tensors" if unsafe else error
        raise ConnectionError(
            f"cannot load {weights} of {model} ({reason}); put the file of {weights.url} into "
            "torch's hub folder (torch.hub.get_dir()/checkpoints) by hand, or set "
            f"{setting}=null to start from scratch"
        ) from error
    return state


def open_path(source: str | Path, setting: str, names: list[str]) -> WeightFile:
    """Read a file of weights, named by a string that is none of the names there are."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"{setting}: {path} is a folder, expected a file such as best.pt")
    if path.is_file():
        return read_weight_file(path)
    text = os.fspath(source)
    if isinstance(source, Path) or os.sep in text or path.suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(f"{setting}: there is no file {path}")
    known = f"one of {', '.join(names)} or a file" if names else "a file"
    raise ValueError(f"{setting} must be {known}, got {text!r}, and there is no such file")


def _check_classifier(what: str, file: WeightFile, model: str | None, stem: str | None) -> None:
    """Refuse weights of a detector, and of a network that its configuration says is another."""
    if any(key.startswith(_DETECTOR_KEYS) for key in file.state):
        raise ValueError(
            f"{what} holds a whole detector, expected a classifier: set detector.weights instead"
        )
    wanted = {"name": model, "stem": stem}
    found = {name: file.setting("model", name) for name in wanted}
    differ = {
        name: found[name]
        for name, value in wanted.items()
        if value and found[name] and plain_name(str(found[name])) != plain_name(value)
    }
    if differ:
        has = " and ".join(f"model.{name}={value}" for name, value in differ.items())
        got = ", ".join(f"backbone.{name}={wanted[name]}" for name in differ)
        advice = " and ".join(f"backbone.{name}={value}" for name, value in differ.items())
        raise ValueError(f"{what} was trained with {has}, got {got}: set {advice}")


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
    """Load weights that were read into a classifier or a body, all but the head."""
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
