"""From what a configuration says, a name or a file, to a pretrained state.

And on into a classifier, or into the body of any torchvision detector.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from detmix.backbones.resnet import resnet_names
from detmix.backbones.timm import TIMM_PREFIX, head_names, plain_name, read_timm_weights
from detmix.pretrained.match_state import IMAGENET_MEAN, IMAGENET_STD, LoadReport, load_matching
from detmix.pretrained.read_state import PretrainedState, read_weight_file

# What a torchvision detector has beside its backbone.
_DETECTOR_KEYS = ("rpn.", "roi_heads.", "head.classification_head.")
_FILE_SUFFIXES = {".safetensors", ".pt", ".pth", ".tar", ".bin", ".ckpt", ".pkl"}
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Source:
    """Where a pretrained state comes from: decided, and nothing opened yet."""

    setting: str
    text: str
    what: str  # both, for messages
    # A member of torchvision's weights, the name of one of timm's, or a path.
    place: WeightsEnum | str | Path
    is_torchvisions: bool
    # What it is for, where that is known, and which names there are for that.
    network: str | None
    names: tuple[str, ...]


def find_source(
    text: str | Path,
    setting: str,
    known: Sequence[WeightsEnum],
    network: str | None = None,
    *,
    timm: bool = True,
) -> Source:
    """Decide whether a setting names one of torchvision's weights, one of timm's or a file."""
    place: WeightsEnum | str | Path = Path(text)
    if isinstance(text, str):
        if timm and text.startswith(TIMM_PREFIX):
            place = text
        for enum in {type(member): None for member in known}:
            name = text.removeprefix(f"{enum.__name__}.")
            # Where the network is not known, only a full name tells whose weights are meant.
            if name in enum.__members__ and (network is not None or name != text):
                place = enum[name]
    names = [str(member) if network is None else member.name for member in known]
    return Source(
        setting=setting,
        text=os.fspath(text),
        what=f"{setting}={text}",
        place=place,
        is_torchvisions=isinstance(place, WeightsEnum),
        network=network,
        names=(*names, f"{TIMM_PREFIX}NAME") if timm else tuple(names),
    )


def read_source(
    source: Source,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> PretrainedState:
    """Read a state, with the mean and deviation of its images, these where it tells none."""
    if isinstance(source.place, WeightsEnum):
        found = PretrainedState(_download(source, source.place))
    elif isinstance(source.place, Path):
        found = read_weight_file(_existing(source, source.place.expanduser()))
    else:
        found = PretrainedState(*read_timm_weights(source.place, source.setting, source.network))
    return replace(found, source=source.what, mean=found.mean or mean, std=found.std or std)


def _download(source: Source, member: WeightsEnum) -> dict[str, Tensor]:
    """Return torchvision's weights, from its folder of downloads where they are there already."""
    try:
        state: dict[str, Tensor] = member.get_state_dict(
            check_hash=True, map_location="cpu", weights_only=True
        )
    # OSError is URLError and whatever else a broken connection gives; the others, a broken file.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "its file holds more than tensors" if unsafe else error
        raise ConnectionError(
            f"cannot load {member} of {source.network or type(member).__name__} ({reason}); put "
            f"the file of {member.url} into torch's hub folder "
            "(torch.hub.get_dir()/checkpoints) by hand, or set "
            f"{source.setting}=null to start from scratch"
        ) from error
    return state


def _existing(source: Source, path: Path) -> Path:
    """Return the path of a file that is there."""
    if path.is_file():
        return path
    if path.is_dir():
        raise FileNotFoundError(f"{source.what} is a folder, expected a file such as best.pt")
    if os.sep in source.text or path.suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(f"{source.what}: there is no file {path}")
    of = "" if source.network is None else f" of {source.network}"
    known = f"one of {', '.join(source.names)} or a file"
    raise ValueError(
        f"{source.setting}{of} must be {known}, got {source.text!r}, and there is no such file"
    )


def load_classifier(
    module: nn.Module, source: Source, name: str, stem: str | None = None
) -> LoadReport:
    """Load a classifier into another or a body, all but the head, if it is of that network."""
    weights = read_source(source)
    if any(key.startswith(_DETECTOR_KEYS) for key in weights.state):
        raise ValueError(
            f"{source.what} holds a whole detector, expected a classifier: set "
            "detector.weights instead"
        )
    for option, wanted in (("name", source.network), ("stem", stem)):
        found = weights.network.get(option)
        if wanted and found and plain_name(str(found)) != plain_name(wanted):
            raise ValueError(
                f"{source.what} was trained with model.{option}={found}, got "
                f"backbone.{option}={wanted}: set backbone.{option}={found}"
            )
    return load_matching(
        module,
        weights,
        model=name,
        heads=head_names(module),
        head="the classifier head",
        # The body of a torchvision detector ends at the last stage that it returns.
        absent=[stage for stage in _STAGES if not hasattr(module, stage)],
    )


def load_backbone_weights(module: nn.Module, source: str | Path) -> LoadReport:
    """Load pretrained weights into a ResNet or the body of a torchvision detector, in place.

    Every tensor but those of the classifier's head must be in the weights with its shape, and no
    other may be left over. Set ``model.transform.image_mean`` and ``image_std`` to the report's.

    Args:
        module: A ResNet of torchvision, a classifier of timm, or ``model.backbone.body``.
        source: A file as `BackboneConfig.weights` takes it, a full name such as
            ``"ResNet50_Weights.IMAGENET1K_V2"``, or ``"timm:NAME"``.

    Raises:
        TypeError: If the module is a whole detector or a backbone with its pyramid.
        FileNotFoundError: If there is no such file.
        ValueError: If the weights are unknown, broken or of another network; the module is
            unchanged then.
        ConnectionError: If they cannot be downloaded.
    """
    name = type(module).__name__
    if hasattr(module, "backbone") or isinstance(module, BackboneWithFPN):
        raise TypeError(
            f"expected a classifier or a detector's body, got {name}: give it model.backbone.body"
        )
    known = [member for each in resnet_names() for member in get_model_weights(each)]
    return load_classifier(module, find_source(source, "source", known), name)
