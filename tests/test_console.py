"""What a person sees of errors and warnings of the tools."""

from __future__ import annotations

import warnings

import pytest
from torch.distributed import DistBackendError

import detmix
from detmix.training.console import run_tool
from detmix.training.failures import OtherProcessError

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer "
    "[127.0.0.1]:6296. This is typically caused by a remote worker crashing."
)
RESET = "[../third_party/gloo/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer"


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), RuntimeError(RESET), DistBackendError("NCCL error: remote")]
)
def test_a_process_that_lost_another(error, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(error), []) == 2
    expected = "error in process 3: lost another process; its own error tells why\n"
    assert capsys.readouterr().err == expected


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="out of ideas"):
        run_tool(raising(RuntimeError("out of ideas")), [])


def test_one_line_for_an_error(capsys):
    assert run_tool(raising(OtherProcessError("another process stops:\n no image")), []) == 2
    assert capsys.readouterr().err == "error: another process stops: no image\n"


def test_warnings_of_detmix_alone_are_short(capsys):
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
    assert out.startswith("warning: 2 images left out\n/elsewhere/module.py:7: FutureWarning: old")
