"""Shared fixtures: few threads, and the real data where there is some."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import STATEFUL, tiny_config

from detmix.data import write_shapes
from detmix.training import DetectorTrainer

torch.set_num_threads(1)  # small models: more threads only wait for each other


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """Return the devkit of the reduced Pascal VOC 2007, or skip."""
    root = Path(os.environ.get("DETMIX_DATA", "")) / "VOCdevkit"
    if not root.is_dir():
        pytest.skip(f"no real Pascal VOC images to test on: DETMIX_DATA has no folder {root}")
    return root


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """Return a devkit of 24 images of shapes to train on and 8 to test on, 64 pixels large."""
    root = tmp_path_factory.mktemp("shapes")
    return write_shapes(root, num_train=24, num_test=8, image_size=64)


@pytest.fixture(scope="session")
def whole_run(shapes_root, tmp_path_factory) -> Path:
    """Return the folder of a training with `STATEFUL` settings that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    DetectorTrainer(tiny_config(shapes_root, run_dir, *STATEFUL)).fit()
    return run_dir


@pytest.fixture(scope="session")
def stripes_root(tmp_path_factory) -> Path:
    """Return images in four folders, told apart by the direction of their stripes."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16]
    waves = {"across": y, "along": x, "falling": x + y, "rising": x - y}
    for split, num in (("train", 12), ("val", 5)):
        for name, phase in waves.items():
            (root / split / name).mkdir(parents=True)
            for index in range(num):
                wave = np.sin(1.5 * phase + rng.uniform(0, 6))[..., None] * rng.uniform(40, 90, 3)
                pixels = 128 + wave + rng.normal(0, 10, (16, 16, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Let a test choose device and precision: accelerate keeps the first ones of a process."""
    AcceleratorState._reset_state(True)
    yield
    torch.set_num_threads(1)
