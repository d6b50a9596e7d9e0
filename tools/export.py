#!/usr/bin/env python
"""The command `detmix export`."""

from detmix.commands import main

if __name__ == "__main__":
    raise SystemExit(main("export"))
