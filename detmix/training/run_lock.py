"""One process at a time in a run's folder."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import IO

from detmix.training.checkpoint import write_errors

if sys.platform != "win32":
    import fcntl

__all__ = ["LOCK", "RunLock"]

LOCK = ".lock"
"""The file in the folder that is locked."""

# The open files of this process and how often each is held: the system lets go of a lock with the
# first one closed.
_held: dict[Path, tuple[IO[bytes], int]] = {}


class RunLock:
    """Keeps other processes from a folder until it is released, or the process ends in any way.

    Within one process it may be held several times. Windows, and a file system without locks, keep
    nobody.

    Args:
        folder: The folder, which exists.

    Raises:
        FileExistsError: If another process holds it.
        OSError: If the lock's file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder.resolve() / LOCK
        file, number = _held.get(path) or (_lock(path), 0)
        _held[path] = file, number + 1
        self.release = weakref.finalize(self, _release, path)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _lock(path: Path) -> IO[bytes]:
    with write_errors(path):
        file = open(path, "ab")  # noqa: SIM115
    if sys.platform == "win32":
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise FileExistsError(f"{path.parent}: another process is training there") from None
    except OSError:  # not every file system has locks
        pass
    return file


def _release(path: Path) -> None:
    file, number = _held.pop(path)
    if number > 1:
        _held[path] = file, number - 1
    else:
        file.close()
