"""Images with boxes drawn on them: mixed batches with their weights, predictions beside the truth.

Shape legend: N boxes, D of them predicted or G true, of one image of H x W pixels; C classes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from detmix.evaluation.errors.result import label_of
from detmix.evaluation.records import as_array
from detmix.pictures import style
from detmix.pictures.boxes import Objects, draw_boxes

Target = Mapping[str, Any]
Panel = tuple[Tensor, Sequence[str], Objects]  # image, heading, what is drawn on it

_WIDTH, _WIDEST, _GAP = 480, 960, 10  # pixels, of a panel and what is between two
_WIDEST_CLASS = 220  # pixels, of a name on a panel
_PER_OBJECT = (
    *("labels", "scores", "box_weights", "source", "difficult", "iscrowd"),
    *("masks", "keypoints", "outcomes"),
)


def plot_batch(
    images: Sequence[Tensor], targets: Sequence[Target], classes: Sequence[str], path: str | Path
) -> Path:
    """Draw a (mixed) batch, every box in its class's colour, with its weight.

    Boxes of another source than the image's first one, those of its partner, are dashed; above each
    panel stand its ``sources`` and their weights. Masks and keypoints are drawn too.

    Args:
        images: ``(3, H, W)`` uint8, or float in [0, 1]; sizes may differ.
        targets: ``boxes (N, 4)``, ``labels (N,)`` in 1..C and maybe ``box_weights (N,)``, ``masks``
            as `encode_masks` takes them, ``keypoints (N, K, 3)``, and both ``source (N,)``, the
            number of each object's image, and ``sources``, each such image's name by its number.
        classes: the C class names without the background.
        path: of the picture, in a format that Pillow writes.

    Raises:
        ValueError: lists of unequal length, an image of another shape, a label outside 1..C, a
            per-object value without N entries, no image at all, an unknown format.
    """
    _check(images, targets=targets)
    panels = []
    for image, target in zip(images, targets, strict=True):
        weights = as_array(target.get("box_weights", np.ones(len(target["boxes"]))))
        shown = {**target, "scores": weights, "difficult": [], "iscrowd": []}
        objects, heading = _objects(shown, classes), []
        for number, (source, name) in enumerate(target.get("sources", {}).items()):
            is_own = as_array(target["source"]) == source
            objects.is_dashed |= is_own & (number > 0)
            own = np.sort(weights[is_own]).tolist()
            span = " to ".join(dict.fromkeys(f"{w:.2f}" for w in own[:1] + own[-1:]))
            what = f"weight {span}" if span else "no objects"
            heading.append(f"{name}{' (dashed)' if number else ''}: {what}")
        panels.append((image, heading, objects))
    return _save(panels, math.ceil(len(panels) / math.ceil(len(panels) / 4)), path)


def plot_predictions(
    images: Sequence[Tensor],
    predictions: Sequence[Target],
    targets: Sequence[Target] | None,
    classes: Sequence[str],
    path: str | Path,
    score_threshold: float = 0.5,
) -> Path:
    """Draw predictions, beside the ground truth where it is given, each class in its colour.

    Args:
        images: these, ``classes``, ``path`` and errors are as of `plot_batch`.
        predictions: ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``, and maybe ``masks``,
            ``keypoints``, and ``outcomes``: D of `detmix.evaluation.errors.result.OUTCOMES`, told
            in words but for "correct", or "missed" for an object that is not found, drawn dashed.
        targets: ``boxes (G, 4)``, ``labels (G,)`` and maybe ``masks``, ``keypoints``,
            ``difficult (G,)`` and ``iscrowd (G,)``, drawn dashed. None: only predictions are drawn,
            larger, as the images are.
        classes: the C class names.
        path: of the picture.
        score_threshold: predictions below it are left out; where it leaves none, the best score is
            told.
    """
    _check(images, predictions=predictions, **({} if targets is None else {"targets": targets}))
    panels: list[Panel] = []
    for index, (image, prediction) in enumerate(zip(images, predictions, strict=True)):
        if targets is not None:
            truth = _objects(targets[index], classes)
            panels.append((image, [f"ground truth: {len(truth.texts)}"], truth))
        found = _objects(_best_last(prediction, score_threshold), classes)
        if found.keypoints is not None:
            # torchvision says "visibility 1" of every keypoint that it finds, COCO's "hidden".
            found.keypoints = found.keypoints[..., :2]
        heading = f"predictions of score ≥ {score_threshold:g}: {len(found.texts)}"
        if not found.texts:
            heading = nothing_found([prediction], score_threshold)
        panels.append((image, [] if "outcomes" in prediction else [heading], found))
    if targets is None:
        widest = max(image.shape[-1] for image in images)
        return _save(panels, min(len(images), 2), path, min(max(widest, _WIDTH), _WIDEST))
    return _save(panels, 2 if len(images) < 3 else 4, path)


def nothing_found(predictions: Sequence[Target], score_threshold: float) -> str:
    """Say that no prediction scores enough, and what the best one does."""
    scores = [score for each in predictions for score in as_array(each["scores"])]
    best = f"; the best is {max(scores):.2g}: --score {max(scores) / 2:.1g}" if scores else ""
    return f"nothing scores {score_threshold:g} or more{best}"


def _best_last(prediction: Target, threshold: float) -> Target:
    """The predictions that score enough, the strongest last: they lie on top."""
    scores = as_array(prediction["scores"])
    rows = np.argsort(scores, kind="stable")
    rows = rows[scores[rows] >= np.asarray(threshold, dtype=scores.dtype)].tolist()
    return {
        key: value[rows] if hasattr(value, "shape") else [value[row] for row in rows]
        for key, value in prediction.items()
        if key in _PER_OBJECT or key == "boxes"
    }


def _objects(record: Target, classes: Sequence[str]) -> Objects:
    """What is drawn of a record: each object's class and number, and what is said of it."""
    labels = as_array(record["labels"]).astype(int).tolist()
    if not all(1 <= label <= len(classes) for label in labels):
        raise ValueError(f"labels are {labels}, expected 1..{len(classes)}")
    num, font = len(labels), style.font(style.font_size(_WIDTH))
    notes = np.array(record.get("outcomes", [""] * num), dtype=object)
    for key, note in (("difficult", "difficult"), ("iscrowd", "crowd")):
        notes[as_array(record.get(key, [])).nonzero()] = note
    numbers = [f"{value:.2f}" for value in as_array(record.get("scores", []))] or [""] * num
    texts = []
    for label, number, note in zip(labels, numbers, notes, strict=True):
        name = style.fit(classes[label - 1], font, _WIDEST_CLASS)
        said = "" if note == "correct" else label_of(note)
        texts.append(" ".join(filter(None, (name, "" if note == "missed" else number, said))))
    keypoints = record.get("keypoints")
    return Objects(
        boxes=as_array(record["boxes"]).reshape(-1, 4),
        texts=texts,
        colors=[style.CLASS_COLORS[(label - 1) % len(style.CLASS_COLORS)] for label in labels],
        is_dashed=np.isin(notes.astype(str), ("missed", "difficult", "crowd")),
        masks=record.get("masks"),
        keypoints=None if keypoints is None else as_array(keypoints),
    )


def _save(panels: Sequence[Panel], columns: int, path: str | Path, width: int = _WIDTH) -> Path:
    """Draw the panels under their headings, rows as high as the highest of their panels."""
    drawn = [draw_boxes(image, objects, width) for image, _, objects in panels]
    font = style.font(style.font_size(width))
    line = sum(font.getmetrics())
    above = line * max(len(heading) for _, heading, _ in panels) + _GAP
    starts = range(0, len(panels), columns)
    heights = [above + max(panel.height for panel in drawn[i : i + columns]) for i in starts]
    whole_width = min(columns, len(panels)) * (width + _GAP) + _GAP
    whole = Image.new("RGB", (whole_width, sum(heights) + _GAP), "white")
    for number, (panel, (_, heading, _)) in enumerate(zip(drawn, panels, strict=True)):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (width + _GAP), sum(heights[:row]) + above
        whole.paste(panel, (left, top))
        for below, text in enumerate(reversed(heading), start=1):
            place, text = (left, top - below * line), style.fit(text, font, width)
            ImageDraw.Draw(whole).text(place, text, fill="black", font=font)
    return style.save(lambda file: whole.save(file, quality=90), path)


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
