"""Classifiers of the optional library timm: alone, or as the body under a feature pyramid."""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

# What marks a name as one of timm's.
TIMM_PREFIX = "timm:"

_SHOWN = 8


def create_timm_model(
    name: str, setting: str, norm: str, num_classes: int | None = None
) -> nn.Module:
    """Create a classifier of timm with random weights, its batch norm frozen or synchronized."""
    timm, architecture = _find_architecture(name, setting)
    options = {} if num_classes is None else {"num_classes": num_classes}
    model: nn.Module = timm.create_model(architecture, pretrained=False, **options)
    if norm == "frozen":
        importlib.import_module("timm.utils.model").freeze_batch_norm_2d(model)
    elif norm == "sync":
        importlib.import_module("timm.layers").convert_sync_batchnorm(model)
    return model


def read_timm_weights(
    name: str, setting: str, model_name: str | None = None
) -> tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]:
    """Return pretrained weights of timm, with the mean and deviation of their images."""
    timm, architecture = _find_architecture(name, setting)
    if not timm.models.is_model_pretrained(architecture):
        raise ValueError(f"{setting}: timm has no pretrained weights of {architecture}")
    if model_name is not None and plain_name(name) != plain_name(model_name):
        # Some networks have equal keys and shapes, and compute something else.
        wanted = f"{TIMM_PREFIX}{plain_name(name)}"
        raise ValueError(f"{setting}={name} is not of {model_name}: set backbone.name={wanted}")
    try:
        model = timm.create_model(architecture, pretrained=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{setting}: the file of {name} holds more than tensors") from error
    except Exception as error:  # the hub's client has many, and not all are OSError
        told = f"{setting}={name} ({type(error).__name__}: {error})"
        raise ConnectionError(f"cannot load {told}; give a file instead, or null") from error
    config = model.pretrained_cfg
    return model.state_dict(), tuple(config["mean"]), tuple(config["std"])


def plain_name(name: str) -> str:
    """Return an architecture's name without the library's prefix and the weights' tag."""
    return name.removeprefix(TIMM_PREFIX).partition(".")[0]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that make a classifier's head."""
    # None of torchvision's ResNets has this attribute, all models of timm do.
    names = getattr(model, "pretrained_cfg", {"classifier": "fc"}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def recorded_statistics(
    module: nn.Module, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation in timm's record of a network; these where it is none of it."""
    records = (each.pretrained_cfg for each in module.modules() if hasattr(each, "pretrained_cfg"))
    record: Any = next(records, {})
    return tuple(record.get("mean", mean)), tuple(record.get("std", std))


def last_stages(model: nn.Module, name: str, count: int) -> tuple[str, ...]:
    """Return the names of the parameters in the last of the stages to the strides 4, 8, 16, 32."""
    modules = [name for name, _ in model.named_modules()]  # in the order in which they compute
    ends = {stage["reduction"]: stage["module"] for stage in _stages(model)}
    before = 2 ** (5 - count)
    if before == 2 and ends.get(before) not in modules:
        # The stem is what stands ahead of the module that holds the stages.
        holder = ends.get(4, "").partition(".")[0]
        start = modules.index(holder) if holder in modules else 0
    else:
        end = f"{ends.get(before)}."
        inside = [index for index, each in enumerate(modules) if f"{each}.".startswith(end)]
        start = max(inside, default=0) + 1
    if start < 2:  # the first is the network itself
        raise ValueError(
            f"backbone.trainable_layers of {name} must be null, 0, 5 or another number of stages, "
            f"got {count}: timm names no module in it that ends at stride {before}"
        )
    names = [key for key, _ in model.named_parameters()]
    return tuple(key for key in names if key.rpartition(".")[0] in modules[start:])


def _stages(model: Any) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", ())
    return list(info.get_dicts() if hasattr(info, "get_dicts") else info)


def _find_architecture(name: str, setting: str) -> tuple[Any, str]:
    """Return timm, if it is there, and a name of its own, if it knows the network and the tag."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(
            f"{setting}: names that start with {TIMM_PREFIX} need the library timm ({error}): "
            "pip install 'timm>=1.0.26'"
        ) from error
    architecture, base = name.removeprefix(TIMM_PREFIX), plain_name(name)
    tags = timm.list_pretrained(f"{base}.*")
    if not timm.is_model(base) or architecture not in (base, *tags):
        alike = ", ".join([*tags, *timm.list_models(f"{base[:6]}*")][:_SHOWN])
        raise ValueError(f"{setting}: timm has no {architecture!r}; alike: {alike or 'none'}")
    return timm, architecture


class _TimmBody(nn.Module):
    """The features of a timm classifier at some strides; what comes after them is dropped."""

    def __init__(self, model: Any, name: str, levels: list[int]) -> None:
        super().__init__()
        if model.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"backbone.name={name} takes images of one size only; choose another")
        needed = ("forward_intermediates", "prune_intermediate_layers", "feature_info")
        if not all(hasattr(model, attribute) for attribute in needed):
            raise ValueError(f"backbone.name={name} gives no intermediate features in timm")
        stages = _stages(model)
        # Of two stages with one stride the last.
        by_stride = {stage["reduction"]: index for index, stage in enumerate(stages)}
        missing = [level for level in levels if 2 ** (level + 1) not in by_stride]
        if missing:
            raise ValueError(
                f"backbone.levels: {name} has features of the strides "
                f"{', '.join(map(str, by_stride))}, not 2^(level + 1) for the levels {missing}"
            )
        indices = [by_stride[2 ** (level + 1)] for level in levels]
        self.channels = [stages[index]["num_chs"] for index in indices]
        self.indices = model.prune_intermediate_layers(indices, prune_norm=True)
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return feature maps (B, C, H', W') by name, ``"0"`` for the finest."""
        features = self.model.forward_intermediates(
            images, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return OrderedDict((str(i), feature) for i, feature in enumerate(features))


def timm_pyramid(model: nn.Module, name: str, levels: list[int], width: int) -> BackboneWithFPN:
    """Put a feature pyramid on some levels of a classifier of timm, which is changed in place."""
    body = _TimmBody(model, name, levels)
    pyramid = BackboneWithFPN(nn.Module(), {}, body.channels, width)
    # Not given above: torchvision would take the body apart layer by layer.
    pyramid.body = body
    return pyramid
