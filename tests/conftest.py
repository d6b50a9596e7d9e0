"""Shared fixtures: few threads, and the real data where there is some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def voc_root() -> Path:
    """Return the devkit of the reduced Pascal VOC 2007, or skip."""
    data = os.environ.get("DETMIX_DATA")
    if not data:
        pytest.skip("DETMIX_DATA is unset: no real Pascal VOC images to test on")
    root = Path(data) / "VOCdevkit"
    if not root.is_dir():
        pytest.skip(f"no VOCdevkit folder in DETMIX_DATA={data}")
    return root
