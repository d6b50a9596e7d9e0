"""Pascal VOC's average precision twice more: a loop over detections, and the devkit's own way.

Also random cases to compare on, and evaluators that have seen them.
"""

import math
from pathlib import Path

import numpy as np
import torch

from detmix.evaluation import VOCEvaluator, read_voc_results, write_voc_results

INTERPOLATIONS = ("all-point", "11point")

# ----------------------------------------------------- the devkit's algorithm on the devkit's files


def devkit_ap(result_file, annotations, name, interpolation, min_overlap=0.5):
    """VOCevaldet.m and VOCap.m, statement by statement, for the class ``name``.

    ``annotations`` holds for each image's name a list of (class, difficult, [xmin, ymin, xmax,
    ymax]) in whole pixels from 1 on, both ends included. As in the devkit's Python port an overlap
    has to be above the threshold, and the recalls of the 11 points are those of ``np.arange``.
    """
    objects = {
        image: [[box, difficult, False] for label, difficult, box in found if label == name]
        for image, found in annotations.items()
    }
    npos = sum(not difficult for found in objects.values() for _, difficult, _ in found)
    lines = [line.split() for line in Path(result_file).read_text().splitlines()]
    lines.sort(key=lambda fields: -float(fields[1]))  # stable
    tp, fp = [], []
    for image, _, *corners in lines:
        bb = [float(corner) for corner in corners]
        ovmax, jmax = -math.inf, None
        for j, (bbgt, _, _) in enumerate(objects[image]):
            bi = max(bb[0], bbgt[0]), max(bb[1], bbgt[1]), min(bb[2], bbgt[2]), min(bb[3], bbgt[3])
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                area = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1)
                ua = area + (bbgt[2] - bbgt[0] + 1) * (bbgt[3] - bbgt[1] + 1) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        hit = ovmax > min_overlap
        match = objects[image][jmax] if hit else None
        tp.append(hit and not match[1] and not match[2])
        fp.append(not hit or (not match[1] and match[2]))
        if tp[-1]:
            match[2] = True
    if npos == 0:
        return math.nan
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    counted = tp + fp > 0  # before the first that counts there is no precision
    return loop_area(tp[counted] / npos, tp[counted] / (tp + fp)[counted], interpolation)


def check_against_the_devkit(folder, annotations, predictions, targets, classes):
    """AP equals the devkit's from the files, and is the very same once they are read back."""
    names = list(annotations)
    paths = write_voc_results(folder, names, predictions, classes)
    results = results_of(predictions, targets, classes)
    for result in results:
        expected = [
            devkit_ap(path, annotations, name, result.interpolation)
            for path, name in zip(paths, classes, strict=True)
        ]
        np.testing.assert_allclose(list(result.ap.values()), expected, rtol=0, atol=1e-9)
    back = read_voc_results(folder, names, classes)
    for again, result in zip(results_of(back, targets, classes), results, strict=True):
        assert again.as_dict() == result.as_dict()
    return results


def results_of(predictions, targets, classes):
    """By both interpolations."""
    evaluator = VOCEvaluator(classes)
    for first in range(0, len(targets), 3):
        evaluator.update(predictions[first : first + 3], targets[first : first + 3])
    return [evaluator.compute(interpolation) for interpolation in INTERPOLATIONS]


# ---------------------------------------------------------------------------- the oracle: a loop


def loop_ap(predictions, targets, num_classes, threshold, interpolation):
    """AP of every class; detections and objects are sorted into classes first, only once."""
    objects = [{} for _ in range(num_classes + 1)]  # class -> image -> boxes, difficult, taken
    for image, target in enumerate(targets):
        difficult = target.get("difficult", np.zeros(len(target["labels"]), bool)).astype(bool)
        for label in set(target["labels"].tolist()):
            mine = target["labels"] == label
            boxes = target["boxes"][mine].astype(float)
            objects[label][image] = (boxes, difficult[mine], [False] * len(boxes))
    if not predictions:
        return [math.nan] * num_classes
    images = np.repeat(np.arange(len(predictions)), [len(p["labels"]) for p in predictions])
    labels, scores, boxes = (
        np.concatenate([p[key] for p in predictions]) for key in ("labels", "scores", "boxes")
    )
    aps = []
    for label in range(1, num_classes + 1):
        mine = labels == label
        detections = images[mine].tolist(), scores[mine], boxes[mine].astype(float)
        aps.append(loop_ap_of_class(*detections, objects[label], threshold, interpolation))
    return aps


