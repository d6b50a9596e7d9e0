"""What all pictures share: names written as they are and cut where they are alike, true paths."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from detmix.evaluation import VOCEvaluator
from detmix.evaluation.errors.analysis import analyze_errors
from detmix.pictures import plot_batch, plot_precision_recall, plot_predictions
from detmix.pictures.errors import plot_errors
from detmix.pictures.style import new_figure, save_figure, shorten

# As formulas the first two would be errors and the third would lose its dollars.
NAMES = ("a$^$b", r"$\foo$", "x_$y$_z", "100%", "<b>&")

IMAGE = torch.zeros(3, 90, 120, dtype=torch.uint8)
TARGET = {
    "boxes": torch.tensor([[10.0, 8 + 16 * i, 60, 20 + 16 * i] for i in range(len(NAMES))]),
    "labels": torch.arange(len(NAMES)) + 1,
}
PREDICTION = TARGET | {"scores": torch.full((len(NAMES),), 0.5)}


def evaluator():
    out = VOCEvaluator(NAMES)
    out.update([PREDICTION], [TARGET])
    return out


def batch(path):
    source = torch.arange(len(NAMES))
    sources = {"source": source, "sources": dict(enumerate(NAMES))}
    plot_batch([IMAGE] * 2, [TARGET | {"source": source}, TARGET | sources], NAMES, path)


def predictions(path):
    some = [IMAGE] * 5, [PREDICTION] * 5, [TARGET] * 5
    plot_predictions(*some, NAMES, path, titles=NAMES, score_threshold=0.0)


KINDS = {
    "batch": batch,
    "predictions": predictions,
    "curves": lambda path: plot_precision_recall(evaluator().compute(), path),
    "errors": lambda path: plot_errors(analyze_errors(evaluator().matching()), path),
}


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda fig, *args, **kw: figures.append(fig) or save(fig, *args, **kw)
    )
    return figures


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_no_formulas(tmp_path, saved, kind):
    KINDS[kind](tmp_path / "picture.png")
    written = saved[0].findobj(Text)
    for name in NAMES:
        found = [text for text in written if name in text.get_text()]
        assert found, name
        assert not any(text.get_parse_math() for text in found)


@pytest.mark.parametrize(
    ("given", "written"),
    [("a", "a.png"), ("a.", "a.png"), ("v1.5/a", "v1.5/a.png"), ("a.svg", "a.svg")],
)
def test_the_path_is_that_of_the_file(tmp_path, given, written):
    path = save_figure(new_figure(1, 1), f"{tmp_path}/{given}")
    assert path == tmp_path / written
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_names_are_cut_in_the_middle():
    text = "".join(map(chr, range(ord("a"), ord("z") + 1)))
    assert shorten(text, 26) == text
    for length in range(1, 26):
        head, tail = shorten(text, length).split("…")
        assert len(head) + 1 + len(tail) == length
        assert 0 <= len(head) - len(tail) <= 1
        assert text.startswith(head)
        assert text.endswith(tail)
