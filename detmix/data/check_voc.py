"""Check a data set in the layout of the Pascal VOC devkit for all its problems at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from detmix.data.check import DataCheck, ImageCheck
from detmix.data.image_file import decode_jpeg_bytes
from detmix.data.voc import VOC_CLASSES
from detmix.data.voc_annotation import VOCAnnotation, VOCObject, read_annotation
from detmix.data.voc_layout import ImageEntry, list_split

__all__ = ["check_voc"]


def check_voc(
    root: str | Path,
    subsets: Mapping[str, Sequence[tuple[str, str]]],
    classes: Sequence[str] = VOC_CLASSES,
) -> DataCheck:
    """Check every list, annotation and image; nothing that is wrong with the data raises.

    Args:
        root: The devkit, as :class:`detmix.data.VOCDetection` takes it.
        subsets: The pairs of year and split of ``"train"`` and of ``"test"``.
        classes: The class names.

    Returns:
        All that was found.
    """
    result = DataCheck(classes)
    for subset, image_sets in subsets.items():
        entries: dict[str, ImageEntry] = {}
        for year, split in image_sets:
            for entry in _list(root, str(year), str(split), subset, result):
                if entry.name in entries:
                    first = "/".join(entries[entry.name].image_set)
                    message = f"{entry.name} of {year}/{split} is in {first}, too"
                    result.add("listed twice", subset, message)
                entries.setdefault(entry.name, entry)
        images = list(entries.values())
        result.run(
            subset,
            [str(entry.image) for entry in images],
            lambda index, images=images: _check_image(images[index], classes),  # type: ignore[misc]
        )
    return result.finish()


def _list(
    root: str | Path, year: str, split: str, subset: str, result: DataCheck
) -> list[ImageEntry]:
    def report(kind: str, message: str, image: int | None = None) -> None:
        result.add(kind, subset, message)

    try:
        return list_split(root, year, split, report)
    except FileNotFoundError as error:
        report("missing file", str(error))
    except (ValueError, OSError) as error:
        report("unusable list", str(error))
    return []


def _check_image(entry: ImageEntry, classes: Sequence[str]) -> ImageCheck:
    check = ImageCheck()
    annotation = _read_annotation(entry, check)
    size = (annotation.height, annotation.width)
    size = check.read_picture(entry.image, decode_jpeg_bytes, size, entry.annotation)
    objects = []
    for item in annotation.objects:
        if item.name in classes:
            objects.append(item)
        else:
            check.report("unknown class", f"{entry.annotation}: {item.name!r}")
    boxes = np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4)
    describe = partial(_describe, entry, size, objects)
    check.read_boxes(boxes, [item.name for item in objects], size, describe)
    return check


def _read_annotation(entry: ImageEntry, check: ImageCheck) -> VOCAnnotation:
    try:
        return read_annotation(entry.annotation, check.report)
    except FileNotFoundError as error:
        check.report("missing file", str(error))
    except (ValueError, OSError) as error:
        check.report("unusable annotation", str(error))
    return VOCAnnotation("", 0, 0, ())


def _describe(
    entry: ImageEntry, size: tuple[int, int], objects: Sequence[VOCObject], row: int
) -> str:
    x1, y1, x2, y2 = objects[row].box
    return (
        f"{entry.annotation}, {objects[row].name}: xmin, ymin, xmax, ymax = {x1 + 1:g}, "
        f"{y1 + 1:g}, {x2:g}, {y2:g} in {size[1]} x {size[0]} pixels"
    )
