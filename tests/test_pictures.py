"""Pictures of images: labels stay inside and apart, colours say what they should, errors name."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from pngs import check_png

from detmix.evaluation import draw_boxes, encode_masks, pictures, plot_batch, plot_predictions
from detmix.evaluation.figures import BLUE, BOX_COLORS, VERMILLION, add_axes, new_figure

CLASSES = [f"class number {i}" for i in range(1, 21)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved, to look at their contents."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda fig, path: figures.append(fig))
    return figures


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
    plot_batch(images, targets, CLASSES, tmp_path / "batch.png")
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
    plot_batch(images, targets, CLASSES, tmp_path / "a.png", max_images=5)
    plot_predictions(images, predictions, targets, CLASSES, tmp_path / "b.png")
    assert [len(figure.axes) for figure in drawn] == [min(num_images, 5), 2 * num_images]
    for figure in drawn:
        extents = [axes.get_window_extent() for axes in figure.axes]
        for i, a in enumerate(extents):
            assert not any(a.overlaps(b) for b in extents[i + 1 :])


def label_colors(axes):
    return [to_hex(text.get_bbox_patch().get_facecolor()).upper() for text in axes.texts]


def key_of(axes):
    """The lines above a panel with the colours before them; None for no square."""
    legend = axes.get_legend()
    return {
        text.get_text(): to_hex(patch.get_facecolor()).upper() if patch.get_facecolor()[3] else None
        for text, patch in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


@pytest.mark.parametrize("count", [4, 5, 12])
def test_keys_of_many_weights_stay_apart(tmp_path, drawn, count):
    """Without sources, weights that are all different say little."""
    weights = torch.linspace(0.125, 1, count)
    some = target(count, box_weights=weights)
    plot_batch([picture()] * 4, [some] * 4, CLASSES, tmp_path / "a.png")
    keys = [axes.get_legend() for axes in drawn[0].axes]
    if count > 4:
        assert key_of(drawn[0].axes[0]) == {"weights 0.12 to 1.00": None}
    else:
        assert list(key_of(drawn[0].axes[0]).values()) == label_colors(drawn[0].axes[0])[::-1]
    drawn[0].canvas.draw()
    extents = [key.get_window_extent() for key in keys]
    panels = [axes.get_window_extent() for axes in drawn[0].axes]
    for i, a in enumerate(extents):
        assert drawn[0].bbox.y1 >= a.y1
        assert not any(a.overlaps(b) for b in extents[i + 1 :])
        assert all(a.y0 >= b.y1 - 1 for b in panels)


def test_colors_are_those_of_the_sources(tmp_path, drawn):
    """CutMix gives every object a weight of its own; a partner may have no objects."""
    weights = torch.tensor([0.8, 1.0, 0.5, 0.5, 0.3])
    mix = target(5, box_weights=weights, source=torch.tensor([3, 3, 8, 8, 3]))
    names = {3: "a.jpg", 11: "empty.jpg", 8: "b.jpg"}
    alone = target(1, source=torch.tensor([8]), sources={8: "b.jpg"})
    empty = target(0, source=torch.zeros(0, dtype=torch.int64), sources={11: "empty.jpg"})
    unnamed = target(1, source=torch.tensor([42]))
    plot_batch(
        [picture()] * 4,
        [mix | {"sources": names}, alone, empty, unnamed],
        CLASSES,
        tmp_path / "a.png",
    )
    first, second, third, fourth = drawn[0].axes
    a, none, b = BOX_COLORS[:3]  # in the order of the sources, in all panels alike
    assert label_colors(first) == [a, a, b, b, a]
    assert label_colors(second) == [b]
    assert label_colors(fourth) == [BOX_COLORS[3]]
    assert key_of(first) == {
        "a.jpg: weights 0.30 to 1.00": a,
        "empty.jpg: no objects": none,
        "b.jpg: weight 0.50": b,
    }
    assert key_of(second) == {"b.jpg: weight 1.00": b}
    assert key_of(third) == {"empty.jpg: no objects": none}
    assert key_of(fourth) == {"image 42: weight 1.00": BOX_COLORS[3]}


def test_more_sources_than_colors(tmp_path, drawn):
    """Then a colour is that of the place in the panel; eight in one panel are too many to name."""
    pairs = [target(2, source=torch.tensor([n, n + 1])) for n in range(10, 18)]
    nested = target(8, source=torch.arange(8), sources={n: "long name " * 20 for n in range(8)})
    plot_batch([picture()] * 8, pairs, CLASSES, tmp_path / "a.png")
    plot_batch([picture()], [nested], CLASSES, tmp_path / "b.png")
    for axes in drawn[0].axes:
        assert label_colors(axes) == list(BOX_COLORS[:2])
    (axes,) = drawn[1].axes
    assert len(set(label_colors(axes))) == len(BOX_COLORS)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(texts) == 4
    assert texts[0].startswith("…")
    assert texts[0].endswith("long name : weight 1.00")
    assert texts[-1] == "and 5 more images"
    drawn[1].canvas.draw()
    assert axes.get_legend().get_window_extent().x1 <= drawn[1].bbox.x1


def test_predictions_beside_ground_truth(tmp_path, drawn):
    scores = torch.tensor([0.9, 0.2, 0.5, 0.7])
    difficult = torch.tensor([False, True, False])
    plot_predictions(
        [picture()],
        [target(4, seed=1) | {"scores": scores}],
        [target(3, difficult=difficult)],
        CLASSES,
        tmp_path / "predictions.png",
        score_threshold=0.5,
    )
    truth, predicted = drawn[0].axes
    dashed = [patch.get_linestyle() != "-" for patch in truth.patches]
    assert dashed == [False, True, False]
    assert [t.get_text().split()[-1] for t in predicted.texts] == ["0.50", "0.70", "0.90"]


def test_outcomes_color_and_name_what_is_wrong(tmp_path, drawn):
    kinds = ["correct", "localization", "similar_class", "duplicate", "ignored", "background"]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.1])
    truth = target(4, difficult=torch.tensor([False, False, True, False]))
    plot_predictions(
        [picture()],
        [target(6, seed=1) | {"scores": scores}],
        [truth | {"iscrowd": torch.tensor([0, 0, 0, 1])}],
        CLASSES,
        tmp_path / "predictions.png",
        outcomes=[kinds],
        missed=[[False, True, False, False]],
        titles=["000123.jpg"],
    )
    true_axes, found_axes = drawn[0].axes
    grey = (set(label_colors(found_axes)) - {BLUE, VERMILLION}).pop()
    assert label_colors(true_axes) == [BLUE, VERMILLION, grey, grey]
    # The weakest, from the threshold on, is drawn first.
    assert label_colors(found_axes) == [grey, VERMILLION, VERMILLION, VERMILLION, BLUE]
    words = [text.get_text().split(maxsplit=4) for text in found_axes.texts]  # class number 1 0.55
    assert [parts[4:] for parts in words] == [
        ["ignored"],
        ["duplicate"],
        ["similar class"],
        ["localization"],
        [],
    ]
    ends = [text.get_text().split(maxsplit=3)[3:] for text in true_axes.texts]
    assert ends == [[], ["missed"], ["difficult"], ["crowd"]]
    assert [p.get_linestyle() != "-" for p in true_axes.patches] == [False, True, True, True]
    widths = [patch.get_linewidth() for patch in true_axes.patches]
    assert widths[1] > widths[0] == widths[2]
    assert true_axes.get_title(loc="left") == "ground truth: 4, 1 missed"
    title = "predictions of score ≥ 0.5: 5, 3 false, 1 ignored"
    assert found_axes.get_title(loc="left") == title
    assert [text.get_text() for text in drawn[0].texts] == ["000123.jpg"]
    (legend,) = drawn[0].legends
    entries = zip(legend.get_texts(), legend.legend_handles, strict=True)
    assert {t.get_text(): to_hex(p.get_facecolor()).upper() for t, p in entries} == {
        "correct, found": BLUE,
        "false, missed": VERMILLION,
        "does not count": grey,
    }


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize("title", ["000123.jpg", "a long title " * 30])
def test_titles_and_panels_stay_apart(tmp_path, drawn, columns, title):
    found = target(2) | {"scores": torch.ones(2)}
    plot_predictions(
        [picture(), picture(60, 200), picture(200, 60)],
        [found] * 3,
        [target(2)] * 3,
        CLASSES,
        tmp_path / "a.png",
        outcomes=[["correct"] * 2] * 3,
        missed=[[False, True]] * 3,
        titles=[title] * 3,
        columns=columns,
    )
    (figure,) = drawn
    figure.canvas.draw()
    panels = [axes.get_window_extent() for axes in figure.axes]
    texts = [text.get_window_extent() for text in figure.texts]
    texts += [axes._left_title.get_window_extent() for axes in figure.axes]
    everything = [*panels, *texts, figure.legends[0].get_window_extent()]
    for i, a in enumerate(everything):
        assert not any(a.padded(-0.5).overlaps(b.padded(-0.5)) for b in everything[i + 1 :])
        assert figure.bbox.x0 <= a.x0 < a.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= a.y0 < a.y1 <= figure.bbox.y1
    assert len({round(panel.x0) for panel in panels}) == columns
    for truth, predicted in zip(panels[::2], panels[1::2], strict=True):
        assert truth.y0 > predicted.y1 if columns == 1 else truth.x1 < predicted.x0


def test_one_column_of_a_batch(tmp_path, drawn):
    plot_batch([picture()] * 3, [target(1)] * 3, CLASSES, tmp_path / "a.png", columns=1)
    assert len({axes.get_window_extent().x0 for axes in drawn[0].axes}) == 1
    width, height = drawn[0].get_size_inches()
    assert width == pytest.approx(4.2, abs=0.1)
    assert height > 2 * width


@pytest.mark.parametrize(
    "threshold",
    [
        [0.5] * 10 + [0.8] * 10,
        {name: 0.5 if number < 10 else 0.8 for number, name in enumerate(CLASSES)},
    ],
)
def test_a_threshold_for_each_class(tmp_path, drawn, threshold):
    labels = torch.tensor([1, 10, 11, 20, 1])
    scores = torch.tensor([0.5, 0.7, 0.7, 0.8, 0.4])
    found = target(5) | {"labels": labels, "scores": scores}
    args = ([picture()], [found], [target(0)], CLASSES, tmp_path / "a.png")
    plot_predictions(*args, threshold)
    plot_predictions(*args, [float("nan")] * 20)
    shown = [[text.get_text() for text in figure.axes[1].texts] for figure in drawn]
    assert shown == [["class number 1 0.50", "class number 10 0.70", "class number 20 0.80"], []]
    title = drawn[0].axes[1].get_title(loc="left")
    assert title == "predictions ≥ class threshold: 3"


def test_files_are_pictures(tmp_path):
    found = mixed(1, 1) | {"scores": torch.ones(2)}
    check_png(plot_batch([picture()] * 5, [mixed(2, 1)] * 5, CLASSES, tmp_path / "new" / "a.png"))
    check_png(plot_predictions([picture()], [found], [target(3)], CLASSES, tmp_path / "b.png"))


def test_nothing_to_draw(tmp_path):
    check_png(plot_batch([], [], CLASSES, tmp_path / "a.png"))
    check_png(plot_predictions([], [], [], CLASSES, tmp_path / "b.png"))
    nothing = target(0) | {"scores": torch.zeros(0)}
    check_png(plot_predictions([picture()], [nothing], [nothing], CLASSES, tmp_path / "c.png"))


@pytest.mark.parametrize("size", [(90, 120), (300, 60), (64, 64), (20, 2000)])
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


def test_long_names_are_cut_and_many_labels_small():
    figure = new_figure(4, 4)
    axes = add_axes(figure, 0, 0, 4, 4)
    some = target(60)
    classes = [f"{'word ' * 30}{number:02}" for number in range(1, 21)]
    draw_boxes(axes, picture(), **some, classes=classes, notes=["similar class"] * 60)
    for text, label in zip(axes.texts, some["labels"], strict=True):
        assert text.get_text().endswith(f"word {label:02} similar class")
        assert "…" in text.get_text()
    assert 4.5 <= axes.texts[0].get_fontsize() < 8


@pytest.mark.parametrize("columns", [1, 2])
def test_flat_images_leave_room_for_labels(tmp_path, drawn, columns):
    flat = picture(20, 2000)
    targets = [target(3, 20, 2000, seed) for seed in range(4)]
    plot_batch([flat] * 4, targets, CLASSES, tmp_path / "a.png", columns=columns)
    (figure,) = drawn
    figure.canvas.draw()
    for axes in figure.axes:
        panel = axes.get_window_extent()
        labels = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
        assert panel.height >= 2 * max(label.height for label in labels)
        assert min(label.y0 for label in labels) >= panel.y0 - 1
        assert max(label.y1 for label in labels) <= panel.y1 + 1
        image = axes.images[0].get_window_extent()
        assert image.width == pytest.approx(100 * image.height)
        assert image.y1 == pytest.approx(panel.y1)
    panels = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(panels) for b in panels[i + 1 :])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", ["predictions", "targets"])
def test_boxes_that_cannot_be_drawn_are_named(tmp_path, bad, value):
    records = {"predictions": target(3) | {"scores": torch.ones(3)}, "targets": target(3)}
    records[bad]["boxes"][1, 2] = value
    lists = {name: [target(0) | {"scores": torch.ones(0)}, one] for name, one in records.items()}
    with pytest.raises(ValueError, match=rf"{bad}\[1\]: boxes\[1\] is .*{value}.*finite"):
        plot_predictions([picture()] * 2, **lists, classes=CLASSES, path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


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


def rendered(**overlay):
    """What boxes' colours look like on black: ``(H, W, 3)``, a display pixel per image pixel."""
    height, width = 96, 120
    figure = new_figure(width / 120, height / 120)
    axes = add_axes(figure, 0, 0, width / 120, height / 120)
    boxes = torch.tensor([[10.0, 10.0, 60.0, 80.0], [70.0, 40.0, 120.0, 96.0]])
    labels = torch.tensor([1, 2])
    draw_boxes(axes, np.zeros((height, width, 3), np.uint8), boxes, labels, classes=CLASSES,
               colors=["#FF0000", "#0000FF"], font_size=4.5, **overlay)  # fmt: skip
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int), axes


