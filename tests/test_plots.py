"""Charts: files are real pictures, all curves and bars are the numbers, bad input is named."""

import json
import math

import numpy as np
import pytest
import torch
from pngs import check_png

from detmix.evaluation import VOCEvaluator
from detmix.pictures import curves as plots
from detmix.pictures import plot_box_weights, plot_learning_curve, plot_precision_recall
from detmix.pictures.metrics import read_metrics


@pytest.fixture
def drawn(monkeypatch):
    """The figures that the picture makers save, to look at their contents."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda fig, path: figures.append(fig) or save(fig, path)
    )
    return figures


def some_result(num_classes, num_images=30):
    rng = np.random.default_rng(0)
    evaluator = VOCEvaluator([f"class number {i}" for i in range(1, num_classes + 1)])
    for _ in range(num_images):
        boxes = np.concatenate([rng.uniform(0, 50, (8, 2)), rng.uniform(60, 99, (8, 2))], axis=1)
        labels = rng.integers(1, num_classes + 1, 8)
        shifted = boxes + rng.normal(0, 8, boxes.shape)
        evaluator.update(
            [{"boxes": shifted, "labels": labels, "scores": rng.random(8)}],
            [{"boxes": boxes, "labels": np.minimum(labels, max(1, num_classes - 1))}],
        )
    return evaluator.compute()


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def assert_apart(figure):
    """Assert that panels with their labels and legends do not overlap or leave the figure."""
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


@pytest.mark.parametrize(("num_classes", "num_panels"), [(1, 1), (20, 1), (41, 3)])
def test_precision_recall_curves(tmp_path, drawn, num_classes, num_panels):
    result = some_result(num_classes)
    path = plot_precision_recall(result, tmp_path / "new folder" / "pr.png")
    check_png(path, max_side=6000)
    figure = drawn[0]
    assert len(figure.axes) == num_panels
    for axes in figure.axes:
        curves = [line for line in axes.lines if line.get_linestyle() != "None"]
        styles = {(line.get_color(), line.get_linestyle()) for line in curves}
        assert len(styles) == len(curves) <= 20
    texts = [text for axes in figure.axes for text in legend_texts(axes)]
    ranked = sorted(result.ap.items(), key=lambda item: (-np.nan_to_num(item[1], nan=-1), item[0]))
    assert texts == [
        f"{name}  " + ("n/a" if math.isnan(ap) else f"{ap:.4f}") for name, ap in ranked
    ]
    assert_apart(figure)


def test_curves_and_their_best_points(tmp_path, drawn):
    result = some_result(3)
    plot_precision_recall(result, tmp_path / "pr.png")
    ranked = sorted(result.classes[:2], key=lambda name: -result.ap[name])
    assert math.isnan(result.ap[result.classes[2]])
    lines = drawn[0].axes[0].lines
    for name, line, dot in zip(ranked, lines[::2], lines[1::2], strict=False):
        curve = result.curves[name]
        np.testing.assert_array_equal(line.get_xydata().T, [curve.recall, curve.precision])
        f1 = [
            2 * p * r / (p + r) if p + r else 0
            for p, r in zip(curve.precision, curve.recall, strict=True)
        ]
        recall, precision = dot.get_xydata()[0]
        assert 2 * precision * recall / (precision + recall) == pytest.approx(max(f1))


def write_lines(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def train(step, **more):
    return {"event": "train", "step": step, "epoch": step / 10, "loss": 2.0, "lr": 0.01} | more


@pytest.mark.parametrize(
    ("scores", "axis", "legend"),
    [
        ({"mean_ap": 0.625}, "mAP", ["mAP, best 0.625 at step 50"]),
        (
            {"top1": 0.25, "top5": 0.5},
            "top-1 accuracy",
            ["top-1 accuracy, best 0.250 at step 50", "top-5 accuracy"],
        ),
        (
            {"mean_ap": 0.75, "ap50": 0.97, "ap75": 0.8, "ap_large": None, "mask_ap": 0.5},
            "AP",
            ["AP, best 0.750 at step 50", "AP50", "mask AP"],
        ),
    ],
)
def test_learning_curve(tmp_path, drawn, scores, axis, legend):
    metrics = write_lines(
        tmp_path / "metrics.jsonl",
        {"event": "start", "versions": {}},
        *[train(step, loss=3 / step, images_per_s=20.0) for step in range(1, 101)],
        "",
        {"event": "eval", "epoch": 5, "step": 50} | scores,
        {"event": "eval", "epoch": 10, "step": 100} | {name: 0 for name in scores},
    )
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))
    loss, rate, score = drawn[0].axes
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["training loss", "learning rate", axis]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), 3 / np.arange(1, 101))
    assert rate.lines[0].get_ydata().tolist() == [0.01] * 100
    assert score.lines[0].get_xydata().tolist() == [[50, next(iter(scores.values()))], [100, 0]]
    assert legend_texts(score) == legend
    assert_apart(drawn[0])


def test_a_resumed_run_counts_the_later_line(tmp_path):
    metrics = write_lines(
        tmp_path / "metrics.jsonl", train(1), train(2, loss=9.0), train(2, loss=1.0), train(3)
    )
    loss = read_metrics(metrics).train["loss"]
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values.tolist() == [2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "train", "st', "JSON"),
        ("[1, 2]", "JSON"),
        ({"event": "train", "step": 3, "lr": 0.1}, "'loss'"),
        (train(3, loss="high"), "'loss' is 'high'"),
        (train(3, lr=None), "'lr' is None"),
        ({"event": "eval", "step": 1}, "'mean_ap'"),
        (train(2.5), "'step' is 2.5"),
    ],
)
def test_broken_metrics_name_file_and_line(tmp_path, line, message):
    metrics = write_lines(tmp_path / "metrics.jsonl", train(1), line, train(2))
    with pytest.raises(ValueError, match=message) as error:
        plot_learning_curve(metrics, tmp_path / "curve.png")
    assert str(error.value).startswith(f"{metrics}, line 2: ")
    assert not (tmp_path / "curve.png").exists()


def bars(figure, index=0):
    return figure.axes[0].patches[index].get_data().values


def test_histogram_of_box_weights(tmp_path, drawn):
    weights = torch.tensor([1.0] * 6 + [0.01, 0.5, 0.5, 0.99])
    check_png(plot_box_weights(weights, tmp_path / "w.png"))
    expected = np.zeros(25)
    expected[[0, 12, 24]] = 0.25, 0.5, 0.25
    np.testing.assert_allclose(bars(drawn[0]), expected)
    title = drawn[0].axes[0].get_title(loc="left")
    assert title == "10 boxes, mean weight 0.800; 60.0% weigh 1"
    assert legend_texts(drawn[0].axes[0]) == ["4 boxes below 1"]


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [(0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))), (2.0, lambda x: 3 * x**2 - 2 * x**3)],
)
def test_expected_shares_are_those_of_the_beta_distribution(tmp_path, drawn, alpha, cdf):
    plot_box_weights(np.array([0.5]), tmp_path / "w.png", alpha=alpha)
    expected = np.diff(cdf(np.linspace(0, 1, 26)))
    np.testing.assert_allclose(bars(drawn[0], 1), expected, atol=1e-3)


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.5], [0.5, float("nan")], [[0.5]]])
def test_bad_weights(tmp_path, weights):
    with pytest.raises(ValueError, match="weights"):
        plot_box_weights(weights, tmp_path / "w.png")
    assert list(tmp_path.iterdir()) == []
