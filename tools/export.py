#!/usr/bin/env python
"""The command `detmix export`."""

from detmix.commands.export import main
from detmix.training.console import run_tool

if __name__ == "__main__":
    raise SystemExit(run_tool(main))
