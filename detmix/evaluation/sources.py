"""Which objects of a mixed image come from the same source image, and what to call it.

Shape legend: N objects of one mixed image.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from detmix.evaluation.figures import BOX_COLORS
from detmix.evaluation.picture_inputs import Target, as_numpy

_MOST_ENTRIES = 4  # lines in a key


class Group(NamedTuple):
    """Objects of one source image."""

    source: Hashable
    """The source's ``image_id``; None where only the weights tell sources apart."""
    name: str
    members: NDArray[np.bool_]
    """``(N,)``."""


def group_objects(target: Target) -> list[Group]:
    """Group the objects of a target by their source image.

    Args:
        target: with ``source`` ``(N,)``, the ``image_id`` that each object comes from, and maybe
            ``sources``, a mapping of ``image_id`` to name, which may hold images without objects.
            Without ``source``, objects of equal weight are taken to come from one image, which is
            true of mixup applied once.

    Returns:
        Groups in the order of ``sources``, then of the objects; those by weight, heaviest first.
    """
    source = target.get("source")
    if source is not None:
        ids = as_numpy(source)
        names = {int(image_id): name for image_id, name in target.get("sources", {}).items()}
        for image_id in ids.tolist():
            names.setdefault(image_id, f"image {image_id}")
        return [Group(image_id, name, ids == image_id) for image_id, name in names.items()]
    weights = weights_of(target)
    levels = np.round(weights, 4)
    return [Group(None, "", levels == level) for level in np.unique(levels)[::-1]]


def weights_of(target: Target) -> NDArray[Any]:
    """``box_weights`` ``(N,)``; ones where there are none."""
    return as_numpy(target.get("box_weights", torch.ones(len(target["boxes"]))))


def group_colors(groups: Sequence[Sequence[Group]]) -> list[list[str]]:
    """A colour for each group of each image.

    A source has the same colour in all images, if there are colours enough for all sources; else
    colours are those of the group's place in its image.
    """
    sources = list(dict.fromkeys(group.source for of_image in groups for group in of_image))
    if None not in sources and len(sources) <= len(BOX_COLORS):
        colors = dict(zip(sources, BOX_COLORS, strict=False))
        return [[colors[group.source] for group in of_image] for of_image in groups]
    return [
        [BOX_COLORS[place % len(BOX_COLORS)] for place in range(len(of_image))]
        for of_image in groups
    ]


def key_entries(
    groups: Sequence[Group], colors: Sequence[str], weights: NDArray[Any]
) -> list[tuple[str, str | None]]:
    """Say each group's name and weight beside its colour; a few lines whatever their number.

    Args:
        groups: those of one image.
        colors: one for each.
        weights: ``(N,)``.
    """
    if not groups:
        return [("no objects", None)]
    if groups[0].source is None and len(groups) > _MOST_ENTRIES:
        return [(_weight_text(weights), None)]  # what CutMix leaves of each object, not sources
    entries: list[tuple[str, str | None]] = [
        (": ".join(filter(None, (group.name, _weight_text(weights[group.members])))), color)
        for group, color in zip(groups, colors, strict=True)
    ]
    if len(entries) > _MOST_ENTRIES:
        rest = len(entries) - _MOST_ENTRIES + 1
        entries[_MOST_ENTRIES - 1 :] = [(f"and {rest} more images", None)]
    return entries


def _weight_text(weights: NDArray[Any]) -> str:
    if not len(weights):
        return "no objects"
    low, high = f"{weights.min():.2f}", f"{weights.max():.2f}"
    return f"weight {low}" if low == high else f"weights {low} to {high}"
