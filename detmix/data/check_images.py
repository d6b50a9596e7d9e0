"""Check images sorted into classes for all their problems at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from detmix.data.check import DataCheck, ImageCheck
from detmix.data.image_file import decode_image_bytes
from detmix.data.image_index import StoredImage, list_images, read_image_bytes

__all__ = ["check_images"]


def check_images(
    root: str | Path, splits: Mapping[str, str], *, class_limit: int | None = None
) -> DataCheck:
    """Check every class, archive and image; nothing that is wrong with the data raises.

    Args:
        root: The folder of the splits, as :class:`detmix.data.ImageClasses` takes it.
        splits: The names of the splits ``"train"`` and ``"test"``, in this order.
        class_limit: Check only so many classes, the first ones in order; None for all.

    Returns:
        All that was found.
    """
    result = DataCheck((), has_objects=False)
    classes: list[str] | None = None  # the first split's
    for subset, split in splits.items():
        images = _list(root, split, subset, result)
        if classes is None and images:
            classes = sorted({image.class_name for image in images})
        known = classes or []
        _report_unknown(images, known, subset, result)
        used = set(known[:class_limit])
        chosen = [image for image in images if image.class_name in used]
        result.run(
            subset,
            [image.where for image in chosen],
            lambda index, chosen=chosen: _check_image(chosen[index]),  # type: ignore[misc]
        )
    return result.finish()


def _list(root: str | Path, split: str, subset: str, result: DataCheck) -> list[StoredImage]:
    def report(kind: str, message: str, image: int | None = None) -> None:
        result.add(kind, subset, message)

    try:
        return list_images(root, split, report)
    except FileNotFoundError as error:
        report("missing file", str(error))
    except (ValueError, OSError) as error:
        report("unusable list", str(error))
    return []


def _report_unknown(
    images: list[StoredImage], known: list[str], subset: str, result: DataCheck
) -> None:
    unknown: dict[str, StoredImage] = {}
    for image in images:
        if image.class_name not in known:
            unknown.setdefault(image.class_name, image)
    for name, image in unknown.items():
        result.add("unknown class", subset, f"{image.where}: {name!r}, not among those of train")


def _check_image(image: StoredImage) -> ImageCheck:
    check = ImageCheck()
    check.decode(
        image.where,
        lambda: read_image_bytes(image),
        lambda data: decode_image_bytes(data, image.where),
    )
    return check
