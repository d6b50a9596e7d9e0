"""Reading configurations from YAML files and dotted overrides."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from jsonargparse import ArgumentParser

__all__ = ["parse_args"]

Config = TypeVar("Config")


def parse_args(cls: type[Config], args: Sequence[str], description: str = "") -> Config:
    """Read a configuration from command-line arguments.

    ``--config FILE`` and dotted overrides such as ``--optim.lr 0.01``; later ones win over
    earlier ones. ``--print_config`` prints the result and ends the process, as ``--help`` does.

    Args:
        cls: The configuration's dataclass, of plain values and further dataclasses.
        args: The arguments, without the program's name.
        description: What ``--help`` says first.

    Raises:
        ValueError: Naming an unknown key, or a key with a value of the wrong type or range, and
            the files that were read.
    """
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action="config", help="A YAML file, or its content; may be given repeatedly."
    )
    parser.add_class_arguments(cls, None)
    try:
        fields = dict(parser.instantiate(parser.parse_args(list(args))))
        fields.pop("config")
        return cls(**fields)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{error}{_files(args)}") from error


def _files(args: Sequence[str]) -> str:
    """Say which configuration files the arguments name."""
    values = [value for option, value in pairwise(args) if option == "--config"]
    values += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    files = [value for value in values if "\n" not in value and value.endswith((".yaml", ".yml"))]
    return f" (reading {', '.join(files)})" if files else ""
