"""Files of ``torch.save``, read without running what is in them.

Beside tensors and plain values they may hold NumPy's numbers and arrays of them, which older
training code saves. NumPy's own functions would make an array of any bytes as if they were objects
in memory, so stand-ins take their names, of NumPy 1 and 2.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable
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
# Booleans, numbers and text: no objects, and no records of them.
_KINDS = "biufcSU"


def read_torch_file(path: Path | str, what: str = "checkpoint", *, checksums: bool = False) -> Any:
    """Read a file of ``torch.save`` onto the CPU, in the present or the old format."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}")
    with open(path, "rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
        problem = _find_problem(file, what, checksums) if is_archive else None
    if problem is not None:
        raise ValueError(f"{path} {problem}")
    # Where the process allows NumPy's own, they would meet the stand-ins.
    numpys = [] if np.dtype in torch.serialization.get_safe_globals() else _STAND_INS
    try:
        # A Namespace is plain values by name: torchvision's training scripts save their arguments.
        with torch.serialization.safe_globals([argparse.Namespace, *numpys]):
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
                return f"is a TorchScript archive, expected a {what}"
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


class _Dtype:
    """What a file says of a dtype: its code and its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _plain_dtype(stand_in: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(stand_in.code)
    if dtype.kind not in _KINDS:  # told as torch does
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype.{dtype.name}")
    return dtype.newbyteorder(stand_in.order)  # type: ignore[no-any-return]


class _Array(np.ndarray[Any, Any]):
    """An array that is empty until it is told its state."""

    def __new__(cls, *_: Any) -> _Array:
        return super().__new__(cls, (0,))  # type: ignore[no-any-return]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, _plain_dtype(dtype), is_fortran, data))


def _scalar(dtype: Any, data: bytes) -> Any:
    return np.frombuffer(data, _plain_dtype(dtype), 1)[0]


_STAND_INS: list[tuple[Callable[..., Any], str]] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (lambda: b"", "builtins.bytes"),  # how the content of an empty array is written
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
