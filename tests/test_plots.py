"""Charts: files are real pictures, all curves are named, bad input is too."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from pngs import check_png

from detmix.evaluation import (
    VOCEvaluator,
    plot_learning_curve,
    plot_precision_recall,
    plots,
)
from detmix.evaluation.metrics import moving_average, read_metrics

CLASSES = [f"class number {i}" for i in range(1, 21)]


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


def assert_apart(figure):
    """Assert that panels, their labels and legends do not overlap or leave the figure."""
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    boxes += [text.get_window_extent() for text in figure.texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


@pytest.mark.parametrize(
    ("num_classes", "num_panels", "narrow"),
    [(1, 1, False), (1, 1, True), (20, 1, False), (21, 2, True), (41, 3, False), (80, 4, True)],
)
def test_precision_recall_curves(tmp_path, drawn, num_classes, num_panels, narrow):
    result = some_result(num_classes)
    path = plot_precision_recall(result, tmp_path / "new folder" / "pr.png", narrow=narrow)
    check_png(path, max_side=6000)
    figure = drawn[0]
    assert len(figure.axes) == len(figure.legends) == num_panels
    for axes in figure.axes:
        styles = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
        assert len(styles) == len(axes.lines) <= 20
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    ranked = sorted(result.ap.items(), key=lambda item: (-np.nan_to_num(item[1], nan=-1), item[0]))
    assert texts == [
        f"{name}  " + ("n/a" if math.isnan(ap) else f"{ap:.3f}") for name, ap in ranked
    ]
    assert_apart(figure)
    assert figure.get_figwidth() == 4.2 if narrow else 7 < figure.get_figwidth() < 11


def test_curves_and_their_best_points(tmp_path, drawn):
    result = some_result(3)
    plot_precision_recall(result, tmp_path / "pr.png")
    ranked = sorted(result.classes[:2], key=lambda name: -result.ap[name])
    assert math.isnan(result.ap[result.classes[2]])
    axes = drawn[0].axes[0]
    for name, line, dot in zip(ranked, axes.lines, axes.collections, strict=True):
        curve = result.curves[name]
        np.testing.assert_array_equal(line.get_xydata().T, [curve.recall, curve.precision])
        f1 = [
            2 * p * r / (p + r) if p + r else 0
            for p, r in zip(curve.precision, curve.recall, strict=True)
        ]
        recall, precision = dot.get_offsets()[0]
        assert 2 * precision * recall / (precision + recall) == pytest.approx(max(f1))


def test_precision_recall_without_anything(tmp_path):
    check_png(plot_precision_recall(VOCEvaluator(CLASSES).compute(), tmp_path / "pr.png"))


@pytest.mark.parametrize("power", [1, 8])
def test_long_curves_are_thinned_out_unseen(power):
    """Within every thousandth of the recall the curve reaches as high and as low as before."""
    rng = np.random.default_rng(0)
    hits = rng.random(100_000) < np.linspace(1, 0, 100_000) ** power
    recall = hits.cumsum() / hits.sum()
    precision = hits.cumsum() / np.arange(1, 100_001)
    thin_recall, thin_precision = plots.thin_out(recall, precision)
    assert len(thin_recall) == len(thin_precision) <= 4 * 1001
    points = set(zip(recall, precision, strict=True))
    assert points.issuperset(zip(thin_recall, thin_precision, strict=True))
    assert (np.diff(thin_recall) >= 0).all()
    place, thin_place = (recall * 1000).astype(int), (thin_recall * 1000).astype(int)
    assert set(place) == set(thin_place)
    for index in set(place):
        before, after = precision[place == index], thin_precision[thin_place == index]
        assert (after.min(), after.max()) == (before.min(), before.max())
        assert (after[0], after[-1]) == (before[0], before[-1])


def test_short_curves_are_drawn_whole():
    recall = np.linspace(0, 1, 500)
    assert plots.thin_out(recall, recall)[0] is recall


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def write_lines(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def train(step, **more):
    return {"event": "train", "step": step, "epoch": step / 10, "loss": 2.0, "lr": 0.01} | more


def test_learning_curve(tmp_path, drawn):
    metrics = write_lines(
        tmp_path / "metrics.jsonl",
        {"event": "start", "versions": {}},
        *[train(step, loss=3 / step, images_per_s=20.0) for step in range(1, 101)],
        "",
        {"event": "eval", "epoch": 1, "step": 50, "mean_ap": None},
        {"event": "eval", "epoch": 2, "step": 100, "mean_ap": 0.625},
    )
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))
    labels = {axes.get_ylabel() for axes in drawn[0].axes}
    assert labels == {"training loss", "learning rate", "mAP"}
    assert legend_texts(drawn[0].axes[2]) == ["mAP, best 0.625 at step 100"]


def test_learning_curve_of_a_classifier(tmp_path, drawn):
    metrics = write_lines(
        tmp_path / "metrics.jsonl",
        *[train(step) for step in range(1, 11)],
        {"event": "eval", "epoch": 1, "step": 5, "top1": 0.25, "top5": 0.5},
        {"event": "eval", "epoch": 2, "step": 10, "top1": 0.2, "top5": 0.5},
    )
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))
    labels = {axes.get_ylabel() for axes in drawn[0].axes}
    assert labels == {"training loss", "learning rate", "top-1 accuracy"}
    assert legend_texts(drawn[0].axes[2]) == [
        "top-1 accuracy, best 0.250 at step 5",
        "top-5 accuracy",
    ]


@pytest.mark.parametrize("narrow", [False, True])
def test_learning_curve_with_coco_scores(tmp_path, drawn, narrow):
    scores = {"mean_ap": 0.75, "ap50": 0.97, "ap75": 0.8, "ap_large": None, "mask_ap": 0.5}
    metrics = write_lines(
        tmp_path / "metrics.jsonl",
        *[train(step, lr=1e-5) for step in range(1000, 90_001, 1000)],
        {"event": "eval", "epoch": 1, "step": 45_000} | scores,
        {"event": "eval", "epoch": 2, "step": 90_000} | dict.fromkeys(scores),
    )
    plot_learning_curve(metrics, tmp_path / "curve.png", narrow=narrow)
    score_axes = drawn[0].axes[2]
    assert legend_texts(score_axes) == ["AP, best 0.750 at step 45,000", "AP50", "mask AP"]
    low, high = score_axes.get_ylim()
    assert low == 0
    assert 0.97 < high <= 1.02
    assert_apart(drawn[0])
    ticks = [t.get_window_extent() for t in score_axes.get_xticklabels() if t.get_text()]
    assert not any(a.overlaps(b) for a, b in pairwise(ticks))


def test_learning_curve_before_the_first_evaluation(tmp_path, drawn):
    metrics = write_lines(tmp_path / "metrics.jsonl", train(1))
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))
    assert len(drawn[0].axes) == 2


def test_one_record_is_seen_and_whole(tmp_path, drawn):
    evaluation = {"event": "eval", "step": 10, "epoch": 1.0, "mean_ap": 0.0}
    plot_learning_curve(
        write_lines(tmp_path / "m.jsonl", train(10), evaluation), tmp_path / "c.png"
    )
    pixels = np.asarray(drawn[0].canvas.buffer_rgba())
    for axes in drawn[0].axes:
        line = axes.lines[-1]
        (place,) = axes.transData.transform(line.get_xydata())
        column, row = round(place[0]), len(pixels) - round(place[1])
        color = np.multiply(to_rgb(line.get_color()), 255)
        for shift in (-2, 2):  # above and below: the score lies on the axis
            np.testing.assert_allclose(pixels[row + shift, column, :3], color, atol=3)


def test_learning_curve_of_an_empty_file(tmp_path):
    metrics = write_lines(tmp_path / "metrics.jsonl")
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))


def test_a_resumed_run_counts_the_later_line(tmp_path):
    metrics = write_lines(
        tmp_path / "metrics.jsonl", train(1), train(2, loss=9.0), train(2, loss=1.0), train(3)
    )
    loss = read_metrics(metrics).train["loss"]
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values.tolist() == [2.0, 1.0, 2.0]


def test_metrics_of_every_name_are_read(tmp_path):
    lines = [
        train(1, loss_box_reg=0.5, note="text", fine=True),
        {"event": "eval", "step": 1, "epoch": 0.1, "mean_ap": None, "ap50": 0.5, "ap_small": None},
        {"event": "other", "anything": "goes"},
    ]
    metrics = read_metrics(write_lines(tmp_path / "metrics.jsonl", *lines))
    assert set(metrics.train) == {"loss", "lr", "loss_box_reg"}
    assert set(metrics.eval) == {"mean_ap", "ap50", "ap_small"}
    assert np.isnan(metrics.eval["mean_ap"].values).tolist() == [True]
    assert metrics.kind == "coco"
    assert metrics.last_step == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "train", "st', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ({"event": "train", "step": 3, "lr": 0.1}, "the train event has no 'loss'"),
        (train(3, loss="high"), "'loss' is 'high', expected a number"),
        (train(3, lr=None), "'lr' is None, expected a number"),
        ({"event": "eval", "mean_ap": 0.5}, "the eval event has no 'step'"),
        ({"event": "eval", "step": 1}, "the eval event has no 'mean_ap'"),
        (train(2.5), "'step' is 2.5, expected a whole number"),
        (train(True), "'step' is True, expected a number"),
    ],
)
def test_broken_metrics_name_file_and_line(tmp_path, line, message):
    metrics = write_lines(tmp_path / "metrics.jsonl", train(1), line, train(2))
    with pytest.raises(ValueError, match=message) as error:
        plot_learning_curve(metrics, tmp_path / "curve.png")
    assert str(error.value).startswith(f"{metrics}, line 2: ")
    assert not (tmp_path / "curve.png").exists()


def test_missing_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        plot_learning_curve(tmp_path / "nowhere.jsonl", tmp_path / "curve.png")


@pytest.mark.parametrize("window", [1, 3, 9, 41])
def test_moving_average(window):
    values = np.random.default_rng(0).normal(size=20)
    half = window // 2
    expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(20)]
    np.testing.assert_allclose(moving_average(values, window), expected, atol=1e-12)
