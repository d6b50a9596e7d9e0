"""The Pascal VOC devkit's result files: one text file for each class, one line for each detection.

A line is ``<image name> <score> <xmin> <ymin> <xmax> <ymax>``, in the devkit's coordinates: 1-based
and inclusive, so that the continuous ``x1, y1, x2, y2`` are written ``x1 + 1, y1 + 1, x2, y2``.
``VOCevaldet.m``, the evaluation server and most toolboxes read such files.

Source: the development kit's documentation, section "Detection task: submission of results".
Shape legend: D detections of one image, or of all of them once they are joined.
"""

import math
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.records import Columns, Record, RecordReader
from detmix.evaluation.voc.evaluator import checked_classes
from detmix.files import write_text

# From continuous to the devkit's coordinates.
_OFFSET = np.array([1.0, 1.0, 0.0, 0.0])
# Pixels by which the sides of a narrow box may cross where a tool writes one decimal.
_ROUNDING = 0.1 + 1e-6


def write_voc_results(
    folder: str | Path,
    names: Sequence[str],
    predictions: Sequence[Record],
    classes: Sequence[str],
    *,
    image_set: str = "test",
) -> list[Path]:
    """Write ``comp4_det_<image_set>_<class>.txt`` for every class, empty where nothing was found.

    Numbers have all their digits. What is float32 comes back exactly from `read_voc_results`, but
    for a corner within 2**-29 pixels of the image's edge. Lines are in the order of the images,
    then of an image's detections: equal scores keep their order.

    Args:
        folder: Made if need be. Files of the same names are replaced, each at once; others stay.
        names: Each image's name as the devkit has it, such as ``"000005"``: without the year, so
            that years, like image sets, need a folder each.
        predictions: For each image ``boxes (D, 4)`` float ``x1, y1, x2, y2`` in continuous pixel
            coordinates, ``labels (D,)`` int in 1..C and ``scores (D,)`` float.
        classes: The C class names; label k is ``classes[k - 1]``.
        image_set: The split, as it is to stand in the files' names.

    Returns:
        The files in the order of the classes.

    Raises:
        ValueError: A name that is empty, holds white space or comes twice; a name of a class or
            image set that cannot be part of a file's name; lists of unequal length; predictions
            that `VOCEvaluator.update` would not take. The message names what is wrong.
    """
    classes, names = checked_classes(classes), _checked_names(names)
    paths = [Path(folder) / _file_name("comp4", image_set, name) for name in classes]
    if len(predictions) != len(names):
        raise ValueError(f"got {len(predictions)} predictions for {len(names)} names of images")
    detections = RecordReader("predictions", list(names), len(classes)).detections(predictions)
    images = np.repeat(np.arange(len(names)), detections.counts)
    for label, path in enumerate(paths, 1):
        rows = np.flatnonzero(detections.labels == label)
        write_text(path, "".join(_lines(names, images, detections, rows)))
    return paths


def read_voc_results(
    folder: str | Path,
    names: Sequence[str],
    classes: Sequence[str],
    *,
    image_set: str | None = None,
) -> list[dict[str, NDArray[Any]]]:
    """Read the result files of all classes, whoever wrote them, for `VOCEvaluator.update`.

    Files may be of ``comp3`` or ``comp4``, with integer or other coordinates, empty lines and any
    line ends. Lines may come in any order: detections of a class in an image stay as they come,
    and equal scores of different images follow the order of ``names``.

    Args:
        folder: Where the files lie. Others may lie there as well.
        names: Each image's name as the files have it (see `write_voc_results`).
        classes: The C class names; each needs its file.
        image_set: The split in the files' names; None where the folder holds one only.

    Returns:
        For each of ``names`` ``boxes (D, 4)`` float64 ``x1, y1, x2, y2`` in continuous pixel
        coordinates, ``labels (D,)`` int64 in 1..C and ``scores (D,)`` float64. An image of which
        no file speaks has no rows. Float64, because scores that differ must not become equal.

    Raises:
        FileNotFoundError: No such folder, no result files in it, or a class without its file.
        ValueError: Results of several competitions or image sets to choose from; a bad name in
            ``names`` or ``classes``; a line with an unknown image, too many or too few fields,
            something other than a finite number, or a box whose sides cross by more than rounding.
            The message names file and line.
    """
    classes, names = checked_classes(classes), _checked_names(names)
    image_index = {name: index for index, name in enumerate(names)}
    images, numbers = zip(
        *(_read(path, image_index) for path in _find(Path(folder), classes, image_set)), strict=True
    )
    labels = np.repeat(np.arange(1, len(classes) + 1), [len(rows) for rows in images])
    of_image = np.concatenate(images)
    order = np.argsort(of_image, kind="stable")
    rows = np.concatenate(numbers)[order]
    boxes, scores, labels = rows[:, 1:] - _OFFSET, rows[:, 0].copy(), labels[order]
    ends = np.cumsum(np.bincount(of_image, minlength=len(names))).tolist()
    spans = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
    return [
        {"boxes": boxes[span], "labels": labels[span], "scores": scores[span]} for span in spans
    ]


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """The images' names, if all are different and each is one field of a line."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not isinstance(name, str) or name.split() != [name]:
            raise ValueError(f"names[{index}] is {name!r}, expected a name without white space")
        if name in seen:
            raise ValueError(f"names[{index}] is {name!r}, which came before: expected once each")
        seen.add(name)
    return tuple(names)


def check_file_names(classes: Sequence[str]) -> None:
    """Raise ValueError for a class whose name cannot be part of a file's name."""
    for name in classes:
        _file_name("comp4", "test", name)


