"""Reading configurations from YAML files and dotted overrides."""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    get_loader,
    set_loader,
)

Config = TypeVar("Config")

# It would take a configuration for the path of one where there is a file of that name; no system
# has paths as long as this makes it.
_NO_PATH = 10_000 * "\n"

# By these jsonargparse imports a class and calls it, wherever a value may be of any type: a
# configuration, and a checkpoint that carries one, could run code.
_CALLS = ("class_path", "init_args", "dict_kwargs")

# Options of earlier versions, and what to do in their place.
_GONE = {
    "backbone.reduced_tail": "an SSDlite has the narrow tail; start it from detector.weights",
    "data.class_limit": "link the folders of some classes into a folder of their own",
    "data.in_memory": "files that were read once stay in the system's memory",
}


def parse_args(cls: type[Config], args: Sequence[str], description: str = "") -> Config:
    """Read a configuration from command-line arguments.

    ``--config FILE`` and dotted overrides such as ``--optim.lr 0.01``; later ones win over
    earlier ones. ``--print_config`` prints the result and ends the process, as ``--help`` does.

    A file holds values alone: one that names a class to be called, or another file to be read in
    the place of a section, is refused.

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
        "--config",
        action=_config_action(cls),
        help="A YAML file, or its content; may be given repeatedly.",
    )
    parser.add_class_arguments(cls, None)
    try:
        parsed = parser.parse_args(list(args))
        _check_calls(parsed.as_dict())  # also of the command line
        fields = dict(parser.instantiate(parsed))
        fields.pop("config")
        return cls(**fields)
    # OverflowError: a float field with an integer of hundreds of digits.
    except (ArgumentError, OSError, OverflowError, TypeError, ValueError) as error:
        gone = [f"; {name} is gone: {how}" for name, how in _GONE.items() if name in str(error)]
        raise ValueError(f"{error}{''.join(gone)}{_files(args)}") from error


def _config_action(cls: type) -> type[ActionConfigFile]:
    """Return what reads a configuration of a dataclass for jsonargparse, which would open more."""

    class ConfigFile(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
            text = values if _is_content(values) else _read(values)
            try:
                config = _load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"the configuration is refused: {error}") from error
            if not isinstance(config, dict):
                raise ValueError(f"expected a file, or options by name, got {text[:200]!r}")
            _check_options(cls, config)
            self.apply_config(parser, cfg, self.dest, text + _NO_PATH)

    return ConfigFile


def _is_content(text: str) -> bool:
    """Tell a configuration from the path of one."""
    return "\n" in text or ": " in text or text.lstrip().startswith("{")


def _read(path: str) -> str:
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no configuration {path}") from None


def _check_options(cls: type, config: Mapping[Any, Any], prefix: str = "") -> None:
    """Raise ValueError unless all keys are options, and all sections mappings or null."""
    # In place of a section jsonargparse takes the path of a file, and ``config`` for one of all.
    kinds = get_type_hints(cls)
    for key, value in config.items():
        name, _, rest = str(key).partition(".")
        if name not in kinds:
            raise ValueError(f"{prefix}{key} is no option; expected one of {', '.join(kinds)}")
        types = (kinds[name], *get_args(kinds[name]))
        section: Any = next(filter(is_dataclass, types), None)
        inner = {rest: value} if rest else value
        if section is not None and isinstance(inner, Mapping):
            _check_options(section, inner, f"{prefix}{name}.")
        elif section is not None and inner is not None:
            raise ValueError(f"{prefix}{name}: expected options by name, got {inner!r:.200}")


def _load(text: str) -> Any:
    """Load what YAML knows itself for jsonargparse, also each text within a configuration."""
    value = get_loader("yaml")(text)
    _check_calls(value)
    return value


def _check_calls(value: Any) -> None:
    """Raise ValueError if a value names a class to be called."""
    for key in _keys(value):
        if key in _CALLS:
            raise ValueError(f"{key} is refused: a configuration holds plain values alone")


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
