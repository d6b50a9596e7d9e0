"""What tests of building and loading share: weights in several layouts, and comparing models."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"
NO_WEIGHTS = {"weights": None, "weights_backbone": None}


def shake(module, seed=0):
    """Give every tensor of a module values of its own, so that one that is not loaded shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                value.fill_(7)
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                scale = value.std() if value.dim() > 1 else 0.1
                noise = scale * torch.randn(value.shape, generator=generator)
                value.copy_(noise if value.dim() > 1 else value + noise)
    return module


def random_resnet(name="resnet18", seed=0, **options):
    return shake(torchvision.models.get_model(name, weights=None, **options), seed)


def pretraining_checkpoint(model, *, name="resnet18", stem="standard", data=None, **more):
    """Return what ``tools/pretrain.py`` saves for a model, as far as a detector reads it."""
    config = {"model": {"name": name, "stem": stem, "norm": "batch"}, "data": data or {}}
    state = {"format": 1, "model": model.state_dict(), "ema": None, "config": config}
    return {**state, "classes": ["a", "b"], **more}


def assert_equal_tensors(found, expected, keys):
    """Compare tensors by key and say how many there were."""
    for key in keys:
        assert torch.equal(found[key], expected[key]), key
    return len(list(keys))


def on_meta(build):
    """Build without any memory: what has no values is not compared by value."""
    with torch.device("meta"):
        return build()


def structure(model):
    """Return what two models of one architecture have in common."""
    return {
        "parts": repr(model),
        "shapes": [(key, value.shape) for key, value in model.state_dict().items()],
        "trained": [name for name, value in model.named_parameters() if value.requires_grad],
        "training": {module.training for module in model.modules()},
        "settings": plain_settings(model),
    }


def plain_settings(model):
    plain = (int, float, str, bool, tuple, dict, list)
    of_modules = vars(nn.Module()).keys()
    return {
        f"{name}.{key}": repr(value)
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if key not in of_modules and isinstance(value, plain)
    }


def trained(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


def norms_of(model):
    return {type(part) for part in model.modules() if "Norm" in type(part).__name__}


def epsilons(model):
    return {part.eps for part in model.modules() if isinstance(part, FrozenBatchNorm2d)}


def statistics(model):
    return [list(model.transform.image_mean), list(model.transform.image_std)]
