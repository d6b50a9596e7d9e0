"""What a person sees of errors and warnings of the tools."""

from __future__ import annotations

import warnings

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

import detmix
from detmix.training.console import run_tool
from detmix.training.stopping import OtherProcessError

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer "
    "[127.0.0.1]:6296. This is typically caused by a remote worker crashing."
)
RESET = "[../third_party/gloo/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"


def raising(error):
    def main(args):
        raise error

    return main


NCCL = "NCCL error: remote process exited or there was a network error, NCCL version 2.27"


@pytest.mark.parametrize("error", [RuntimeError(GLOO), RuntimeError(RESET), DistBackendError(NCCL)])
def test_a_process_that_lost_another(error, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(error), []) == 2
    expected = f"error in process 3: lost another process, whose own error tells why: {error}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("kind", [DistBackendError, DistNetworkError, DistStoreError])
def test_processes_that_never_met(kind, capsys):
    assert run_tool(raising(kind("port 29500 is in use\n" + 99 * "frame #0")), []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: port 29500 is in use frame #0")
    assert len(err) < 600


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="out of ideas"):
        run_tool(raising(RuntimeError("out of ideas")), [])


def test_one_line_for_an_error(capsys):
    assert run_tool(raising(OtherProcessError("another process stops:\n no image")), []) == 2
    assert capsys.readouterr().err == "error: another process stops: no image\n"


@pytest.mark.parametrize("text", ["", "Caught it in DataLoader worker process 0.\n  at x\n"])
def test_an_error_of_a_worker(text, capsys):
    last = "ValueError: a.jpg: broken" if text else ""
    error = ValueError(text + last)
    assert run_tool(raising(error), []) == 2
    assert capsys.readouterr().err == ("error: a.jpg: broken\n" if text else "error: ValueError\n")


def test_warnings_of_detmix_alone_are_short(capsys, monkeypatch):
    def main(args):
        file = detmix.__file__
        warnings.warn_explicit("2 images left out", UserWarning, file, 1, source=None)
        warnings.warn_explicit("old", FutureWarning, "/elsewhere/module.py", 7)

    with warnings.catch_warnings():
        # pytest shows none as they come
        warnings.showwarning = lambda *args: print(warnings.formatwarning(*args[:4]), end="")
        warnings.simplefilter("always")
        before = warnings.formatwarning
        assert run_tool(main, []) == 0
        assert warnings.formatwarning is before
    out = capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.showwarning = lambda *args: print(warnings.formatwarning(*args[:4]), end="")
        warnings.simplefilter("always")
        run_tool(main, [])
    assert "left out" not in capsys.readouterr().out, "the first process tells"
    assert out.startswith("warning: 2 images left out\n/elsewhere/module.py:7: FutureWarning: old")
