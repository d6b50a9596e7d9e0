#!/usr/bin/env python
"""The command `detmix prepare voc`."""

import sys

from detmix.commands.prepare_voc import main
from detmix.training.console import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
