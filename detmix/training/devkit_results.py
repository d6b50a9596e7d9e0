"""The VOC devkit's result files of a data set: ``results/VOC2007/Main/comp4_det_test_cat.txt``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detmix.data import VOCDetection
from detmix.evaluation import read_voc_results, write_voc_results
from detmix.training.predict import Prediction

__all__ = ["load_devkit_results", "save_devkit_results"]


def save_devkit_results(
    folder: Path, dataset: VOCDetection, found: Sequence[tuple[int, Prediction]]
) -> Path:
    """Write what was found in the layout of the devkit, which its server takes as it is.

    Args:
        folder: Each image set's files go to its ``results/VOC<year>/Main``.
        dataset: The images.
        found: The index of each image with what was found in it.

    Returns:
        The folder ``results``.
    """
    results = folder / "results"
    for year, split in dict.fromkeys(dataset.image_sets):  # also those of which nothing is found
        part = [each for each in found if dataset.image_sets[each[0]] == (year, split)]
        write_voc_results(
            results / f"VOC{year}" / "Main",
            [_bare_name(dataset, index) for index, _ in part],
            [prediction for _, prediction in part],
            dataset.classes,
            image_set=split,
        )
    return results


def load_devkit_results(
    results: Path, dataset: VOCDetection, limit: int | None = None
) -> list[tuple[int, Prediction]]:
    """Read result files back, whoever wrote them.

    Args:
        results: The folder ``results`` with ``VOC<year>/Main`` in it, or the one that it lies in,
            or that of the files themselves.
        dataset: The images; each of its image sets needs its files.
        limit: Return the first so many images only; None for all.

    Returns:
        The index of each image with what was found in it.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If one of them is broken; the message names file and line.
    """
    found: dict[int, Prediction] = {}
    for year, split in dict.fromkeys(dataset.image_sets):
        indices = [i for i, pair in enumerate(dataset.image_sets) if pair == (year, split)]
        below = (f"VOC{year}/Main", f"results/VOC{year}/Main", "Main", ".")
        predictions = read_voc_results(
            next((results / part for part in below if (results / part).is_dir()), results),
            [_bare_name(dataset, index) for index in indices],
            dataset.classes,
            image_set=split,
        )
        found.update(zip(indices, predictions, strict=True))
    return sorted(found.items())[:limit]


def _bare_name(dataset: VOCDetection, index: int) -> str:
    return dataset.names[index].rpartition("/")[2]
