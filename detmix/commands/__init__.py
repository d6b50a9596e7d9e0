"""The command ``detmix``: each of its commands is a file here, with a ``main`` for its arguments.

``tools/`` holds the same commands as scripts.
"""

from __future__ import annotations

import argparse
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

from detmix.training.console import run_tool

__all__ = ["main"]

COMMANDS = {
    "quickstart": "see the whole of it work on shapes, in a few minutes",
    "prepare voc": "download and unpack Pascal VOC, or check what is there",
    "prepare shapes": "write the synthetic shapes, in COCO's layout or VOC's",
    "check": "print which images cannot be used, and why",
    "pretrain": "pretrain a classifier, for a detector to start from",
    "train": "train a detector",
    "evaluate": "score a checkpoint, or saved predictions",
    "predict": "find objects in your own images",
    "export": "write a detector as one ONNX or TorchScript file",
    "visualize": "draw what a detector is trained on, or what it finds",
}


def main(named: str = "") -> int:
    """Run the command ``named``, or else in the command line, and return its exit status."""
    words = [*named.split(), *sys.argv[1:]]
    for name in COMMANDS:
        first = name.split()
        if words[: len(first)] == first:
            sys.argv[0] = f"detmix {name}"  # what argparse calls itself
            module = import_module(f"{__name__}.{'_'.join(first)}")
            return run_tool(module.main, words[len(first) :])
    parser = argparse.ArgumentParser(
        prog="detmix",
        usage="detmix COMMAND ...",
        description="`detmix COMMAND --help` tells the options of a command.",
        epilog="\n".join(["commands:", *(f"  {name:16}{text}" for name, text in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("detmix"))
    parser.parse_known_args(words[:1])
    given = " ".join(words[:2])
    similar = "".join(f"{name}, or " for name in get_close_matches(given, COMMANDS, 1, 0.5))
    parser.error(f"expected {similar}one of {', '.join(COMMANDS)}, got {given!r}")
