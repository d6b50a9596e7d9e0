"""Images with boxes drawn on them: mixed batches with their weights, predictions beside the truth.

Shape legend: N boxes, D of them predicted or G true, of one image of H x W pixels; C classes.
"""

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.errors.result import label_of
from detmix.pictures.boxes import Target, as_numpy, as_picture, draw_boxes
from detmix.pictures.style import (
    BLUE,
    BOX_COLORS,
    VERMILLION,
    message_figure,
    new_figure,
    plain_text,
    save_figure,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_PANEL_WIDTH = 3.9  # inches
_LOWEST, _HIGHEST = 0.12, 1.34  # of a panel in its widths: two labels, 3:4
_LINE = 0.17  # inches, of a title
_LONGEST_LINE, _LONGEST_NAME = 50, 34  # characters
_MOST_ENTRIES = 4  # lines in a key
_KEY: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9,
    "handlelength": 0.9,
    "handleheight": 0.8,
    "handletextpad": 0.5,
    "labelspacing": 0.25,
    "borderaxespad": 0,
}
_PER_OBJECT = (
    *("labels", "scores", "box_weights", "source"),
    *("difficult", "iscrowd", "masks", "keypoints"),
)
_SET_ASIDE = "#BBBBBB"  # lighter than the charts' grey: it must stand out from dark images


