"""Pictures of boxes: each where it should be, in its class's colour; texts are told and apart."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

from detmix import pictures
from detmix.evaluation import encode_masks
from detmix.pictures import style

CLASSES = [f"class number {i}" for i in range(1, 46)]
COLORS = style.CLASS_COLORS
WIDTH, GAP = 480, 10  # of a panel and around it, in pixels
NO_OBJECTS = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


class Drawn:
    """What Pillow was told to draw, and the picture that came of it."""

    def __init__(self, calls, path):
        self.picture = Image.open(path).convert("RGB")
        texts = [(one, two) for one, two in pairwise([("", {}), *calls]) if two[0] == "text"]
        # A label's text follows its background.
        self.labels = [
            (two[1]["text"], one[1]["fill"]) for one, two in texts if one[0] == "rectangle"
        ]
        self.headings = [two[1]["text"] for one, two in texts if one[0] != "rectangle"]
        self.rectangles = [one[1]["box"] for one, _ in texts if one[0] == "rectangle"]
        self.texts = [(two[1]["box"], two[1]["size"]) for _, two in texts]
        self.frames = [
            (of["outline"], of["box"]) for name, of in calls if of.get("outline") in COLORS
            and name == "rectangle" and "fill" not in of
        ]  # fmt: skip
        self.circles = [of for name, of in calls if name == "ellipse"]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Return a function that draws, and returns what."""
    calls = []

    def recorder(name, original):
        def record(canvas, where, text=None, **options):
            given = () if text is None else (text,)
            original(canvas, where, *given, **options)
            box = where if text is None else canvas.textbbox(where, text, font=options["font"])
            calls.append((name, {**options, "text": text, "box": box, "size": canvas.im.size}))

        return record

    for name in ("rectangle", "text", "ellipse"):
        monkeypatch.setattr(
            ImageDraw.ImageDraw, name, recorder(name, getattr(ImageDraw.ImageDraw, name))
        )

    def draw(plot, *args, **options):
        calls.clear()
        path = tmp_path / "new" / "picture.png"
        assert plot(*args, path, **options) == path
        return Drawn(calls, path)

    return draw


def picture(height=90, width=120):
    noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return noise.to(torch.uint8)


