"""Images with boxes drawn on them: mixed batches with their weights, predictions beside the truth.

Shape legend: N boxes, D of them predicted or G true, of one image of H x W pixels; C classes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.boxes import as_numpy, as_picture, class_names, draw_boxes
from detmix.evaluation.figures import (
    BOX_COLORS,
    add_axes,
    message_figure,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Target = Mapping[str, Any]

_PANEL_WIDTH = 3.9  # inches
_MARGIN, _GAP, _TITLE = 0.15, 0.12, 0.3
_MAX_LEVELS = 4  # different weights that fit into a title


def plot_batch(
    images: Sequence[Tensor],
    targets: Sequence[Target],
    classes: Sequence[str],
    path: str | Path,
    max_images: int = 8,
) -> Path:
    """Draw a (mixed) batch: every box with its class and its ``box_weights``.

    Boxes of one image that share a weight, hence come from the same source image, share a colour;
    the heaviest is orange, the next sky blue.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        targets: ``boxes (N, 4)``, ``labels (N,)`` and maybe ``box_weights (N,)`` (absent: ones).
        classes: the C class names without the background.
        path: picture to write; its ending chooses the format.
        max_images: draw the first so many.

    Returns:
        The path written.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C.
    """
    _check_equal_lengths(images=images, targets=targets)
    _check_labels("targets", targets[:max_images], classes)
    pictures = [
        as_picture(f"images[{index}]", image) for index, image in enumerate(images[:max_images])
    ]
    if not pictures:
        return save_figure(message_figure("no images"), path)
    rows = math.ceil(len(pictures) / 4)
    figure, panels = _grid(pictures, columns=math.ceil(len(pictures) / rows))
    for axes, picture, target in zip(panels, pictures, targets, strict=False):
        boxes, labels = as_numpy(target["boxes"]), as_numpy(target["labels"])
        weights = as_numpy(target.get("box_weights", torch.ones(len(labels))))
        _, first = np.unique(np.round(weights, 4), return_index=True)
        levels = weights[first][::-1]  # not rounded: title and labels must round alike
        source = np.argmin(np.abs(weights[:, None] - levels), axis=1) if len(levels) else []
        axes.set_title(_weights_title(levels), fontsize=9, loc="left")
        draw_boxes(
            axes,
            picture,
            boxes,
            labels,
            classes=classes,
            values=weights.tolist(),
            colors=[BOX_COLORS[index % len(BOX_COLORS)] for index in source],
        )
    return save_figure(figure, path)


def _weights_title(levels: NDArray[Any]) -> str:
    """Say the different weights of an image, the largest first, or their range if many."""
    if not len(levels):
        return "no objects"
    if len(levels) > _MAX_LEVELS:  # CutMix gives each object a weight of its own
        return f"weights  {levels[-1]:.2f} to {levels[0]:.2f}"
    return "weights  " + "  +  ".join(f"{level:.2f}" for level in levels)


def plot_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Target],
    targets: Sequence[Target],
    classes: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.5,
    max_images: int = 8,
) -> Path:
    """Draw predictions beside the ground truth: two panels an image, a colour for each class in it.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        predictions: ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``.
        targets: ``boxes (G, 4)``, ``labels (G,)`` and maybe ``difficult (G,)``, drawn dashed.
        classes: the C class names without the background.
        path: picture to write; its ending chooses the format.
        score_threshold: predictions below it are left out.
        max_images: draw the first so many.

    Returns:
        The path written.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C.
    """
    _check_equal_lengths(images=images, predictions=predictions, targets=targets)
    _check_labels("targets", targets[:max_images], classes)
    _check_labels("predictions", predictions[:max_images], classes)
    pictures = [
        as_picture(f"images[{index}]", image) for index, image in enumerate(images[:max_images])
    ]
    if not pictures:
        return save_figure(message_figure("no images"), path)
    twice = [picture for picture in pictures for _ in range(2)]
    figure, panels = _grid(twice, columns=2 if len(pictures) < 3 else 4)
    for index, picture in enumerate(pictures):
        truth, predicted = panels[2 * index : 2 * index + 2]
        prediction = _above(predictions[index], score_threshold)
        present = sorted({*as_numpy(targets[index]["labels"]), *prediction["labels"]})
        if len(classes) <= len(BOX_COLORS):  # then a class has one colour in all images
            present = list(range(1, len(classes) + 1))
        palette = {label: BOX_COLORS[i % len(BOX_COLORS)] for i, label in enumerate(present)}
        _draw_truth(truth, picture, targets[index], classes, palette)
        title = f"predictions of score ≥ {score_threshold:g}: {len(prediction['labels'])}"
        predicted.set_title(title, fontsize=9, loc="left")
        draw_boxes(
            predicted,
            picture,
            prediction["boxes"],
            prediction["labels"],
            classes=classes,
            values=prediction["scores"].tolist(),
            colors=[palette[label] for label in prediction["labels"]],
        )
    return save_figure(figure, path)


def _above(prediction: Target, score_threshold: float) -> dict[str, NDArray[Any]]:
    """Boxes, labels and scores from the threshold on, weakest first: the strongest lie on top."""
    scores = as_numpy(prediction["scores"])
    kept = np.argsort(scores, kind="stable")
    kept = kept[scores[kept] >= score_threshold]
    return {key: as_numpy(prediction[key])[kept] for key in ("boxes", "labels", "scores")}


def _draw_truth(
    axes: "Axes",
    picture: NDArray[Any],
    target: Target,
    classes: Sequence[str],
    palette: Mapping[int, str],
) -> None:
    labels = as_numpy(target["labels"])
    difficult = as_numpy(target.get("difficult", torch.zeros(len(labels)))).astype(bool)
    note = " (dashed: difficult)" if difficult.any() else ""
    axes.set_title(f"ground truth: {len(labels)}{note}", fontsize=9, loc="left")
    draw_boxes(
        axes,
        picture,
        target["boxes"],
        labels,
        classes=classes,
        colors=[palette[label] for label in labels],
        dashed=difficult.tolist(),
    )


def _grid(pictures: Sequence[NDArray[Any]], columns: int) -> "tuple[Figure, list[Axes]]":
    """A figure with one panel for each picture; a row is as high as its highest picture needs."""
    aspects = [picture.shape[0] / picture.shape[1] for picture in pictures]
    rows = [aspects[first : first + columns] for first in range(0, len(aspects), columns)]
    heights = [_PANEL_WIDTH * min(max(row), 1.34) for row in rows]
    figure = new_figure(
        2 * _MARGIN + columns * _PANEL_WIDTH + (columns - 1) * _GAP,
        2 * _MARGIN + sum(heights) + len(rows) * _TITLE + (len(rows) - 1) * _GAP,
    )
    panels, top = [], figure.get_size_inches()[1] - _MARGIN
    for row, height in zip(rows, heights, strict=True):
        bottom = top - _TITLE - height
        for column in range(len(row)):
            left = _MARGIN + column * (_PANEL_WIDTH + _GAP)
            axes = add_axes(figure, left, bottom, _PANEL_WIDTH, height)
            axes.set_anchor("NW")
            panels.append(axes)
        top = bottom - _GAP
    return figure, panels


def _check_labels(name: str, records: Sequence[Target], classes: Sequence[str]) -> None:
    for index, record in enumerate(records):
        try:
            class_names(as_numpy(record["labels"]), classes)
        except ValueError as error:
            raise ValueError(f"{name}[{index}]: {error}") from None


def _check_equal_lengths(**lists: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"got {got}, expected as many of each")
