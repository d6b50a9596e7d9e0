"""Write a made data set as a whole or not at all, and only once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_once"]


def write_once(
    folder: Path, marker: str, description: dict[str, Any], write: Callable[[Path], None]
) -> None:
    """Have a folder written, unless the same data set is there already.

    It is built in a temporary folder beside it and renamed at the end, so that an interrupted
    run leaves nothing that looks finished.

    Args:
        folder: The folder to make; those above it are made too.
        marker: Name of the JSON file in it that holds the description.
        description: All that the data set depends on.
        write: Called with a folder that does not exist yet; makes and fills it.

    Raises:
        FileExistsError: The folder exists and has no such description.
    """
    if _is_there(folder, marker, description):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        # A subfolder: the temporary folder itself is readable by its owner alone.
        draft = Path(temporary) / folder.name
        write(draft)
        (draft / marker).write_text(json.dumps(description, indent=2) + "\n")
        _publish(draft, folder, marker, description)


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


def _publish(draft: Path, folder: Path, marker: str, description: dict[str, Any]) -> None:
    try:
        os.rename(draft, folder)
    except OSError:
        # Another process may have finished the same data set in the meantime.
        if not _is_there(folder, marker, description):
            raise
