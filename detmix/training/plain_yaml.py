"""Plain values out of YAML that somebody else wrote, of which a few lines can ask for anything."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader

__all__ = ["MAX_BYTES", "load_plain_yaml"]

MAX_BYTES = 2**22
"""The most that is read of a file, and more than any configuration has, with all its classes."""
_MAX_VALUES, _MAX_DEPTH = 200_000, 32
# Tags of what YAML knows itself.
_PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "map", "null", "seq", "str")
)


def load_plain_yaml(text: str) -> Any:
    """Load YAML, or JSON, as jsonargparse does, if what it stands for is of ordinary size.

    Args:
        text: Texts, numbers, booleans, null, and lists and mappings of them, without tags.

    Raises:
        yaml.YAMLError: If it is none of that, is nested too deeply or stands for too much.
    """
    _check_size(text)
    try:
        return get_loader("yaml")(text)
    except (OverflowError, ValueError) as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _check_size(text: str) -> None:
    """Refuse what would take too much before it is built: aliases and merge keys multiply.

    LibYAML's loader does not survive deep nesting, its parser does.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"{len(text)} characters, expected at most {MAX_BYTES}")
    num_values = 0
    anchored: dict[str | None, int] = {}  # the values that an alias stands for
    opened: list[tuple[str | None, int]] = []  # anchor of a list or mapping, values before it
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _PLAIN_TAGS:
            raise yaml.YAMLError(f"expected plain values without tags, got {tag}")
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            anchored[anchor] = num_values - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise yaml.YAMLError(f"*{event.anchor} stands for nothing, or for itself")
            num_values += anchored[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            num_values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, num_values - 1))
            else:
                anchored[event.anchor] = 1
        if len(opened) > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested too deeply, expected at most {_MAX_DEPTH} levels")
        if num_values > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES} values")
