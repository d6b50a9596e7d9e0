"""What the command-line tools have in common: errors and signals as a person wants them."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from detmix.training.stopping import Interrupted, NonFiniteLossError, OtherProcessError, one_line

# ImportError: an optional package is not installed.
_USER_ERRORS = (ValueError, IndexError, OSError, ImportError, NonFiniteLossError, OtherProcessError)
# Characters of an error of torch's, whose messages may hold a stack.
_MOST = 500
# How gloo and nccl tell that the process at the other end has gone.
_LOST = re.compile(r"(?i)connection (closed|reset) by peer|remote process (has )?exited")


def run_tool(main: Callable[[Sequence[str]], None], args: Sequence[str] | None = None) -> int:
    """Run a tool's ``main`` and turn what a user can mend into one line on standard error."""
    try:
        with _shown():
            main(sys.argv[1:] if args is None else args)
    except _USER_ERRORS as error:
        return _tell(one_line(error))
    except RuntimeError as error:
        is_lost = _LOST.search(str(error))
        if not is_lost and not isinstance(error, DistError):
            raise
        hint = "lost another process, whose own error tells why: " if is_lost else ""
        return _tell(hint + one_line(error)[:_MOST])
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _tell(error: str) -> int:
    """Print an error, of several processes with the number of this one, and return the status."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    prefix = f"error in process {os.environ.get('RANK', '0')}" if several else "error"
    print(f"{prefix}: {error}", file=sys.stderr)
    return 2


@contextmanager
def _shown() -> Iterator[None]:
    """Show what detmix logs and warns of, without the line of code, once for all processes."""
    is_first = os.environ.get("RANK", "0") == "0"
    log, full, package = (
        logging.getLogger("detmix"),
        warnings.formatwarning,
        str(Path(__file__).parents[1]),
    )
    handler, level = logging.StreamHandler(), log.level

    def short(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> str:
        if not filename.startswith(package):
            return full(message, category, filename, *args, **kwargs)
        return f"warning: {message}\n" if is_first else ""

    warnings.formatwarning = short
    if is_first:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        warnings.formatwarning = full
