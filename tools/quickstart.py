#!/usr/bin/env python
"""The command `detmix quickstart`."""

from detmix.commands import main

if __name__ == "__main__":
    raise SystemExit(main("quickstart"))
