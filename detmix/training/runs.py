"""Runs read back from their folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from detmix.evaluation.metrics import Metrics, read_metrics
from detmix.regular_file import read_regular_file
from detmix.training.plain_yaml import MAX_BYTES, load_plain_yaml

__all__ = ["Run", "read_run", "read_runs"]


@dataclass(frozen=True, eq=False)
class Run:
    """A run as its folder tells of it.

    Attributes:
        name: What to call it: the folder's name, or more of its path among others of that name.
        metrics: Its ``metrics.jsonl``.
        config: Its ``config.yaml``, as plain values.
        versions: Its ``versions.json``: of Python, the platform and the packages.
    """

    name: str
    metrics: Metrics
    config: Mapping[str, Any]
    versions: Mapping[str, str]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read several runs and tell them apart: by as much of their paths as it takes.

    Args:
        folders: Of the runs.

    Raises:
        ValueError: If a folder is given twice; and as `read_run` does.
        FileNotFoundError: As `read_run` does.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ValueError(f"{folders[index]} is given twice")
    names = _distinct_names(paths)
    return [replace(read_run(path), name=name) for path, name in zip(folders, names, strict=True)]


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Args:
        folder: With ``metrics.jsonl``, ``config.yaml`` and ``versions.json``.

    Raises:
        FileNotFoundError: If there is no such folder, or one of the three files is not in it.
        ValueError: If one of them is broken, naming file and line, or nothing is recorded yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    for name in ("metrics.jsonl", "config.yaml", "versions.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected the folder of a run")
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics.train and not metrics.eval:
        raise ValueError(f"{folder / 'metrics.jsonl'}: nothing is recorded yet")
    config = _read_mapping(folder / "config.yaml")
    if not isinstance(config.get("epochs"), int | None):
        raise ValueError(
            f"{folder / 'config.yaml'}: expected epochs to be a whole number, "
            f"got {config['epochs']!r:.80}"
        )
    versions = _read_mapping(folder / "versions.json")
    if not all(isinstance(version, str) for version in versions.values()):
        raise ValueError(f"{folder / 'versions.json'}: expected a string for every name")
    return Run(Path(os.path.abspath(folder)).name, metrics, config, versions)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that no other path has."""
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        length = 1
        while any(other.parts[-length:] == path.parts[-length:] for other in others):
            length += 1
        names.append(str(Path(*path.parts[-length:])))
    return names


def _read_mapping(path: Path) -> dict[str, Any]:
    text = read_regular_file(path, MAX_BYTES).decode(errors="replace")
    try:
        value = json.loads(text) if path.suffix == ".json" else load_plain_yaml(text)
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is broken: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a mapping")
    return value
