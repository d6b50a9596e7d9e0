"""Pascal VOC's average precision by the devkit's own statements, and random cases to compare on."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from detmix.evaluation import VOCEvaluator

INTERPOLATIONS = ("all-point", "11point")
CLASSES = tuple(f"c{number}" for number in range(9))


def devkit_hits(lines, annotations, name, min_overlap):
    """VOCevaldet.m, statement by statement: scores, true and false positives, objects to find.

    ``lines`` holds the detections of the class ``name`` as a result file does: (image, score,
    [xmin, ymin, xmax, ymax]); ``annotations`` for each image a list of (class, difficult, [xmin,
    ymin, xmax, ymax]), both in pixels from 1 on, both ends included. As in the devkit's Python port
    an overlap has to be above the threshold.
    """
    objects = {
        image: [[box, difficult, False] for label, difficult, box in found if label == name]
        for image, found in annotations.items()
    }
    npos = sum(not difficult for found in objects.values() for _, difficult, _ in found)
    tp, fp = [], []
    lines = sorted(lines, key=lambda line: -line[1])  # stable
    for image, _, bb in lines:
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
    return np.array([score for _, score, _ in lines]), np.array(tp, int), np.array(fp, int), npos


def devkit_ap(tp, fp, npos, interpolation):
    """VOCap.m, statement by statement; the recalls of the 11 points are those of ``np.arange``."""
    if npos == 0:
        return math.nan
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    counted = tp + fp > 0  # before the first that counts there is no precision
    recall, precision = tp[counted] / npos, tp[counted] / (tp + fp)[counted]
    if interpolation == "11point":
        highest = [max(precision[recall >= t], default=0.0) for t in np.arange(0.0, 1.1, 0.1)]
        return sum(highest) / 11
    r, p = np.array([0.0, *recall, 1.0]), np.array([0.0, *precision, 0.0])
    for i in range(len(p) - 1, 0, -1):
        p[i - 1] = max(p[i - 1], p[i])
    return float(np.sum((r[1:] - r[:-1]) * p[1:]))


def best_of_thresholds(scores, tp, fp, npos):
    """Score, precision, recall and F1 of what the best threshold leaves, of equal ones the first.

    What counts neither way is no threshold.
    """
    best = (math.nan,) + ((0.0, 0.0, 0.0) if npos else (math.nan,) * 3)
    for score in sorted(scores[tp + fp > 0], reverse=True):
        hits, misses = tp[scores >= score].sum(), fp[scores >= score].sum()
        f1 = 2 * hits / (npos + hits + misses)
        if npos and (math.isnan(best[0]) or f1 > best[3] + 1e-12):
            best = score, hits / (hits + misses), hits / npos, f1
    return best


def check_against_the_devkit(evaluator, predictions, targets, threshold=0.5):
    """AP of every class, its mean and the best F1 are the devkit's; all-point AP is returned."""
    lines = devkit_lines(evaluator.classes, range(len(predictions)), predictions)
    annotations = {
        index: as_annotated(evaluator.classes, target, "difficult")
        for index, target in enumerate(targets)
    }
    hits = [devkit_hits(lines[name], annotations, name, threshold) for name in lines]
    for interpolation in INTERPOLATIONS:
        result = evaluator.compute(interpolation)
        expected = [devkit_ap(*of_class, interpolation) for _, *of_class in hits]
        np.testing.assert_allclose(list(result.ap.values()), expected, rtol=0, atol=1e-9)
        mean = math.nan if np.isnan(expected).all() else np.nanmean(expected)
        np.testing.assert_allclose(result.mean_ap, mean, rtol=0, atol=1e-9)
    points = [list(vars(point).values()) for point in result.best_f1().values()]
    expected = [best_of_thresholds(*of_class) for of_class in hits]
    np.testing.assert_allclose(points, expected, rtol=0, atol=1e-9)
    return evaluator.compute("all-point").mean_ap


