"""The histogram of box weights, and the sample that it shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from detmix.evaluation import plot_box_weights, weight_plots
from detmix.mixing import DetectionMixUp
from detmix.training.preview import mixed_batch
from detmix.training.weight_sample import sample_box_weights


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to look at their contents."""
    figures = []
    save = weight_plots.save_figure
    monkeypatch.setattr(
        weight_plots, "save_figure", lambda fig, path: figures.append(fig) or save(fig, path)
    )
    return figures


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for axes in figure.axes for text in axes.texts]


def bars(axes, index=0):
    return axes.patches[index].get_data().values


@pytest.mark.parametrize("narrow", [False, True])
def test_bars_and_numbers(tmp_path, drawn, narrow):
    weights = torch.tensor([1.0] * 6 + [0.01, 0.5, 0.5, 0.99])
    path = plot_box_weights(weights, tmp_path / "w.png", title="a run", narrow=narrow)
    assert min(Image.open(path).size) > 300
    shares, histogram = drawn[0].axes
    assert [patch.get_width() for patch in shares.patches] == pytest.approx([0.4, 0.6])
    expected = np.zeros(25)
    expected[[0, 12, 24]] = 0.25, 0.5, 0.25
    np.testing.assert_allclose(bars(histogram), expected)
    heading, below, whole = texts(drawn[0])
    assert heading.split("\n" if narrow else ": ") == ["a run", "10 boxes, mean weight 0.800"]
    assert (below, whole) == ("weight below 1: 40.0 %", "weight 1: 60.0 %")
    boxes = [axes.get_tightbbox() for axes in drawn[0].axes]
    boxes.append(drawn[0].texts[0].get_window_extent())
    for index, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= drawn[0].bbox.x1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


@pytest.mark.parametrize("narrow", [False, True])
def test_a_long_title_is_wrapped(tmp_path, drawn, narrow):
    title = "runs/" + "a_long_name_" * 10 + " and a lot of other words" * 8
    plot_box_weights([0.5, 1.0], tmp_path / "w.png", title=title, narrow=narrow)
    (figure,) = drawn
    heading = figure.texts[0]
    written = heading.get_text().replace("\n", "").replace(" ", "")
    separator = "" if narrow else ":"
    assert written == f"{title}{separator}2 boxes, mean weight 0.750".replace(" ", "")
    box, shares = heading.get_window_extent(), figure.axes[0].get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert shares.y1 < box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_expected_shares_are_those_of_the_beta_distribution(tmp_path, drawn, alpha, cdf):
    plot_box_weights(np.array([0.5]), tmp_path / "w.png", alpha=alpha)
    expected = np.diff(cdf(np.linspace(0, 1, 26)))
    np.testing.assert_allclose(bars(drawn[0].axes[1], 1), expected, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_boxes_mixed_as_expected(tmp_path, drawn, alpha):
    """However many objects the images hold, weights follow Beta(alpha, alpha)."""
    counts = [0, 1, 3, 12]
    samples = [
        (torch.zeros(3, 1, 1), {"boxes": torch.ones(n, 4), "labels": torch.ones(n).long()})
        for n in counts
    ]
    mixer = DetectionMixUp(alpha, p=0.5)
    torch.manual_seed(0)
    weights = torch.cat([t["box_weights"] for _ in range(1000) for t in mixer(samples)[1]])
    plot_box_weights(weights, tmp_path / "w.png", alpha=alpha)
    difference = np.abs(bars(drawn[0].axes[1]) - bars(drawn[0].axes[1], 1)).mean()
    assert difference < 0.005  # a bin holds 0.04


def test_extremes(tmp_path, drawn):
    plot_box_weights([], tmp_path / "none.png")
    assert texts(drawn[0]) == ["no boxes to weigh"]
    plot_box_weights(np.ones(3), tmp_path / "ones.png")
    assert texts(drawn[1])[-1] == "no box weighs less than 1"
    plot_box_weights(np.full(3, 0.5), tmp_path / "halves.png", narrow=True)
    assert drawn[2].axes[1].get_ylim()[1] == pytest.approx(1.02)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.0], r"weights\[1\] is 0, expected above 0, at most 1"),
        ([1.5], r"weights\[0\] is 1.5"),
        ([0.5, float("nan")], r"weights\[1\] is nan"),
        ([[0.5]], r"weights have shape \(1, 1\), expected \(N,\)"),
    ],
)
def test_bad_weights(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        plot_box_weights(weights, tmp_path / "w.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_alpha(tmp_path, alpha):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        plot_box_weights([0.5], tmp_path / "w.png", alpha=alpha)


class TestSample:
    @pytest.mark.parametrize("place", ["batch", "dataset", "device"])
    def test_weights_are_those_of_the_training(self, shapes_root, place):
        config = tiny_config(shapes_root, "run", f"mixing.place={place}")
        weights = sample_box_weights(config, num_images=12, epoch=1)
        _, targets = mixed_batch(config, epoch=1, num_images=12)
        expected = [weight for target in targets for weight in target["box_weights"].tolist()]
        assert weights.dtype == torch.float32
        assert weights.tolist() == expected
        assert 0 < (weights < 1).float().mean() < 1

    def test_epochs_differ_and_the_last_ones_are_not_mixed(self, shapes_root):
        config = tiny_config(shapes_root, "run", "epochs=3", "mixing.off_epochs=1", "mixing.p=1")
        first, second, last = (sample_box_weights(config, epoch=epoch) for epoch in range(3))
        assert (first < 1).all()
        assert first.tolist() != second.tolist()
        assert (last == 1).all()

    def test_without_mixing(self, shapes_root):
        config = tiny_config(shapes_root, "run", "mixing.name=none")
        weights = sample_box_weights(config)
        assert len(weights) > 24  # more images are asked for than there are
        assert (weights == 1).all()

    @pytest.mark.parametrize("epoch", [-1, 2])
    def test_no_such_epoch(self, shapes_root, epoch):
        with pytest.raises(ValueError, match=rf"epoch must be in 0\.\.1, got {epoch}"):
            sample_box_weights(tiny_config(shapes_root, "run"), epoch=epoch)

    def test_real_images(self, voc_root):
        config = tiny_config(
            voc_root, "run", "data.classes=null", "data.train_limit=64", "mixing.alpha=1.5",
            "mixing.p=1",
        )  # fmt: skip
        weights = sample_box_weights(config)
        assert len(weights) > 128  # VOC 2007 has 2.5 objects an image, and two images are mixed
        assert 0.4 < float(weights.mean()) < 0.6
