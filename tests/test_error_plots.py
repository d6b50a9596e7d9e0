"""The chart of errors: lengths of bars from the numbers, texts inside the picture and apart."""

import numpy as np
import pytest
from pngs import check_png
from voc_oracle import random_case

from detmix.data import VOC_CLASSES
from detmix.evaluation import VOCEvaluator
from detmix.evaluation.errors.analysis import analyze_errors
from detmix.evaluation.errors.result import KINDS, ErrorAnalysis
from detmix.pictures import errors as error_plots
from detmix.pictures import plot_errors

EIGHTY = [f"class number {i}" for i in range(80)]
LONG = "a class with a name too long for any chart, and then some"


def some_analysis(classes, num_images=60) -> ErrorAnalysis:
    evaluator = VOCEvaluator(classes)
    predictions, targets = random_case(0, num_images, len(classes))
    for record in (*predictions, *targets):
        record["boxes"] = 3 * record["boxes"]  # of all sizes
    evaluator.update(predictions, targets)
    return analyze_errors(evaluator.matching())


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw an analysis; returns the figure once its picture has been checked."""
    figures = []
    save = error_plots.save_figure
    monkeypatch.setattr(
        error_plots, "save_figure", lambda fig, path: figures.append(fig) or save(fig, path)
    )

    def drawn(analysis):
        check_png(plot_errors(analysis, tmp_path / "new" / "errors.png"))
        return figures[-1]

    return drawn


def panels(figure):
    """The three axes with the names of their rows and each one's bars: (start, length)."""
    found = []
    for axes in figure.axes:
        rows = [[] for _ in axes.get_yticks()]
        for bar in axes.patches:
            row = round(bar.get_y() + bar.get_height() / 2)
            rows[row].append((bar.get_x(), bar.get_width()))
        found.append(([tick.get_text() for tick in axes.get_yticklabels()], rows))
    return found


@pytest.mark.parametrize("classes", [["cat", "dog", LONG], VOC_CLASSES, EIGHTY], ids=len)
def test_texts_lie_inside_the_picture_and_apart(draw, classes):
    from matplotlib.text import Text

    figure = draw(some_analysis(classes))
    inside = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]
    for index, (text, box) in enumerate(inside):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        for other, other_box in inside[:index]:
            assert not box.padded(-2).overlaps(other_box.padded(-2)), (text, other)


def test_bars_are_the_numbers(draw):
    analysis = some_analysis(VOC_CLASSES)
    figure = draw(analysis)
    (names, bars), (kinds, gains), (_, missed) = panels(figure)
    correct = {
        name: analysis.counts["top_n"][name]["correct"] / analysis.num_objects[name]
        for name in VOC_CLASSES
        if analysis.num_objects[name]
    }
    assert names == sorted(correct, key=lambda name: (-correct[name], name))
    for name, row in zip(names, bars, strict=True):
        counts = [analysis.counts["top_n"][name][kind] for kind in ("correct", *KINDS)]
        lengths = np.array(counts) / analysis.num_objects[name]
        np.testing.assert_allclose([length for _, length in row], lengths)
        np.testing.assert_allclose([start for start, _ in row], np.cumsum(lengths) - lengths)
    assert kinds == [kind.replace("_", " ") for kind in KINDS]
    assert [row[0][1] for row in gains] == pytest.approx(list(analysis.ap_gain.values()))
    expected = [
        [by_size[size].share_at_best_f1, by_size[size].share]
        for by_size in (analysis.missed, analysis.missed_difficult)
        for size in ("small", "medium", "large")
    ]
    np.testing.assert_allclose([[length for _, length in row] for row in missed], expected)


def test_of_many_classes_those_with_most_errors_are_drawn(draw):
    analysis = some_analysis(EIGHTY, num_images=150)
    figure = draw(analysis)
    lacking = {
        name: num - analysis.counts["top_n"][name]["correct"]
        for name, num in analysis.num_objects.items()
    }
    names = panels(figure)[0][0]
    assert len(names) == 24
    least = min(lacking[name] for name in names)
    assert all(lacking[name] <= least for name in set(lacking) - set(names))
    assert "24 classes\nwith most errors" in figure.axes[0].get_title(loc="left")


def test_a_class_without_objects_is_not_drawn_and_one_without_detections_has_no_bar(draw):
    evaluator = VOCEvaluator(["cat", "dog", "cow"])
    box = np.array([[0, 0, 50, 50]], np.float32)
    evaluator.update(
        [{"boxes": box, "labels": np.array([1]), "scores": np.array([0.9])}],
        [{"boxes": np.concatenate([box, box]), "labels": np.array([1, 2])}],
    )
    (names, bars), _, (sizes, _) = panels(draw(analyze_errors(evaluator.matching())))
    assert names == ["cat", "dog"]
    assert [sum(length for _, length in row) for row in bars] == [1, 0]
    assert sizes == ["medium"]
