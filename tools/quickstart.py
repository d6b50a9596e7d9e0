#!/usr/bin/env python
"""The command `detmix quickstart`."""

import sys

from detmix.commands.quickstart import main
from detmix.training.console import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
