#!/usr/bin/env python
"""The command `detmix check`."""

from detmix.commands import main

if __name__ == "__main__":
    raise SystemExit(main("check"))
