"""Files import from their own floor downwards, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"files"},
    {"mixing", "losses", "backbones"},
    {"pretrained", "data"},
    {"detectors", "evaluation"},
    {"pictures"},
    {"training"},
    {"commands"},
    {"__main__"},
)
FILES = {  # by the names of modules; packages by those of their folders
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "detmix").rglob("*.py")
}


def imported(path: Path, known: set[str]) -> set[str]:
    """Return which of the known modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def floor(module: str) -> int:
    """Return the number of a module's floor, from the ground."""
    return next(number for number, rooms in enumerate(FLOORS) if module.split(".")[1] in rooms)


IMPORTS = {module: imported(path, {*FILES}) for module, path in FILES.items()}


def test_no_import_upwards():
    pairs = [(file, name) for file in FILES.keys() - {"detmix"} for name in IMPORTS[file]]
    assert not [(file, name) for file, name in pairs if floor(name) > floor(file)]


def test_no_circle():
    assert "detmix.mixing.target" in IMPORTS["detmix.mixing.mixer"]
    assert len(list(TopologicalSorter(IMPORTS).static_order())) == len(FILES)


def test_tools_stand_on_top():
    known = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert not any(imported(path, known) for path in FILES.values())
