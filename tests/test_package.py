"""The package's public names, and what importing it costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys

import pytest

import detmix

PUBLIC = {
    "detmix": {
        "DetectionCutMix",
        "DetectionMixUp",
        "MixedDataset",
        "RandomChoice",
        "__version__",
        "cutmix",
        "mixup",
        "weight_losses",
    },
    "detmix.mixing": {
        "Cut",
        "DetectionCutMix",
        "DetectionMixUp",
        "DetectionMixer",
        "MixParams",
        "MixedDataset",
        "RandomChoice",
        "Sample",
        "SharedEpoch",
        "Target",
        "blend",
        "box_weights",
        "cutmix",
        "mixup",
        "sample_seed",
        "union",
    },
}
HEAVY = ("matplotlib", "accelerate", "jsonargparse", "albumentations")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name])
    assert all(hasattr(module, public) for public in module.__all__)


def test_version_is_that_of_the_installed_distribution():
    assert detmix.__version__ == importlib.metadata.version("detmix")


@pytest.mark.parametrize("name", PUBLIC)
def test_import_loads_nothing_heavy(name):
    code = (
        f"import json, sys, {name}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []
