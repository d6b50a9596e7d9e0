"""Charts: precision over recall, a run's course, the weights of mixed boxes, kinds of errors.

Shape legend: K points of a class's curve, N boxes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from detmix.evaluation.errors.result import KINDS, SIZES, ErrorAnalysis, label_of
from detmix.evaluation.results import VOCResult, ap_text
from detmix.files import read_file
from detmix.pictures import style

_MAX_CURVES = 20  # more cannot be told apart in one panel
_DASHES, _NUM = ("-", "--", ":", "-."), len(style.CLASS_COLORS)  # 80 classes all look different
_SMOOTHING = 1 / 25  # of the records, for the moving average of the loss
# What is drawn beside the score by which the best checkpoint is chosen.
_MORE_SCORES = {
    "mean_ap_11point": ("11-point mAP", style.SKY_BLUE),
    "ap50": ("AP50", style.SKY_BLUE),
    "mask_ap": ("mask AP", style.PURPLE),
    "keypoint_ap": ("keypoint AP", style.ORANGE),
    "top5": ("top-5 accuracy", style.SKY_BLUE),
}
_LINE: dict[str, Any] = {"marker": "o", "markersize": 4, "markevery": [-1]}  # seen if alone
_BINS: dict[str, Any] = {"bins": 25, "range": (0, 1)}
# Drawn to know the share that is expected in a bin, of some per cent, to a fiftieth of one.
_DRAWS = 1_000_000

_MAX_BARS, _LEAST_ROWS = 24, 12  # of the panel of classes
_ROW = 0.235  # inches
_FONT = 9
_WIDEST_NAME = 12 * _FONT
_COLORS = {
    "correct": style.GREEN,
    "localization": style.ORANGE,
    "duplicate": style.YELLOW,
    "similar_class": style.SKY_BLUE,
    "other_class": style.BLUE,
    "background": style.GREY,
}
_BAR: dict[str, Any] = {"height": 0.78, "edgecolor": "white", "linewidth": 0.6}
_LEGEND: dict[str, Any] = {  # above the panel, with its title
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "alignment": "left",
    "borderaxespad": 0.3,
    "handlelength": 1.3,
    "columnspacing": 1.2,
}

Series = npt.NDArray[np.float64]  # (2, K): optimizer steps and values, NaN where undefined


@style.styled
def plot_precision_recall(result: VOCResult, path: str | Path) -> Path:
    """Draw every class's precision over recall, its AP in the legend.

    A dot marks the point of highest F1. More than 20 classes are spread over several panels;
    classes without objects appear in the legend only.
    """
    order = sorted(result.classes, key=lambda name: (-np.nan_to_num(result.ap[name], nan=-1), name))
    num_panels = math.ceil(len(order) / _MAX_CURVES)
    figure = style.new_figure(style.WIDTH, 4.6 * num_panels)
    panels = figure.subplots(num_panels, 1, squeeze=False)[:, 0]
    panels[0].set_title(
        f"mean AP {ap_text(result.mean_ap)} ({result.interpolation}, "
        f"IoU > {result.iou_threshold:g}, {result.num_images:,} images)"
    )
    for axes, names in zip(panels, np.array_split(order, num_panels), strict=True):
        for name in names:
            index = result.classes.index(name)
            color = style.CLASS_COLORS[index % _NUM]
            dashes = _DASHES[(index + index // _NUM) % len(_DASHES)]
            curve, best = result.curves[name], result.curves[name].best_f1()
            shown = style.fit(name, style.font(_FONT), _WIDEST_NAME)
            label = f"{shown}  {ap_text(result.ap[name])}"
            axes.plot(curve.recall, curve.precision, color=color, linestyle=dashes, label=label)
            axes.plot(best.recall, best.precision, "o", ms=6, mec="white", color=color)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        title = "class and AP\n(dot: highest F1)"
        axes.legend(title=title, alignment="left", loc="upper left", bbox_to_anchor=(1, 1))
    return style.save(figure.savefig, path)


@style.styled
def plot_learning_curve(metrics_path: str | Path, path: str | Path) -> Path:
    """Draw loss, learning rate and scores over a run's optimizer steps.

    A ValueError if a line of its ``metrics.jsonl`` is broken, or none is of training.
    """
    train, scores = _read_metrics(metrics_path)
    if "loss" not in train or "lr" not in train:
        raise ValueError(f"{metrics_path}: no training step is recorded yet")
    heights = [2.6, 1.3, 2.2] if scores else [2.6, 1.3]
    figure = style.new_figure(style.WIDTH, sum(heights) + 0.6)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_loss(panels[0], *train["loss"])
    panels[1].plot(*train["lr"], color=style.GREEN, **_LINE)
    panels[1].set(ylabel="learning rate", ylim=(0, None))
    panels[1].ticklabel_format(axis="y", scilimits=(-2, 2))
    if scores:
        _draw_scores(panels[2], scores)
    panels[-1].set(xlabel="optimizer step", xlim=(0, None))
    panels[-1].xaxis.get_major_locator().set_params(integer=True, nbins=6)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
    return style.save(figure.savefig, path)


def _read_metrics(path: str | Path) -> tuple[dict[str, Series], dict[str, Series]]:
    """The numbers of training steps and of evaluations by name."""
    metrics: dict[str, dict[str, dict[int, float | None]]] = {"train": {}, "eval": {}}
    for number, line in enumerate(read_file(path).decode(errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
            of_event, step = metrics.get(record["event"], {}), record.get("step")
        except (KeyError, TypeError, ValueError) as error:
            where = f"{path}, line {number}"
            raise ValueError(f"{where}: {line[:80]!r} is no record: {error}") from None
        for name, value in record.items():
            if value is None or isinstance(value, int | float):
                # Where a resumed run has repeated a step, the later line counts.
                of_event.setdefault(name, {})[step] = value
    train, scores = (
        {name: np.array(sorted(values.items()), float).T for name, values in of_event.items()}
        for of_event in metrics.values()
    )
    return train, scores


def _draw_loss(axes: Axes, steps: Series, losses: Series) -> None:
    window = 2 * int(len(losses) * _SMOOTHING / 2) + 1
    total, count = (np.convolve(x, np.ones(window), "same") for x in (losses, np.ones_like(losses)))
    smooth = total / count
    axes.plot(steps, losses, color=style.BLUE, alpha=0.25, linewidth=0.8)
    label = f"mean of {window} records" if window > 1 else "loss"
    axes.plot(steps, smooth, color=style.BLUE, label=label, **_LINE)
    finite = smooth[np.isfinite(smooth)]
    if len(finite) and finite.max() > 0:
        axes.set_ylim(0, 1.25 * finite.max())  # single peaks may leave the frame
    axes.set_ylabel("training loss")
    axes.legend()


def _draw_scores(axes: Axes, metrics: Mapping[str, Series]) -> None:
    main = "top1" if "top1" in metrics else "mean_ap"
    name = {"top1": "top-1 accuracy", "mean_ap": "AP" if "ap50" in metrics else "mAP"}[main]
    axes.set_ylabel(name)
    steps, scores = metrics[main]
    if not np.isnan(scores).all():
        best = np.nanargmax(scores)
        name += f", best {scores[best]:.3f} at step {steps[best]:,.0f}"
    # Markers are seen whole also where they lie on an axis.
    look: dict[str, Any] = {"markersize": 4, "clip_on": False, "zorder": 3}
    axes.plot(steps, scores, "o-", color=style.VERMILLION, label=name, **look)
    for key, (label, color) in _MORE_SCORES.items():
        if key in metrics:
            axes.plot(*metrics[key], "s--", color=color, linewidth=1, label=label, **look)
    axes.margins(y=0.4)  # room for the legend
    axes.set_ylim(bottom=0)
    axes.legend()


@style.styled
def plot_box_weights(
    weights: npt.ArrayLike, path: str | Path, *, alpha: float | None = None
) -> Path:
    """Draw how often boxes have which weight below 1.

    Boxes that are not mixed weigh 1, and so do those that CutMix leaves whole.

    Args:
        weights: ``(N,)``, N > 0, an array or a CPU tensor; a ValueError if not all in (0, 1].
        path: of the picture.
        alpha: draw what mixup with a ratio λ from Beta(alpha, alpha) is expected to give, which is
            symmetric: weights are distributed alike whether they are λ or 1 - λ. Not for CutMix.
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values > 0) & (values <= 1)).all():
        raise ValueError(f"weights must be (N,), N > 0, and in (0, 1], got {values}")
    figure = style.new_figure(style.WIDTH, 3.4)
    axes = figure.subplots()
    mixed = values[values < 1]
    counts, edges = np.histogram(mixed, **_BINS)
    label = f"{len(mixed):,} boxes below 1"
    axes.stairs(counts / max(len(mixed), 1), edges, fill=True, color=style.BLUE, label=label)
    if alpha is not None:
        counts, _ = np.histogram(np.random.default_rng(0).beta(alpha, alpha, _DRAWS), **_BINS)
        label = f"mixup: Beta({alpha:g}, {alpha:g})"
        line = axes.stairs(counts / _DRAWS, edges, baseline=None, label=label, linewidth=2)
        line.set_color(style.VERMILLION)
    axes.set_title(
        f"{len(values):,} boxes, mean weight {values.mean():.3f}; "
        f"{1 - len(mixed) / len(values):.1%} weigh 1"
    )
    axes.margins(y=0.3)  # room for the legend
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="weight below 1", ylabel="share of these boxes")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.legend(loc="upper right")
    return style.save(figure.savefig, path)


@style.styled
def plot_errors(analysis: ErrorAnalysis, path: str | Path) -> Path:
    """Draw kinds of errors by class, what each costs and what is missed.

    Of each class the best N detections are drawn, N being its objects, difficult ones left out; a
    class with fewer detections has a shorter bar, one without objects none. Of more than 24 classes
    only those are drawn that lack most correct detections, by number.
    """
    num = {name: num for name, num in analysis.num_objects.items() if num}
    correct = {name: analysis.counts["top_n"][name]["correct"] for name in num}
    lacking = sorted(num, key=lambda name: (correct[name] - num[name], name))[:_MAX_BARS]
    names = sorted(lacking, key=lambda name: (-correct[name] / num[name], name))
    title = "best N detections of each class (N: its objects)"
    if len(names) < len(num):
        title += f",\nof the {len(names)} classes with most errors out of {len(num)}"
    figure = style.new_figure(9, _ROW * max(len(names), _LEAST_ROWS) + 1.1)
    panels = figure.subplot_mosaic("CG;CM", width_ratios=[1.4, 1], height_ratios=[5, 6])
    _draw_classes(panels["C"], analysis, names)
    panels["C"].legend(title=title, ncols=3, **_LEGEND)
    _draw_gains(panels["G"], analysis)
    _draw_missed(panels["M"], analysis)
    return style.save(figure.savefig, path)