def target(num, height=90, width=120, **extra):
    corners = torch.rand(num, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    boxes = corners.flatten(1) * torch.tensor([width, height] * 2)
    return {"boxes": boxes, "labels": torch.arange(num) + 1} | extra


def share_of(drawn, color, box, row=0):
    """How much of a box's upper side, 1 for a whole line, has the colour."""
    left, top, right, _ = np.array(box, int)
    top += GAP + row
    line = np.asarray(drawn.picture)[top + 1, left + GAP : right + GAP]
    return (line == ImageColor.getrgb(color)).all(axis=1).mean()


# ----------------------------------------------------------------------------- all pictures


@pytest.mark.parametrize("given", ["a", "v1.5/a", "a.svg"])
def test_the_path_is_that_of_the_file(tmp_path, given):
    path = pictures.plot_box_weights([0.5], f"{tmp_path}/{given}")
    assert path == tmp_path / (given if given.endswith("svg") else f"{given}.png")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_texts_are_cut_in_the_middle():
    font = style.font(13)
    for text in ("abcdefghijk", "a\nb \t c", "W" * 300, "é", "\udcff", ""):
        for width in (1, 40, 80, 10_000):
            short = style.fit(text, font, width)
            assert font.getlength(short) <= width or len(short) <= 1
            head, cut, tail = short.partition("…")
            assert " ".join(text.split()).startswith(head)
            assert text.endswith(tail)
            assert len(head) - len(tail) in (0, 1) or not cut
    assert style.fit("a\nb \t c", font, 99) == "a b c"


# Severity 1 of Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of
# Color Vision Deficiency", 2009: protanopia and deuteranopia.
VISION = {
    "all": np.eye(3),
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


@pytest.mark.parametrize(("cones", "least"), [("all", 12), ("no red", 8), ("no green", 8)])
def test_colors_of_twenty_classes_are_apart(cones, least):
    """By CIE 1976, in which 2.3 is just noticeable."""
    rgb = np.array([ImageColor.getrgb(color) for color in COLORS]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    seen = (linear @ np.transpose(VISION[cones])).clip(0, 1) @ np.transpose(to_xyz)
    x, y, z = np.cbrt(np.maximum(seen / (0.9505, 1, 1.089), 0.009)).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=2)[np.triu_indices(20, 1)]
    assert len(COLORS) == 20
    assert apart.min() > least


# ----------------------------------------------------------------------------- batches


def test_every_box_of_a_batch_with_its_weight(draw):
    images = [picture(360, 480), picture(200, 100) / 255, (picture(40, 60) / 255).bfloat16()]
    weights = torch.tensor([0.7, 0.7, 0.3, 0.3, 0.3])
    first = target(5, 360, 480, box_weights=weights, difficult=torch.ones(5))
    first["labels"] = torch.tensor([1, 2, 1, 20, 45])
    drawn = draw(pictures.plot_batch, images, [first, NO_OBJECTS, target(1, 40, 60)], CLASSES)
    colors = [COLORS[0], COLORS[1], COLORS[0], COLORS[19], COLORS[4]]
    texts = [f"class number {k} {w:.2f}" for k, w in zip(first["labels"], weights, strict=True)]
    expected = list(zip(texts, colors, strict=True))
    assert drawn.labels == [*expected, ("class number 1 1.00", COLORS[0])]
    # As large as its panel: neither the boxes nor the pixels are scaled.
    boxes = [box for _, box in drawn.frames[:5]]
    np.testing.assert_allclose(boxes, first["boxes"], atol=0.5)
    assert [color for color, _ in drawn.frames[:5]] == colors
    assert share_of(drawn, colors[4], boxes[4]) == 1  # the last one hides others
    plain = draw(pictures.plot_batch, images[:1], [NO_OBJECTS], CLASSES).picture
    inner = plain.crop((GAP, GAP, GAP + WIDTH, GAP + 360))
    np.testing.assert_array_equal(np.asarray(inner), images[0].permute(1, 2, 0))
    for image in (images[0] / 255, (images[0] / 255).bfloat16()):
        same = draw(pictures.plot_batch, [image], [NO_OBJECTS], CLASSES).picture
        assert np.abs(np.asarray(same, int) - np.asarray(plain, int)).max() <= 1


def test_what_is_of_a_partner_is_dashed(draw):
    """CutMix gives every object a weight of its own; a partner may have no objects."""
    weights = torch.tensor([0.8, 1.0, 0.5, 0.5, 0.3])
    names = {3: "a.jpg", 8: "b.jpg", 11: "empty.jpg"}
    rows = torch.arange(5) * 60 + 20
    boxes = torch.stack([rows * 0 + 9, rows, rows * 0 + 400, rows + 40], dim=1)
    source = torch.tensor([3, 3, 8, 8, 3])
    mix = target(5, boxes=boxes, box_weights=weights, source=source, sources=names)
    drawn = draw(pictures.plot_batch, [picture(360, 480)], [mix], CLASSES)
    above = ["a.jpg: weight 0.30 to 1.00", "b.jpg (dashed): weight 0.50"]
    assert drawn.headings == [*above, "empty.jpg (dashed): no objects"][::-1]  # the lowest first
    height = drawn.picture.height - 360 - 2 * GAP
    for row, own in enumerate(source):
        share = share_of(drawn, COLORS[row], boxes[row] + torch.tensor([120, 0, 0, 0]), height)
        assert share == 1 if own == 3 else 0.3 < share < 0.7


@pytest.mark.parametrize("num_images", [1, 5])
def test_panels_and_texts_stay_apart_and_inside(draw, num_images):
    sizes = [(90, 120), (60, 200), (200, 60), (20, 2000), (64, 64)][:num_images]
    images = [picture(*size) for size in sizes]
    sources = {"source": torch.arange(12) % 3, "sources": {n: "long name " * 20 for n in range(3)}}
    targets = [target(12, *size) | sources for size in sizes]
    for one, (height, width) in zip(targets, sizes, strict=True):
        one["boxes"][:3] = torch.tensor([[0, 0, width, height], [width - 3, 0, width, 3], [-5] * 4])
    found = [one | {"scores": torch.ones(12), "outcomes": ["other_class"] * 12} for one in targets]
    batch = draw(pictures.plot_batch, images, targets, ["W" * 99, *CLASSES])
    both = draw(pictures.plot_predictions, images, found, targets, ["W" * 99, *CLASSES])
    alone = draw(pictures.plot_predictions, images, found, None, ["W" * 99, *CLASSES])
    for drawn, num_panels in ((batch, num_images), (both, 2 * num_images), (alone, num_images)):
        assert len(drawn.labels) == 12 * num_panels
        assert (drawn.picture.width - GAP) % (WIDTH + GAP) == 0 or drawn is alone
        for (left, top, right, bottom), (width, height) in drawn.texts:
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_labels_hide_no_other(draw):
    """As many as there is room for, though the boxes are the same."""
    same = target(6, boxes=torch.tensor([[40.0, 30, 80, 60]] * 6))
    places = np.array(draw(pictures.plot_batch, [picture()], [same], CLASSES).rectangles)
    for index, (left, top, right, bottom) in enumerate(places):
        others = np.delete(places, index, axis=0)
        beside = (others[:, 0] > right) | (others[:, 2] < left)
        assert (beside | (others[:, 1] > bottom) | (others[:, 3] < top)).all()


def test_keypoints_are_dots_and_rings(draw):
    points = [[[20.0, 30, 2], [25, 35, 1], [0, 0, 0]], [[80, 50, 2], [90, 60, 2], [99, 70, 1]]]
    one = target(2, keypoints=torch.tensor(points))
    circles = draw(pictures.plot_batch, [picture()], [one], CLASSES).circles
    seen = [(row, color) for of, color in zip(points, COLORS, strict=False) for row in of if row[2]]
    for circle, ((x, y, visibility), color) in zip(circles, seen, strict=True):
        # The middle of a pixel is half a pixel from its corner; the image is four times as large.
        center = np.reshape(circle["box"], (2, 2)).mean(axis=0)
        np.testing.assert_allclose(center, [4 * x + 2, 4 * y + 2])
        assert circle["fill"] == (color if visibility == 2 else None)
        assert visibility == 2 or circle["outline"] == color


BAD = [
    ([picture()], [], "1 images and 0 targets"),
    ([], [], "0 images"),
    ([picture(), picture()[0]], [target(1)] * 2, r"\(90, 120\)"),
    ([picture()], [target(1) | {"labels": torch.tensor([46])}], r"labels are \[46\]"),
    ([picture()], [target(3, source=torch.tensor([1, 2]))], r"targets\[0\]: 2 source"),
]


@pytest.mark.parametrize(("images", "targets", "message"), BAD)
def test_bad_pictures(tmp_path, images, targets, message):
    with pytest.raises(ValueError, match=message):
        pictures.plot_batch(images, targets, CLASSES, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\.jpgg"):
        pictures.plot_batch([picture()], [target(1)], CLASSES, tmp_path / "a.jpgg")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- predictions


def test_errors_are_told_in_words(draw):
    """The weakest, from the threshold on, is drawn first; an object that is missed has no score."""
    kinds = ["correct", "localization", "similar_class", "missed", "ignored", "background"]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55, 0.1])
    boxes = torch.arange(6)[:, None] * 60 + torch.tensor([20, 20, 20, 50])
    boxes[:, ::2] = torch.tensor([9, 470])
    found = {"boxes": boxes, "labels": torch.arange(6) + 1, "scores": scores, "outcomes": kinds}
    drawn = draw(pictures.plot_predictions, [picture(400, 480)], [found], None, CLASSES)
    assert drawn.headings == []
    assert [(text.removeprefix("class number "), color) for text, color in drawn.labels] == [
        ("5 0.55 ignored", COLORS[4]), ("4 missed", COLORS[3]), ("3 0.70 similar class", COLORS[2]),
        ("2 0.80 localization", COLORS[1]), ("1 0.90", COLORS[0]),
    ]  # fmt: skip
    for row, kind in enumerate(kinds[:5]):
        share = share_of(drawn, COLORS[row], boxes[row] + torch.tensor([240, 0, 0, 0]))
        assert 0.3 < share < 0.7 if kind == "missed" else share == 1


def test_the_truth_is_beside(draw):
    truth = target(3, difficult=torch.tensor([0, 1, 0]), iscrowd=torch.tensor([0, 0, 1]))
    found = target(2, scores=torch.tensor([0.25, 0.5]))
    drawn = draw(pictures.plot_predictions, [picture()], [found], [truth], CLASSES)
    truths = ["class number 1", "class number 2 difficult", "class number 3 crowd"]
    assert [text for text, _ in drawn.labels] == [*truths, "class number 2 0.50"]
    assert drawn.headings == ["ground truth: 3", "predictions of score ≥ 0.5: 1"]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([0.31, 0.04], "nothing scores 0.5 or more; the best is 0.31: --score 0.2"),
        ([0.04], "nothing scores 0.5 or more; the best is 0.04: --score 0.02"),
        ([], "nothing scores 0.5 or more"),
    ],
)
def test_low_scores_are_told(draw, scores, text):
    found = target(len(scores), scores=torch.tensor(scores))
    drawn = draw(pictures.plot_predictions, [picture()], [found], None, CLASSES)
    assert (drawn.headings, drawn.labels) == ([text], [])


