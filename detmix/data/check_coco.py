"""Check a data set in the COCO format for all its problems at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from detmix.data.check import DataCheck, ImageCheck
from detmix.data.coco import choose_categories
from detmix.data.coco_annotation import CocoCategory, CocoFile, read_coco
from detmix.data.coco_keypoints import check_same_keypoints, common_keypoints
from detmix.data.coco_table import CocoTable
from detmix.data.image_file import decode_image_bytes
from detmix.data.problems import Report

__all__ = ["check_coco"]


def check_coco(
    subsets: Mapping[str, tuple[Path, Path]],
    *,
    masks: bool = False,
    keypoints: bool = False,
    classes: Sequence[str] | None = None,
    num_keypoints: int | None = None,
) -> DataCheck:
    """Check every annotation and image; nothing that is wrong with the data raises.

    Args:
        subsets: The folder of images and the annotation file of ``"train"`` and of ``"test"``, in
            this order: what is trained is evaluated.
        masks: Whether objects need segmentations.
        keypoints: Whether objects need keypoints.
        classes: The class names; None for all of the file to train on.
        num_keypoints: How many keypoints an object has to have; None for as many as in the files.

    Returns:
        All that was found.
    """
    check = _Check(masks, keypoints, classes, num_keypoints)
    for subset, (folder, path) in subsets.items():
        check.read(subset, folder, path)
    return check.result.finish()


class _Check:
    """Checks subsets, with the classes and keypoints of the first one."""

    def __init__(
        self,
        masks: bool,
        keypoints: bool,
        classes: Sequence[str] | None,
        num_keypoints: int | None,
    ) -> None:
        self._masks, self._needs_keypoints = masks, keypoints
        self._are_chosen = classes is not None
        self._classes = list(classes or ())
        self._num_keypoints = num_keypoints
        self._keypoint_names: tuple[str, ...] = ()
        self.result = DataCheck(self._classes)

    def read(self, subset: str, folder: Path, path: Path) -> None:
        """Check the images and annotations of a subset."""
        found: defaultdict[int, ImageCheck] = defaultdict(ImageCheck)

        def report(kind: str, message: str, image: int | None = None) -> None:
            if image is None:
                self.result.add(kind, subset, message)
            else:
                found[image].report(kind, message)

        if not folder.is_dir():
            report("missing file", f"{folder}: there is no such folder of images")
        try:
            file = read_coco(path, masks=self._masks, report=report)
        except FileNotFoundError as error:
            return report("missing file", str(error))
        except (ValueError, OSError) as error:
            return report("unusable list", str(error))
        categories = self._choose_categories(file, path, report)
        num_keypoints = self._check_keypoints(categories, path, report)
        table = CocoTable.read(file, [category.id for category in categories], path)
        table = table.fill_sizes(folder, _ignore)
        is_train = subset == "train"
        is_used = table.is_used(clip=is_train, drop_crowd=is_train)
        table.check_objects(report, is_used, masks=self._masks, num_keypoints=num_keypoints)
        for image_id in sorted(found.keys() - set(table.images.ids)):  # those left out
            for kind, message in found[image_id].found:
                report(kind, message)
        _check_images(table, folder, [c.name for c in categories], found, self.result, subset)

    def _choose_categories(
        self, file: CocoFile, path: Path, report: Report
    ) -> Sequence[CocoCategory]:
        """Return those of the classes; all where there is a class without one."""
        try:
            chosen = choose_categories(file, self._classes or None, path)
        except ValueError as error:
            report("unknown class", str(error))
            chosen = list(file.categories)
        if not self._classes:
            self._classes += [category.name for category in chosen]
        elif not self._are_chosen:
            self._report_untrained(file, path, report)
        return chosen

    def _report_untrained(self, file: CocoFile, path: Path, report: Report) -> None:
        counts = np.bincount(file.objects.category_index, minlength=len(file.categories))
        for category, count in zip(file.categories, counts.tolist(), strict=True):
            if count and category.name not in self._classes:
                what = f"category {category.id} ({category.name!r}) with {count} objects"
                report("class that is not trained", f"{path}: {what}")

    def _check_keypoints(
        self, categories: Sequence[CocoCategory], path: Path, report: Report
    ) -> int | None:
        """Return how many an object has; None where that is not known or not needed."""
        if not self._needs_keypoints:
            return None
        try:
            names = common_keypoints([(c.name, c.keypoints) for c in categories])
            if len(names) != (self._num_keypoints or len(names)):
                report(
                    "unusable list",
                    f"{path}: names {len(names)} keypoints for each object, expected "
                    f"{self._num_keypoints}",
                )
            self._keypoint_names = self._keypoint_names or names
            check_same_keypoints(self._keypoint_names, names)
        except ValueError as error:
            report("unusable list", f"{path}: {error}")
            return None
        return len(names)


def _ignore(kind: str, message: str, image: int | None = None) -> None:
    """Leave what is wrong with an image to the reading of all of it."""


def _check_images(
    table: CocoTable,
    folder: Path,
    classes: Sequence[str],
    found: Mapping[int, ImageCheck],
    result: DataCheck,
    subset: str,
) -> None:
    images, offsets = table.images, table.offsets().tolist()
    sizes = images.sizes.tolist()

    def check_image(index: int) -> ImageCheck:
        check = found[images.ids[index]]
        path = folder / images.names[index]
        height, width = check.read_picture(
            path, decode_image_bytes, tuple(sizes[index]), table.path
        )
        rows = slice(offsets[index], offsets[index + 1])
        names = [classes[label - 1] for label in table.labels[rows].tolist()]
        check.read_boxes(
            table.objects.boxes[rows],
            names,
            (height, width),
            lambda row: table.describe_box(offsets[index] + row),
            clip=subset == "train",
            is_left_out=table.objects.iscrowd[rows] & (subset == "train"),
        )
        return check

    seen: dict[str, int] = {}
    for image_id, name in zip(images.ids, images.names, strict=True):
        if seen.setdefault(name, image_id) != image_id:
            where = f"{table.path}, images {seen[name]} and {image_id}"
            result.add("listed twice", subset, f"{where} are both {name!r}")
    result.run(subset, [str(folder / name) for name in images.names], check_image)
