"""Check a data set in the COCO format for all its problems at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from detmix.data.check import DataCheck, ImageCheck, check_boxes
from detmix.data.coco import choose_categories
from detmix.data.coco_annotation import CocoCategory, CocoFile, read_coco
from detmix.data.coco_keypoints import common_keypoints
from detmix.data.coco_table import CocoTable
from detmix.data.image_file import decode_image_bytes

__all__ = ["check_coco"]


def check_coco(
    subsets: Mapping[str, tuple[Path, Path]],
    *,
    masks: bool = False,
    keypoints: bool = False,
    classes: Sequence[str] | None = None,
) -> DataCheck:
    """Check every annotation and image; nothing that is wrong with the data raises.

    Args:
        subsets: The folder of images and the annotation file of ``"train"`` and of ``"test"``.
        masks: Whether objects need segmentations.
        keypoints: Whether objects need keypoints.
        classes: The class names; None for all of the file.

    Returns:
        All that was found.
    """
    names: list[str] = list(classes or ())
    result = DataCheck(names)
    for subset, (folder, path) in subsets.items():
        found: defaultdict[int, ImageCheck] = defaultdict(ImageCheck)

        def report(
            kind: str,
            message: str,
            image: int | None = None,
            subset: str = subset,
            found: Mapping[int, ImageCheck] = found,
        ) -> None:
            if image is None or kind == "name that leads outside":
                result.add(kind, subset, message)
            else:
                found[image].report(kind, message)

        if not folder.is_dir():
            report("missing file", f"{folder}: there is no such folder of images")
        try:
            file = read_coco(path, masks=masks, report=report)
        except FileNotFoundError as error:
            report("missing file", str(error))
            continue
        except (ValueError, OSError) as error:
            report("unusable list", str(error))
            continue
        categories = _categories(file, classes, path, result, subset)
        if subset == "train" and classes is None:
            names += [category.name for category in categories]
        num_keypoints = _num_keypoints(categories, path, result, subset) if keypoints else None
        table = CocoTable.read(file, [category.id for category in categories], path)
        table = table.fill_sizes(folder, _ignore)
        table.check_objects(report, masks=masks, num_keypoints=num_keypoints)
        _check_images(table, folder, [c.name for c in categories], found, result, subset)
    return result.finish()


def _ignore(kind: str, message: str, image: int | None = None) -> None:
    """Leave what is wrong with an image to the reading of all of it."""


def _categories(
    file: CocoFile, classes: Sequence[str] | None, path: Path, result: DataCheck, subset: str
) -> Sequence[CocoCategory]:
    try:
        return choose_categories(file, classes, path)
    except ValueError as error:
        result.add("unknown class", subset, str(error))
        return file.categories


def _num_keypoints(
    categories: Sequence[CocoCategory], path: Path, result: DataCheck, subset: str
) -> int | None:
    try:
        return len(common_keypoints([(c.name, c.keypoints) for c in categories]))
    except ValueError as error:
        result.add("unusable list", subset, f"{path}: {error}")
        return None


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
        check.num_objects.update(names)
        check.found += check_boxes(
            table.objects.boxes[rows],
            names,
            (height, width),
            lambda row: table.describe_box(offsets[index] + row),
        )
        return check

    seen: dict[str, int] = {}
    for image_id, name in zip(images.ids, images.names, strict=True):
        if seen.setdefault(name, image_id) != image_id:
            where = f"{table.path}, images {seen[name]} and {image_id}"
            result.add("listed twice", subset, f"{where} are both {name!r}")
    result.run(subset, [str(folder / name) for name in images.names], check_image)