def _draw_classes(axes: Axes, analysis: ErrorAnalysis, names: Sequence[str]) -> None:
    """A stacked bar for each class, its share of correct detections and N beside it."""
    counts = [analysis.counts["top_n"][name] for name in names]
    num = np.array([analysis.num_objects[name] for name in names])
    start = np.zeros(len(names))
    for outcome, color in _COLORS.items():
        share = np.array([of_class[outcome] for of_class in counts]) / num
        label = label_of(outcome)
        axes.barh(range(len(names)), share, left=start, color=color, label=label, **_BAR)
        start += share
    texts = [f"{c['correct'] / n:.0%} of {n:,}" for c, n in zip(counts, num, strict=True)]
    shown = [style.fit(name, style.font(_FONT), _WIDEST_NAME) for name in names]
    _name_rows(axes, shown, texts, _LEAST_ROWS)


def _draw_gains(axes: Axes, analysis: ErrorAnalysis) -> None:
    """How much mean AP would gain without each kind of error."""
    axes.set_title(f"mean AP {ap_text(analysis.mean_ap)} would gain without")
    gains = [analysis.ap_gain[kind] for kind in KINDS]
    longest = max(*gains, 0.01)
    shares = [gain / longest for gain in gains]
    axes.barh(range(len(KINDS)), shares, color=[_COLORS[kind] for kind in KINDS], **_BAR)
    _name_rows(axes, list(map(label_of, KINDS)), [f"{gain:.3f}" for gain in gains])


def _draw_missed(axes: Axes, analysis: ErrorAnalysis) -> None:
    """The share of objects missed by size, of sizes of which there are objects."""
    missed = {
        size + suffix: by_size[size]
        for suffix, by_size in (("", analysis.missed), (", difficult", analysis.missed_difficult))
        for size in SIZES
        if by_size[size].objects
    }
    of_size, rows = missed.values(), range(len(missed))
    by_all, shown = [m.share for m in of_size], [m.share_at_best_f1 for m in of_size]
    axes.barh(rows, shown, color="#F3C9AE", label="found only below the best F1", **_BAR)
    axes.barh(rows, by_all, color=style.VERMILLION, label="found by no detection", **_BAR)
    axes.legend(title="objects missed, by size", reverse=True, **_LEGEND)
    _name_rows(axes, list(missed), [f"{m.share_at_best_f1:.0%} of {m.objects:,}" for m in of_size])


def _name_rows(axes: Axes, names: Sequence[str], texts: Sequence[str], least: int = 1) -> None:
    """Name the rows of bars up to a length of 1, the first above, and write a text after each."""
    axes.set(xlim=(0, 1), xticks=[], ylim=(max(len(names), least) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names, fontsize=_FONT)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    after: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
    for row, text in enumerate(texts):
        axes.annotate(text, (1, row), **after, va="center_baseline", fontsize=_FONT)
