"""What a person sees of errors and warnings of the tools."""

from __future__ import annotations

import warnings

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

import detmix
from detmix.training.console import run_tool
from detmix.training.stopping import OtherProcessError


def raising(error):
    def main(args):
        raise error

    return main


LOST = [
    RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:6296."),
    RuntimeError("[../gloo/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"),
    DistBackendError("NCCL error: remote process exited or there was a network error"),
]


@pytest.mark.parametrize("error", LOST, ids=["closed", "reset", "nccl"])
def test_a_process_that_lost_another(error, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(error), []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error in process 3: lost another process")
    assert err.endswith(f"{error}\n")


IN_A_WORKER = ValueError("Caught it in DataLoader worker process 0.\n  at x\nValueError: a: broken")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OtherProcessError("another process stops:\n no image"), "another process stops: no image"),
        (IN_A_WORKER, "a: broken"),
        (ValueError(), "ValueError"),
        *(
            (kind("port 29500 is in use\n" + 99 * "frame #0"), "port 29500 is in use frame #0")
            for kind in (DistBackendError, DistNetworkError, DistStoreError)
        ),
    ],
)
def test_one_line_for_an_error(error, line, capsys):
    assert run_tool(raising(error), []) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
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
