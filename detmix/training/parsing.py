"""Reading configurations from YAML files and dotted overrides."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

__all__ = ["parse_args"]

Config = TypeVar("Config")

# More than any configuration has; a few lines of aliases may stand for more than memory holds.
_MAX_VALUES = 10_000
# By these jsonargparse imports a class and calls it, wherever a value may be of any type: a
# configuration, and a checkpoint that carries one, could run code.
_CALLS = ("class_path", "init_args", "dict_kwargs")


def parse_args(cls: type[Config], args: Sequence[str], description: str = "") -> Config:
    """Read a configuration from command-line arguments.

    ``--config FILE`` and dotted overrides such as ``--optim.lr 0.01``; later ones win over
    earlier ones. ``--print_config`` prints the result and ends the process, as ``--help`` does.

    A file holds values alone: one that names a class to be called is refused.

    Args:
        cls: The configuration's dataclass, of plain values and further dataclasses.
        args: The arguments, without the program's name.
        description: What ``--help`` says first.

    Raises:
        ValueError: Naming an unknown key, or a key with a value of the wrong type or range, and
            the files that were read.
    """
    parser = ArgumentParser(description=description, exit_on_error=False, parser_mode=_MODE)
    parser.add_argument(
        "--config", action="config", help="A YAML file, or its content; may be given repeatedly."
    )
    parser.add_class_arguments(cls, None)
    try:
        parsed = parser.parse_args(list(args))
        _check_values(parsed.as_dict())  # also of the command line
        fields = dict(parser.instantiate(parsed))
        fields.pop("config")
        return cls(**fields)
    # OverflowError: a float field with an integer of hundreds of digits.
    except (ArgumentError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{error}{_files(args)}") from error


def _load(text: str) -> Any:
    """Load YAML as jsonargparse does by itself, but plain values only."""
    try:
        value = get_loader("yaml")(text)
        _check_values(value)
    except RecursionError:
        raise ValueError("the configuration is nested too deeply") from None
    return value


def _check_values(value: Any) -> None:
    """Raise ValueError if a value names a class to be called, or stands for far too many."""
    num_values = 0
    for key in islice(_keys(value), _MAX_VALUES):
        num_values += 1
        if key in _CALLS:
            raise ValueError(f"{key} is refused: a configuration holds plain values alone")
    if num_values == _MAX_VALUES:
        raise ValueError(f"the configuration has more than {_MAX_VALUES} values")


def _keys(value: Any) -> Iterator[Any]:
    """Yield the key, or the index, of every value within a value."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield key
            yield from _keys(item)


_MODE = "detmix"
set_loader(_MODE, _load, exceptions=(yaml.YAMLError,))


def _files(args: Sequence[str]) -> str:
    """Say which configuration files the arguments name."""
    values = [value for option, value in pairwise(args) if option == "--config"]
    values += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    files = [value for value in values if "\n" not in value and value.endswith((".yaml", ".yml"))]
    return f" (reading {', '.join(files)})" if files else ""