def two_masks():
    masks = torch.zeros(2, 96, 120, dtype=torch.uint8)
    masks[0, 30:70, 20:50] = 1
    masks[0, 45:55, 30:40] = 0  # a hole
    masks[1, 60:, 80:] = 1  # to the image's border
    return masks


def test_masks_are_filled_with_their_color():
    plain, (found, _) = rendered()[0], rendered(masks=two_masks())
    tint = found - plain
    inside = [np.zeros((96, 120), bool) for _ in range(2)]
    inside[0][33:42, 24:48] = inside[1][64:90, 84:114] = True
    for channel, region in ((0, inside[0]), (2, inside[1])):
        assert (tint[region][:, channel] > 60).all()
        assert (np.delete(tint[region], channel, axis=1) == 0).all()
    assert (tint[47:53, 32:38] == 0).all()
    assert (tint[:28] == 0).all()


@pytest.mark.parametrize("form", ["bool", "probabilities", "run lengths", "numpy"])
def test_masks_come_in_any_form(form):
    masks = two_masks()
    given = {
        "bool": masks.bool(),
        "probabilities": masks[:, None] * 0.6 + 0.2,
        "run lengths": encode_masks(masks),
        "numpy": masks.numpy(),
    }[form]
    np.testing.assert_array_equal(rendered(masks=given)[0], rendered(masks=masks)[0])


