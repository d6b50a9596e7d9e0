"""Files of ``torch.save``, read without running what is in them.

Beside tensors and plain values they may hold NumPy's numbers and arrays, as older training code
saves them. None is needed here, and NumPy's own functions would take any bytes for addresses of
objects: what they would make is passed over.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

# How torch names what a pickle would import.
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# How an archive of torch.save begins; older formats have no entries and no checksums.
_ARCHIVE = b"PK\x03\x04"
# The bit of an entry's attributes that makes a folder of it.
_FOLDER = 0x10


def read_torch_file(path: Path | str, what: str = "checkpoint", *, checksums: bool = False) -> Any:
    """Read a file of ``torch.save`` onto the CPU, in the present or the old format."""
    path = Path(path)
    if not path.is_file():
        hint = ": it is a folder, a file such as best.pt is expected" if path.is_dir() else ""
        raise FileNotFoundError(f"there is no {what} {path}{hint}")
    with open(path, "rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
        problem = _find_problem(file, what, checksums) if is_archive else None
    if problem is not None:
        raise ValueError(f"{path} {problem}")
    # A Namespace is plain values by name: torchvision's training scripts save their arguments.
    allowed: list[Any] = [argparse.Namespace]
    # A process that allows NumPy's own reads its numbers, too.
    if np.dtype not in torch.serialization.get_safe_globals():
        allowed += [(_PassedOver, name) for name in _NUMPYS]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's whole message would advise to run the file's code.
        found = _GLOBAL.search(str(error))
        refers = f"it refers to {found[1]}" if found else "it is no file of torch.save"
        raise ValueError(
            f"{path} is not a {what} that loads with weights_only=True: {refers}; what is no "
            "tensor or plain value could run code, so save a state dict alone"
        ) from error
    except Exception as error:  # flipped bytes have torch raise nearly anything
        raise ValueError(f"{path} is broken: {type(error).__name__}: {error}") from error


def _find_problem(file: BinaryIO, what: str, checksums: bool) -> str | None:
    """Say what is wrong with an archive of torch, None if nothing is."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            if any(part.filename.endswith("/constants.pkl") for part in parts):
                return f"is a TorchScript archive, expected a {what}: save a state dict alone"
            for part in parts:
                # Torch compresses nothing: what is compressed may be a thousand times as large,
                # and what it takes for shorter, or for a folder, it would fill with whatever lies
                # in memory.
                if part.compress_size != part.file_size or part.external_attr & _FOLDER:
                    return f"is broken: the entry of {part.filename} in it is wrong"
            # Entries may have the same bytes for their content.
            if sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
                return "is broken: its entries are larger than the file"
            name = archive.testzip() if checksums else None
    except Exception as error:  # flipped bytes have it raise nearly anything
        return f"is broken: {type(error).__name__}: {error}"
    return None if name is None else f"is broken: the checksum of {name} in it is wrong"


class _PassedOver:
    """What a number or an array of NumPy's, or a part of one, becomes."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_NUMPYS = (
    "numpy.dtype",
    "numpy.ndarray",
    "builtins.bytes",  # the content of an empty array
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
)
