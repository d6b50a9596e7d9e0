"""Reading a file so that whatever goes wrong names it; writing one whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file whole; an error in the midst of it, as of a disk, does not name it by itself."""
    try:
        with open(path, "rb", buffering=0) as file:  # a buffer would only take time
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary_path(path: Path) -> Path:
    """Return where `write_atomically` writes a file first; a killed process may leave it there."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Have an `OSError` name the file that could not be written; that of a full disk does not."""
    try:
        yield
    except OSError as error:
        message = f"{path} could not be written: {error.strerror or error}"
        raise OSError(error.errno, message) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None
) -> None:
    """Write a file under a temporary name and rename it, so that it is never half there."""
    # On the disk before the file gets its name: not even a power cut leaves half of it.
    temporary = temporary_path(path)
    try:
        with write_errors(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
            with suppress(OSError):  # the name too, where the system can do that
                _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_atomically` writes a file; its folder is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_once(
    folder: Path, marker: str, description: dict[str, Any], write: Callable[[Path], None]
) -> None:
    """Have a folder written, unless the same data set is there already."""
    # Built in a temporary folder beside it and renamed: an interrupted run leaves nothing
    # unfinished.
    if _is_there(folder, marker, description):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        # A subfolder: the temporary folder itself is readable by its owner alone.
        draft = Path(temporary) / folder.name
        write(draft)
        (draft / marker).write_text(json.dumps(description, indent=2) + "\n")
        try:
            os.rename(draft, folder)
        except OSError:
            # Another process may have finished the same data set in the meantime.
            if not _is_there(folder, marker, description):
                raise


def _is_there(folder: Path, marker: str, description: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / marker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != description:
        raise FileExistsError(
            f"{folder}: exists and is not the data set asked for; expected {marker} to hold "
            f"{description}, got {found}; move it away or choose another folder"
        )
    return True