def loop_ap_of_class(images, scores, boxes, objects, threshold, interpolation):
    """One class: its detections one after the other, as VOCevaldet does."""
    npos = sum(int((~difficult).sum()) for _, difficult, _ in objects.values())
    if npos == 0:
        return math.nan
    if not images:
        return 0.0
    nothing = (np.zeros((0, 4)), [], [])
    order = np.argsort(-scores, kind="stable")
    tp, fp = np.zeros(len(order)), np.zeros(len(order))
    for rank, d in enumerate(order):
        gt, difficult, taken = objects.get(images[d], nothing)
        best, j = -np.inf, -1
        if len(gt):
            box = boxes[d]
            w = np.maximum(np.minimum(gt[:, 2], box[2]) - np.maximum(gt[:, 0], box[0]), 0.0)
            h = np.maximum(np.minimum(gt[:, 3], box[3]) - np.maximum(gt[:, 1], box[1]), 0.0)
            area = (box[2] - box[0]) * (box[3] - box[1])
            union = area + (gt[:, 2] - gt[:, 0]) * (gt[:, 3] - gt[:, 1]) - w * h
            overlaps = w * h / union
            best, j = np.max(overlaps), int(np.argmax(overlaps))
        if best > threshold:
            if not difficult[j]:
                if not taken[j]:
                    tp[rank], taken[j] = 1.0, True
                else:
                    fp[rank] = 1.0
        else:
            fp[rank] = 1.0
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    recall = tp / npos
    precision = tp / np.maximum(tp + fp, np.finfo(float).eps)
    return loop_area(recall, precision, interpolation)


def loop_area(recall, precision, interpolation):
    if interpolation == "11point":
        ap = 0.0
        for t in np.arange(0.0, 1.1, 0.1):
            reached = precision[recall >= t]
            ap += (reached.max() if len(reached) else 0.0) / 11.0
        return ap
    r = np.concatenate(([0.0], recall, [1.0]))
    p = np.concatenate(([0.0], precision, [0.0]))
    for i in range(len(p) - 1, 0, -1):
        p[i - 1] = max(p[i - 1], p[i])
    steps = np.where(r[1:] != r[:-1])[0]
    return float(np.sum((r[steps + 1] - r[steps]) * p[steps + 1]))


# ------------------------------------------------------------------------------------ random data


def random_boxes(rng, num, grid):
    """Boxes on a coarse grid have many equal overlaps; ``grid=None`` draws continuous ones."""
    low, size = rng.uniform(0, 60, (num, 2)), rng.uniform(5, 40, (num, 2))
    if grid:
        low, size = np.round(low / grid) * grid, np.ceil(size / grid) * grid
    return np.concatenate([low, low + size], axis=1).astype(np.float32)


def random_case(seed, num_images, num_classes, grid=None, score_levels=None):
    rng = np.random.default_rng(seed)
    used = rng.permutation(num_classes)[: max(1, num_classes - 1)] + 1  # one class has no objects
    predictions, targets = [], []
    for _ in range(num_images):
        num_gt, num_far = rng.integers(0, 6), rng.integers(0, 5)
        gt = random_boxes(rng, num_gt, grid)
        gt_labels = rng.choice(used, num_gt)
        target = {"boxes": gt, "labels": gt_labels}
        if rng.random() < 0.8:
            target["difficult"] = rng.random(num_gt) < 0.3
        copies = rng.integers(0, max(num_gt, 1), rng.integers(0, 10) if num_gt else 0)
        shift = rng.normal(0, 3, (len(copies), 4)) if not grid else rng.integers(-1, 2, (1, 4))
        near = gt[copies] + shift.astype(np.float32)
        near_labels = gt_labels[copies]
        boxes = np.concatenate([near, random_boxes(rng, num_far, grid)]).astype(np.float32)
        labels = np.concatenate([near_labels, rng.integers(1, num_classes + 1, num_far)])
        scores = rng.random(len(boxes)).astype(np.float32)
        if score_levels:
            scores = np.round(scores * score_levels).astype(np.float32) / score_levels
        predictions.append({"boxes": boxes, "labels": labels, "scores": scores})
        targets.append(target)
    return predictions, targets


# --------------------------------------------------------------------------- images and evaluators


def image(boxes, scores=None, labels=None, **extra):
    """A prediction if it has scores, else a target."""
    record = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
    }
    if scores is not None:
        record["scores"] = torch.tensor(scores, dtype=torch.float32)
    return record | extra


def single(prediction, target, **options):
    evaluator = VOCEvaluator(["cat"], **options)
    evaluator.update([prediction], [target])
    return evaluator.compute()


def evaluate(predictions, targets, num_classes, threshold=0.5, batch_size=3):
    evaluator = VOCEvaluator([f"c{i}" for i in range(num_classes)], threshold)
    for first in range(0, len(predictions), batch_size):
        evaluator.update(
            predictions[first : first + batch_size], targets[first : first + batch_size]
        )
    return evaluator


def guesses(dataset, seed=0):
    """For each image its objects shifted, of another class, found twice or not at all, in NumPy."""
    rng, found = np.random.default_rng(seed), []
    for index in range(len(dataset)):
        target = dataset.target(index)
        rows = rng.integers(0, max(len(target["boxes"]), 1), 2 * len(target["boxes"]))
        boxes = target["boxes"].numpy()[rows] + rng.normal(0, 4, (len(rows), 1)).astype(np.float32)
        labels = target["labels"].numpy()[rows]
        labels = np.where(rng.random(len(rows)) < 0.2, 1, labels)
        scores = rng.integers(1, 9, len(rows)).astype(np.float32) / 8  # many are equal
        found.append({"boxes": boxes, "labels": labels, "scores": scores})
    return found
