"""Detection data with YOLO's text labels: a line for each object, numbers from 0 to 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from detmix.data.detection import Problem, Transforms, attempt, check_classes
from detmix.data.images import read_image_size
from detmix.data.voc.dataset import AnnotatedFiles
from detmix.data.voc.devkit import VOCAnnotation, VOCObject
from detmix.data.voc.lists import ImageEntry, pair_entries
from detmix.files import read_file


class YOLODetection(AnnotatedFiles):
    """Images and objects of YOLO's text labels, a file for each image.

    A line is ``class cx cy w h``: the class's number from 0, and centre, width and height of the
    box in shares of the image's width and height. ``class x1 y1 x2 y2 x3 y3 ...`` is a polygon,
    which becomes its box; one warning tells so. An image without a file, or with an empty one, is
    background.

    Samples and targets, clipped and dropped boxes are as `VOCDetection` has them; no object is
    ``difficult``.

    Args:
        root: The folder that holds all.
        files: The path of each image below ``root`` with that of its labels, "" for none.
        classes: The class names in the order of their numbers; label ``k`` is ``classes[k - 1]``.
        transforms: Called as ``transforms(image, target)``; returns the new pair.
        on_error: As `VOCDetection` has it.

    Attributes:
        category_ids: 1 to C, the labels themselves.
        names: The images' paths below ``root`` by index.
        image_ids: Every sample's ``image_id`` by index: the index itself.
        report: Counts, a `VOCReport`.
        skipped: The images that were left out, each a `SkippedImage`.

    Raises:
        FileNotFoundError: An image or a file of labels is missing.
        ValueError: An argument, a line or an image cannot be used; the file and the line are named.
    """

    def __init__(
        self,
        root: str | Path,
        files: Mapping[str, str],
        classes: Sequence[str],
        transforms: Transforms | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.transforms = transforms
        names, polygons = check_classes(classes), list[str]()

        def read(entry: ImageEntry, _: object) -> VOCAnnotation | Problem:
            size = attempt("unusable image", read_image_size, entry.image)
            if isinstance(size, Problem) or entry.annotation == entry.image:
                return size if isinstance(size, Problem) else VOCAnnotation("", *size[::-1], ())
            return attempt("unusable annotation", _read, entry.annotation, size, names, polygons)

        entries = pair_entries(root, files, all_there=on_error == "raise")
        self._open(entries, read, classes, on_error, root)
        if polygons:
            warnings.warn(
                f"{len(polygons)} polygons became their boxes (first: {min(polygons)})",
                UserWarning,
                stacklevel=2,
            )


def _read(
    path: Path, size: tuple[int, int], classes: Sequence[str], polygons: list[str]
) -> VOCAnnotation:
    """Read the labels of an image of a height and width, and note where polygons are."""
    height, width = size
    objects = []
    for number, line in enumerate(read_file(path).decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            label, *values = map(float, line.split())
        except ValueError:
            label, values = math.nan, []
        is_polygon = len(values) > 4 and len(values) % 2 == 0
        if not (is_polygon or len(values) == 4) or not all(map(math.isfinite, (label, *values))):
            raise ValueError(
                f"{where}: expected a class and 4 numbers, or those of a polygon, got {line!r}"
            )
        if label not in range(len(classes)):
            raise ValueError(
                f"{where}: class {label:g} has no name, expected 0 to {len(classes) - 1} "
                f"({', '.join(classes)})"
            )
        x1, y1, x2, y2 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
        if is_polygon:
            polygons.append(where)
        else:
            cx, cy, w, h = values
            x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        box = (x1 * width, y1 * height, x2 * width, y2 * height)
        objects.append(VOCObject(classes[int(label)], box))
    return VOCAnnotation("", width, height, tuple(objects))
