"""Categories of a file in the COCO format, and the classes of a data set that they become.

Names of keypoints stand with them.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detmix.data.detection import check_classes

_SIDE = re.compile("left|right", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}


@dataclass(frozen=True)
class CocoCategory:
    """One category: its number in the file, its name and the names of its keypoints."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    supercategory: str = ""


def read_categories(
    items: Iterable[tuple[int | str, dict[str, Any]]], where: str
) -> tuple[CocoCategory, ...]:
    """Read the file's list of categories."""
    categories = []
    for category_id, item in items:
        name, keypoints = item.get("name"), item.get("keypoints") or []
        if isinstance(category_id, str):
            raise ValueError(f"{where} {category_id!r}: id must be an integer")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} {category_id}: expected a name, got {name!r}")
        if not isinstance(keypoints, list) or not all(isinstance(n, str) for n in keypoints):
            raise ValueError(
                f"{where} {category_id}: keypoints must be a list of names, got {keypoints!r}"
            )
        above = str(item.get("supercategory") or "")
        categories.append(CocoCategory(category_id, name, tuple(keypoints), above))
    return tuple(categories)


def unique_names(categories: Collection[CocoCategory]) -> dict[int, str]:
    """Return the names by id, with the id behind those that several categories share."""
    names = {category.id: category.name for category in categories}
    while len(times := Counter(names.values())) < len(names):  # once, but for a "dog (18)" beside
        names = {id: f"{name} ({id})" if times[name] > 1 else name for id, name in names.items()}
    return names


def choose_categories(
    categories: Collection[CocoCategory],
    used: Collection[int],
    classes: Sequence[str] | None,
    path: Path,
) -> dict[str, CocoCategory]:
    """Return the category of each class by the class's name, in the order of the labels."""
    unique = unique_names(categories)
    annotated = Counter(category.name for category in categories if category.id in used)
    known: dict[str, CocoCategory] = {}
    for category in sorted(categories, key=lambda category: category.id):
        # Super-categories come first: with none annotated, as in a small split, the last is it.
        if category.id in used or not annotated[category.name]:
            is_shared = annotated[category.name] > 1
            known[unique[category.id] if is_shared else category.name] = category
    if classes is None:
        shared = [name for name, category in known.items() if name != category.name]
        if shared:
            warnings.warn(
                f"{path}: categories of one name that have annotations are classes of their own: "
                f"{', '.join(shared)}; give their objects one category_id where they are the same",
                UserWarning,
                stacklevel=3,
            )
        above = {c.supercategory for c in categories if c.supercategory != c.name}
        unused = [n for n, c in known.items() if c.id not in used and c.name in above]
        if unused:
            told = f"{path}: categories above others, without objects, are no classes: "
            warnings.warn(told + ", ".join(unused), UserWarning, stacklevel=3)
        classes = sorted(known.keys() - {*unused}, key=lambda name: known[name].id)
        return {name: known[name] for name in classes}
    every = {unique[category.id]: category for category in categories} | known
    for name in check_classes(classes):
        if name not in every:
            raise ValueError(f"{path}: there is no category {name!r}; known are {', '.join(known)}")
    chosen = {name: every[name] for name in classes}
    if len({category.id for category in chosen.values()}) < len(chosen):
        raise ValueError(f"{path}: classes names a category twice, got {list(classes)!r}")
    return chosen


def common_keypoints(categories: Sequence[CocoCategory], path: Path) -> tuple[str, ...]:
    """Return the keypoints' names that all categories share; one without any does not count."""
    found = {category.keypoints: category.name for category in categories if category.keypoints}
    if len(found) != 1:
        got = [f"{name!r} has {len(names)} ({', '.join(names)})" for names, name in found.items()]
        raise ValueError(
            f"{path}: keypoints=True, expected the same keypoints for all categories that name "
            f"any, got {'; '.join(got) or 'none'}"
        )
    (names,) = found
    return names


def mirrored_order(names: Sequence[str]) -> tuple[int, ...]:
    """Return which keypoint takes each one's place when the image is mirrored left to right."""
    partners = [_SIDE.sub(lambda side: _OTHER_SIDE.get(side[0], side[0]), name) for name in names]
    indices = {name: index for index, name in enumerate(names)}
    return tuple(indices.get(partner, index) for index, partner in enumerate(partners))
