"""The walkthrough's blocks run one after the other as they stand, and print what it shows."""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from runs import succeed

PAGE = (Path(__file__).parents[2] / "docs" / "walkthrough.md").read_text(encoding="utf-8")
# For seconds in the place of minutes; what has learned nothing tells all its guesses.
SMALL = {"400": "20", "00040": "00002", "epochs: 20": "epochs: 2", "score=0.5": "score=0"}


def beginnings(text: str) -> set[str]:
    """Return the first word of each line, whatever the numbers in it."""
    return set(re.findall(r"(?m)^\s*(\S+)", re.sub(r"\d[\d.]*", "#", text)))


@pytest.mark.parametrize("is_whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_pictures_to_a_detector(is_whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.partition("## What next")[0]
    for shown, small in {} if is_whole else SMALL.items():
        assert shown in text
        text = text.replace(shown, small)
    printed, names = "pictures/1.jpg\npictures/1.xml", {}
    for language, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text):
        if language == "yaml":
            Path(code.split()[1]).write_text(code)  # the first line is its name
        elif language == "python":
            with redirect_stdout(out := io.StringIO()):
                exec(code, names)
            printed = out.getvalue()
        elif language == "bash":
            printed = "\n".join(succeed(*shlex.split(code)))
        else:
            assert beginnings(code) <= beginnings(printed), printed
    assert len(list(tmp_path.glob("found/*.png"))) == 8
    report = tmp_path / "runs" / "own" / "evaluation" / "report.html"
    results = json.loads(report.with_name("results.json").read_text())
    assert report.stat().st_size > 100_000
    assert results["voc"]["mean_ap"] >= 0.6 * is_whole
