"""Images with boxes drawn on them: mixed batches with their weights, predictions beside the truth.

Shape legend: N boxes, D of them predicted or G true, of one image of H x W pixels; C classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.boxes import draw_boxes
from detmix.evaluation.figures import message_figure, plain_text, save_figure
from detmix.evaluation.panels import (
    HEADER,
    add_header,
    add_key,
    check_columns,
    make_grid,
    set_title,
)
from detmix.evaluation.picture_inputs import (
    Target,
    as_picture,
    check_equal_lengths,
    check_records,
)
from detmix.evaluation.prediction_panels import (
    OUTCOME_KEY,
    ScoreThreshold,
    check_outcomes,
    class_thresholds,
    draw_predictions,
    draw_truth,
    make_palette,
)
from detmix.evaluation.sources import group_colors, group_objects, key_entries, weights_of


@plain_text()
def plot_batch(
    images: Sequence[Tensor],
    targets: Sequence[Target],
    classes: Sequence[str],
    path: str | Path,
    max_images: int = 8,
    *,
    columns: int | None = None,
) -> Path:
    """Draw a (mixed) batch: every box with its class and its ``box_weights``.

    Boxes that come from the same source image share a colour, and a key above each panel says the
    sources and their weights. Where targets have no ``source``, boxes of equal weight are taken to
    share one; the heaviest are orange, the next sky blue. Masks and keypoints are drawn too.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        targets: ``boxes (N, 4)``, ``labels (N,)`` and maybe ``box_weights (N,)`` (absent: ones),
            ``masks``, ``keypoints``, as `draw_boxes` takes them, ``source (N,)``, the
            ``image_id`` of each object's image, and ``sources``, a mapping of ``image_id`` to name
            for all images that were mixed.
        classes: the C class names without the background.
        path: picture to write; its ending chooses the format.
        max_images: draw the first so many.
        columns: panels side by side, 1 for a phone; None for up to 4.

    Returns:
        The path written.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C, a
            per-object value without N entries, a box with NaN or infinity, ``columns`` below 1.
    """
    check_equal_lengths(images=images, targets=targets)
    targets = targets[:max_images]
    check_records("targets", targets, classes)
    columns = check_columns(columns, math.ceil(len(targets) / max(1, math.ceil(len(targets) / 4))))
    pictures = _as_pictures(images[:max_images])
    if not pictures:
        return save_figure(message_figure("no images"), path)
    groups = [group_objects(target) for target in targets]
    weights = [weights_of(target) for target in targets]
    colors = group_colors(groups)
    keys = list(map(key_entries, groups, colors, weights))
    figure, panels = make_grid(pictures, columns, [len(key) for key in keys])
    for index, axes in enumerate(panels):
        box_colors = [""] * len(weights[index])
        for group, color in zip(groups[index], colors[index], strict=True):
            for row in np.flatnonzero(group.members):
                box_colors[row] = color
        add_key(axes, keys[index])
        draw_boxes(
            axes,
            pictures[index],
            targets[index]["boxes"],
            targets[index]["labels"],
            classes=classes,
            values=weights[index].tolist(),
            colors=box_colors,
            masks=targets[index].get("masks"),
            keypoints=targets[index].get("keypoints"),
        )
    return save_figure(figure, path)


@plain_text()
def plot_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Target],
    targets: Sequence[Target],
    classes: Sequence[str],
    path: str | Path,
    score_threshold: ScoreThreshold = 0.5,
    max_images: int = 8,
    *,
    outcomes: Sequence[Sequence[str]] | None = None,
    missed: Sequence[Sequence[bool]] | None = None,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
) -> Path:
    """Draw predictions beside the ground truth, two panels an image, with masks and keypoints.

    Each class has a colour within an image. With ``outcomes`` and ``missed``, colours say instead
    what is right and what is wrong: correct detections and found objects are blue, false
    detections, with their kind in words, and missed objects vermillion, what does not count grey.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        predictions: ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``, and maybe ``masks`` and
            ``keypoints``, as `draw_boxes` takes them.
        targets: ``boxes (G, 4)``, ``labels (G,)`` and maybe ``masks``, ``keypoints`` and
            ``difficult (G,)`` and ``iscrowd (G,)``, drawn dashed.
        classes: the C class names without the background.
        path: picture to write; its ending chooses the format.
        score_threshold: predictions below it are left out; one number, or one for each class: C
            numbers, or a mapping of every class name. NaN leaves out all of a class.
        max_images: draw the first so many.
        outcomes: for each image what each prediction is, D of
            `detmix.evaluation.error_result.OUTCOMES`.
        missed: for each image G flags; goes with ``outcomes``, and with what is drawn: which
            objects no detection from the threshold on has found.
        titles: for each image what to write above it, such as its name.
        columns: panels side by side: 1 for a phone, with the truth above the predictions, or an
            even number; None for 2 or 4.

    Returns:
        The path written.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C, a
            per-object value of another length, a box with NaN or infinity, an unknown outcome,
            thresholds that are not one for each class, only one of ``outcomes`` and ``missed``,
            other ``columns``.
    """
    check_equal_lengths(
        images=images,
        predictions=predictions,
        targets=targets,
        outcomes=outcomes,
        missed=missed,
        titles=titles,
    )
    predictions, targets = predictions[:max_images], targets[:max_images]
    check_records("targets", targets, classes)
    check_records("predictions", predictions, classes)
    check_outcomes(predictions, targets, outcomes, missed)
    thresholds = class_thresholds(score_threshold, classes)
    columns = check_columns(columns, 2 if len(targets) < 3 else 4, step=2)
    pictures = _as_pictures(images[:max_images])
    if not pictures:
        return save_figure(message_figure("no images"), path)
    lines = 1 if titles is None else 2
    # In one column nothing is beside the truth that a heading would have to be level with.
    title_lines = [lines, 1 if columns == 1 else lines] * len(pictures)
    figure, panels = make_grid(
        [picture for picture in pictures for _ in range(2)],
        columns,
        title_lines,
        header=0.0 if outcomes is None else HEADER,
    )
    if outcomes is not None:
        add_header(figure, OUTCOME_KEY)
    shown = " ≥ class threshold"
    if isinstance(score_threshold, float | int):
        shown = f" of score ≥ {score_threshold:g}" if score_threshold > 0 else ""
    for index, picture in enumerate(pictures):
        truth, predicted = panels[2 * index : 2 * index + 2]
        target, prediction = targets[index], predictions[index]
        palette = make_palette(target, prediction, thresholds, classes)
        title = draw_truth(
            truth, picture, target, classes, palette, None if missed is None else missed[index]
        )
        heading = "" if titles is None else titles[index]
        set_title(truth, title, heading=heading, heading_panels=min(columns, 2))
        title = draw_predictions(
            predicted,
            picture,
            prediction,
            classes,
            palette,
            thresholds,
            None if outcomes is None else outcomes[index],
        )
        set_title(predicted, f"predictions{shown}: {title}")
    return save_figure(figure, path)


def _as_pictures(images: Sequence[Tensor]) -> list[NDArray[Any]]:
    return [as_picture(f"images[{index}]", image) for index, image in enumerate(images)]
