"""The images on which a detector fails most, with what is to be drawn of them.

Shape legend: D detections and G ground-truth objects of one image.
"""

from dataclasses import dataclass

import numpy as np

from detmix.evaluation.errors.result import KINDS, OUTCOMES, ErrorAnalysis
from detmix.evaluation.records import BoolArray, ImageId, IntArray


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """One image at the score thresholds that give every class its best F1.

    Attributes:
        image: its place among the matching's images.
        image_id: None where it has none.
        detections: ``(D,)`` rows of the detections shown, by decreasing score.
        outcomes: D names out of `OUTCOMES`.
        objects: ``(G,)`` rows of the image's objects, difficult ones as well.
        is_missed: ``(G,)`` bool; never of a difficult object.
    """

    image: int
    image_id: ImageId
    detections: IntArray
    outcomes: tuple[str, ...]
    objects: IntArray
    is_missed: BoolArray

    @property
    def num_correct(self) -> int:
        """True positives shown."""
        return self.outcomes.count("correct")

    @property
    def num_false(self) -> int:
        """False positives shown."""
        return sum(outcome in KINDS for outcome in self.outcomes)

    @property
    def num_missed(self) -> int:
        """Objects, difficult ones left out, that no detection shown has found."""
        return int(self.is_missed.sum())

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
        num: how many images at most, not negative.
    """
    if num < 0:
        raise ValueError(f"num is {num}, expected at least 0")
    matching = analysis.matching
    is_missed = analysis.is_missed_at_best_f1 & ~matching.gt_difficult
    starts = np.arange(1, len(matching.image_ids))  # rows come image by image
    detections = np.split(np.arange(len(analysis.kinds)), matching.det_images.searchsorted(starts))
    objects = np.split(np.arange(len(is_missed)), matching.gt_images.searchsorted(starts))
    found = []
    for image, image_id in enumerate(matching.image_ids):
        rows = detections[image][analysis.is_shown[detections[image]]]
        rows = rows[np.argsort(-matching.det_scores[rows], kind="stable")]
        outcomes = tuple(OUTCOMES[kind] for kind in analysis.kinds[rows])
        own = objects[image]
        found.append(ImageErrors(image, image_id, rows, outcomes, own, is_missed[own]))
    wrong = [errors for errors in found if errors.num_errors]
    return sorted(wrong, key=lambda e: (e.f1, -e.num_errors, e.image))[:num]
