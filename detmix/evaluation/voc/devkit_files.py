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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detmix.data.detection import check_classes
from detmix.evaluation.records import IntArray, Record, Records, where
from detmix.files import write_text

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
    for a corner within 2**-29 pixels of the image's edge. Equal scores keep their order.

    Args:
        folder: Made if need be; files of the same names are replaced.
        names: Each image's name as the devkit has it, such as ``"000005"``: without the year, so
            that years need a folder each. All different and of one line; the devkit itself reads
            names without white space only.
        predictions: For each image what `VOCEvaluator.update` takes, with x1 <= x2 and y1 <= y2.
        classes: The C class names; label k is ``classes[k - 1]``.
        image_set: The split, as it is to stand in the files' names.

    Returns:
        The files in the order of the classes.
    """
    files = [file_name("comp4", image_set, name) for name in check_classes(classes)]
    paths = [Path(folder) / file for file in files]
    image_index = _index(names)
    if len(predictions) != len(names):
        raise ValueError(f"got {len(predictions)} predictions for {len(names)} names of images")
    records = Records("predictions", predictions, list(image_index))
    found = records.read(len(paths))
    records.check_boxes(found["boxes"])
    found["boxes"] = found["boxes"] + np.array([1.0, 1.0, 0.0, 0.0])
    for label, path in enumerate(paths, 1):
        own = where(found, found["labels"] == label)
        columns = (own[key].tolist() for key in ("images", "scores", "boxes"))
        lines = (
            f"{names[image]} {score!r} {x1!r} {y1!r} {x2!r} {y2!r}\n"
            for image, score, (x1, y1, x2, y2) in zip(*columns, strict=True)
        )
        write_text(path, "".join(lines))
    return paths


def read_voc_results(
    folder: str | Path,
    names: Sequence[str],
    classes: Sequence[str],
    *,
    image_set: str | None = None,
) -> list[dict[str, NDArray[Any]]]:
    """Read the result files of all classes, whoever wrote them, for `VOCEvaluator.update`.

    A file's name ends with its class, and all have the same prefix: ``comp4_det_test_cat.txt``,
    ``comp3_…``, with a salt (``comp4_8d1c_det_test_cat.txt``), ``det_test_cat.txt``, ``cat.txt``.
    Lines are in any order: detections of a class in an image stay as they come, and equal scores of
    different images follow the order of ``names``.

    Args:
        folder: Where the files lie, maybe among others: of several prefixes that have a file of
            every class, those with ``det_<image set>_`` count.
        names: Each image's name as the files have it (see `write_voc_results`).
        classes: The C class names; each needs its file.
        image_set: The split in the files' names, where these tell one; None where the folder holds
            one only.

    Returns:
        For each of ``names`` ``boxes (D, 4)``, ``labels (D,)`` int64 in 1..C and ``scores (D,)``;
        no rows where no file speaks of the image. Float64: scores that differ must not become
        equal.

    Raises:
        FileNotFoundError: No such folder, no result files in it, or a class without its file.
        ValueError: Results of several prefixes to choose from; a line that is no result, named
            with its file.
    """
    paths = _find(Path(folder), check_classes(classes), image_set)
    image_index = _index(names)
    images, numbers = zip(*(_read(path, image_index) for path in paths), strict=True)
    labels = np.repeat(np.arange(1, len(classes) + 1), [len(rows) for rows in images])
    of_image = np.concatenate(images)
    order = np.argsort(of_image, kind="stable")
    rows, labels = np.concatenate(numbers)[order], labels[order]
    ends = np.cumsum(np.bincount(of_image, minlength=len(names))).tolist()
    spans = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
    return [
        {"boxes": rows[span, 1:], "labels": labels[span], "scores": rows[span, 0]} for span in spans
    ]


def file_name(competition: str, image_set: str, name: str) -> str:
    """The file of class ``name``; ValueError for what cannot be part of a file's name."""
    for part in (image_set, name):
        if not part or re.search(r"[/\\\x00-\x1f]", part):
            raise ValueError(f"got {part!r}, expected what can be part of a file's name")
    return f"{competition}_det_{image_set}_{name}.txt"


def _index(names: Sequence[str]) -> dict[str, int]:
    """The images' places by their names, if all are different and each can begin a line."""
    index: dict[str, int] = {}
    for name in names:
        if name.strip().splitlines() != [name] or name in index:
            expected = "expected a name, without white space around it, that has not come before"
            raise ValueError(f"names[{len(index)}] is {name!r}, {expected}")
        index[name] = len(index)
    return index


def _find(folder: Path, classes: tuple[str, ...], image_set: str | None) -> list[Path]:
    """The file of every class, in their order: those of the one prefix that all classes have."""
    # The shortest prefix, hence the longest class: "hot_dog" is no "dog" of the set "test_hot".
    pattern = re.compile(rf"(|.*?[\W_])({'|'.join(map(re.escape, classes))})\.txt")
    there = {path.name for path in folder.iterdir()}
    found = [match[1] for match in map(pattern.fullmatch, there) if match]
    # Beside files of the devkit's task others are of another one, such as "comp1_cls_test_".
    if of_task := [prefix for prefix in found if re.fullmatch("(.*_)?det_.+_", prefix)]:
        chosen = ".+" if image_set is None else re.escape(image_set)
        found = [prefix for prefix in of_task if re.fullmatch(f"(.*_)?det_{chosen}_", prefix)]
    files = {prefix: [f"{prefix}{name}.txt" for name in classes] for prefix in sorted(found)}
    whole = [prefix for prefix in files if there.issuperset(files[prefix])]
    if len(whole) > 1:
        kinds = ", ".join(f"{prefix}<class>.txt" for prefix in whole)
        raise ValueError(
            f"{folder}: holds {kinds}; expected one of these only, or an image_set that tells it"
        )
    if not whole:
        example = f"comp4_det_{image_set or '<image set>'}_"
        prefix = max(files, key=found.count, default=example)  # what most classes have
        missing = [f"{prefix}{name}.txt" for name in classes if f"{prefix}{name}.txt" not in there]
        raise FileNotFoundError(
            f"{folder}: lacks {', '.join(missing)}; expected a file for each class, all of one "
            f"prefix, such as {example}{classes[0]}.txt"
        )
    return [folder / file for file in files[whole[0]]]


def _read(path: Path, image_index: dict[str, int]) -> tuple[IntArray, NDArray[np.float64]]:
    """The images ``(D,)`` and the numbers ``(D, 5)``: score and box in continuous coordinates."""
    images, numbers = array("q"), array("d")  # 48 bytes a line, where Python's objects take 300
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                name, *fields = line.strip().rsplit(maxsplit=5)
                images.append(image_index[name])
                score, xmin, ymin, xmax, ymax = map(float, fields)
                x1, y1 = xmin - 1, ymin - 1
                extent = min(xmax - x1, ymax - y1)
                if not math.isfinite(score + x1 + y1 + xmax + ymax) or extent < -_ROUNDING:
                    raise ValueError
                # Without what rounding has made cross.
                numbers.extend((score, x1, y1, max(x1, xmax), max(y1, ymax)))
            except (KeyError, ValueError):
                raise ValueError(
                    f"{path}, line {number}: is {line.strip()!r}, expected <image> <score> <xmin> "
                    f"<ymin> <xmax> <ymax>, of one of the {len(image_index)} images, such as "
                    f"{next(iter(image_index), '')!r}, finite, with xmin <= xmax and ymin <= ymax"
                ) from None
    return np.frombuffer(images, dtype=np.int64), np.frombuffer(numbers).reshape(-1, 5)