def test_no_masks_and_empty_masks():
    plain = rendered()[0]
    np.testing.assert_array_equal(rendered(masks=torch.zeros(2, 96, 120))[0], plain)
    axes = add_axes(new_figure(1, 1), 0, 0, 1, 1)
    nothing = target(0)
    for masks in (torch.zeros(0, 90, 120), []):
        draw_boxes(axes, picture(), **nothing, classes=CLASSES, masks=masks,
                   keypoints=torch.zeros(0, 3))  # fmt: skip


def test_keypoints_are_dots_and_rings():
    points = torch.tensor(
        [
            [[20.0, 30.0, 2], [25.0, 35.0, 1], [0, 0, 0]],
            [[80.0, 50.0, 2], [90.0, 60.0, 2], [99.0, 70.0, 1]],
        ]
    )
    _, axes = rendered(keypoints=points)
    drawn = [
        (tuple(place), to_hex(marks.get_edgecolors()[0]), len(marks.get_facecolors()) > 0)
        for marks in axes.collections
        for place in marks.get_offsets().tolist()
    ]
    red, blue = "#ff0000", "#0000ff"
    assert drawn == [  # the middle of a pixel is half a pixel from its corner
        ((20.5, 30.5), red, True),
        ((25.5, 35.5), red, False),
        ((80.5, 50.5), blue, True),
        ((90.5, 60.5), blue, True),
        ((99.5, 70.5), blue, False),
    ]
    _, axes = rendered(keypoints=points[..., :2])
    assert sum(len(m.get_offsets()) for m in axes.collections if len(m.get_facecolors())) == 6


