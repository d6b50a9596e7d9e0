"""Pictures: every box, curve and bar is what it should be, texts are apart, errors are named."""

import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from voc_oracle import evaluate, random_case

from detmix import pictures
from detmix.data import VOC_CLASSES
from detmix.evaluation import analyze_errors, encode_masks
from detmix.evaluation.errors.result import KINDS
from detmix.pictures import style

EIGHTY = [f"class number {i}" for i in range(1, 81)]
CLASSES = EIGHTY[:20]
LONG = "a class with a name too long for any chart, and then some"


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Return a function that draws, panels apart, nothing blank, no name with two $ a formula."""
    figures = []
    save = Figure.savefig

    def savefig(figure, path):
        assert not any(text.get_parse_math() for text in figure.findobj(Text))
        figures.append(figure)
        save(figure, path)

    def draw(plot, *args, **options):
        path = tmp_path / "new" / "picture.png"
        assert plot(*args, path, **options) == path
        with Image.open(path) as picture:
            assert all(200 <= side <= 6000 for side in picture.size)
            assert any(low < high for low, high in picture.convert("RGB").getextrema())
        check_apart(figures[-1], [axes.get_tightbbox() for axes in figures[-1].axes])
        return figures[-1]

    monkeypatch.setattr(Figure, "savefig", savefig)
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


# ----------------------------------------------------------------------------- all pictures


@pytest.mark.parametrize("given", ["a", "v1.5/a", "a.svg"])
def test_the_path_is_that_of_the_file(tmp_path, given):
    path = style.save_figure(style.new_figure(1, 1), f"{tmp_path}/{given}")
    assert path == tmp_path / (given if given.endswith("svg") else f"{given}.png")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_names_are_cut_in_the_middle():
    text = "abcdefghijk"
    assert [style.shorten(text, length) for length in (12, 11, 10, 5, 4, 1)] == [
        *(text, text, "abcde…hijk", "ab…jk", "ab…k", "…"),
    ]


# -------------------------------------------------------------------- boxes on images


def picture(height=90, width=120):
    noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.uint8)


def target(num, height=90, width=120, **extra):
    corners = torch.rand(num, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    boxes = corners.flatten(1) * torch.tensor([width, height] * 2)
    return {"boxes": boxes, "labels": torch.arange(num) + 1} | extra


def labels_of(axes):
    """The texts of the boxes and their colours, in the order drawn; after them those above."""
    num = len(axes.patches)
    texts = [
        (text.get_text(), to_hex(text.get_bbox_patch().get_facecolor()).upper())
        for text in axes.texts
    ]
    return texts[:num], texts[num:]


def test_every_box_of_a_batch_with_its_weight(draw):
    images = [picture(), picture(200, 100) / 255, (picture(40, 60) / 255).bfloat16()]
    weights = torch.tensor([0.7, 0.7, 0.3, 0.3, 0.3])
    targets = [target(5, box_weights=weights), target(0, 200, 100), target(2, 40, 60)]
    panels = first, empty, plain = draw(pictures.plot_batch, images, targets, CLASSES).axes
    heavy, light = style.BOX_COLORS[:2]  # without sources, boxes of equal weight share a colour
    assert {color for text, color in labels_of(first)[0] if text.endswith(" 0.70")} == {heavy}
    assert {color for text, color in labels_of(first)[0] if text.endswith(" 0.30")} == {light}
    assert [text.rsplit(maxsplit=1)[0] for text, _ in labels_of(first)[0]] == [
        f"class number {label}" for label in targets[0]["labels"]
    ]
    boxes = [patch.get_bbox().extents for patch in first.patches]
    np.testing.assert_allclose(boxes, targets[0]["boxes"], rtol=1e-5)
    assert labels_of(empty) == ([], [])
    assert [text[-4:] for text, _ in labels_of(plain)[0]] == ["1.00", "1.00"]
    for axes, image in zip(panels, images, strict=True):
        expected = image if image.dtype == torch.uint8 else (image.float() * 255).round()
        np.testing.assert_array_equal(axes.images[0].get_array(), expected.permute(1, 2, 0))


@pytest.mark.parametrize("num_more", [0, 5])
def test_colors_are_those_of_the_sources(draw, num_more):
    """CutMix gives every object a weight of its own; a partner may have no objects."""
    weights = torch.tensor([0.8, 1.0, 0.5, 0.5, 0.3])
    names = {3: "a.jpg", 11: "empty.jpg", 8: "b.jpg"}
    mix = target(5, box_weights=weights, source=torch.tensor([3, 3, 8, 8, 3]), sources=names)
    alone = target(1, source=torch.tensor([8]), sources={8: "b.jpg"})
    empty = target(0, source=torch.zeros(0, dtype=torch.int64), sources={11: "empty.jpg"})
    more = [target(1, source=torch.tensor([50 + i])) for i in range(num_more)]
    targets = [mix, alone, empty, *more]
    panels = draw(pictures.plot_batch, [picture()] * len(targets), targets, CLASSES).axes
    first, second, third = map(labels_of, panels[:3])
    a, none, b = style.BOX_COLORS[:3]
    assert [color for _, color in first[0]] == [a, a, b, b, a]
    above = [("a.jpg: weight 0.30 to 1.00", a), ("empty.jpg: no objects", none)]
    assert first[1] == [*above, ("b.jpg: weight 0.50", b)][::-1]  # the lowest first
    # In all panels alike, where there are colours enough for all their sources.
    assert [color for _, color in second[0]] == [style.BOX_COLORS[0] if num_more else b]
    assert third[1] == [("empty.jpg: no objects", style.BOX_COLORS[0] if num_more else none)]


@pytest.mark.parametrize("num_images", [1, 5])
def test_panels_and_texts_stay_apart_and_inside(draw, num_images):
    sizes = [(90, 120), (60, 200), (200, 60), (20, 2000), (64, 64)][:num_images]
    images = [picture(*size) for size in sizes]
    sources = {"source": torch.arange(12) % 3, "sources": {n: "long name " * 20 for n in range(3)}}
    targets = [target(12, *size) | sources for size in sizes]
    for one, (height, width) in zip(targets, sizes, strict=True):
        one["boxes"][:3] = torch.tensor([[0, 0, width, height], [width - 3, 0, width, 3], [-5] * 4])
    found = [one | {"scores": torch.ones(12), "outcomes": ["correct"] * 12} for one in targets]
    named = [one | {"missed": [True] * 12, "name": "a name " * 30} for one in targets]
    batch = draw(pictures.plot_batch, images, targets, CLASSES)
    predictions = draw(pictures.plot_predictions, images, found, named, CLASSES)
    alone = draw(pictures.plot_predictions, images, found, None, CLASSES)
    counts = ((batch, num_images), (predictions, 2 * num_images), (alone, num_images))
    for figure, num_panels in counts:
        assert len(figure.axes) == num_panels
        headings = [text for axes in figure.axes for text in axes.texts[12:]]
        boxes = [axes.get_window_extent() for axes in figure.axes]
        check_apart(figure, boxes + extents(headings))
        for label in extents(text for axes in figure.axes for text in axes.texts):
            check_apart(figure, [label], slack=0)


def test_labels_hide_no_other(draw):
    """As many as there is room for, though the boxes are the same."""
    same = target(6, boxes=torch.tensor([[40.0, 30, 80, 60]] * 6))
    figure = draw(pictures.plot_batch, [picture()], [same], CLASSES)
    check_apart(figure, extents(figure.axes[0].texts), slack=0)


def test_outcomes_color_and_name_what_is_wrong(draw):
    kinds = ["correct", "localization", "similar_class", "duplicate", "ignored", "background"]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.1])
    found = target(6) | {"scores": scores, "outcomes": kinds}
    truth = target(4, difficult=torch.tensor([0, 0, 1, 0]), iscrowd=torch.tensor([0, 0, 0, 1]))
    truth |= {"missed": [False, True, False, False], "name": "000123.jpg"}
    panels = draw(pictures.plot_predictions, [picture()], [found], [truth], CLASSES).axes
    (truths, above), (founds, _) = map(labels_of, panels)
    right, wrong, neither = style.BLUE, style.VERMILLION, style.GREY
    # The weakest, from the threshold on, is drawn first.
    assert [(text.split(maxsplit=3)[3], color) for text, color in founds] == [
        ("0.55 ignored", neither), ("0.60 duplicate", wrong), ("0.70 similar class", wrong),
        ("0.80 localization", wrong), ("0.90", right),
    ]  # fmt: skip
    assert [(text.split()[3:], color) for text, color in truths] == [
        ([], right), (["missed"], wrong), (["difficult"], neither), (["crowd"], neither),
    ]  # fmt: skip
    styles = [patch.get_linestyle() != "-" for patch in panels[0].patches]
    assert styles == [False, True, True, True]
    assert [text for text, _ in above] == ["ground truth: 4", "000123.jpg"]


def test_keypoints_are_dots_and_rings(draw):
    points = [[[20.0, 30, 2], [25, 35, 1], [0, 0, 0]], [[80, 50, 2], [90, 60, 2], [99, 70, 1]]]
    one = target(2, keypoints=torch.tensor(points))
    (axes,) = draw(pictures.plot_batch, [picture()], [one], CLASSES).axes
    for marks, rows in zip(axes.collections, points, strict=True):
        seen = [row for row in rows if row[2]]
        # The middle of a pixel is half a pixel from its corner.
        assert marks.get_offsets().tolist() == [[x + 0.5, y + 0.5] for x, y, _ in seen]
        assert [face[3] for face in marks.get_facecolors()] == [v == 2 for *_, v in seen]


def test_predictions_have_masks_and_keypoints(draw):
    """Those of predictions below the threshold are left out; torchvision says 1 of every point."""
    points = torch.tensor([[[10.0, 20.0, 1.0]], [[30.0, 40.0, 1.0]]])
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    masks[0, 50:60, 50:60] = masks[1, 70:80, 100:110] = 1
    black = torch.zeros(3, 90, 120, dtype=torch.uint8)
    found = target(2) | {"scores": torch.tensor([0.9, 0.1]), "keypoints": points}
    found["masks"] = encode_masks(masks)
    _, axes = draw(pictures.plot_predictions, [black], [found], [target(0)], CLASSES).axes
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[10.5, 20.5]]
    assert dots.get_facecolors()[0][3] == 1
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal(shown.any(axis=2), masks[0].bool())
    color = 255 * np.asarray(axes.patches[0].get_edgecolor())[:3]
    np.testing.assert_allclose(shown[55, 55], 0.45 * color, atol=1)


BAD = [
    ([picture()], [], "1 images and 0 targets"),
    ([], [], "0 images"),
    ([picture(), picture()[0]], [target(1)] * 2, r"\(90, 120\)"),
    ([picture()], [target(1) | {"labels": torch.tensor([21])}], r"labels are \[21\]"),
    ([picture()], [target(3, source=torch.tensor([1, 2]))], r"targets\[0\]: 2 source"),
]


@pytest.mark.parametrize(("images", "targets", "message"), BAD)
def test_bad_pictures(tmp_path, images, targets, message):
    with pytest.raises(ValueError, match=message):
        pictures.plot_batch(images, targets, CLASSES, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- charts


def evaluated(classes, num_images=60):
    return evaluate(*random_case(0, num_images, len(classes), limit=300), classes)  # of all sizes


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("classes", "num_panels"), [(VOC_CLASSES, 1), (EIGHTY[:41], 3)])
def test_precision_recall_curves(draw, classes, num_panels):
    result = evaluated(classes).compute()
    panels = draw(pictures.plot_precision_recall, result).axes
    assert len(panels) == num_panels
    ranked = sorted(result.ap.items(), key=lambda item: (-np.nan_to_num(item[1], nan=-1), item[0]))
    assert math.isnan(ranked[-1][1])  # a class without objects
    texts = [f"{name}  {'n/a' if math.isnan(ap) else f'{ap:.4f}'}" for name, ap in ranked]
    assert [text for axes in panels for text in legend_texts(axes)] == texts
    lines = [line for axes in panels for line in axes.lines]
    for (name, _), line, dot in zip(ranked, lines[::2], lines[1::2], strict=True):
        curve, best = result.curves[name], result.curves[name].best_f1()
        np.testing.assert_array_equal(line.get_xydata().T, [curve.recall, curve.precision])
        np.testing.assert_array_equal(dot.get_xydata(), [[best.recall, best.precision]])
    for axes in panels:
        looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines[::2]]
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
    ("classes", "num_images"), [([LONG, "cat", "dog"], 150), (EIGHTY, 150), (VOC_CLASSES, 0)]
)
def test_bars_of_errors_are_the_numbers(draw, classes, num_images):
    """Of the classes with objects, at most 24, those with most errors, the best first."""
    analysis = analyze_errors(evaluated(classes, num_images).matching())
    figure = draw(pictures.plot_errors, analysis)
    check_apart(figure, extents(figure.findobj(Text)), slack=2)
    of_class, gains, missed = map(rows_of, figure.axes)
    counts, expected = analysis.counts["top_n"], {}
    num = {name: num for name, num in analysis.num_objects.items() if num}
    for name in sorted(num, key=lambda name: (counts[name]["correct"] - num[name], name))[:24]:
        lengths = np.array([counts[name][kind] for kind in ("correct", *KINDS)]) / num[name]
        expected[style.shorten(name, 20)] = np.stack(
            [np.cumsum(lengths) - lengths, lengths], axis=1
        )
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
