#!/usr/bin/env python
"""The command `detmix prepare shapes`."""

from detmix.commands import main

if __name__ == "__main__":
    raise SystemExit(main("prepare shapes"))
