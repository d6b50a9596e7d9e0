"""What an error analysis found: tables, plain values, the images on which a detector fails most.

Shape legend: D detections and G ground-truth objects, of the whole data set or of one image.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detmix.evaluation.records import BoolArray, ImageId, IntArray
from detmix.evaluation.results import align, ap_text, class_table, plain
from detmix.evaluation.voc.matching import VOCMatching

KINDS = ("localization", "duplicate", "similar_class", "other_class", "background")
"""The kinds of false positives, defined in `analyze_errors`."""

OUTCOMES = ("correct", "ignored", *KINDS)
"""What a detection can be; `ErrorAnalysis.kinds` holds places in this tuple."""

SCOPES = ("top_n", "best_f1", "all")
"""Which detections are counted, see `ErrorAnalysis`."""

SIZES = ("small", "medium", "large")
"""Sizes of boxes as in COCO: an area below 32 x 32, below 96 x 96 and from there on, in pixels."""


@dataclass(frozen=True)
class MissedObjects:
    """How many of some objects no detection has found."""

    objects: int
    missed: int
    missed_at_best_f1: int

    @property
    def share(self) -> float:
        """``missed`` in [0, 1]; NaN without objects."""
        return self.missed / self.objects if self.objects else math.nan

    @property
    def share_at_best_f1(self) -> float:
        """``missed_at_best_f1`` in [0, 1]; NaN without objects."""
        return self.missed_at_best_f1 / self.objects if self.objects else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Counts and shares, in the order of a table's columns."""
        names = ("objects", "missed", "share", "missed_at_best_f1", "share_at_best_f1")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """Where a detector fails; ``print`` shows it as two tables. See `analyze_errors`.

    Detections are counted in three scopes. ``"top_n"``: the N of a class with the highest scores,
    N being its objects that are not difficult (ignored detections are passed over), as Hoiem et al.
    have it: all would drown in background of low score. ``"best_f1"``: those from the score up at
    which their class reaches its best F1; none of a class without objects. ``"all"``: all.

    Attributes:
        matching: what was analysed.
        background_iou: an object overlapped by less has nothing to do with a detection.
        similar: groups of similar classes.
        kinds: ``(D,)`` int8, each detection's place in this module's ``OUTCOMES``.
        best_f1_scores: by class name; NaN for a class without objects or detections.
        num_objects: by class name, objects that are not difficult.
        counts: by scope, class name and outcome.
        mean_ap: all-point, over the classes that have objects; NaN where none has.
        ap_gain: by kind, how much higher ``mean_ap`` were without the errors of that kind.
        confusion: ``(C + 1, C + 1)`` counts, rows the truth, columns the prediction; the last ones
            are the background: false detections, and missed objects. Those of ``is_shown`` and the
            objects of their image, of whatever classes, are paired one to one: of the pairs with an
            overlap above the matching's ``iou_threshold`` the highest first, of equal ones that of
            the higher score, then always the next of which both are free. Difficult objects do not
            count, paired or not, nor detections without partner that are ``ignored``.
        missed: by size and for ``"all"``, of the objects that are not difficult.
        missed_difficult: the same of the difficult ones.
        is_shown: ``(D,)`` bool, detections of the scope ``"best_f1"``.
        is_missed: ``(G,)`` bool, objects that no detection has found.
        is_missed_at_best_f1: ``(G,)`` bool, objects that none of ``is_shown`` has found.
    """

    matching: VOCMatching = field(repr=False)
    background_iou: float
    similar: tuple[tuple[str, ...], ...]
    kinds: NDArray[Any] = field(repr=False)
    best_f1_scores: Mapping[str, float]
    num_objects: Mapping[str, int]
    counts: Mapping[str, Mapping[str, Mapping[str, int]]] = field(repr=False)
    mean_ap: float
    ap_gain: Mapping[str, float]
    confusion: IntArray = field(repr=False)
    missed: Mapping[str, MissedObjects]
    missed_difficult: Mapping[str, MissedObjects]
    is_shown: BoolArray = field(repr=False)
    is_missed: BoolArray = field(repr=False)
    is_missed_at_best_f1: BoolArray = field(repr=False)

    def totals(self, scope: str) -> dict[str, int]:
        """Detections by outcome in a scope, such as ``"top_n"``, over all classes."""
        by_class = self.counts[scope].values()
        return {outcome: sum(counts[outcome] for counts in by_class) for outcome in OUTCOMES}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the rows as plain values for JSON; None stands for NaN, and background."""
        names = ("background_iou", "similar", "best_f1_scores", "num_objects", "mean_ap", "ap_gain")
        values = {name: getattr(self, name) for name in names}
        values["iou_threshold"] = self.matching.iou_threshold
        values["counts"] = {
            scope: {"total": self.totals(scope), "by_class": by_class}
            for scope, by_class in self.counts.items()
        }
        classes, counts = (*self.matching.classes, None), self.confusion
        pairs = np.argwhere(counts).tolist()  # truth and prediction, where there are any
        values["confusion"] = [(classes[i], classes[j], int(counts[i, j])) for i, j in pairs]
        for name in ("missed", "missed_difficult"):
            by_size = getattr(self, name).items()
            values[name] = {size: missed.as_dict() for size, missed in by_size}
        return {name: plain(value) for name, value in values.items()}

    def __str__(self) -> str:
        """Detections by outcome with the AP each kind of error costs; objects missed by size."""
        shown = ("correct", *KINDS, "ignored")
        gains = {label_of(outcome): self.ap_gain.get(outcome, "") for outcome in shown}
        columns = []
        for title, scope in (("top N", "top_n"), ("at best F1", "best_f1"), ("all", "all")):
            totals = self.totals(scope)
            counts = {label_of(outcome): totals[outcome] for outcome in shown}
            columns.append((title, counts, sum(counts.values())))
        corner = f"detections (IoU > {self.matching.iou_threshold:g})"
        last = f"all (mean AP {ap_text(self.mean_ap)})"
        detections = class_table(last, [*columns, ("AP gain", gains, "")], corner)
        notes = [
            "top N: the N best detections of each class, N its objects; at best F1: those from",
            "the score up where the class's F1 is highest; AP gain: of the mean AP, without them",
        ]
        objects: list[list[tuple[Any, ...]]] = [
            [
                (size + suffix, *map(_cell, by_size[size].as_dict().values()))
                for size in (*SIZES, "all")
                if by_size[size].objects or not suffix
            ]
            for suffix, by_size in (("", self.missed), (", difficult", self.missed_difficult))
        ]
        names = ("objects", "number", "missed", "", "missed at best F1", "")
        lines = [*align(*detections), *notes, "", *align([names], *objects)]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """One image at the score thresholds that give every class its best F1.

    Attributes:
        image: its place among the matching's images.
        detections: ``(D,)`` rows of the detections shown, by decreasing score.
        outcomes: D names, the kinds of `analyze_errors` or ``"correct"`` and ``"ignored"``.
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
    the objects that are not difficult. Of more than ``num`` images the others are left out.
    """
    if num < 0:
        raise ValueError(f"num is {num}, expected at least 0")
    matching = analysis.matching
    is_missed = analysis.is_missed_at_best_f1 & ~matching.gt_difficult
    shown = matching.ranked[analysis.is_shown[matching.ranked]]
    shown = shown[np.argsort(matching.det_images[shown], kind="stable")]
    starts = np.arange(1, len(matching.image_ids))
    detections = np.split(shown, matching.det_images[shown].searchsorted(starts))
    objects = np.split(np.arange(len(is_missed)), matching.gt_images.searchsorted(starts))
    found = []
    for image, image_id in enumerate(matching.image_ids):
        rows, own = detections[image], objects[image]
        outcomes = tuple(OUTCOMES[kind] for kind in analysis.kinds[rows])
        found.append(ImageErrors(image, image_id, rows, outcomes, own, is_missed[own]))
    wrong = [errors for errors in found if errors.num_errors]
    return sorted(wrong, key=lambda e: (e.f1, -e.num_errors, e.image))[:num]


def label_of(outcome: str) -> str:
    """An outcome or kind as people read it."""
    return outcome.replace("_", " ")


def _cell(value: float) -> str:
    """A count, or a share in percent."""
    if isinstance(value, int):
        return str(value)
    return "n/a" if math.isnan(value) else f"{value:.1%}"