def devkit_lines(classes, images, predictions):
    """Of each class its detections, as a result file holds them."""
    lines = {name: [] for name in classes}
    for image_name, found in zip(images, predictions, strict=True):
        for name, score, box in as_annotated(classes, found, "scores"):
            lines[name].append((image_name, score, box))
    return lines


def as_annotated(classes, record, key):
    """Of each row its class, the value of ``key`` and the box with both ends included."""
    names = [classes[label - 1] for label in record["labels"]]
    boxes = np.asarray(record["boxes"], np.float64).reshape(-1, 4) + np.array([1, 1, 0, 0])
    values = record.get(key, np.zeros(len(names), bool))
    return list(zip(names, values, boxes.tolist(), strict=True))


def random_boxes(rng, num, grid, limit):
    """Boxes on a coarse grid have many equal overlaps; ``grid=None`` draws continuous ones."""
    low, size = rng.uniform(0, 0.6, (num, 2)) * limit, rng.uniform(0.15, 0.4, (num, 2)) * limit
    if grid:
        low, size = np.round(low / grid) * grid, np.ceil(size / grid) * grid
    return np.concatenate([low, low + size], axis=1).astype(np.float32)


def random_case(seed, num_images, num_classes, grid=None, levels=None, limit=100.0):
    """Predictions and targets, some objects found twice or not at all, some difficult.

    The last class has no objects.
    """
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(num_images):
        num_gt, num_far = rng.integers(0, 6), rng.integers(0, 5)
        gt = random_boxes(rng, num_gt, grid, limit)
        gt_labels = rng.integers(1, max(num_classes, 2), num_gt)
        target = {"boxes": gt, "labels": gt_labels}
        if rng.random() < 0.8:
            target["difficult"] = rng.random(num_gt) < 0.3
        copies = rng.integers(0, max(num_gt, 1), rng.integers(0, 10) if num_gt else 0)
        doubt = rng.random((len(copies), 1))  # how far off, and how far from sure
        noise = rng.normal(0, 0.04 * limit, (len(copies), 4)) * doubt
        near = gt[copies] + (rng.integers(-1, 2, (1, 4)) if grid else noise)
        boxes = np.concatenate([near, random_boxes(rng, num_far, grid, limit)]).astype(np.float32)
        labels = np.concatenate([gt_labels[copies], rng.integers(1, num_classes + 1, num_far)])
        sure = 1 - doubt[:, 0] * rng.random(len(copies))
        scores = np.concatenate([sure, 0.6 * rng.random(num_far)]).astype(np.float32)
        if levels:
            scores = np.round(scores * levels).astype(np.float32) / np.float32(levels)
        predictions.append({"boxes": boxes, "labels": labels, "scores": scores})
        targets.append(target)
    return predictions, targets


# Equal overlaps (grid) and equal scores (levels) among them.
random_cases = st.builds(
    random_case,
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(0, 12),
    num_classes=st.integers(1, 4),
    grid=st.sampled_from([None, 5, 20]),
    levels=st.sampled_from([None, 2, 10]),
)


def image(boxes, scores=None, labels=None, **extra):
    """A prediction if it has scores, else a target."""
    record = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
    }
    if scores is not None:
        record["scores"] = torch.tensor(scores, dtype=torch.float32)
    return record | extra


def evaluate(predictions, targets, classes=1, threshold=0.5, batch_size=3):
    """An evaluator that has seen these images; ``classes`` are names or their number."""
    names = CLASSES[:classes] if isinstance(classes, int) else classes
    return fed(VOCEvaluator(names, threshold), predictions, targets, batch_size)


def fed(evaluator, predictions, targets, batch_size):
    """The evaluator once it has seen these images."""
    for first in range(0, len(predictions), batch_size):
        part = slice(first, first + batch_size)
        evaluator.update(predictions[part], targets[part])
    return evaluator