def test_predictions_have_masks_and_keypoints(tmp_path, drawn):
    """Those of predictions below the threshold are left out; torchvision says 1 of every point."""
    points = torch.tensor([[[10.0, 20.0, 1.0]], [[30.0, 40.0, 1.0]]])
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    masks[0, 50:60, 50:60] = masks[1, 70:80, 100:110] = 1
    for given in (masks, encode_masks(masks)):
        found = target(2) | {"scores": torch.tensor([0.9, 0.1]), "masks": given,
                             "keypoints": points}  # fmt: skip
        plot_predictions([picture()], [found], [target(0)], CLASSES, tmp_path / "a.png")
        axes = drawn.pop().axes[1]
        *shapes, dots, rings = axes.collections
        assert dots.get_offsets().tolist() == [[10.5, 20.5]]
        assert len(rings.get_offsets()) == 0
        for shape in shapes:
            box = shape.get_paths()[0].get_extents().extents
            np.testing.assert_allclose(box, [50, 50, 60, 60], atol=0.5)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"masks": torch.zeros(1, 96, 120)}, "masks has 1 entries for 2 boxes"),
        ({"keypoints": torch.zeros(3, 4, 3)}, "keypoints has 3 entries for 2 boxes"),
        ({"notes": ["missed"]}, "notes has 1 entries for 2 boxes"),
        ({"thick": [True]}, "thick has 1 entries"),
        ({"masks": torch.zeros(2, 90, 120)}, r"masks\[0\] is of size \(90, 120\), the image of"),
        ({"masks": torch.zeros(2, 3, 96, 120)}, r"shape \(2, 3, 96, 120\), expected \(N, H, W\)"),
        ({"masks": [{"size": [96, 120], "counts": [5]}] * 2}, r"masks\[0\].*cover 5 pixels"),
        ({"keypoints": torch.zeros(2, 4)}, r"shape \(2, 4\), expected \(N, K, 3\)"),
    ],
)
def test_bad_overlays(overlay, message):
    with pytest.raises(ValueError, match=message):
        rendered(**overlay)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"titles": []}, "1 images, 1 predictions, 1 targets, 0 titles, expected as many of each"),
        ({"outcomes": [["correct"] * 2]}, "outcomes and missed go together"),
        (
            {"outcomes": [["correct"]], "missed": [[True]]},
            r"outcomes\[0\] has 1 entries for 2 boxes",
        ),
        ({"outcomes": [["correct"] * 2], "missed": [[]]}, r"missed\[0\] has 0 entries for 1 boxes"),
        (
            {"outcomes": [["correct", "wrong"]], "missed": [[True]]},
            r"outcomes\[0\]\[1\] is 'wrong', expected correct, ignored",
        ),
        ({"columns": 3}, "columns must be 1 or a multiple of 2, got 3"),
        ({"columns": 0}, "got 0"),
        ({"score_threshold": [0.5] * 3}, "score_threshold has 3 entries, .* the 20 classes"),
        (
            {"score_threshold": {"class number 1": 1}},
            "score_threshold has none for 'class number 2'",
        ),
    ],
)
def test_bad_choices(tmp_path, more, message):
    found = target(2) | {"scores": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        plot_predictions([picture()], [found], [target(1)], CLASSES, tmp_path / "a.png", **more)
    assert list(tmp_path.iterdir()) == []


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
        (
            [picture()],
            [target(3, source=torch.tensor([1, 2]))],
            r"targets\[0\]: 'source' has 2 entries for 3 boxes",
        ),
        ([picture()], [target(1, box_weights=torch.ones(2))], "'box_weights' has 2 entries"),
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
