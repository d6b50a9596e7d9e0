"""The chart of errors: lengths of bars from the numbers, texts inside the picture and apart."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from detmix.data import VOC_CLASSES
from detmix.evaluation import VOCEvaluator, error_plots
from detmix.evaluation.error_plots import plot_errors
from detmix.evaluation.error_result import KINDS, ErrorAnalysis
from detmix.evaluation.errors import analyze_errors

LONG = "a class with a name too long for any chart, and then some"


def some_analysis(classes, num_images=60, seed=0, difficult=0.2, detections=6) -> ErrorAnalysis:
    rng = np.random.default_rng(seed)
    evaluator = VOCEvaluator(classes)
    for _ in range(num_images):
        num = rng.integers(1, 6)
        low, size = rng.uniform(0, 200, (num, 2)), np.exp(rng.normal(4, 0.8, (num, 2)))
        gt = np.concatenate([low, low + size], axis=1).astype(np.float32)
        labels = rng.integers(1, len(classes) + 1, num)
        near = rng.integers(0, num, detections)
        jitter = rng.choice([0.05, 0.2, 2], (detections, 1)) * np.tile(size[near], 2)
        boxes = gt[near] + (jitter * rng.normal(0, 1, (detections, 4))).astype(np.float32)
        wrong = rng.integers(1, len(classes) + 1, detections)
        evaluator.update(
            [
                {
                    "boxes": boxes,
                    "labels": np.where(rng.random(detections) < 0.7, labels[near], wrong),
                    "scores": rng.random(detections).astype(np.float32),
                }
            ],
            [{"boxes": gt, "labels": labels, "difficult": rng.random(num) < difficult}],
        )
    return analyze_errors(evaluator.matching())


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw an analysis; returns the figure once its picture has been checked."""
    figures = []
    save = error_plots.save_figure
    monkeypatch.setattr(
        error_plots, "save_figure", lambda fig, path: figures.append(fig) or save(fig, path)
    )

    def drawn(analysis, narrow):
        path = plot_errors(analysis, tmp_path / "new" / "errors.png", narrow=narrow)
        assert path == tmp_path / "new" / "errors.png"
        with Image.open(path) as picture:
            assert picture.format == "PNG"
        return figures[-1]

    return drawn


def texts(figure):
    """Every text of the figure with its box in pixels."""
    from matplotlib.text import Text

    return [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]


def panels(figure):
    """The three axes and each one's bars by row: lists of (start, length)."""
    found = []
    for axes in figure.axes:
        rows = [[] for _ in axes.get_yticks()]
        for bar in axes.patches:
            row = round(bar.get_y() + bar.get_height() / 2)
            rows[row].append((bar.get_x(), bar.get_width()))
        found.append(([tick.get_text() for tick in axes.get_yticklabels()], rows))
    return found


CASES = {
    "one": ["cat"],
    "three": ["cat", "WIDE LETTERS WWWWWWWWWWWWWWWWWWWWWW", LONG],
    "voc": VOC_CLASSES,
    "eighty": [f"class number {i}" for i in range(80)],
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_texts_lie_inside_the_picture_and_apart(draw, case, narrow):
    difficult = 0 if case == "one" else 0.3
    figure = draw(some_analysis(CASES[case], difficult=difficult), narrow)
    width, height = figure.get_size_inches()
    assert width == pytest.approx(4.2 if narrow else 9.0)
    inside = texts(figure)
    for text, box in inside:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width * figure.dpi, text
        assert box.y1 <= height * figure.dpi, text
    for index, (text, box) in enumerate(inside):
        for other, other_box in inside[:index]:
            shared_x = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
            shared_y = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
            assert min(shared_x, shared_y) < 3, (text, other)  # pixels


@pytest.mark.parametrize("narrow", [False, True])
def test_bars_are_the_numbers(draw, narrow):
    analysis = some_analysis(VOC_CLASSES)
    (names, bars), (kinds, gains), (_, missed) = panels(draw(analysis, narrow))
    correct = {
        name: analysis.counts["top_n"][name]["correct"] / analysis.num_objects[name]
        for name in VOC_CLASSES
    }
    assert names == sorted(VOC_CLASSES, key=lambda name: (-correct[name], name))
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


def test_long_names_are_told_apart_by_their_ends(draw):
    names = [f"{LONG} {number}" for number in range(4)]
    labels = panels(draw(some_analysis(names), narrow=True))[0][0]
    assert sorted(label[-1] for label in labels) == list("0123")
    assert all(label.startswith("a class") and "…" in label for label in labels)


def test_without_difficult_objects_no_rows_speak_of_them(draw):
    analysis = some_analysis(VOC_CLASSES, difficult=0)
    assert panels(draw(analysis, narrow=False))[2][0] == ["small", "medium", "large"]
    assert "difficult" not in str(analysis)


def test_of_many_classes_those_with_most_errors_are_drawn(draw):
    analysis = some_analysis(CASES["eighty"], num_images=150)
    figure = draw(analysis, narrow=False)
    lacking = {
        name: num - analysis.counts["top_n"][name]["correct"]
        for name, num in analysis.num_objects.items()
    }
    names = panels(figure)[0][0]
    assert len(names) == 24
    least = min(lacking[name] for name in names)
    assert all(lacking[name] <= least for name in set(lacking) - set(names))
    assert any("24 classes\nwith most errors out of 80" in text for text, _ in texts(figure))


def test_a_class_without_objects_is_not_drawn_and_one_without_detections_has_no_bar(draw):
    evaluator = VOCEvaluator(["cat", "dog", "cow"])
    box = np.array([[0, 0, 50, 50]], np.float32)
    evaluator.update(
        [{"boxes": box, "labels": np.array([1]), "scores": np.array([0.9])}],
        [{"boxes": np.concatenate([box, box]), "labels": np.array([1, 2])}],
    )
    (names, bars), _, (sizes, _) = panels(draw(analyze_errors(evaluator.matching()), False))
    assert names == ["cat", "dog"]
    assert [sum(length for _, length in row) for row in bars] == [1, 0]
    assert sizes == ["medium"]


def test_nothing_to_draw(draw):
    figure = draw(analyze_errors(VOCEvaluator(["cat"]).matching()), False)
    assert [text for text, _ in texts(figure)] == ["no objects to detect"]


def test_kinds_differ_by_more_than_hue():
    """Neighbouring segments differ in lightness or in hatching."""
    from matplotlib.colors import to_rgb

    looks = [
        (float(np.dot(to_rgb(style["facecolor"]), (0.2126, 0.7152, 0.0722))), style.get("hatch"))
        for style in error_plots._STYLES.values()
    ]
    for (light, hatch), (next_light, next_hatch) in pairwise(looks):
        assert hatch != next_hatch or abs(light - next_light) > 0.1
