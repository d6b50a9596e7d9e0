"""Pictures of images: every box with its text, colours that say what they should, errors named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from pngs import check_png

import detmix.pictures
from detmix.evaluation import encode_masks
from detmix.pictures import plot_batch, plot_predictions
from detmix.pictures.style import BLUE, BOX_COLORS, GREY, VERMILLION

CLASSES = [f"class number {i}" for i in range(1, 21)]


@pytest.fixture
def drawn(monkeypatch):
    """The panels of each picture that is saved."""
    found = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: found.append(figure.axes) or save(figure, path)
    )
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


def labels_of(axes):
    """The texts of the boxes and their colours, in the order drawn; after them those above."""
    num = len(axes.patches)
    texts = [
        (text.get_text(), to_hex(text.get_bbox_patch().get_facecolor()).upper())
        for text in axes.texts
    ]
    return texts[:num], texts[num:]


def test_every_box_of_a_batch_with_its_weight(tmp_path, drawn):
    images = [picture(), picture(200, 100, torch.float32), picture(40, 60, torch.bfloat16)]
    weights = torch.tensor([0.7, 0.7, 0.3, 0.3, 0.3])
    targets = [target(5, box_weights=weights), target(0, 200, 100), target(2, 40, 60)]
    check_png(plot_batch(images, targets, CLASSES, tmp_path / "new" / "batch.png"))
    first, empty, plain = drawn[0]
    heavy, light = BOX_COLORS[:2]  # without sources, boxes of equal weight share a colour
    assert {color for text, color in labels_of(first)[0] if text.endswith(" 0.70")} == {heavy}
    assert {color for text, color in labels_of(first)[0] if text.endswith(" 0.30")} == {light}
    assert [text.rsplit(maxsplit=1)[0] for text, _ in labels_of(first)[0]] == [
        f"class number {label}" for label in targets[0]["labels"]
    ]
    boxes = [patch.get_bbox().extents for patch in first.patches]
    np.testing.assert_allclose(boxes, targets[0]["boxes"], rtol=1e-5)
    assert labels_of(empty) == ([], [])
    assert [text[-4:] for text, _ in labels_of(plain)[0]] == ["1.00", "1.00"]
    for axes, image in zip(drawn[0], images, strict=True):
        expected = image if image.dtype == torch.uint8 else (image.float() * 255).round()
        np.testing.assert_array_equal(axes.images[0].get_array(), expected.permute(1, 2, 0))


@pytest.mark.parametrize("num_more", [0, 5])
def test_colors_are_those_of_the_sources(tmp_path, drawn, num_more):
    """CutMix gives every object a weight of its own; a partner may have no objects."""
    weights = torch.tensor([0.8, 1.0, 0.5, 0.5, 0.3])
    names = {3: "a.jpg", 11: "empty.jpg", 8: "b.jpg"}
    mix = target(5, box_weights=weights, source=torch.tensor([3, 3, 8, 8, 3]), sources=names)
    alone = target(1, source=torch.tensor([8]), sources={8: "b.jpg"})
    empty = target(0, source=torch.zeros(0, dtype=torch.int64), sources={11: "empty.jpg"})
    more = [target(1, source=torch.tensor([50 + i])) for i in range(num_more)]
    targets = [mix, alone, empty, *more]
    plot_batch([picture()] * len(targets), targets, CLASSES, tmp_path / "a.png")
    first, second, third = map(labels_of, drawn[0][:3])
    a, none, b = BOX_COLORS[:3]
    assert [color for _, color in first[0]] == [a, a, b, b, a]
    above = [("a.jpg: weight 0.30 to 1.00", a), ("empty.jpg: no objects", none)]
    assert first[1] == [*above, ("b.jpg: weight 0.50", b)][::-1]  # the lowest first
    # In all panels alike, where there are colours enough for all their sources.
    assert [color for _, color in second[0]] == [BOX_COLORS[0] if num_more else b]
    assert third[1] == [("empty.jpg: no objects", BOX_COLORS[0] if num_more else none)]


@pytest.mark.parametrize("num_images", [1, 5])
def test_panels_and_texts_stay_apart_and_inside(tmp_path, drawn, num_images):
    sizes = [(90, 120), (60, 200), (200, 60), (20, 2000), (64, 64)][:num_images]
    images = [picture(*size) for size in sizes]
    sources = {"source": torch.arange(12) % 3, "sources": {n: "long name " * 20 for n in range(3)}}
    targets = [target(12, *size) | sources for size in sizes]
    for one, (height, width) in zip(targets, sizes, strict=True):
        one["boxes"][:3] = torch.tensor([[0, 0, width, height], [width - 3, 0, width, 3], [-5] * 4])
    found = [one | {"scores": torch.ones(12), "outcomes": ["correct"] * 12} for one in targets]
    named = [one | {"missed": [True] * 12, "name": "a name " * 30} for one in targets]
    plot_batch(images, targets, CLASSES, tmp_path / "a.png")
    plot_predictions(images, found, named, CLASSES, tmp_path / "b.png")
    assert [len(panels) for panels in drawn] == [num_images, 2 * num_images]
    for panels in drawn:
        figure = panels[0].figure
        boxes = [axes.get_window_extent() for axes in panels]
        boxes += [text.get_window_extent() for axes in panels for text in axes.texts[12:]]
        for i, a in enumerate(boxes):
            assert not any(a.padded(-1).overlaps(b.padded(-1)) for b in boxes[i + 1 :])
        for box in boxes + [text.get_window_extent() for axes in panels for text in axes.texts]:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert 0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_labels_hide_no_other(tmp_path, drawn):
    """As many as there is room for, though the boxes are the same."""
    same = {"boxes": torch.tensor([[40.0, 30, 80, 60]]).repeat(6, 1), "labels": torch.arange(6) + 1}
    plot_batch([picture()], [same], CLASSES, tmp_path / "a.png")
    boxes = [text.get_window_extent() for text in drawn[0][0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_outcomes_color_and_name_what_is_wrong(tmp_path, drawn):
    kinds = ["correct", "localization", "similar_class", "duplicate", "ignored", "background"]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.1])
    found = target(6, seed=1) | {"scores": scores, "outcomes": kinds}
    truth = target(4, difficult=torch.tensor([0, 0, 1, 0]), iscrowd=torch.tensor([0, 0, 0, 1]))
    truth |= {"missed": [False, True, False, False], "name": "000123.jpg"}
    plot_predictions([picture()], [found], [truth], CLASSES, tmp_path / "predictions.png")
    (truths, above), (founds, _) = map(labels_of, drawn[0])
    assert [color for _, color in truths] == [BLUE, VERMILLION, GREY, GREY]
    # The weakest, from the threshold on, is drawn first.
    assert [color for _, color in founds] == [GREY, VERMILLION, VERMILLION, VERMILLION, BLUE]
    ends = [text.split(maxsplit=4)[3:] for text, _ in founds]
    assert ends == [
        ["0.55", "ignored"], ["0.60", "duplicate"], ["0.70", "similar class"],
        ["0.80", "localization"], ["0.90"],
    ]  # fmt: skip
    assert [text.split()[3:] for text, _ in truths] == [[], ["missed"], ["difficult"], ["crowd"]]
    styles = [patch.get_linestyle() != "-" for patch in drawn[0][0].patches]
    assert styles == [False, True, True, True]
    assert [text for text, _ in above] == ["ground truth: 4", "000123.jpg"]


def test_keypoints_are_dots_and_rings(tmp_path, drawn):
    points = [[[20.0, 30, 2], [25, 35, 1], [0, 0, 0]], [[80, 50, 2], [90, 60, 2], [99, 70, 1]]]
    plot_batch(
        [picture()], [target(2, keypoints=torch.tensor(points))], CLASSES, tmp_path / "a.png"
    )
    for marks, rows in zip(drawn[0][0].collections, points, strict=True):
        seen = [row for row in rows if row[2]]
        # The middle of a pixel is half a pixel from its corner.
        assert marks.get_offsets().tolist() == [[x + 0.5, y + 0.5] for x, y, _ in seen]
        assert [face[3] for face in marks.get_facecolors()] == [v == 2 for *_, v in seen]


def test_predictions_have_masks_and_keypoints(tmp_path, drawn):
    """Those of predictions below the threshold are left out; torchvision says 1 of every point."""
    points = torch.tensor([[[10.0, 20.0, 1.0]], [[30.0, 40.0, 1.0]]])
    masks = torch.zeros(2, 90, 120, dtype=torch.uint8)
    masks[0, 50:60, 50:60] = masks[1, 70:80, 100:110] = 1
    black = torch.zeros(3, 90, 120, dtype=torch.uint8)
    found = target(2) | {"scores": torch.tensor([0.9, 0.1]), "keypoints": points}
    for given in (masks, encode_masks(masks)):
        plot_predictions([black], [found | {"masks": given}], [target(0)], CLASSES, tmp_path / "a")
        axes = drawn.pop()[1]
        (dots,) = axes.collections
        assert dots.get_offsets().tolist() == [[10.5, 20.5]]
        assert dots.get_facecolors()[0][3] == 1
        shown = np.asarray(axes.images[0].get_array())
        np.testing.assert_array_equal(shown.any(axis=2), masks[0].bool())
        color = 255 * np.asarray(axes.patches[0].get_edgecolor())[:3]
        np.testing.assert_allclose(shown[55, 55], 0.45 * color, atol=1)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([picture()], [], "1 images and 0 targets"),
        ([], [], "0 images"),
        ([picture(), picture()[0]], [target(1)] * 2, r"\(90, 120\)"),
        ([picture()], [target(1) | {"labels": torch.tensor([21])}], r"labels are \[21\]"),
        ([picture()], [target(3, source=torch.tensor([1, 2]))], r"targets\[0\]: 2 source"),
    ],
)
def test_bad_pictures(tmp_path, images, targets, message):
    with pytest.raises(ValueError, match=message):
        plot_batch(images, targets, CLASSES, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_not_involved():
    """Its global state, backends and warnings stay out of training runs."""
    files = list(Path(detmix.pictures.__file__).parent.glob("*.py"))
    lines = [line for path in files for line in path.read_text().splitlines()]
    imports = [line for line in lines if line.split()[:1] in (["from"], ["import"])]
    assert any("matplotlib" in line for line in imports)
    assert not any("pyplot" in line for line in imports)
