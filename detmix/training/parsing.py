"""Reading configurations from YAML files, dotted overrides and checkpoints."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

__all__ = ["make_parser", "parse_args", "parse_dict"]

Config = TypeVar("Config")


def make_parser(cls: type, description: str = "") -> ArgumentParser:
    """Return a parser of ``--config FILE`` and dotted overrides for a configuration class.

    Later arguments win over earlier ones, files included; ``--print_config`` prints the result.

    Args:
        cls: A dataclass of plain values and further dataclasses.
        description: What ``--help`` says first.
    """
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file; may be given repeatedly.")
    parser.add_class_arguments(cls, None)
    return parser


def parse_args(cls: type[Config], args: Sequence[str], description: str = "") -> Config:
    """Read a configuration from command-line arguments.

    Args:
        cls: The configuration's dataclass.
        args: The arguments, without the program's name.
        description: What ``--help`` says first.

    Raises:
        ValueError: Naming an unknown key, or a key with a value of the wrong type or range.
    """
    parser = make_parser(cls, description)
    try:
        values = parser.parse_args(list(args))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return _instantiate(parser, cls, values)


def parse_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Read a configuration from nested plain values, as a checkpoint holds them.

    Args:
        cls: The configuration's dataclass.
        values: The values; what is left out has its default.

    Raises:
        ValueError: Naming an unknown key, or a key with a value of the wrong type or range.
    """
    parser = make_parser(cls)
    try:
        parsed = parser.parse_object(values)
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return _instantiate(parser, cls, parsed)


def _instantiate(parser: ArgumentParser, cls: type[Config], values: Any) -> Config:
    fields = dict(parser.instantiate(values))
    fields.pop("config", None)
    return cls(**fields)
