"""Images with boxes drawn on them: mixed batches with their weights, predictions beside the truth.

Shape legend: N boxes, D of them predicted or G true, of one image of H x W pixels; C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from detmix.evaluation.errors.result import label_of
from detmix.evaluation.records import as_array
from detmix.pictures import style
from detmix.pictures.boxes import contrasting, draw_boxes

Target = Mapping[str, Any]
Line = tuple[str, str]  # a text and its colour
Panel = tuple[Tensor, Sequence[Line], dict[str, Any]]  # image, heading, what else is drawn of it

_PANEL_WIDTH, _GAP = 3.9, 0.08  # inches
_LOWEST, _HIGHEST = 0.12, 1.34  # of a panel in its widths: two labels, 3:4
_LINE = 14.0  # points, of a heading
_ABOVE_IMAGE = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 8.5}
_LONGEST_TITLE, _LONGEST_SOURCE, _LONGEST_CLASS = 50, 34, 28  # characters
_PER_OBJECT = (
    *("labels", "scores", "box_weights", "source", "difficult", "iscrowd"),
    *("masks", "keypoints", "missed", "outcomes"),
)


@style.styled
def plot_batch(
    images: Sequence[Tensor], targets: Sequence[Target], classes: Sequence[str], path: str | Path
) -> Path:
    """Draw a (mixed) batch, every box with its class and weight.

    Boxes of one source image share a colour, without ``source`` boxes of equal weight; above each
    panel stand its ``sources`` and their weights. Masks and keypoints are drawn too.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        targets: ``boxes (N, 4)``, ``labels (N,)`` in 1..C and maybe ``box_weights (N,)``, ``masks``
            as `encode_masks` takes them, ``keypoints (N, K, 3)``, ``source (N,)``, the number
            of each object's image, and ``sources``, the name of each image mixed by its number.
        classes: the C class names without the background.
        path: of the picture.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C, a
            per-object value without N entries, no image at all.
    """
    _check(images, targets=targets)
    weights = [as_array(t.get("box_weights", np.ones(len(t["boxes"])))) for t in targets]
    # Mixup gives the objects of an image the same weight.
    origins = [as_array(t.get("source", w)).tolist() for t, w in zip(targets, weights, strict=True)]
    sources = [
        dict.fromkeys([*target.get("sources", {}), *sorted(origin, reverse=True)])
        for target, origin in zip(targets, origins, strict=True)
    ]
    every = dict.fromkeys(source for of_image in sources for source in of_image)
    panels = []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        # A source has one colour in all panels, if there are colours enough.
        order = every if len(every) <= len(style.BOX_COLORS) else sources[i]
        colors = dict(zip(order, cycle(style.BOX_COLORS), strict=False))
        drawn = _objects(target, classes, weights[i])
        drawn["colors"] = [colors[source] for source in origins[i]]
        heading = []
        for source, name in target.get("sources", {}).items():
            own = weights[i][np.equal(origins[i], source)]
            span = " to ".join(sorted({f"{own.min():.2f}", f"{own.max():.2f}"})) if len(own) else ""
            text = f"weight {span}" if span else "no objects"
            heading.append((f"{style.shorten(name, _LONGEST_SOURCE)}: {text}", colors[source]))
        panels.append((image, heading, drawn))
    return _save(panels, math.ceil(len(panels) / math.ceil(len(panels) / 4)), path)


@style.styled
def plot_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Target],
    targets: Sequence[Target] | None,
    classes: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.5,
) -> Path:
    """Draw predictions, beside the ground truth where it is given, with masks and keypoints.

    Each class has a colour. With ``outcomes`` and ``missed``, colours say instead what is right and
    what is wrong: correct detections and found objects are blue, false detections, with their kind
    in words, and missed objects vermillion, what does not count grey.

    Args:
        images: these, ``classes``, ``path`` and errors are as of `plot_batch`.
        predictions: ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``, and maybe ``masks`` and
            ``keypoints``, and ``outcomes``, D of `detmix.evaluation.errors.result.OUTCOMES`.
        targets: ``boxes (G, 4)``, ``labels (G,)`` and maybe ``masks``, ``keypoints``,
            ``difficult (G,)`` and ``iscrowd (G,)``, drawn dashed, ``missed``, G flags, which goes
            with ``outcomes``, and ``name``, a title. None: only predictions are drawn, larger.
        classes: the C class names.
        path: of the picture.
        score_threshold: predictions below it are left out.
    """
    _check(images, predictions=predictions, **({} if targets is None else {"targets": targets}))
    what = f"predictions of score ≥ {score_threshold:g}" if score_threshold > 0 else "predictions"
    panels: list[Panel] = []
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        if targets is not None:
            target = targets[index]
            title = [style.shorten(target["name"], _LONGEST_TITLE)] if "name" in target else []
            truth = _truth(target, classes)
            lines = [*title, f"ground truth: {len(truth['texts'])}"]
            panels.append((image, [(line, "white") for line in lines], truth))
        found = _found(prediction, classes, score_threshold)
        panels.append((image, [(f"{what}: {len(found['texts'])}", "white")], found))
    if targets is None:
        return _save(panels, 1 if len(images) < 2 else 2, path, style.WIDTH)
    return _save(panels, 2 if len(images) < 3 else 4, path)


def _truth(target: Target, classes: Sequence[str]) -> dict[str, Any]:
    """What is drawn of an image's objects."""
    drawn = _objects(target, classes)
    notes = np.full(len(target["boxes"]), "", dtype=object)
    for key, note in (("difficult", "difficult"), ("iscrowd", "crowd"), ("missed", "missed")):
        notes[as_array(target.get(key, [])).nonzero()] = note
    _append(drawn["texts"], notes)
    drawn["dashed"] = (notes != "").tolist()
    if "missed" in target:
        looks = {"": style.BLUE, "missed": style.VERMILLION}
        drawn["colors"] = [looks.get(note, style.GREY) for note in notes]
    return drawn


