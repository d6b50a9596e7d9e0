"""Pictures of images: every box with its label, colours that say what they should, errors named."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from pngs import check_png

from detmix.evaluation import encode_masks
from detmix.pictures import draw_boxes, plot_batch, plot_predictions
from detmix.pictures import images as pictures
from detmix.pictures.style import BLUE, BOX_COLORS, VERMILLION, new_figure

CLASSES = [f"class number {i}" for i in range(1, 21)]


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the pictures that are saved, to look at their contents."""
    found = []
    save = pictures.save_figure

    def note(figure, path):
        found.append([axes for axes in figure.axes if axes.images])
        return save(figure, path)

    monkeypatch.setattr(pictures, "save_figure", note)
    return found


def picture(height=90, width=120, dtype=torch.uint8):
    noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.uint8) if dtype == torch.uint8 else (noise / 255).to(dtype)


def target(num, height=90, width=120, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(num, 2, generator=generator) * 0.7
    high = low + torch.rand(num, 2, generator=generator) * (1 - low)
    labels = torch.randint(1, 21, (num,), generator=generator)
    scale = torch.tensor([width, height] * 2)
    return {"boxes": torch.cat([low, high], 1) * scale, "labels": labels} | extra


def label_colors(axes):
    return [to_hex(text.get_bbox_patch().get_facecolor()).upper() for text in axes.texts]


def key_of(axes):
    """The lines above a panel with the colours before them; None for no square."""
    legend = axes.get_legend()
    return {
        text.get_text(): to_hex(patch.get_facecolor()).upper() if patch.get_facecolor()[3] else None
        for text, patch in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


def assert_apart(boxes):
    for i, a in enumerate(boxes):
        assert not any(a.padded(-1).overlaps(b.padded(-1)) for b in boxes[i + 1 :])


def test_every_box_of_a_batch_with_its_weight(tmp_path, drawn):
    images = [picture(), picture(200, 100, torch.float32), picture(40, 60, torch.bfloat16)]
    weights = torch.tensor([0.7, 0.7, 0.3, 0.3, 0.3])
    targets = [target(5, box_weights=weights), target(0, 200, 100), target(2, 40, 60)]
    check_png(plot_batch(images, targets, CLASSES, tmp_path / "new" / "batch.png"))
    first, empty, plain = drawn[0]
    assert [text.get_text() for text in first.texts] == [
        f"class number {label} {weight:.2f}"
        for label, weight in zip(targets[0]["labels"], weights, strict=True)
    ]
    boxes = [patch.get_bbox().extents for patch in first.patches]
    np.testing.assert_allclose(boxes, targets[0]["boxes"], rtol=1e-5)
    # Without sources, boxes of equal weight share a colour, the heaviest the first.
    heavy, light = BOX_COLORS[:2]
    assert label_colors(first) == [heavy] * 2 + [light] * 3
    assert key_of(first) == {"weight 0.70": heavy, "weight 0.30": light}
    assert key_of(empty) == {"no objects": None}
    assert [text.get_text()[-4:] for text in plain.texts] == ["1.00", "1.00"]


def test_colors_are_those_of_the_sources(tmp_path, drawn):
    """CutMix gives every object a weight of its own; a partner may have no objects."""
    weights = torch.tensor([0.8, 1.0, 0.5, 0.5, 0.3])
    names = {3: "a.jpg", 11: "empty.jpg", 8: "b.jpg"}
    mix = target(5, box_weights=weights, source=torch.tensor([3, 3, 8, 8, 3]), sources=names)
    alone = target(1, source=torch.tensor([8]), sources={8: "b.jpg"})
    empty = target(0, source=torch.zeros(0, dtype=torch.int64), sources={11: "empty.jpg"})
    unnamed = target(1, source=torch.tensor([42]))
    plot_batch([picture()] * 4, [mix, alone, empty, unnamed], CLASSES, tmp_path / "a.png")
    first, second, third, fourth = drawn[0]
    a, none, b, other = BOX_COLORS[:4]  # in the order of the sources, in all panels alike
    assert label_colors(first) == [a, a, b, b, a]
    assert label_colors(second) == [b]
    assert key_of(first) == {
        "a.jpg: weights 0.30 to 1.00": a,
        "empty.jpg: no objects": none,
        "b.jpg: weight 0.50": b,
    }
    assert key_of(third) == {"empty.jpg: no objects": none}
    assert key_of(fourth) == {"image 42: weight 1.00": other}


@pytest.mark.parametrize("num_images", [1, 5])
def test_panels_and_what_is_above_them_stay_apart(tmp_path, drawn, num_images):
    sizes = [(90, 120), (60, 200), (200, 60), (20, 2000)] * 2
    images = [picture(*size) for size in sizes[:num_images]]
    sources = {"source": torch.arange(5), "sources": {n: "long name " * 20 for n in range(5)}}
    targets = [target(5, *size) | sources for size in sizes[:num_images]]
    found = [one | {"scores": torch.ones(5)} for one in targets]
    outcomes, missed = [["correct"] * 5] * num_images, [[True] * 5] * num_images
    more = {"outcomes": outcomes, "missed": missed, "titles": ["a name " * 30] * num_images}
    plot_batch(images, targets, CLASSES, tmp_path / "a.png", max_images=4)
    plot_predictions(images, found, targets, CLASSES, tmp_path / "b.png", **more)
    assert [len(panels) for panels in drawn] == [min(num_images, 4), 2 * num_images]
    for panels in drawn:
        figure = panels[0].figure
        boxes = [axes.get_window_extent() for axes in panels]
        boxes += [axes.get_legend().get_window_extent() for axes in panels if axes.get_legend()]
        boxes += [axes._left_title.get_window_extent() for axes in panels if axes.get_title("left")]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        assert_apart(boxes)
        for box in boxes:
            assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
            assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1


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
    true_axes, found_axes = drawn[0]
    grey = (set(label_colors(found_axes)) - {BLUE, VERMILLION}).pop()
    assert label_colors(true_axes) == [BLUE, VERMILLION, grey, grey]
    # The weakest, from the threshold on, is drawn first.
    assert label_colors(found_axes) == [grey, VERMILLION, VERMILLION, VERMILLION, BLUE]
    ends = [text.get_text().split(maxsplit=4)[4:] for text in found_axes.texts]
    assert ends == [["ignored"], ["duplicate"], ["similar class"], ["localization"], []]
    ends = [text.get_text().split(maxsplit=3)[3:] for text in true_axes.texts]
    assert ends == [[], ["missed"], ["difficult"], ["crowd"]]
    assert [p.get_linestyle() != "-" for p in true_axes.patches] == [False, True, True, True]
    assert true_axes.get_title(loc="left") == "000123.jpg\nground truth: 4"
    (legend,) = true_axes.figure.legends
    entries = zip(legend.get_texts(), legend.legend_handles, strict=True)
    assert {t.get_text(): to_hex(p.get_facecolor()).upper() for t, p in entries} == {
        "correct, found": BLUE,
        "false, missed": VERMILLION,
        "does not count": grey,
    }


def own_axes(width=4.0, height=4.0):
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    return figure.add_axes((0, 0, 1, 1), anchor="NW")


@pytest.mark.parametrize("size", [(90, 120), (300, 60), (64, 64), (20, 2000)])
def test_labels_stay_inside_the_room_of_the_axes(size):
    height, width = size
    axes = own_axes()
    some = target(12, height, width)
    edges = torch.tensor([[0, 0, width, height], [width - 3, 0, width, 3], [-5, -5, 2, 2]])
    some["boxes"] = torch.cat([some["boxes"], edges])
    some["labels"] = torch.cat([some["labels"], torch.tensor([1, 2, 20])])
    draw_boxes(axes, picture(height, width), **some, classes=CLASSES, values=[0.5] * 15)
    for text in axes.texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= axes.figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= axes.figure.bbox.y1


def rendered(**overlay):
    """What boxes' colours look like on black: ``(H, W, 3)``, a display pixel per image pixel."""
    axes = own_axes(120 / 120, 96 / 120)
    boxes = torch.tensor([[10.0, 10.0, 60.0, 80.0], [70.0, 40.0, 120.0, 96.0]])
    black = np.zeros((96, 120, 3), np.uint8)
    draw_boxes(axes, black, boxes, torch.tensor([1, 2]), classes=["a", "b"],
               colors=["#FF0000", "#0000FF"], **overlay)  # fmt: skip
    axes.figure.canvas.draw()
    return np.asarray(axes.figure.canvas.buffer_rgba())[..., :3].astype(int), axes


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


def test_predictions_have_masks_and_keypoints(tmp_path, drawn):
    """Those of predictions below the threshold are left out; torchvision says 1 of every point."""
    points = torch.tensor([[[10.0, 20.0, 1.0]], [[30.0, 40.0, 1.0]]])
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    masks[0, 50:60, 50:60] = masks[1, 70:80, 100:110] = 1
    black = torch.zeros(3, 90, 120, dtype=torch.uint8)
    for given in (masks, encode_masks(masks)):
        found = target(2) | {"scores": torch.tensor([0.9, 0.1]), "masks": given,
                             "keypoints": points}  # fmt: skip
        plot_predictions([black], [found], [target(0)], CLASSES, tmp_path / "a.png")
        axes = drawn.pop()[1]
        dots, rings = axes.collections
        assert dots.get_offsets().tolist() == [[10.5, 20.5]]
        assert len(rings.get_offsets()) == 0
        shown = np.asarray(axes.images[0].get_array()).any(axis=2)
        np.testing.assert_array_equal(shown, masks[0].bool())


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([picture()], [], "1 images and 0 targets"),
        ([picture(), picture()[0]], [target(1)] * 2, r"\(90, 120\)"),
        ([picture()], [target(1) | {"labels": torch.tensor([21])}], r"labels are \[21\]"),
        ([picture()], [target(3, source=torch.tensor([1, 2]))], r"targets\[0\]: 2 source for 3"),
        (
            [picture()],
            [{"boxes": torch.full((1, 4), torch.nan), "labels": torch.tensor([1])}],
            r"targets\[0\]: a box",
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
        "from detmix.pictures import plot_batch\n"
        "target = {'boxes': torch.ones(0, 4), 'labels': torch.ones(0, dtype=torch.int64)}\n"
        f"plot_batch([torch.zeros(3, 20, 20)], [target], ['a'], {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
