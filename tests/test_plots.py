"""Figures: files are real pictures, labels stay inside and apart, bad input is named."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from detmix.evaluation import (
    VOCEvaluator,
    draw_boxes,
    pictures,
    plot_batch,
    plot_learning_curve,
    plot_precision_recall,
    plot_predictions,
    plots,
)
from detmix.evaluation.figures import BOX_COLORS, LINE_COLORS, add_axes, new_figure

CLASSES = [f"class number {i}" for i in range(1, 21)]


def check_png(path, min_width=300, min_height=200, max_side=2500):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        width, height = picture.size
        colors = picture.convert("RGB").getcolors(1 << 24)
    assert min_width <= width <= max_side
    assert min_height <= height <= max_side
    assert len(colors) > 1  # not blank
    return width, height


@pytest.fixture
def drawn(monkeypatch):
    """The figures that the picture makers save, to look at their contents."""
    figures = []
    for module in (pictures, plots):
        save = module.save_figure
        monkeypatch.setattr(
            module,
            "save_figure",
            lambda fig, path, save=save: figures.append(fig) or save(fig, path),
        )
    return figures


# ------------------------------------------------------------------------------------------ curves


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


@pytest.mark.parametrize("num_classes", [1, 20, 60])
def test_precision_recall_curves(tmp_path, drawn, num_classes):
    result = some_result(num_classes)
    path = plot_precision_recall(result, tmp_path / "new folder" / "pr.png")
    check_png(path)
    axes = drawn[0].axes[0]
    assert len(axes.lines) == num_classes
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(styles) == min(num_classes, 4 * len(LINE_COLORS))
    legend = axes.get_legend()
    texts = [text.get_text() for text in legend.get_texts()]
    assert sorted(texts) == sorted(
        f"{name}  " + ("n/a" if math.isnan(ap) else f"{ap:.3f}") for name, ap in result.ap.items()
    )
    box, whole = legend.get_window_extent(), drawn[0].bbox
    assert box.x0 >= axes.get_window_extent().x1  # beside the curves
    assert box.x1 <= whole.x1
    assert box.y0 >= whole.y0


def test_precision_recall_without_anything(tmp_path):
    check_png(plot_precision_recall(VOCEvaluator(CLASSES).compute(), tmp_path / "pr.png"))


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
    texts = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    assert texts == ["best 0.625 at step 100"]


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
    texts = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    assert texts == ["best 0.250 at step 5"]


def test_learning_curve_before_the_first_evaluation(tmp_path, drawn):
    metrics = write_lines(tmp_path / "metrics.jsonl", train(1))
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))
    assert len(drawn[0].axes) == 2


def test_learning_curve_of_an_empty_file(tmp_path):
    metrics = write_lines(tmp_path / "metrics.jsonl")
    check_png(plot_learning_curve(metrics, tmp_path / "curve.png"))


def test_a_resumed_run_counts_the_later_line(tmp_path):
    metrics = write_lines(
        tmp_path / "metrics.jsonl", train(1), train(2, loss=9.0), train(2, loss=1.0), train(3)
    )
    loss = plots.read_metrics(metrics).loss
    assert loss.steps.tolist() == [1, 2, 3]
    assert loss.values.tolist() == [2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "train", "st', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ({"event": "train", "step": 3, "lr": 0.1}, "the train event has no 'loss'"),
        (train(3, loss="high"), "'loss' is 'high', expected a number"),
        (train(3, lr=None), "'lr' is None, expected a number"),
        ({"event": "eval", "mean_ap": 0.5}, "the eval event has no 'step'"),
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
    np.testing.assert_allclose(plots.moving_average(values, window), expected, atol=1e-12)


# ---------------------------------------------------------------------------------------- pictures


def picture(height=90, width=120, dtype=torch.uint8):
    noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.uint8) if dtype == torch.uint8 else (noise / 255).to(dtype)


def target(num, height=90, width=120, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 0.7
    high = low + torch.rand(num, 2, generator=generator) * (1 - low)
    scale = torch.tensor([width, height] * 2)
    labels = torch.randint(1, 21, (num,), generator=generator)
    return {"boxes": torch.cat([low, high], 1) * scale, "labels": labels} | extra


def mixed(num_heavy, num_light, **size):
    weights = torch.tensor([0.7] * num_heavy + [0.3] * num_light)
    return target(num_heavy + num_light, **size, box_weights=weights)


def test_batch_labels_and_colors(tmp_path, drawn):
    images = [picture(), picture(200, 100, torch.float32), picture(40, 60, torch.bfloat16)]
    targets = [mixed(2, 3), target(0, 200, 100), target(2, 40, 60)]
    check_png(plot_batch(images, targets, CLASSES, tmp_path / "batch.png"))
    first, empty, plain = drawn[0].axes
    expected = [
        f"class number {label} {weight:.2f}"
        for label, weight in zip(targets[0]["labels"], targets[0]["box_weights"], strict=True)
    ]
    assert [text.get_text() for text in first.texts] == expected
    colors = [text.get_bbox_patch().get_facecolor() for text in first.texts]
    assert len(set(colors[:2])) == len(set(colors[2:])) == 1
    assert colors[0] != colors[2]
    assert not empty.texts
    assert [text.get_text()[-4:] for text in plain.texts] == ["1.00", "1.00"]


@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 8])
def test_grids_have_a_panel_for_each_image(tmp_path, drawn, num_images):
    images, targets = [picture()] * num_images, [target(1)] * num_images
    predictions = [t | {"scores": torch.ones(1)} for t in targets]
    check_png(plot_batch(images, targets, CLASSES, tmp_path / "a.png", max_images=5))
    check_png(plot_predictions(images, predictions, targets, CLASSES, tmp_path / "b.png"))
    assert [len(figure.axes) for figure in drawn] == [min(num_images, 5), 2 * num_images]
    for figure in drawn:
        extents = [axes.get_window_extent() for axes in figure.axes]
        for i, a in enumerate(extents):
            assert not any(a.overlaps(b) for b in extents[i + 1 :])


@pytest.mark.parametrize("count", [4, 5, 12])
def test_titles_of_many_weights_stay_apart(tmp_path, drawn, count):
    """CutMix gives every object a weight of its own."""
    weights = torch.linspace(0.125, 1, count)
    some = target(count, box_weights=weights)
    plot_batch([picture()] * 4, [some] * 4, CLASSES, tmp_path / "a.png")
    titles = [axes.title if axes.get_title() else axes._left_title for axes in drawn[0].axes]
    assert "0.12" in titles[0].get_text()
    assert "1.00" in titles[0].get_text()
    drawn[0].canvas.draw()
    extents = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[i + 1 :])


def test_predictions_beside_ground_truth(tmp_path, drawn):
    scores = torch.tensor([0.9, 0.2, 0.5, 0.7])
    difficult = torch.tensor([False, True, False])
    path = plot_predictions(
        [picture()],
        [target(4, seed=1) | {"scores": scores}],
        [target(3, difficult=difficult)],
        CLASSES,
        tmp_path / "predictions.png",
        score_threshold=0.5,
    )
    check_png(path)
    truth, predicted = drawn[0].axes
    dashed = [patch.get_linestyle() != "-" for patch in truth.patches]
    assert dashed == [False, True, False]
    assert [t.get_text().split()[-1] for t in predicted.texts] == ["0.50", "0.70", "0.90"]


def test_nothing_to_draw(tmp_path):
    check_png(plot_batch([], [], CLASSES, tmp_path / "a.png"))
    check_png(plot_predictions([], [], [], CLASSES, tmp_path / "b.png"))
    nothing = target(0) | {"scores": torch.zeros(0)}
    check_png(plot_predictions([picture()], [nothing], [nothing], CLASSES, tmp_path / "c.png"))


@pytest.mark.parametrize("size", [(90, 120), (300, 60), (64, 64)])
def test_labels_stay_inside_the_image(size):
    height, width = size
    figure = new_figure(4, 4)
    axes = add_axes(figure, 0, 0, 4, 4)
    some = target(12, height, width)
    edges = torch.tensor([[0, 0, width, height], [width - 3, 0, width, 3], [-5, -5, 2, 2]])
    some["boxes"] = torch.cat([some["boxes"], edges])
    some["labels"] = torch.cat([some["labels"], torch.tensor([1, 2, 20])])
    draw_boxes(axes, picture(height, width), **some, classes=CLASSES, values=[0.5] * 15)
    figure.canvas.draw()
    area = axes.get_window_extent()
    for text in axes.texts:
        box = text.get_window_extent()
        assert area.x0 <= box.x0
        assert box.x1 <= area.x1
        assert area.y0 <= box.y0
        assert box.y1 <= area.y1


def test_labels_of_stacked_boxes_do_not_hide_each_other():
    figure = new_figure(4, 4)
    axes = add_axes(figure, 0, 0, 4, 4)
    boxes = torch.tensor([[30.0, 40.0, 90.0, 100.0]] * 5)
    labels = torch.arange(1, 6)
    draw_boxes(axes, picture(128, 128), boxes, labels, classes=CLASSES)
    figure.canvas.draw()
    extents = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[i + 1 :])
    faces = [text.get_bbox_patch().get_facecolor() for text in axes.texts]
    assert len(set(faces)) == 5 <= len(BOX_COLORS)  # a colour for each class


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([picture()], [], "1 images, 0 targets, expected as many of each"),
        ([picture(), picture()[0]], [target(1)] * 2, r"images\[1\] has shape \(90, 120\)"),
        (
            [picture()] * 2,
            [target(1), target(1) | {"labels": torch.tensor([21])}],
            r"targets\[1\]: labels\[0\] is 21, expected 1\.\.20",
        ),
    ],
)
def test_bad_pictures(tmp_path, images, targets, message):
    with pytest.raises(ValueError, match=message):
        plot_batch(images, targets, CLASSES, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_not_involved(tmp_path):
    code = (
        "import sys, torch\n"
        "from detmix.evaluation import plot_batch\n"
        "target = {'boxes': torch.ones(0, 4), 'labels': torch.ones(0, dtype=torch.int64)}\n"
        f"plot_batch([torch.zeros(3, 20, 20)], [target], ['a'], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
