"""The two panels of an image in a picture of predictions: what is true, what was found.

Shape legend: D predicted and G true boxes of one image of H x W pixels; C classes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.boxes import draw_boxes
from detmix.evaluation.error_result import OUTCOMES, label_of
from detmix.evaluation.figures import BLUE, BOX_COLORS, VERMILLION
from detmix.evaluation.picture_inputs import Target, as_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ScoreThreshold: TypeAlias = float | Sequence[float] | Mapping[str, float]

_SET_ASIDE = "#BBBBBB"  # lighter than the charts' grey: it must stand out from dark images
OUTCOME_KEY = (
    ("correct, found", BLUE),
    ("false, missed", VERMILLION),
    ("does not count", _SET_ASIDE),
)
"""What the colours of outcomes stand for."""

_OUTCOME_LABELS = tuple(map(label_of, OUTCOMES))


def make_palette(
    target: Target, prediction: Target, thresholds: NDArray[Any], classes: Sequence[str]
) -> dict[int, str]:
    """A colour for each class that is drawn in an image."""
    drawn = as_numpy(prediction["labels"])[_strong_rows(prediction, thresholds)]
    present = sorted({*as_numpy(target["labels"]).tolist(), *drawn.tolist()})
    if len(classes) <= len(BOX_COLORS):  # then a class has one colour in all images
        present = list(range(1, len(classes) + 1))
    return {label: BOX_COLORS[i % len(BOX_COLORS)] for i, label in enumerate(present)}


def draw_truth(
    axes: "Axes",
    picture: NDArray[Any],
    target: Target,
    classes: Sequence[str],
    palette: Mapping[int, str],
    missed: Sequence[bool] | None,
) -> str:
    """Draw the objects and return the panel's title."""
    labels = as_numpy(target["labels"])
    flags = {
        word: as_numpy(target.get(key, np.zeros(len(labels)))).astype(bool)
        for word, key in (("difficult", "difficult"), ("crowd", "iscrowd"))
    }
    aside = flags["difficult"] | flags["crowd"]
    words = [word for word, flag in flags.items() if flag.any()]
    title = f"ground truth: {len(labels)}"
    notes, colors, is_missed = None, [palette[label] for label in labels.tolist()], None
    if missed is not None:
        is_missed = as_numpy(missed).astype(bool)
        title += f", {is_missed.sum()} missed"
        choices = ("missed", is_missed), ("crowd", flags["crowd"]), ("difficult", aside)
        notes = [
            next((word for word, flag in choices if flag[row]), "") for row in range(len(labels))
        ]
        colors = [_truth_color(note) for note in notes]
    elif words:
        title += f" (dashed: {' or '.join(words)})"
    draw_boxes(
        axes,
        picture,
        target["boxes"],
        labels,
        classes=classes,
        notes=notes,
        colors=colors,
        dashed=(aside if is_missed is None else aside | is_missed).tolist(),
        thick=None if is_missed is None else is_missed.tolist(),
        masks=target.get("masks"),
        keypoints=target.get("keypoints"),
    )
    return title


def _truth_color(note: str) -> str:
    return {"": BLUE, "missed": VERMILLION}.get(note, _SET_ASIDE)


def draw_predictions(
    axes: "Axes",
    picture: NDArray[Any],
    prediction: Target,
    classes: Sequence[str],
    palette: Mapping[int, str],
    thresholds: NDArray[Any],
    outcomes: Sequence[str] | None,
) -> str:
    """Draw the predictions above the threshold and return how many there are of which outcome."""
    rows = _strong_rows(prediction, thresholds)
    labels = as_numpy(prediction["labels"])[rows]
    title = str(len(rows))
    notes, colors = None, [palette[label] for label in labels.tolist()]
    if outcomes is not None:
        kinds = [label_of(outcomes[row]) for row in rows]
        notes = ["" if kind == "correct" else kind for kind in kinds]
        colors = [{"correct": BLUE, "ignored": _SET_ASIDE}.get(k, VERMILLION) for k in kinds]
        title += f", {colors.count(VERMILLION)} false"
        if colors.count(_SET_ASIDE):
            title += f", {colors.count(_SET_ASIDE)} ignored"
    draw_boxes(
        axes,
        picture,
        as_numpy(prediction["boxes"])[rows],
        labels,
        classes=classes,
        values=as_numpy(prediction["scores"])[rows].tolist(),
        notes=notes,
        colors=colors,
        masks=_rows_of(prediction.get("masks"), rows),
        # torchvision says "visibility 1" of every keypoint that it finds, COCO's "hidden".
        keypoints=_rows_of(prediction.get("keypoints"), rows, axes=2),
    )
    return title


def _rows_of(values: Any, rows: NDArray[Any], axes: int | None = None) -> Any:
    """The rows of a tensor, an array or a list, and of each the first entries of the last axis."""
    if values is None:
        return None
    if not hasattr(values, "shape"):
        return [values[row] for row in rows]
    return as_numpy(values[rows.tolist()])[..., :axes]


def _strong_rows(prediction: Target, thresholds: NDArray[Any]) -> NDArray[np.int64]:
    """Rows from the threshold on, weakest first: the strongest lie on top."""
    scores, labels = as_numpy(prediction["scores"]), as_numpy(prediction["labels"])
    rows: NDArray[np.int64] = np.argsort(scores, kind="stable")
    lowest = thresholds.astype(scores.dtype)[labels.astype(np.int64) - 1]
    return rows[(scores >= lowest)[rows]]


def class_thresholds(threshold: ScoreThreshold, classes: Sequence[str]) -> NDArray[Any]:
    """Return ``(C,)`` thresholds, or raise ValueError if they are not one for each class."""
    if isinstance(threshold, Mapping):
        absent = [name for name in classes if name not in threshold]
        if absent:
            raise ValueError(f"score_threshold has none for {absent[0]!r}, expected every class")
        threshold = [threshold[name] for name in classes]
    values = np.asarray(threshold, dtype=np.float64)
    if values.ndim and values.shape != (len(classes),):
        raise ValueError(
            f"score_threshold has {len(values)} entries, expected one for each of the "
            f"{len(classes)} classes"
        )
    return np.broadcast_to(values, (len(classes),))


def check_outcomes(
    predictions: Sequence[Target],
    targets: Sequence[Target],
    outcomes: Sequence[Sequence[str]] | None,
    missed: Sequence[Sequence[bool]] | None,
) -> None:
    """Raise ValueError unless each prediction has a known outcome and each object a flag."""
    if (outcomes is None) != (missed is None):
        raise ValueError("outcomes and missed go together, got only one of them")
    for name, lists, records in (
        ("outcomes", outcomes or [], predictions),
        ("missed", missed or [], targets),
    ):
        for index, (values, record) in enumerate(zip(lists, records, strict=False)):
            if len(values) != len(record["boxes"]):
                raise ValueError(
                    f"{name}[{index}] has {len(values)} entries for {len(record['boxes'])} boxes"
                )
    for index, kinds in enumerate(outcomes or []):
        for row, kind in enumerate(kinds):
            if label_of(kind) not in _OUTCOME_LABELS:
                expected = ", ".join(OUTCOMES)
                raise ValueError(f"outcomes[{index}][{row}] is {kind!r}, expected {expected}")
