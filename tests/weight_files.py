"""Weights that tests load: random ones with statistics of their own, in several layouts."""

from __future__ import annotations

import torch
import torchvision
from torch import nn


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


def official_checkpoint(model):
    """Return what train.py of the official CutMix repository saves for a model."""
    return {
        "epoch": 300,
        "arch": "resnet",
        "state_dict": nn.DataParallel(model).state_dict(),
        "best_err1": 21.4,
        "best_err5": 5.92,
        "optimizer": torch.optim.SGD(
            model.parameters(), 0.1, nesterov=True, momentum=0.9
        ).state_dict(),
    }


def pretraining_checkpoint(model, *, name="resnet18", stem="standard", ema=None, data=None):
    """Return what ``tools/pretrain.py`` saves for a model, as far as a detector reads it."""
    return {
        "format": 1,
        "model": model.state_dict(),
        "ema": ema,
        "config": {
            "model": {"name": name, "stem": stem, "norm": "batch"},
            "data": {} if data is None else data,
        },
        "classes": ["a", "b"],
    }


def assert_equal_tensors(found, expected, keys):
    """Compare tensors by key and say how many there were."""
    for key in keys:
        assert torch.equal(found[key], expected[key]), key
    return len(list(keys))
