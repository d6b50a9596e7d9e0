"""Reading configurations from YAML files, dotted overrides and checkpoints."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from detmix.training.checkpoint import LAST, update_options
from detmix.training.config import FREE, LoopConfig, flat_options

Config = TypeVar("Config", bound=LoopConfig)

_USAGE = """
--config FILE: a YAML file, its text, or the name of a configuration that detmix brings, such as
    voc2007_cpu; may be given repeatedly; what comes later wins
--resume RUN: go on in this folder, or with this last.pt, as it was configured
--print_config: print what results, for --config

Values are YAML. A Share is from 0 to 1.
"""

# What pydantic has other words for.
_EXPECTED = {"dataclass": "options by name", "int": "a whole number", "tuple": "a list"}
_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries them in the package; in a clone they lie beside it.
CONFIGS = _PACKAGE / "configs"
if not CONFIGS.is_dir():
    CONFIGS = _PACKAGE.parent / "configs"


class _Loader(yaml.SafeLoader):
    """YAML's own, which takes numbers such as 1e-3 for text."""


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_args(
    cls: type[Config], args: Sequence[str], description: str = "", example: str = ""
) -> Config:
    """Read a configuration from command-line arguments.

    ``--config FILE``, or the name of a configuration that detmix brings, and dotted overrides such
    as ``--optim.lr 0.01``; later ones win over earlier ones. ``--resume RUN``, a run's folder or
    its ``last.pt``, stands for its configuration, and goes on there. ``--print_config`` prints the
    result and ends the process, as ``--help`` does, which begins with the description. Where an
    example of a configuration is given, there must be one, or a data.root.

    Raises:
        ValueError: Naming every unknown option, every value of the wrong type or range, and the
            files that were read.
    """
    if "--help" in args or "-h" in args:
        print(description, _USAGE, _help(cls()), sep="\n")
        sys.exit()
    config = from_dict(cls, {}, [arg for arg in args if arg != "--print_config"])
    if "--print_config" in args:
        print(yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True), end="")
        sys.exit()
    start = r"--(config|data\.root|resume.(?!(auto|never)( |$)))"
    if example and not re.search(start, " ".join(args)):
        there = _configs(f"{Path(example).parent}/*.yaml")
        raise ValueError(f"expected --data.root, or --config, as in --config {example}, of {there}")
    return config


def from_dict(cls: type[Config], values: Mapping[str, Any], args: Sequence[str] = ()) -> Config:
    """Build a configuration from plain values, changed by arguments as `parse_args` reads them."""
    merged, known, files = _merge({}, values), flat_options(cls().as_dict()), list[str]()
    try:
        for options in _read(args, known, files):
            _merge(merged, options)
        # As JSON: there pydantic takes no text for a number, but lists for tuples.
        return TypeAdapter(cls).validate_json(to_json(merged), strict=True)
    except ValidationError as error:
        problem = "; ".join(_tell(item, [*known, "config"]) for item in error.errors())
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error)
    raise ValueError(f"{problem} (reading {', '.join(files)})" if files else problem)


def _read(args: Sequence[str], known: Mapping[str, Any], files: list[str]) -> Iterator[Any]:
    """Yield what each argument sets, and note the files that are read."""
    words, place = iter(args), dict[str, str]()
    for word in words:
        name, has_value, text = word.removeprefix("--").partition("=")
        text = text if has_value else next(words, "--")
        if not word.startswith("--") or text.startswith("--"):
            raise ValueError(f"expected an option and its value, as in --epochs 3, got {word}")
        is_run = name == "resume" and text not in ("auto", "never")
        if is_run:
            folder = Path(text.removesuffix(LAST)).expanduser()
            if not (folder / "config.yaml").exists():
                raise ValueError(f"resume must be auto, never, a run or its {LAST}, got {text}")
            place = {"resume": "auto", "run_dir": str(folder)}
            name, text = "config", str(folder / "config.yaml")
        if name != "config":
            # YAML would make more of a path, or of "no".
            yield {name: text if isinstance(known.get(name), str) else yaml.load(text, _Loader)}
            continue
        if not re.search(r"\n|: |^\s*\{", text):
            files.append(text)
            text = _find(text).read_text("utf-8-sig")
        options = yaml.load(text, _Loader)
        if not isinstance(options, dict):
            raise ValueError(f"expected a file, or options by name, got {text[:200]!r}")
        if is_run:
            update_options(options)
        yield options
    yield place


def _configs(pattern: str = "**/*.yaml") -> str:
    """Name the configurations that detmix brings."""
    files = [file.relative_to(CONFIGS).with_suffix("") for file in CONFIGS.glob(pattern)]
    return ", ".join(sorted(file.as_posix() for file in files))


def _find(given: str) -> Path:
    """Return the file of this path, or else the configuration of this name that detmix brings."""
    path, brought = Path(given).expanduser(), CONFIGS / f"{given.removesuffix('.yaml')}.yaml"
    for file in (path, brought):
        if file.exists() and not file.is_dir():
            return file
    raise FileNotFoundError(f"no file or configuration {given}; expected one of {_configs()}")


def _merge(merged: dict[str, Any], values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Put values, by dotted names or in sections, over earlier ones, and return these."""
    for key, value in values.items():
        name, _, rest = str(key).partition(".")
        if rest or isinstance(value, Mapping):
            before = merged.get(name)
            if not isinstance(before, dict) or (prefix + name == FREE and not rest):
                before = {}
            merged[name] = _merge(before, {rest: value} if rest else value, f"{prefix}{name}.")
        else:
            merged[name] = value
    return merged


def _tell(problem: Any, known: Iterable[str]) -> str:
    """Say what is wrong with an option."""
    places, kind = map(str, problem["loc"]), problem["type"]
    name = ".".join(each for each in places if not re.match(r"constrained-|tuple\[", each))  # types
    if kind == "unexpected_keyword_argument":
        name = next(iter(flat_options({name: problem["input"]})), name)
        part = name.split(".")[-1].replace("-", "_")
        similar = [each for each in known if each.split(".")[-1] == part]
        similar = similar or get_close_matches(name, known, n=1) or ["one of --help"]
        return f"{name} is no option; expected {' or '.join(similar)}"
    if kind == "value_error":  # of a class's own check, which names the option
        text = str(problem["ctx"]["error"])
        return text if text.startswith(name) else f"{name}.{text}"
    text = problem["msg"].replace("Input should", "must").replace("a valid ", "a ")
    expected = _EXPECTED.get(kind.removesuffix("_type"))
    return f"{name} {f'must be {expected}' if expected else text}, got {problem['input']!r:.200}"


def _help(config: Any, prefix: str = "") -> str:
    """Return the options as the source has them, by dotted names; sections come last."""
    source = "".join(map(inspect.getsource, type(config).__mro__[-2::-1])).replace("#: ", "# ")
    found = re.findall(r"(?m)^((?: {4}# .*\n)*) {4}(\w+)(: .+)$", source)
    options = {name: f"{above}--{prefix}{name}{rest}" for above, name, rest in found}
    about = (inspect.getdoc(config) or "").partition("\n\nRaises:")[0]
    parts = ["\n".join([about, *(options[name] for name in vars(config))])]
    sections = {name: value for name, value in vars(config).items() if is_dataclass(value)}
    parts += [_help(value, f"{prefix}{name}.") for name, value in sections.items()]
    return "\n\n".join(parts)
