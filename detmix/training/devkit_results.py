"""The VOC devkit's result files of a data set: ``results/VOC2007/Main/comp4_det_test_cat.txt``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detmix.data import VOCDetection
from detmix.evaluation import read_voc_results, write_voc_results
from detmix.training.inference import Prediction

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
    by_set: dict[tuple[str, str], list[tuple[int, Prediction]]] = {}
    for index, prediction in found:
        by_set.setdefault(dataset.image_sets[index], []).append((index, prediction))
    for (year, split), part in by_set.items():
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
        results: The folder with ``VOC<year>/Main``, or that of the files themselves.
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
        folder = results / f"VOC{year}" / "Main"
        predictions = read_voc_results(
            folder if folder.is_dir() else results,
            [_bare_name(dataset, index) for index in indices],
            dataset.classes,
            image_set=split,
        )
        found.update(zip(indices, predictions, strict=True))
    return sorted(found.items())[:limit]


def _bare_name(dataset: VOCDetection, index: int) -> str:
    return dataset.names[index].rpartition("/")[2]
