"""Mean average precision as Pascal VOC defines it, gathered batch by batch.

Shape legend: D detections and G ground-truth objects of one image, C classes without background.
"""

from collections.abc import Sequence

import numpy as np

from detmix.data.detection import check_classes
from detmix.evaluation.records import Columns, ImageId, Record, check_choice, open_batch, where
from detmix.evaluation.results import VOCResult
from detmix.evaluation.voc.ap import Interpolation, average_precisions
from detmix.evaluation.voc.matching import VOCMatching, match


class VOCEvaluator:
    """Pascal VOC average precision by the devkit's rule (``VOCevaldet.m``).

    Within a class, detections are taken in order of decreasing score; equal scores keep the order
    in which they came. Each is assigned to the object of its class and image that it overlaps most,
    even if a better detection has taken that object already:

    * overlap not above ``iou_threshold``: false positive;
    * the object is difficult: the detection counts neither way;
    * the object is taken: false positive;
    * else: true positive.

    Recall is taken over the objects that are not difficult; a class without any has AP NaN and is
    left out of the mean. A match needs an overlap **strictly** above the threshold, as in the
    devkit's widely used Python port (the Matlab original also takes equality).

    COCO's crowds (``iscrowd``) are no objects: a detection that is no true positive and lies in a
    crowd of its class with more than ``iou_threshold`` of its own area counts neither way.

    Args:
        classes: the C class names without the background, all different; label k stands for
            ``classes[k - 1]``.
        iou_threshold: in (0, 1).
        interpolation: ``"11point"`` as in VOC2007 or ``"all-point"`` as from VOC2010 on.
    """

    def __init__(
        self,
        classes: Sequence[str],
        iou_threshold: float = 0.5,
        interpolation: Interpolation = "all-point",
    ) -> None:
        self.classes = check_classes(classes)
        if not 0 < iou_threshold < 1:
            raise ValueError(f"iou_threshold is {iou_threshold}, expected a number in (0, 1)")
        check_choice("interpolation", interpolation, Interpolation)
        self.iou_threshold = float(iou_threshold)
        self.interpolation: Interpolation = interpolation
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._image_ids: dict[object, ImageId] = {}  # a key of its own where there is no id
        self._parts: tuple[list[Columns], list[Columns]] = [], []
        self.update([], [])

    def update(self, predictions: Sequence[Record], targets: Sequence[Record]) -> None:
        """Add the images of a batch: tensors on any device, or NumPy arrays.

        An image whose ``image_id`` has been seen since the last `reset` is dropped, because the
        padded samplers of distributed runs score some images twice. Images without ``image_id``
        always count. A batch with an error leaves the evaluator as it was.

        Args:
            predictions: for each image a dict with ``boxes (D, 4)``, ``labels (D,)`` in 1..C and
                ``scores (D,)``.
            targets: for each image a dict with ``boxes (G, 4)``, ``labels (G,)`` and optionally
                ``difficult (G,)``, ``iscrowd (G,)`` and ``image_id`` (int, str or a tensor of one
                element). Other keys are ignored.

        Raises:
            ValueError: naming the image and the value: a missing key, a wrong shape or dtype, a
                label outside 1..C, NaN or infinity, an object with ``x2 < x1``.
        """
        found, there = open_batch(predictions, targets)
        columns = found.read(len(self.classes)), there.read(len(self.classes))
        places = np.full(len(targets), -1)  # of these among all images; -1 of what has been seen
        for index, image_id in enumerate(there.image_ids):
            key = object() if image_id is None else image_id
            if key not in self._image_ids:
                places[index] = len(self._image_ids)
                self._image_ids[key] = image_id
        for parts, part in zip(self._parts, columns, strict=True):
            images = places[part["images"]]
            parts.append(where(part | {"images": images}, images >= 0))
        self._matching: VOCMatching | None = None

    def matching(self) -> VOCMatching:
        """Match the detections of all images so far; asking again is free until more are added."""
        if self._matching is None:
            found, there = (
                {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
                for parts in self._parts
            )
            image_ids, classes = list(self._image_ids.values()), self.classes
            self._matching = match(image_ids, found, there, classes, self.iou_threshold)
        return self._matching

    def compute(self, interpolation: Interpolation | None = None) -> VOCResult:
        """Evaluate all images so far, by the constructor's interpolation or another one."""
        chosen = self.interpolation if interpolation is None else interpolation
        check_choice("interpolation", chosen, Interpolation)
        matching = self.matching()
        aps, mean_ap = average_precisions(matching.curves, matching.num_objects, chosen)
        return VOCResult(
            mean_ap=mean_ap,
            ap=matching.by_name(aps),
            classes=self.classes,
            num_objects=matching.by_name(matching.num_objects.tolist()),
            num_detections=matching.by_name([len(rows) for rows in matching.by_class]),
            curves=matching.by_name(matching.curves),
            iou_threshold=self.iou_threshold,
            interpolation=chosen,
            num_images=len(matching.image_ids),
        )
