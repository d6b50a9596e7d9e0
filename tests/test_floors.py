"""Files import from their own floor downwards, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"files"},
    {"mixing", "losses", "backbones"},
    {"pretrained", "data"},
    {"detectors", "evaluation"},
    {"pictures"},
    {"training"},
)


def modules() -> dict[str, Path]:
    """Return the files of detmix by their modules' names; packages by those of their folders."""
    paths = (ROOT / "detmix").rglob("*.py")
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Return which of the known modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def floor(module: str) -> int:
    """Return the number of a module's floor, from the ground; the package itself is the roof."""
    parts = module.split(".")
    if len(parts) == 1:
        return len(FLOORS)
    return next(number for number, rooms in enumerate(FLOORS) if parts[1] in rooms)


KNOWN = modules()
IMPORTS = {module: imported(path, KNOWN) for module, path in KNOWN.items()}


def test_there_is_something_to_check():
    assert len(KNOWN) > 50
    assert "detmix.mixing.target" in IMPORTS["detmix.mixing.mixer"]


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_no_import_upwards(module):
    if module != "detmix":
        assert {name for name in IMPORTS[module] if floor(name) > floor(module)} == set()


def test_no_circle():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(KNOWN)


def test_tools_stand_on_top():
    known = dict.fromkeys((path.stem for path in (ROOT / "tools").glob("*.py")), ROOT)
    assert not any(imported(path, known) for path in KNOWN.values())
