"""The public names, those that the documentation imports, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import detmix

ROOT = Path(__file__).resolve().parents[2]
PAGES = "\n".join(p.read_text("utf-8") for p in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
HEAVY = ("matplotlib", "accelerate", "pydantic", "albumentations", "pycocotools")
PACKAGES = ("mixing", "data", "detectors", "evaluation", "training")


def imported() -> set[tuple[str, str]]:
    """Return the modules of detmix and the names that the documentation imports from them."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES, flags=re.MULTILINE | re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {(node.module or "", alias.name) for node in froms for alias in node.names}
    found |= {(m, n) for n, m in re.findall(r"(\w+)\([^`]*`\s+from `(detmix[\w.]*)`", PAGES)}
    return {(module, name) for module, name in found if module.split(".")[0] == "detmix"}


def test_names_of_the_package():
    assert sorted(detmix.__all__) == [
        "DetectionCutMix", "DetectionMixUp", "MixedDataset", "RandomChoice", "__version__",
        "cutmix", "mixup", "weight_losses",
    ]  # fmt: skip
    assert detmix.__version__ == importlib.metadata.version("detmix")


def test_every_name_that_the_documentation_imports_is_public():
    assert ("detmix.detectors", "load_backbone_weights") in imported()
    assert len(imported()) >= 10
    for module, name in sorted(imported()):
        assert name in importlib.import_module(module).__all__


@pytest.mark.parametrize("name", ["detmix", *(f"detmix.{package}" for package in PACKAGES)])
def test_every_public_name_exists(name):
    module = importlib.import_module(name)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def test_import_loads_nothing_heavy():
    code = f"import sys, detmix.evaluation; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
