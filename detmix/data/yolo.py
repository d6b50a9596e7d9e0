"""Detection data with YOLO's text labels: a line for each object."""

from __future__ import annotations

import math
import warnings

from detmix.data.detection import Problem, attempt
from detmix.data.images import read_image_size
from detmix.data.voc.dataset import VOCDetection
from detmix.data.voc.devkit import VOCAnnotation, VOCObject
from detmix.data.voc.lists import ImageEntry
from detmix.files import read_file


class YOLODetection(VOCDetection):
    """Images and objects of YOLO's text labels, one file for each image.

    A line is ``class cx cy w h``: the class's number from 0, then the box's centre, width and
    height in shares of the image's. ``class x1 y1 x2 y2 x3 y3 ...`` is a polygon and becomes its
    box; a warning tells so at the first one. An image without a file or lines is background.

    Everything else is as `VOCDetection` has it; no object is ``difficult``.

    Args:
        root: The folder that holds all.
        files: The path of each image within ``root``, with that of its labels, "" for none.
        classes: The class names in the order of their numbers.
        transforms, on_error: As `VOCDetection` has them; its other arguments mean nothing here.

    Raises:
        FileNotFoundError: An image or a file of labels is missing.
        ValueError: A line cannot be used, whose file and number are told, or an argument.
    """

    _has_corners = False
    _told_of_polygons = False

    def _read(self, entry: ImageEntry, *_: object) -> VOCAnnotation | Problem:
        size = attempt("unusable image", read_image_size, entry.image)
        if isinstance(size, Problem):
            return size
        return attempt("unusable annotation", self._read_labels, entry, *size)

    def _read_labels(self, entry: ImageEntry, height: int, width: int) -> VOCAnnotation:
        """Read the lines of a file; the image stands for one that is not there."""
        path, last, objects = entry.annotation, len(self.classes) - 1, []
        data = b"" if path == entry.image else read_file(path)
        for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                label, *values = map(float, line.split())
            except ValueError:
                label, values = math.nan, []
            is_shape = len(values) >= 4 and len(values) % 2 == 0 and math.isfinite(sum(values))
            if not is_shape or label not in range(last + 1):
                raise ValueError(
                    f"{path}, line {number}: expected a class from 0 to {last} "
                    f"({', '.join(self.classes)}) and 4 numbers, or a polygon's, got {line!r}"
                )
            x, y = values[::2], values[1::2]
            if len(values) == 4:
                x, y = ([center - size / 2, center + size / 2] for center, size in (x, y))
            elif not self._told_of_polygons:
                self._told_of_polygons = True
                told = f"{path}, line {number}: the first polygon, which becomes its box"
                warnings.warn(told, UserWarning, stacklevel=2)
            box = (min(x) * width, min(y) * height, max(x) * width, max(y) * height)
            objects.append(VOCObject(self.classes[int(label)], box))
        return VOCAnnotation("", width, height, tuple(objects))
