"""Leave out the images of a data set that cannot be used, and say which and why.

A reader returns for each image what it reads, or the `Problem` with it; `read_usable` raises the
first of these, or leaves their images out.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from tqdm import tqdm

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_OF_THE_DATA = (
    ValueError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# A link to itself, a socket, a name that is too long: those without a class.
_ERRNOS_OF_THE_DATA = (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)
_NUM_SHOWN = 5


@dataclass(frozen=True)
class SkippedImage:
    """An image that was left out.

    Attributes:
        name: Its name, as in the data set's ``names``.
        kind: ``"missing file"``, ``"unusable annotation"`` or ``"unusable image"``.
        reason: The error that it would have been.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Problem:
    """Why an image cannot be used: a kind as in `SkippedImage`, and the error that it is."""

    kind: str
    error: ValueError | OSError


def attempt(
    kind: str, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | Problem:
    """Return what a call returns, or the problem with the file that it reads."""
    try:
        return call(*args, **kwargs)
    except (ValueError, OSError) as error:
        # A retry may go well where the machine is at fault, and not a file: then the images of two
        # runs would not be the same.
        if not isinstance(error, _OF_THE_DATA) and error.errno not in _ERRNOS_OF_THE_DATA:
            raise
        return Problem("missing file" if isinstance(error, FileNotFoundError) else kind, error)


def read_usable(
    names: Sequence[str],
    read: Callable[[int], Result | Problem],
    on_error: str,
    where: object,
) -> tuple[dict[int, Result], tuple[SkippedImage, ...]]:
    """Return what is read of each image that can be used, by index, and the other images.

    With ``"raise"`` the first problem is raised. With ``"skip"``, in threads, all are told in one
    warning, of whoever calls the function that calls this one.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    results: dict[int, Result] = {}
    skipped = []
    found = map(read, range(len(names))) if on_error == "raise" else _in_threads(read, len(names))
    for index, result in enumerate(found):
        if not isinstance(result, Problem):
            results[index] = result
        elif on_error == "raise":
            raise result.error
        else:
            skipped.append(SkippedImage(names[index], result.kind, str(result.error)))
    if skipped:
        message = f"{where}: {len(skipped)} of {len(names)} images left out {_summary(skipped)}"
        if not results:
            raise ValueError(f"{message}; there is none left")
        warnings.warn(message, UserWarning, stacklevel=3)
    return results, tuple(skipped)


def _in_threads(read: Callable[[int], Result], num: int) -> Iterator[Result]:
    """Yield ``read(0)``, ``read(1)``, ... in this order; decoding does not hold Python's lock."""
    with ThreadPoolExecutor(max(2, min(32, os.cpu_count() or 1))) as pool:
        try:
            found = pool.map(read, range(num))
            # disable=None: a bar only where standard error is a terminal.
            yield from tqdm(found, "checking images", num, leave=False, disable=None, delay=2)
        finally:
            pool.shutdown(cancel_futures=True)


def _summary(skipped: Sequence[SkippedImage]) -> str:
    counts = Counter(image.kind for image in skipped)
    kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()))
    reasons = [image.reason for image in skipped[:_NUM_SHOWN]]
    more = len(skipped) - len(reasons)
    return f"({kinds}): " + "; ".join([*reasons, *([f"and {more} more"] if more else [])])
