"""Charts: every curve and bar is what it should be, texts are apart, errors are named."""

import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from voc_oracle import evaluate, random_case

from detmix import pictures
from detmix.data import VOC_CLASSES
from detmix.evaluation import analyze_errors
from detmix.evaluation.errors.result import KINDS
from detmix.pictures import style

EIGHTY = [f"class number {i}" for i in range(1, 81)]
LONG = "a class with a name too long for any chart, and then some"
WIDE = 40 * "W"
COLORS = style.CLASS_COLORS


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Return a function that draws, panels and texts apart, nothing blank, no $ in a formula."""
    figures, texts = [], []
    save, draw_text = Figure.savefig, Text.draw

    def savefig(figure, path):
        assert not any(text.get_parse_math() for text in figure.findobj(Text))
        figures.append(figure)
        texts.clear()
        save(figure, path)

    def drawn(text, *args, **options):
        draw_text(text, *args, **options)
        texts.append(text)

    def draw(plot, *args, **options):
        path = tmp_path / "new" / "picture.png"
        assert plot(*args, path, **options) == path
        with Image.open(path) as picture:
            assert all(200 <= side <= 6000 for side in picture.size)
            assert any(low < high for low, high in picture.convert("RGB").getextrema())
        check_apart(figures[-1], [axes.get_tightbbox() for axes in figures[-1].axes])
        check_apart(figures[-1], extents(dict.fromkeys(texts)), slack=2)
        return figures[-1]

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(Text, "draw", drawn)
    return draw


def check_apart(figure, boxes, slack=1):
    """Assert that boxes, in pixels, lie inside the picture and apart."""
    for index, box in enumerate(boxes):
        assert -slack <= box.x0 < box.x1 <= figure.bbox.x1 + slack
        assert -slack <= box.y0 < box.y1 <= figure.bbox.y1 + slack
        others = (other.padded(-slack) for other in boxes[index + 1 :])
        assert not any(box.padded(-slack).overlaps(other) for other in others)


def extents(texts):
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


def fitting(name):
    return style.fit(name, style.font(9), 108)


def evaluated(classes, num_images=60):
    return evaluate(*random_case(0, num_images, len(classes), limit=300), classes)  # of all sizes


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("classes", "num_panels"), [(VOC_CLASSES, 1), (EIGHTY, 4), ([LONG, WIDE, "cat"], 1)]
)
def test_precision_recall_curves(draw, classes, num_panels):
    """Each class in its colour, also of 80 no two alike; the curves keep the most of the width."""
    result = evaluated(classes).compute()
    figure = draw(pictures.plot_precision_recall, result)
    panels = figure.axes
    assert len(panels) == num_panels
    assert all(axes.get_window_extent().width > figure.bbox.width / 2 for axes in panels)
    ranked = sorted(result.ap.items(), key=lambda item: (-np.nan_to_num(item[1], nan=-1), item[0]))
    assert math.isnan(ranked[-1][1])  # a class without objects
    texts = [f"{fitting(n)}  {'n/a' if math.isnan(ap) else f'{ap:.4f}'}" for n, ap in ranked]
    assert [text for axes in panels for text in legend_texts(axes)] == texts
    lines = [line for axes in panels for line in axes.lines]
    for (name, _), line, dot in zip(ranked, lines[::2], lines[1::2], strict=True):
        curve, best = result.curves[name], result.curves[name].best_f1()
        np.testing.assert_array_equal(line.get_xydata().T, [curve.recall, curve.precision])
        np.testing.assert_array_equal(dot.get_xydata(), [[best.recall, best.precision]])
        assert line.get_color() == dot.get_color() == COLORS[classes.index(name) % len(COLORS)]
    looks = [(line.get_color(), line.get_linestyle()) for line in lines[::2]]
    assert len(set(looks)) == len(looks)


def write_lines(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def train(step, **more):
    return {"event": "train", "step": step, "epoch": step / 10, "loss": 2.0, "lr": 0.01} | more


SCORES = [
    ({"mean_ap": None}, ["mAP"]),
    ({"top1": 0.25, "top5": 0.5}, ["top-1 accuracy, best 0.250 at step 50", "top-5 accuracy"]),
    (
        {"mean_ap": 0.75, "ap50": 0.97, "ap75": 0.8, "ap_large": None, "mask_ap": 0.5},
        ["AP, best 0.750 at step 50", "AP50", "mask AP"],
    ),
]


@pytest.mark.parametrize(("scores", "legend"), SCORES)
def test_learning_curve(tmp_path, draw, scores, legend):
    metrics = write_lines(
        tmp_path / "metrics.jsonl",
        {"event": "start", "versions": {}},
        *[train(step, loss=3 / step, images_per_s=20.0) for step in range(1, 101)],
        {"event": "eval", "epoch": 5, "step": 50} | scores,
        {"event": "eval", "epoch": 10, "step": 100} | {name: 0 for name in scores if scores[name]},
        train(100, loss=7.0),  # a resumed run
    )
    loss, rate, score = panels = draw(pictures.plot_learning_curve, metrics).axes
    name = legend[0].partition(",")[0]
    assert [axes.get_ylabel() for axes in panels] == ["training loss", "learning rate", name]
    steps = np.arange(1, 101)
    losses = np.append(3 / steps[:-1], 7)  # the later line counts
    np.testing.assert_allclose(loss.lines[0].get_xydata().T, [steps, losses])
    means = [losses[max(0, i - 2) : i + 3].mean() for i in range(100)]
    np.testing.assert_allclose(loss.lines[1].get_xydata().T, [steps, means])
    assert legend_texts(loss) == ["mean of 5 records"]
    assert rate.lines[0].get_ydata().tolist() == [0.01] * 100
    expected = [[50, next(iter(scores.values()))], [100, 0]][: len(score.lines[0].get_xdata())]
    np.testing.assert_equal(score.lines[0].get_xydata(), np.array(expected, float))
    assert legend_texts(score) == legend


def test_numbers_of_a_long_run_are_apart(tmp_path, draw):
    steps = range(1000, 9_000_001, 100_000)
    metrics = write_lines(tmp_path / "metrics.jsonl", *[train(s, lr=1e-9 * s) for s in steps])
    assert len(draw(pictures.plot_learning_curve, metrics).axes) == 2


@pytest.mark.parametrize("line", ['{"event": "train", "st', "[1, 2]", {"step": 3}])
def test_broken_metrics_name_file_and_line(tmp_path, line):
    metrics = write_lines(tmp_path / "metrics.jsonl", train(1), line, train(2))
    with pytest.raises(ValueError, match=re.escape(f"{metrics}, line 2: ")):
        pictures.plot_learning_curve(metrics, tmp_path / "curve.png")
    lines = write_lines(tmp_path / "start.jsonl", {"event": "start"})
    with pytest.raises(ValueError, match=r"start\.jsonl: no training step"):
        pictures.plot_learning_curve(lines, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_histogram_of_box_weights(draw):
    weights = torch.tensor([1.0] * 6 + [0.01, 0.5, 0.5, 0.99])
    (axes,) = draw(pictures.plot_box_weights, weights, alpha=2).axes
    of_boxes, of_beta = (patch.get_data().values for patch in axes.patches)
    expected = np.zeros(25)
    expected[[0, 12, 24]] = 0.25, 0.5, 0.25
    np.testing.assert_allclose(of_boxes, expected)
    x = np.linspace(0, 1, 26)
    np.testing.assert_allclose(of_beta, np.diff(3 * x**2 - 2 * x**3), atol=1e-3)
    assert axes.get_title("left") == "10 boxes, mean weight 0.800; 60.0% weigh 1"
    assert legend_texts(axes) == ["4 boxes below 1", "mixup: Beta(2, 2)"]


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.5], [0.5, math.nan], [[0.5]], []])
def test_bad_weights(tmp_path, weights):
    with pytest.raises(ValueError, match="weights"):
        pictures.plot_box_weights(weights, tmp_path / "w.png")
    assert list(tmp_path.iterdir()) == []


def rows_of(axes):
    """The names of the rows and the bars of each: (start, length)."""
    rows = {tick.get_text(): [] for tick in axes.get_yticklabels()}
    names = list(rows)
    for bar in axes.patches:
        rows[names[round(bar.get_y() + bar.get_height() / 2)]].append(
            [bar.get_x(), bar.get_width()]
        )
    return rows


@pytest.mark.parametrize(
    ("classes", "num_images"), [([LONG, WIDE, "dog"], 150), (EIGHTY, 150), (VOC_CLASSES, 0)]
)
def test_bars_of_errors_are_the_numbers(draw, classes, num_images):
    """Of the classes with objects, at most 24, those with most errors, the best first."""
    analysis = analyze_errors(evaluated(classes, num_images).matching())
    figure = draw(pictures.plot_errors, analysis)
    of_class, gains, missed = map(rows_of, figure.axes)
    counts, expected = analysis.counts["top_n"], {}
    num = {name: num for name, num in analysis.num_objects.items() if num}
    for name in sorted(num, key=lambda name: (counts[name]["correct"] - num[name], name))[:24]:
        lengths = np.array([counts[name][kind] for kind in ("correct", *KINDS)]) / num[name]
        expected[fitting(name)] = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    assert of_class.keys() == expected.keys()
    for name, bars in of_class.items():
        np.testing.assert_allclose(bars, expected[name], err_msg=name)
    shares = [bars[0][1] for bars in of_class.values()]
    assert shares == sorted(shares, reverse=True)
    assert list(gains) == [kind.replace("_", " ") for kind in KINDS]
    gain = np.array(list(analysis.ap_gain.values()))
    np.testing.assert_allclose([bars[0][1] for bars in gains.values()], gain / max(*gain, 0.01))
    written = [text.get_text() for text in figure.axes[1].texts]
    assert written == [f"{each:.3f}" for each in gain]
    assert {name: [length for _, length in bars] for name, bars in missed.items()} == {
        size + suffix: [by_size[size].share_at_best_f1, by_size[size].share]
        for suffix, by_size in (("", analysis.missed), (", difficult", analysis.missed_difficult))
        for size in ("small", "medium", "large")
        if by_size[size].objects
    }