@pytest.mark.parametrize(("width", "drawn_as"), [(64, 480), (700, 700), (3000, 960)])
def test_predictions_alone_are_as_large_as_the_image(draw, width, drawn_as):
    found = target(1, 60, width, scores=torch.ones(1))
    drawn = draw(pictures.plot_predictions, [picture(60, width)], [found], None, CLASSES)
    assert drawn.picture.width == drawn_as + 2 * GAP
    ((_, box),) = drawn.frames
    np.testing.assert_allclose(box, found["boxes"][0] * drawn_as / width, atol=0.51)


def test_predictions_have_masks_and_keypoints(draw):
    """Those of predictions below the threshold are left out; torchvision says 1 of every point."""
    points = torch.tensor([[[10.0, 20.0, 1.0]], [[30.0, 40.0, 1.0]]])
    masks = torch.zeros(2, 360, 480, dtype=torch.uint8)
    masks[0, 200:240, 200:240] = masks[1, 280:320, 400:440] = 1
    black = torch.zeros(3, 360, 480, dtype=torch.uint8)
    found = target(2, boxes=torch.tensor([[0, 0, 9, 9]] * 2)) | {"keypoints": points}
    found |= {"scores": torch.tensor([0.9, 0.1]), "masks": encode_masks(masks)}
    drawn = draw(pictures.plot_predictions, [black], [found], None, CLASSES)
    (dot,) = drawn.circles
    assert dot["fill"] == COLORS[0]
    np.testing.assert_allclose(np.reshape(dot["box"], (2, 2)).mean(axis=0), [10.5, 20.5])
    shown = np.asarray(drawn.picture)[-360 - GAP : -GAP, GAP:-GAP][100:]
    np.testing.assert_array_equal(shown.any(axis=2), masks[0, 100:].bool())
    np.testing.assert_allclose(shown[120, 220], 0.45 * np.array(ImageColor.getrgb(COLORS[0])), 0, 1)
