"""What a person sees of errors and warnings of the tools."""

from __future__ import annotations

import re
import warnings

import pytest
from torch.distributed import DistBackendError, DistNetworkError

import detmix
from detmix.training.console import run_tool
from detmix.training.stopping import OtherProcessError


def raising(error):
    def main(args):
        raise error

    return main


IN_A_WORKER = ValueError("Caught it in DataLoader worker process 0.\n  at x\nValueError: a: broken")
STACK = 99 * "frame #0"
LOST = "error in process 3: lost another process"
CASES = [
    ("1", OtherProcessError("another process stops:\n no image"),
     "error: another process stops: no image"),
    ("1", IN_A_WORKER, "error: a: broken"),
    ("1", ValueError(), "error: ValueError"),
    ("1", DistNetworkError(f"port 29500 is in use\n{STACK}"), "error: port 29500 is in use frame"),
    ("8", RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:6296."),
     f"{LOST}.*Connection closed by peer .*:6296"),
    ("8", DistBackendError("NCCL error: remote process exited or there was a network error"),
     f"{LOST}.*NCCL error: remote process exited"),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "error", "line"), CASES)
def test_one_line_for_an_error(processes, error, line, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(error), []) == 2
    err = capsys.readouterr().err
    assert re.match(line, err)
    assert (err.count("\n"), len(err) < 600) == (1, True)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="out of ideas"):
        run_tool(raising(RuntimeError("out of ideas")), [])


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_of_detmix_are_short_and_of_the_first_process(rank, capsys, monkeypatch):
    def main(args):
        warnings.warn_explicit("2 images left out", UserWarning, detmix.__file__, 1, source=None)
        warnings.warn_explicit("old", FutureWarning, "/elsewhere/module.py", 7)

    monkeypatch.setenv("RANK", str(rank))
    with warnings.catch_warnings():
        # pytest shows none as they come
        warnings.showwarning = lambda *args: print(warnings.formatwarning(*args[:4]), end="")
        warnings.simplefilter("always")
        before = warnings.formatwarning
        assert run_tool(main, []) == 0
        assert warnings.formatwarning is before
    short = "" if rank else "warning: 2 images left out\n"
    assert capsys.readouterr().out.startswith(f"{short}/elsewhere/module.py:7: FutureWarning: old")