def _found(prediction: Target, classes: Sequence[str], threshold: float) -> dict[str, Any]:
    """What is drawn of predictions: the weakest first, the strongest lie on top."""
    scores = as_array(prediction["scores"])
    rows = np.argsort(scores, kind="stable")
    rows = rows[scores[rows] >= np.asarray(threshold, dtype=scores.dtype)].tolist()
    chosen = {
        key: value[rows] if hasattr(value, "shape") else [value[row] for row in rows]
        for key, value in prediction.items()
        if key in _PER_OBJECT or key == "boxes"
    }
    drawn = _objects(chosen, classes, scores[rows])
    if drawn["keypoints"] is not None:
        # torchvision says "visibility 1" of every keypoint that it finds, COCO's "hidden".
        drawn["keypoints"] = drawn["keypoints"][..., :2]
    if "outcomes" in chosen:
        looks = {"correct": style.BLUE, "ignored": style.GREY}
        kinds = chosen["outcomes"]
        drawn["colors"] = [looks.get(kind, style.VERMILLION) for kind in kinds]
        _append(drawn["texts"], ["" if kind == "correct" else label_of(kind) for kind in kinds])
    return drawn


def _objects(
    record: Target, classes: Sequence[str], values: NDArray[Any] | None = None
) -> dict[str, Any]:
    """What `draw_boxes` takes of objects, each class in its colour, perhaps with values."""
    labels = as_array(record["labels"]).astype(int).tolist()
    if not all(1 <= label <= len(classes) for label in labels):
        raise ValueError(f"labels are {labels}, expected 1..{len(classes)}")
    texts = [style.shorten(classes[label - 1], _LONGEST_CLASS) for label in labels]
    if values is not None:
        _append(texts, [f"{value:.2f}" for value in values])
    keypoints = record.get("keypoints")
    return {
        "boxes": as_array(record["boxes"]).reshape(-1, 4),
        "texts": texts,
        "colors": [style.BOX_COLORS[(label - 1) % len(style.BOX_COLORS)] for label in labels],
        "dashed": [False] * len(labels),
        "masks": record.get("masks"),
        "keypoints": None if keypoints is None else as_array(keypoints),
    }


def _append(texts: list[str], more: Iterable[str]) -> None:
    texts[:] = [f"{text} {end}".rstrip() for text, end in zip(texts, more, strict=True)]


def _save(
    panels: Sequence[Panel], columns: int, path: str | Path, panel: float = _PANEL_WIDTH
) -> Path:
    """Draw the panels, rows as high as the highest of their images."""
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    highest = [max(image.shape[-2] / image.shape[-1] for image, *_ in row) for row in rows]
    heights = [panel * min(max(aspect, _LOWEST), _HIGHEST) for aspect in highest]
    above = _LINE / 72 * max(len(heading) for _, heading, _ in panels) + _GAP
    width = min(columns, len(panels)) * (panel + _GAP) + _GAP
    top = height = sum(heights) + len(rows) * (above + _GAP)
    figure = style.new_figure(width, height)
    figure.set_layout_engine("none")  # texts are placed on axes that stay where they are
    for row, row_height in zip(rows, heights, strict=True):
        top -= above + row_height
        for column, (image, heading, drawn) in enumerate(row):
            left = _GAP + column * (panel + _GAP)
            place = (left / width, top / height, panel / width, row_height / height)
            axes = figure.add_axes(place, anchor="NW")
            draw_boxes(axes, image, **drawn)
            for line, (text, color) in enumerate(reversed(heading)):
                look = {"boxstyle": "square,pad=0.2", "facecolor": color, "linewidth": 0}
                above_image: dict[str, Any] = {"xytext": (2, 4 + line * _LINE), **_ABOVE_IMAGE}
                axes.annotate(text, (0, 1), **above_image, color=contrasting(color), bbox=look)
        top -= _GAP
    return style.save_figure(figure, path)


def _check(images: Sequence[Tensor], **records: Sequence[Target]) -> None:
    """Raise ValueError, naming the record, for what cannot be drawn."""
    num = len(images)
    for name, of_images in records.items():
        if num == 0 or len(of_images) != num:
            raise ValueError(f"got {num} images and {len(of_images)} {name}, expected as many")
        for index, record in enumerate(of_images):
            size = len(record["boxes"])
            for key in _PER_OBJECT:
                if record.get(key) is not None and len(record[key]) != size:
                    raise ValueError(f"{name}[{index}]: {len(record[key])} {key}, {size} boxes")
