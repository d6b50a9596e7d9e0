"""Charts: files are real pictures, all curves and bars are the numbers, bad input is named."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from pngs import check_png
from voc_oracle import random_case

from detmix import pictures
from detmix.data import VOC_CLASSES
from detmix.evaluation import VOCEvaluator, analyze_errors
from detmix.evaluation.errors.result import KINDS
from detmix.pictures.style import new_figure, save_figure, shorten

EIGHTY = [f"class number {i}" for i in range(80)]
LONG = "a class with a name too long for any chart, and then some"
# As formulas the first two would be errors and the third would lose its dollars.
NASTY = ("a$^$b", r"$\foo$", "x_$y$_z", "100%", "<b>&")
IMAGE = torch.zeros(3, 90, 120, dtype=torch.uint8)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    return figures


def evaluated(classes, num_images=60):
    evaluator = VOCEvaluator(classes)
    predictions, targets = random_case(0, num_images, len(classes))
    for record in (*predictions, *targets):
        record["boxes"] = 3 * record["boxes"]  # of all sizes
    evaluator.update(predictions, targets)
    return evaluator


def check_texts(figure):
    """Assert that all texts lie inside the picture and apart."""
    inside = []
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            assert -1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1, text
            assert -1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1, text
            others = [other for other in inside if box.padded(-2).overlaps(other.padded(-2))]
            assert not others, (text, others)
            inside.append(box)


def check_panels(figure):
    """Assert that panels with their labels and legends lie inside the picture and apart."""
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# --------------------------------------------------------------------------- all pictures


@pytest.mark.parametrize("kind", ["batch", "predictions", "curves", "errors"])
def test_names_are_no_formulas(tmp_path, drawn, kind):
    num = len(NASTY)
    boxes = torch.tensor([[10.0, 8 + 16 * i, 60, 20 + 16 * i] for i in range(num)])
    sources = {"source": torch.arange(num), "sources": dict(enumerate(NASTY))}
    target = {"boxes": boxes, "labels": torch.arange(num) + 1} | sources
    found = target | {"scores": torch.full((num,), 0.6)}
    evaluator = VOCEvaluator(NASTY)
    evaluator.update([found], [target])
    path = tmp_path / "picture.png"
    if kind == "batch":
        pictures.plot_batch([IMAGE], [target], NASTY, path)
    elif kind == "predictions":
        named = [target | {"name": name} for name in NASTY]
        pictures.plot_predictions([IMAGE] * num, [found] * num, named, NASTY, path)
    elif kind == "curves":
        pictures.plot_precision_recall(evaluator.compute(), path)
    else:
        pictures.plot_errors(analyze_errors(evaluator.matching()), path)
    for name in NASTY:
        found = [text for text in drawn[0].findobj(Text) if name in text.get_text()]
        assert found, name
        assert not any(text.get_parse_math() for text in found)


@pytest.mark.parametrize("given", ["a", "v1.5/a", "a.svg"])
def test_the_path_is_that_of_the_file(tmp_path, given):
    path = save_figure(new_figure(1, 1), f"{tmp_path}/{given}")
    assert path == tmp_path / (given if given.endswith("svg") else f"{given}.png")
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


# ----------------------------------------------------------------------- precision and recall


@pytest.mark.parametrize(("classes", "num_panels"), [(VOC_CLASSES, 1), (EIGHTY[:41], 3)])
def test_precision_recall_curves(tmp_path, drawn, classes, num_panels):
    result = evaluated(classes).compute()
    path = pictures.plot_precision_recall(result, tmp_path / "new folder" / "pr.png")
    check_png(path, max_side=6000)
    (figure,) = drawn
    check_panels(figure)
    assert len(figure.axes) == num_panels
    for axes in figure.axes:
        curves = [line for line in axes.lines if line.get_linestyle() != "None"]
        styles = {(line.get_color(), line.get_linestyle()) for line in curves}
        assert len(styles) == len(curves) <= 20
    texts = [text for axes in figure.axes for text in legend_texts(axes)]
    ranked = sorted(result.ap.items(), key=lambda item: (-np.nan_to_num(item[1], nan=-1), item[0]))
    aps = ["n/a" if math.isnan(ap) else f"{ap:.4f}" for _, ap in ranked]
    assert aps[-1] == "n/a"  # of a class without objects
    assert texts == [f"{name}  {ap}" for (name, _), ap in zip(ranked, aps, strict=True)]
    lines = [line for axes in figure.axes for line in axes.lines]
    for (name, _), line, dot in zip(ranked[:-1], lines[::2], lines[1::2], strict=False):
        curve = result.curves[name]
        np.testing.assert_array_equal(line.get_xydata().T, [curve.recall, curve.precision])
        f1 = [0 if p == 0 else 2 / (1 / p + 1 / r) for r, p in line.get_xydata()]
        ((recall, precision),) = dot.get_xydata()
        assert 2 * precision * recall / (precision + recall) == pytest.approx(max(f1))


# ----------------------------------------------------------------------------- learning curve


def write_lines(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def train(step, **more):
    return {"event": "train", "step": step, "epoch": step / 10, "loss": 2.0, "lr": 0.01} | more


@pytest.mark.parametrize(
    ("scores", "legend"),
    [
        ({"mean_ap": 0.625}, ["mAP, best 0.625 at step 50"]),
        (
            {"top1": 0.25, "top5": 0.5},
            ["top-1 accuracy, best 0.250 at step 50", "top-5 accuracy"],
        ),
        (
            {"mean_ap": 0.75, "ap50": 0.97, "ap75": 0.8, "ap_large": None, "mask_ap": 0.5},
            ["AP, best 0.750 at step 50", "AP50", "mask AP"],
        ),
        ({"mean_ap": None}, ["mAP"]),
    ],
)
def test_learning_curve(tmp_path, drawn, scores, legend):
    metrics = write_lines(
        tmp_path / "metrics.jsonl",
        {"event": "start", "versions": {}},
        *[train(step, loss=3 / step, images_per_s=20.0) for step in range(1, 101)],
        {"event": "eval", "epoch": 5, "step": 50} | scores,
        {"event": "eval", "epoch": 10, "step": 100} | {name: 0 for name in scores if scores[name]},
        train(100, loss=7.0),  # a resumed run
    )
    check_png(pictures.plot_learning_curve(metrics, tmp_path / "curve.png"))
    check_panels(drawn[0])
    loss, rate, score = drawn[0].axes
    name = legend[0].partition(",")[0]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["training loss", "learning rate", name]
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "train", "st', "is no record"),
        ("[1, 2]", "is no record"),
        ({"step": 3}, "event"),
    ],
)
def test_broken_metrics_name_file_and_line(tmp_path, line, message):
    metrics = write_lines(tmp_path / "metrics.jsonl", train(1), line, train(2))
    with pytest.raises(ValueError, match=message) as error:
        pictures.plot_learning_curve(metrics, tmp_path / "curve.png")
    assert str(error.value).startswith(f"{metrics}, line 2: ")
    lines = write_lines(tmp_path / "start.jsonl", {"event": "start"})
    with pytest.raises(ValueError, match=r"start\.jsonl: no training step"):
        pictures.plot_learning_curve(lines, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


# --------------------------------------------------------------------------- weights of boxes


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [(0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))), (2.0, lambda x: 3 * x**2 - 2 * x**3)],
)
def test_histogram_of_box_weights(tmp_path, drawn, alpha, cdf):
    weights = torch.tensor([1.0] * 6 + [0.01, 0.5, 0.5, 0.99])
    check_png(pictures.plot_box_weights(weights, tmp_path / "w.png", alpha=alpha))
    (axes,) = drawn[0].axes
    check_panels(drawn[0])
    of_boxes, of_beta = (patch.get_data().values for patch in axes.patches)
    expected = np.zeros(25)
    expected[[0, 12, 24]] = 0.25, 0.5, 0.25
    np.testing.assert_allclose(of_boxes, expected)
    np.testing.assert_allclose(of_beta, np.diff(cdf(np.linspace(0, 1, 26))), atol=1e-3)
    assert axes.get_title("left") == "10 boxes, mean weight 0.800; 60.0% weigh 1"
    assert legend_texts(axes) == ["4 boxes below 1", f"mixup: Beta({alpha:g}, {alpha:g})"]


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.5], [0.5, float("nan")], [[0.5]], []])
def test_bad_weights(tmp_path, weights):
    with pytest.raises(ValueError, match="weights"):
        pictures.plot_box_weights(weights, tmp_path / "w.png")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------- errors


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
def test_bars_of_errors_are_the_numbers(tmp_path, drawn, classes):
    analysis = analyze_errors(evaluated(classes, num_images=150).matching())
    check_png(pictures.plot_errors(analysis, tmp_path / "new" / "errors.png"))
    check_texts(drawn[0])
    (names, bars), (kinds, gains), (sizes, missed) = panels(drawn[0])
    num = {name: num for name, num in analysis.num_objects.items() if num}
    counts = analysis.counts["top_n"]
    lacking = {shorten(name, 20): num[name] - counts[name]["correct"] for name in num}
    assert len(names) == min(len(num), 24)  # those with most errors
    least = min(lacking[name] for name in names)
    assert all(lacking[name] <= least for name in lacking.keys() - set(names))
    shares = []
    for name in num:
        if shorten(name, 20) in names:
            row = bars[names.index(shorten(name, 20))]
            of_class = [counts[name][kind] for kind in ("correct", *KINDS)]
            lengths = np.array(of_class) / num[name]
            np.testing.assert_allclose([length for _, length in row], lengths)
            np.testing.assert_allclose([start for start, _ in row], np.cumsum(lengths) - lengths)
    shares = [row[0][1] for row in bars]
    assert shares == sorted(shares, reverse=True)
    assert kinds == [kind.replace("_", " ") for kind in KINDS]
    gain = np.array(list(analysis.ap_gain.values()))
    np.testing.assert_allclose([row[0][1] for row in gains], gain / max(*gain, 0.01))
    written = [text.get_text() for text in drawn[0].axes[1].texts]
    assert written == [f"{each:.3f}" for each in gain]
    expected = {
        size + suffix: [by_size[size].share_at_best_f1, by_size[size].share]
        for suffix, by_size in (("", analysis.missed), (", difficult", analysis.missed_difficult))
        for size in ("small", "medium", "large")
        if by_size[size].objects
    }
    assert sizes == list(expected)
    np.testing.assert_allclose([[size for _, size in row] for row in missed], [*expected.values()])


def test_errors_of_nothing(tmp_path, drawn):
    """A class without objects is not drawn, one without detections has no bar."""
    evaluator = VOCEvaluator(["cat", "dog", "cow"])
    pictures.plot_errors(analyze_errors(evaluator.matching()), tmp_path / "none.png")
    box = np.array([[0, 0, 50, 50]], np.float32)
    evaluator.update(
        [{"boxes": box, "labels": np.array([1]), "scores": np.array([0.9])}],
        [{"boxes": np.concatenate([box, box]), "labels": np.array([1, 2])}],
    )
    pictures.plot_errors(analyze_errors(evaluator.matching()), tmp_path / "errors.png")
    (none, _), *_ = panels(drawn[0])
    (names, bars), _, (sizes, _) = panels(drawn[1])
    assert (none, names, sizes) == ([], ["cat", "dog"], ["medium"])
    assert [sum(length for _, length in row) for row in bars] == [1, 0]