def _file_name(competition: str, image_set: str, name: str) -> str:
    for part in (image_set, name):
        if not part or re.search(r"[/\\\x00-\x1f]", part):
            raise ValueError(f"got {part!r}, expected what can be part of a file's name")
    return f"{competition}_det_{image_set}_{name}.txt"


def _lines(
    names: tuple[str, ...], images: NDArray[np.int64], detections: Columns, rows: NDArray[np.int64]
) -> Iterator[str]:
    """The lines of the detections ``rows``."""
    scores = detections.extra[rows].tolist()
    boxes = detections.boxes[rows].astype(np.float64) + _OFFSET
    for image, score, box in zip(images[rows].tolist(), scores, boxes.tolist(), strict=True):
        yield f"{names[image]} {score!r} {box[0]!r} {box[1]!r} {box[2]!r} {box[3]!r}\n"


def _find(folder: Path, classes: tuple[str, ...], image_set: str | None) -> list[Path]:
    """The file of every class, in their order."""
    chosen = ".+?" if image_set is None else re.escape(image_set)
    # The shortest image set, hence the longest class: "hot_dog" is no "dog" of the set "test_hot".
    pattern = re.compile(rf"(comp[34])_det_({chosen})_({'|'.join(map(re.escape, classes))})\.txt")
    matches = (pattern.fullmatch(path.name) for path in folder.iterdir())
    found = sorted({(match[1], match[2]) for match in matches if match})
    if not found:
        expected = f"comp4_det_{image_set or '<image set>'}_{classes[0]}.txt"
        raise FileNotFoundError(f"{folder}: holds no result files, expected {expected} and so on")
    if len(found) > 1:
        kinds = ", ".join("_det_".join(pair) for pair in found)
        raise ValueError(f"{folder}: holds results of {kinds}; expected one, or name an image_set")
    competition, image_set = found[0]
    paths = [folder / _file_name(competition, image_set, name) for name in classes]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: lacks {', '.join(missing)}; expected a file for each class"
        )
    return paths


def _read(path: Path, image_index: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The images ``(D,)`` and the numbers ``(D, 5)``: score and box as written."""
    images, numbers = array("q"), array("d")  # 48 bytes a line, where Python's objects take 300
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                name, *fields = line.split()
                score, x1, y1, x2, y2 = map(float, fields)
                image = image_index[name]
                x2, y2 = _upper(x1 - 1, x2), _upper(y1 - 1, y2)
                if not math.isfinite(score + x1 + y1 + x2 + y2):
                    raise ValueError
            except (ValueError, KeyError):
                if not line.strip():
                    continue
                raise _line_error(path, number, line, image_index) from None
            images.append(image)
            numbers.extend((score, x1, y1, x2, y2))
    return np.frombuffer(images, dtype=np.int64), np.frombuffer(numbers).reshape(-1, 5)


def _upper(low: float, high: float) -> float:
    """The upper side of a box; no less than the lower one, if only rounding has made it so."""
    if high < low - _ROUNDING:
        raise ValueError
    return low if high < low else high  # max() would hide a NaN


def _line_error(path: Path, number: int, line: str, image_index: dict[str, int]) -> ValueError:
    """What is wrong with a line."""
    name, *fields = line.split()
    if len(fields) != 5:
        what = f"has {len(fields) + 1} fields, expected 6: image, score, xmin, ymin, xmax, ymax"
    elif name not in image_index:
        names = f"one of the {len(image_index)} images, such as {next(iter(image_index), '')!r}"
        what = f"names the image {name!r}, expected {names}"
    else:
        numbers = "five finite numbers with xmin <= xmax and ymin <= ymax"
        what = f"holds {' '.join(fields)!r}, expected {numbers}"
    return ValueError(f"{path}, line {number}: {what}")
