#!/usr/bin/env python
"""The command `detmix predict`."""

from detmix.commands.predict import main
from detmix.training.console import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool(main))
