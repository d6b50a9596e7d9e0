"""Read a file so that whatever goes wrong names it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_regular_file"]


def read_regular_file(path: str | Path) -> bytes:
    """Read a file whole; an error in the midst of it, as of a disk, does not name it by itself."""
    try:
        with open(path, "rb", buffering=0) as file:  # a buffer would only take time
            return file.read()
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
