"""Open a file that somebody else has put there: a regular one, which does not block and ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["MAX_JSON_BYTES", "open_regular_file", "read_regular_file"]

MAX_JSON_BYTES = 2**34
"""No file of annotations or predictions larger than this is read; COCO's have half a gigabyte."""


@contextmanager
def open_regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes.

    A pipe under an image's name would block its reader and a device never end, and so would a
    link to one; a link to a file is as good as the file.

    Args:
        path: The file.

    Raises:
        OSError: The file is missing or cannot be read, here or within the block; names it.
        ValueError: It is no regular file, or its name holds a NUL; names it.
    """
    try:
        if "\0" in str(path):
            raise ValueError(f"{str(path)!r}: the name holds a NUL")
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path}: expected a regular file, not a pipe or a device")
            yield file
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # of read() and the like


def read_regular_file(path: str | Path, max_bytes: int) -> bytes:
    """Read a file whole.

    Args:
        path: The file.
        max_bytes: The most that is read.

    Raises:
        OSError: As :func:`open_regular_file`.
        ValueError: As there, or the file is larger.
    """
    with open_regular_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise ValueError(f"{path}: refused: {num_bytes} bytes, expected at most {max_bytes}")
        return file.read(num_bytes)  # no more: it may grow, and some of the system's say 0


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # waits for no pipe's other end