@plain_text()
def plot_batch(
    images: Sequence[Tensor],
    targets: Sequence[Target],
    classes: Sequence[str],
    path: str | Path,
    max_images: int = 8,
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

    Returns:
        The path written.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C, a
            per-object value without N entries, a box with NaN or infinity.
    """
    pictures = [as_picture(image) for image in images[:max_images]]
    targets = targets[:max_images]
    _check("targets", targets, len(pictures))
    if not pictures:
        return save_figure(message_figure("no images"), path)
    weights = [as_numpy(t.get("box_weights", torch.ones(len(t["boxes"])))) for t in targets]
    sources, names = zip(*map(_sources, targets, weights), strict=True)
    every = list(dict.fromkeys(source for of_image in names for source in of_image))
    # A source has one colour in all panels, if there are colours enough.
    shared = len(every) <= len(BOX_COLORS) and all("source" in target for target in targets)
    colors = [
        {source: BOX_COLORS[place % len(BOX_COLORS)] for place, source in enumerate(order)}
        for order in ([every] * len(names) if shared else names)
    ]
    columns = math.ceil(len(pictures) / math.ceil(len(pictures) / 4))
    figure, panels = _make_grid(pictures, columns, min(max(map(len, names)), _MOST_ENTRIES))
    for axes, *of_image in zip(panels, sources, names, weights, colors, strict=True):
        axes.legend(handles=_key(*of_image), loc="lower left", bbox_to_anchor=(0, 1), **_KEY)
    _settle(figure)
    for index, axes in enumerate(panels):
        draw_boxes(
            axes,
            pictures[index],
            targets[index]["boxes"],
            targets[index]["labels"],
            classes=classes,
            values=weights[index].tolist(),
            colors=[colors[index][source] for source in sources[index]],
            masks=targets[index].get("masks"),
            keypoints=targets[index].get("keypoints"),
        )
    return save_figure(figure, path)


def _sources(target: Target, weights: NDArray[Any]) -> tuple[list[Hashable], dict[Hashable, str]]:
    """What tells each object's source image, and the name of every image that was mixed."""
    if "source" not in target:  # mixup gives the objects of an image the same weight
        levels = weights.round(4)
        return levels.tolist(), dict.fromkeys(sorted(levels.tolist(), reverse=True), "")
    sources = as_numpy(target["source"]).tolist()
    names = dict(target.get("sources", {}))
    return sources, names | {s: f"image {s}" for s in sources if s not in names}


def _key(
    sources: list[Hashable],
    names: dict[Hashable, str],
    weights: NDArray[Any],
    colors: dict[Hashable, str],
) -> "list[Patch]":
    """Each source's name and weights beside its colour; a few lines whatever their number."""
    entries = []
    for source, name in names.items():
        own = weights[[other == source for other in sources]]
        text = "no objects"
        if len(own):
            low, high = f"{own.min():.2f}", f"{own.max():.2f}"
            text = f"weight {low}" if low == high else f"weights {low} to {high}"
        text = f"{shorten(name, _LONGEST_NAME)}: {text}" if name else text
        entries.append((text, colors[source]))
    if len(entries) > _MOST_ENTRIES:
        kept = _MOST_ENTRIES - 1
        entries[kept:] = [(f"and {len(entries) - kept} more", "none")]
    return [_patch(*entry) for entry in entries or [("no objects", "none")]]


def _patch(label: str, color: str) -> "Patch":
    from matplotlib.patches import Patch

    return Patch(facecolor=color, edgecolor="none", label=label)


@plain_text()
def plot_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Target],
    targets: Sequence[Target],
    classes: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.5,
    max_images: int = 8,
    *,
    outcomes: Sequence[Sequence[str]] | None = None,
    missed: Sequence[Sequence[bool]] | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """Draw predictions beside the ground truth, two panels an image, with masks and keypoints.

    Each class has a colour. With ``outcomes`` and ``missed``, colours say instead what is right and
    what is wrong: correct detections and found objects are blue, false detections, with their kind
    in words, and missed objects vermillion, what does not count grey.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        predictions: ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``, and maybe ``masks`` and
            ``keypoints``, as `draw_boxes` takes them.
        targets: ``boxes (G, 4)``, ``labels (G,)`` and maybe ``masks``, ``keypoints`` and
            ``difficult (G,)`` and ``iscrowd (G,)``, drawn dashed.
        classes: the C class names without the background.
        path: picture to write; its ending chooses the format.
        score_threshold: predictions below it are left out.
        max_images: draw the first so many.
        outcomes: for each image what each prediction is, D of
            `detmix.evaluation.errors.result.OUTCOMES`.
        missed: for each image G flags; goes with ``outcomes``, and with what is drawn: which
            objects no detection from the threshold on has found.
        titles: for each image what to write above it, such as its name.

    Returns:
        The path written.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C, a
            per-object value of another length, a box with NaN or infinity, only one of ``outcomes``
            and ``missed``.
    """
    if (outcomes is None) != (missed is None):
        raise ValueError("outcomes and missed go together, got only one of them")
    pictures = [as_picture(image) for image in images[:max_images]]
    num = len(pictures)
    predictions, targets = predictions[:max_images], targets[:max_images]
    _check("targets", targets, num)
    _check("predictions", predictions, num)
    if not pictures:
        return save_figure(message_figure("no images"), path)
    given = [
        [None] * num if values is None else values[:max_images]
        for values in (missed, outcomes, titles)
    ]
    contents = []
    for target, found, is_missed, kinds, name in zip(targets, predictions, *given, strict=True):
        heading = "" if name is None else f"{shorten(name, _LONGEST_LINE)}\n"
        contents.append((heading, _truth(target, is_missed)))
        contents.append(("", _found(found, score_threshold, kinds)))
    lines = 1 if titles is None else 2
    columns = 2 if num < 3 else 4
    figure, panels = _make_grid([p for p in pictures for _ in range(2)], columns, lines)
    if outcomes is not None:
        names = {"correct, found": BLUE, "false, missed": VERMILLION, "does not count": _SET_ASIDE}
        patches = [_patch(*entry) for entry in names.items()]
        figure.legend(handles=patches, loc="outside upper left", ncols=3, **_KEY)
        figure.set_figheight(figure.get_figheight() + 0.25)
    what = f"predictions of score ≥ {score_threshold:g}" if score_threshold > 0 else "predictions"
    for index, (axes, (heading, drawn)) in enumerate(zip(panels, contents, strict=True)):
        title = f"{what if index % 2 else 'ground truth'}: {len(drawn['labels'])}"
        axes.set_title(heading + title, loc="left", fontsize=9)
    _settle(figure)
    for index, (axes, (_, drawn)) in enumerate(zip(panels, contents, strict=True)):
        draw_boxes(axes, pictures[index // 2], **drawn, classes=classes)
    return save_figure(figure, path)


def _truth(target: Target, missed: Sequence[bool] | None) -> dict[str, Any]:
    """What `draw_boxes` is to draw of an image's objects."""
    num = len(target["boxes"])
    notes = np.full(num, "", dtype=object)
    for key, note in (("difficult", "difficult"), ("iscrowd", "crowd")):
        notes[as_numpy(target.get(key, torch.zeros(num))).astype(bool)] = note
    if missed is not None:
        notes[as_numpy(missed).astype(bool)] = "missed"
    looks = {"": BLUE, "missed": VERMILLION}
    return {
        **{key: target.get(key) for key in ("boxes", "labels", "masks", "keypoints")},
        "notes": notes.tolist(),
        "dashed": [note != "" for note in notes],
        "colors": None if missed is None else [looks.get(note, _SET_ASIDE) for note in notes],
    }


def _found(prediction: Target, threshold: float, outcomes: Sequence[str] | None) -> dict[str, Any]:
    """What `draw_boxes` is to draw of predictions: the weakest first, the strongest lie on top."""
    scores = as_numpy(prediction["scores"])
    rows = np.argsort(scores, kind="stable")
    rows = rows[scores[rows] >= np.asarray(threshold, dtype=scores.dtype)]
    masks, keypoints = prediction.get("masks"), prediction.get("keypoints")
    if masks is not None:
        masks = masks[rows.tolist()] if hasattr(masks, "shape") else [masks[row] for row in rows]
    drawn = {
        "boxes": as_numpy(prediction["boxes"])[rows],
        "labels": as_numpy(prediction["labels"])[rows],
        "values": scores[rows].tolist(),
        "masks": masks,
        # torchvision says "visibility 1" of every keypoint that it finds, COCO's "hidden".
        "keypoints": None if keypoints is None else as_numpy(keypoints)[rows, :, :2],
    }
    if outcomes is None:
        return drawn
    kinds = [label_of(outcomes[row]) for row in rows]
    looks = {"correct": BLUE, "ignored": _SET_ASIDE}
    notes = ["" if kind == "correct" else kind for kind in kinds]
    return {**drawn, "notes": notes, "colors": [looks.get(kind, VERMILLION) for kind in kinds]}


def _make_grid(
    pictures: Sequence[NDArray[Any]], columns: int, lines: int
) -> "tuple[Figure, list[Axes]]":
    """A figure with a panel for each picture, rows as high as the highest of their pictures."""
    columns = min(columns, len(pictures))
    aspects = [picture.shape[0] / picture.shape[1] for picture in pictures]
    rows = [aspects[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [_PANEL_WIDTH * min(max(*row, _LOWEST), _HIGHEST) for row in rows]
    height = sum(heights) + len(rows) * (_LINE * lines + 0.1) + 0.05
    figure = new_figure(columns * (_PANEL_WIDTH + 0.1), height)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("NW")
    return figure, list(grid.flat[: len(pictures)])


def _settle(figure: "Figure") -> None:
    """Fix the layout, for labels to be placed on."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _check(name: str, records: Sequence[Target], num: int) -> None:
    """Raise ValueError, naming the record, for what cannot be drawn."""
    if len(records) != num:
        raise ValueError(f"got {num} images and {len(records)} {name}, expected as many of each")
    for index, record in enumerate(records):
        where, size = f"{name}[{index}]", len(record["boxes"])
        for key in _PER_OBJECT:
            if record.get(key) is not None and len(record[key]) != size:
                raise ValueError(f"{where}: {len(record[key])} {key} for {size} boxes")
        if not np.isfinite(as_numpy(record["boxes"])).all():
            raise ValueError(f"{where}: a box is not finite: {record['boxes']}")
