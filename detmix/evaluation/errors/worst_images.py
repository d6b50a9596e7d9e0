"""The images on which a detector fails most, with what is to be drawn of them.

Shape legend: D detections and G ground-truth objects of one image.
"""

from dataclasses import dataclass

import numpy as np

from detmix.evaluation.errors.result import OUTCOMES, ErrorAnalysis
from detmix.evaluation.records import BoolArray, ImageId, IntArray


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """One image at the score thresholds that give every class its best F1.

    Attributes:
        image: its place among the matching's images.
        image_id: None where it has none.
        num_correct: true positives shown.
        num_false: false positives shown.
        num_missed: objects, difficult ones left out, that no detection shown has found.
        detections: ``(D,)`` rows of the detections shown, by decreasing score.
        outcomes: D names out of `OUTCOMES`.
        objects: ``(G,)`` rows of the image's objects, difficult ones as well.
        is_missed: ``(G,)`` bool; never of a difficult object.
    """

    image: int
    image_id: ImageId
    num_correct: int
    num_false: int
    num_missed: int
    detections: IntArray
    outcomes: tuple[str, ...]
    objects: IntArray
    is_missed: BoolArray

    @property
    def num_errors(self) -> int:
        """False positives and missed objects."""
        return self.num_false + self.num_missed

    @property
    def f1(self) -> float:
        """Harmonic mean of the image's precision and recall, in [0, 1)."""
        return 2 * self.num_correct / (2 * self.num_correct + self.num_errors)


def worst_images(analysis: ErrorAnalysis, num: int) -> list[ImageErrors]:
    """The images with errors: lowest F1 first, of equal ones that with most errors, then the first.

    Counted are the detections at or above their class's best-F1 score (``analysis.is_shown``) and
    the objects that are not difficult.

    Args:
        analysis: of `analyze_errors`.
        num: how many images at most.

    Returns:
        ``num`` images or as many as have errors.

    Raises:
        ValueError: if ``num`` is negative.
    """
    if num < 0:
        raise ValueError(f"num is {num}, expected at least 0")
    matching = analysis.matching
    is_false = analysis.is_shown & ~(matching.is_true | matching.is_ignored)
    is_missed = analysis.is_missed_at_best_f1 & ~matching.gt_difficult
    correct, false, missed = (
        np.bincount(images, minlength=len(matching.image_ids))
        for images in (
            matching.det_images[analysis.is_shown & matching.is_true],
            matching.det_images[is_false],
            matching.gt_images[is_missed],
        )
    )
    errors = false + missed
    images = np.flatnonzero(errors)
    f1 = 2 * correct[images] / (2 * correct[images] + errors[images])
    worst = images[np.lexsort((images, -errors[images], f1))][:num]
    result = []
    for image in worst.tolist():
        rows = _rows_of(image, matching.det_images)
        rows = rows[analysis.is_shown[rows]]
        rows = rows[np.argsort(-matching.det_scores[rows], kind="stable")]
        objects = _rows_of(image, matching.gt_images)
        result.append(
            ImageErrors(
                image=image,
                image_id=matching.image_ids[image],
                num_correct=int(correct[image]),
                num_false=int(false[image]),
                num_missed=int(missed[image]),
                detections=rows,
                outcomes=tuple(OUTCOMES[kind] for kind in analysis.kinds[rows]),
                objects=objects,
                is_missed=is_missed[objects],
            )
        )
    return result


def _rows_of(image: int, images: IntArray) -> IntArray:
    """The rows of one image; rows come image by image."""
    first, last = np.searchsorted(images, [image, image + 1])
    return np.arange(first, last)
