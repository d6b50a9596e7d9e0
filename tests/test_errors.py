"""Error analysis against a per-detection loop, re-evaluated repairs and cases worked by hand."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detmix.data import VOC_CLASSES, VOCDetection
from detmix.evaluation import VOCEvaluator, analyze_errors, worst_images
from detmix.evaluation.errors.analysis import HOIEM_GROUPS
from detmix.evaluation.errors.result import KINDS, OUTCOMES, SCOPES

CLASSES = ("cat", "dog", "cow", "car")
GROUPS = (("cat", "dog"), ("dog", "cow"))  # cat and cow are not similar

# ---------------------------------------------------------------------------- the oracle: a loop


def overlap(a, b):
    ax1, ay1, ax2, ay2 = map(float, a)
    bx1, by1, bx2, by2 = map(float, b)
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter)


def first_best(ious):
    """The first object of highest overlap and the overlap; ``ious`` by object."""
    return max(ious.items(), key=lambda item: item[1], default=(-1, 0.0))


def diagnose(prediction, target, classes, groups, t, b):
    """Outcomes and, if repaired, objects of an image's detections; which objects are found."""
    outcomes, objects = [""] * len(prediction["scores"]), [-1] * len(prediction["scores"])
    found, taken = set(), set()
    for d in sorted(range(len(outcomes)), key=lambda d: -prediction["scores"][d]):
        label = prediction["labels"][d]
        ious = {g: overlap(prediction["boxes"][d], box) for g, box in enumerate(target["boxes"])}
        g, iou = first_best({g: v for g, v in ious.items() if target["labels"][g] == label})
        if iou > t:
            found.add(g)
            if target["difficult"][g]:
                outcomes[d] = "ignored"
            elif g in taken:
                outcomes[d] = "duplicate"
            else:
                outcomes[d], objects[d] = "correct", g
                taken.add(g)
            continue
        if iou >= b:
            outcomes[d] = "localization"
            objects[d] = -1 if target["difficult"][g] else g
            continue
        near = {classes[label - 1]}.union(*(s for s in groups if classes[label - 1] in s))
        similar = {g: v for g, v in ious.items() if classes[target["labels"][g] - 1] in near}
        for kind, of_kind in (("similar_class", similar), ("other_class", ious)):
            g, iou = first_best({g: v for g, v in of_kind.items() if v >= b})
            if iou >= b:
                outcomes[d] = kind
                objects[d] = -1 if iou <= t or target["difficult"][g] else g
                break
        else:
            outcomes[d] = "background"
    return outcomes, objects, found


def repair(prediction, target, outcomes, objects, kind):
    """The image's detections once those of one kind are right or gone."""
    boxes, labels = prediction["boxes"].copy(), prediction["labels"].copy()
    claims = {}
    for d, (outcome, g) in enumerate(zip(outcomes, objects, strict=True)):
        if outcome in ("correct", kind) and g >= 0:
            claims.setdefault(g, []).append(d)
        if outcome == kind and g >= 0:
            if kind == "localization":
                boxes[d] = target["boxes"][g]
            labels[d] = target["labels"][g]
    firsts = [min(ds, key=lambda d: (-prediction["scores"][d], d)) for ds in claims.values()]
    keep = [
        d
        for d, outcome in enumerate(outcomes)
        if d in firsts or outcome not in ("correct", kind, "ignored")
    ]
    return {"boxes": boxes[keep], "labels": labels[keep], "scores": prediction["scores"][keep]}


# ------------------------------------------------------------------------------------ random data


def random_boxes(rng, num, grid):
    low, size = rng.uniform(0, 40, (num, 2)), rng.uniform(5, 60, (num, 2))
    if grid:
        low, size = np.round(low / grid) * grid, np.ceil(size / grid) * grid
    return np.concatenate([low, low + size], axis=1).astype(np.float32)


def random_case(seed, num_images, num_classes, grid=None, score_levels=None):
    """Coarse grids make equal overlaps, score levels equal scores; one class has no objects."""
    rng = np.random.default_rng(seed)
    with_objects = rng.permutation(num_classes)[: max(1, num_classes - 1)] + 1
    predictions, targets = [], []
    for _ in range(num_images):
        num_gt = rng.integers(0, 5)
        target = {
            "boxes": random_boxes(rng, num_gt, grid),
            "labels": rng.choice(with_objects, num_gt),
            "difficult": rng.random(num_gt) < 0.25,
        }
        near = rng.integers(0, num_gt, rng.integers(0, 9)) if num_gt else np.zeros(0, np.int64)
        jitter = rng.choice([0.5, 3, 12], (len(near), 1)) * rng.normal(0, 1, (len(near), 4))
        boxes = target["boxes"][near] + (np.round(jitter / grid) * grid if grid else jitter)
        boxes = np.concatenate([boxes, random_boxes(rng, rng.integers(0, 4), grid)])
        labels = rng.integers(1, num_classes + 1, len(boxes))
        right = rng.random(len(near)) < 0.6
        labels[: len(near)][right] = target["labels"][near][right]
        scores = rng.random(len(boxes))
        if score_levels:
            scores = np.round(scores * score_levels) / score_levels
        predictions.append(
            {
                "boxes": boxes.astype(np.float32),
                "labels": labels,
                "scores": scores.astype(np.float32),
            }
        )
        targets.append(target)
    return predictions, targets


def evaluate(predictions, targets, classes=CLASSES, threshold=0.5):
    evaluator = VOCEvaluator(classes, threshold)
    evaluator.update(predictions, targets)
    return evaluator


def check_against_the_loop(predictions, targets, classes, groups, threshold=0.5, background=0.1):
    evaluator = evaluate(predictions, targets, classes, threshold)
    result = evaluator.compute("all-point")
    analysis = analyze_errors(evaluator.matching(), similar=groups, background_iou=background)
    found = [
        diagnose(prediction, target, classes, groups, threshold, background)
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    outcomes = [outcome for image, _, _ in found for outcome in image]
    assert [OUTCOMES[kind] for kind in analysis.kinds] == outcomes
    assert analysis.is_missed.tolist() == [
        g not in image
        for (_, _, image), target in zip(found, targets, strict=True)
        for g in range(len(target["labels"]))
    ]
    for kind in KINDS:
        repaired = [
            repair(prediction, target, of_image, objects, kind)
            for prediction, target, (of_image, objects, _) in zip(
                predictions, targets, found, strict=True
            )
        ]
        mean_ap = evaluate(repaired, targets, classes, threshold).compute().mean_ap
        gain = mean_ap - result.mean_ap
        assert not gain < -1e-12, kind
        assert analysis.ap_gain[kind] == pytest.approx(gain, abs=1e-9, nan_ok=True), kind
    check_counts(analysis, result, predictions, outcomes)
    return analysis


def check_counts(analysis, result, predictions, outcomes):
    """Counts of every class and scope from the outcomes and the result."""
    assert analysis.mean_ap == pytest.approx(result.mean_ap, abs=1e-12, nan_ok=True)
    rows = sorted(
        (
            (-score, row, label, outcome)
            for row, (label, score, outcome) in enumerate(
                zip(
                    (label for p in predictions for label in p["labels"]),
                    (score for p in predictions for score in p["scores"]),
                    outcomes,
                    strict=True,
                )
            )
        ),
    )
    for label, name in enumerate(result.classes, start=1):
        own = [(-score, outcome) for score, _, of, outcome in rows if of == label]
        point, num = result.best_f1()[name], result.num_objects[name]
        scopes = {
            "top_n": [outcome for _, outcome in own if outcome != "ignored"][:num],
            "best_f1": [outcome for score, outcome in own if score >= point.score],
            "all": [outcome for _, outcome in own],
        }
        for scope in SCOPES:
            counts = {outcome: scopes[scope].count(outcome) for outcome in OUTCOMES}
            assert analysis.counts[scope][name] == counts


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(0, 8),
    num_classes=st.integers(1, 4),
    grid=st.sampled_from([None, 5, 20]),
    score_levels=st.sampled_from([None, 2, 10]),
    thresholds=st.sampled_from([(0.5, 0.1), (0.5, 0.5), (0.75, 0.25)]),
)
def test_equals_the_loop(seed, num_images, num_classes, grid, score_levels, thresholds):
    case = random_case(seed, num_images, num_classes, grid, score_levels)
    classes = CLASSES[:num_classes]
    groups = [tuple(name for name in group if name in classes) for group in GROUPS]
    check_against_the_loop(*case, classes, groups, *thresholds)


def test_equals_the_loop_on_a_large_set_with_all_kinds():
    analysis = check_against_the_loop(*random_case(3, 300, 4), CLASSES, GROUPS)
    assert all(count > 20 for count in analysis.totals("all").values())
    assert all(gain > 0.001 for gain in analysis.ap_gain.values())


def test_equals_the_loop_on_real_objects(voc_root):
    dataset = VOCDetection(voc_root, (("2007", "test"),))
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for index in range(150):
        target = {k: np.asarray(v) for k, v in dataset.target(index).items()}
        near = rng.integers(0, len(target["labels"]), 2 * len(target["labels"]))
        sides = np.tile(target["boxes"][:, 2:] - target["boxes"][:, :2], 2)[near]
        labels = target["labels"][near]
        wrong = rng.random(len(near)) < 0.3
        labels[wrong] = rng.integers(1, 21, wrong.sum())
        boxes = target["boxes"][near] + rng.normal(0, 0.15, sides.shape) * sides
        scores = rng.random(len(near)).astype(np.float32)
        predictions.append({"boxes": boxes.astype(np.float32), "labels": labels, "scores": scores})
        targets.append(target)
    analysis = check_against_the_loop(predictions, targets, VOC_CLASSES, HOIEM_GROUPS)
    assert analysis.missed_difficult["all"].objects > 0


# ------------------------------------------------------------------------------- worked by hand


def image(objects, detections):
    """Objects are (class, box[, difficult]), detections (class, box, score)."""
    names = {name: label for label, name in enumerate(CLASSES, start=1)}
    target = {
        "boxes": np.array([o[1] for o in objects], np.float32).reshape(-1, 4),
        "labels": np.array([names[o[0]] for o in objects], np.int64),
        "difficult": np.array([len(o) > 2 for o in objects], bool),
    }
    prediction = {
        "boxes": np.array([d[1] for d in detections], np.float32).reshape(-1, 4),
        "labels": np.array([names[d[0]] for d in detections], np.int64),
        "scores": np.array([d[2] for d in detections], np.float32),
    }
    return prediction, target


def analyze(*images, similar=(), **options):
    predictions, targets = zip(*images, strict=True)
    matching = evaluate(list(predictions), list(targets)).matching()
    return analyze_errors(matching, similar=similar, **options)


def outcomes_of(analysis):
    return [OUTCOMES[kind] for kind in analysis.kinds]


BOX, FAR = (0, 0, 10, 10), (50, 50, 60, 60)
HALF, QUARTER = (0, 0, 10, 5), (0, 0, 5, 5)  # overlaps of exactly 1/2 and 1/4 with BOX


def test_own_class_comes_before_a_better_overlap_with_another():
    objects = [("cat", QUARTER), ("dog", BOX)]
    assert outcomes_of(analyze(image(objects, [("cat", BOX, 0.9)]))) == ["localization"]


def test_similar_comes_before_a_better_overlap_with_another():
    objects = [("dog", QUARTER), ("cow", BOX)]
    analysis = analyze(image(objects, [("cat", BOX, 0.9)]), similar=[("cat", "dog")])
    assert outcomes_of(analysis) == ["similar_class"]
    assert analysis.ap_gain["similar_class"] == 0  # as a dog it overlaps by a quarter only


def test_gains_worked_by_hand():
    # Average precision 1/2 * (1/2 + 2/4). Without the background: 1/2 * (1/1 + 2/3).
    detections = [
        ("cat", (80, 0, 90, 9), 0.9),
        ("cat", BOX, 0.8),
        ("cat", BOX, 0.7),
        ("cat", FAR, 0.6),
    ]
    analysis = analyze(image([("cat", BOX), ("cat", FAR)], detections))
    assert analysis.mean_ap == pytest.approx(1 / 2)
    assert analysis.ap_gain["background"] == pytest.approx(5 / 6 - 1 / 2)
    assert analysis.ap_gain["duplicate"] == pytest.approx((1 / 2 * (2 / 3 + 2 / 3)) - 1 / 2)


def test_errors_on_difficult_objects_are_dropped_when_repaired():
    objects = [("cat", BOX, "difficult"), ("cat", FAR)]
    detections = [("cat", HALF, 0.9), ("dog", BOX, 0.8), ("cat", BOX, 0.7), ("cat", FAR, 0.6)]
    analysis = analyze(image(objects, detections))
    assert outcomes_of(analysis) == ["localization", "other_class", "ignored", "correct"]
    assert analysis.mean_ap == 0.5
    assert analysis.ap_gain["localization"] == 0.5
    assert analysis.ap_gain["other_class"] == 0
    assert analysis.totals("top_n") == {
        **dict.fromkeys(OUTCOMES, 0),
        "localization": 1,
    }


def test_missed_objects_by_size_and_difficulty():
    sides = {"small": (31.999,), "medium": (32, 95.999), "large": (96, 200)}
    objects = [("cat", (0, 0, side, side)) for of_size in sides.values() for side in of_size]
    hit, low = ("cat", (300, 0, 310, 10), 0.9), ("cat", (400, 0, 410, 10), 0.1)
    objects += [(hit[0], hit[1]), ("cat", low[1]), ("cat", (500, 0, 540, 40), "difficult")]
    blunders = [("cat", (600, 10 * i, 610, 10 * i + 10), 0.5) for i in range(20)]
    difficult_hit = ("cat", (500, 0, 540, 40), 0.2)
    analysis = analyze(image(objects, [hit, low, difficult_hit, *blunders]))
    assert analysis.best_f1_scores["cat"] == pytest.approx(0.9)
    assert math.isnan(analysis.best_f1_scores["dog"])
    numbers = {
        size: (m.objects, m.missed, m.missed_at_best_f1) for size, m in analysis.missed.items()
    }
    assert numbers == {
        "small": (3, 1, 2),
        "medium": (2, 2, 2),
        "large": (2, 2, 2),
        "all": (7, 5, 6),
    }
    medium = analysis.missed_difficult["medium"]
    assert (medium.objects, medium.share, medium.share_at_best_f1) == (1, 0.0, 1.0)
    assert math.isnan(analysis.missed_difficult["small"].share)


def test_a_class_without_objects_has_errors_but_nothing_at_its_best_f1():
    analysis = analyze(image([("cat", BOX)], [("dog", FAR, 0.9), ("cat", BOX, 0.5)]))
    assert analysis.counts["all"]["dog"]["background"] == 1
    assert sum(analysis.counts["best_f1"]["dog"].values()) == 0
    assert sum(analysis.counts["top_n"]["dog"].values()) == 0


def test_nothing_at_all():
    analysis = analyze_errors(VOCEvaluator(CLASSES).matching())
    assert math.isnan(analysis.mean_ap)
    assert all(math.isnan(gain) for gain in analysis.ap_gain.values())
    assert worst_images(analysis, 5) == []
    assert json.loads(json.dumps(analysis.as_dict(), allow_nan=False))["mean_ap"] is None


def test_as_dict_and_table():
    predictions, targets = random_case(3, 60, 4)
    analysis = analyze_errors(evaluate(predictions, targets).matching(), similar=GROUPS)
    values = json.loads(json.dumps(analysis.as_dict(), allow_nan=False))
    assert values["similar"] == [list(group) for group in GROUPS]
    assert values["ap_gain"] == analysis.ap_gain
    totals = values["counts"]["top_n"]["total"]
    by_class = values["counts"]["top_n"]["by_class"].values()
    assert totals == {name: sum(counts[name] for counts in by_class) for name in OUTCOMES}
    assert values["missed"]["all"]["missed"] == analysis.missed["all"].missed
    assert values["missed"]["all"]["share"] == pytest.approx(analysis.missed["all"].share)

    lines = str(analysis).splitlines()
    cells = {line.split("  ")[0]: line.split() for line in lines if line}
    total = [str(analysis.totals(scope)["similar_class"]) for scope in SCOPES]
    assert cells["similar class"][2:] == [*total, f"{analysis.ap_gain['similar_class']:.4f}"]
    missed = analysis.missed["all"]
    assert cells["all"][1:4] == [str(missed.objects), str(missed.missed), f"{missed.share:.1%}"]
    blank = lines.index("")
    for table in (lines[: blank - 2], lines[blank + 1 :]):
        assert len({len(line) for line in table}) == 1


def test_the_table_has_rows_for_difficult_objects_where_there_are_some():
    objects = [("cat", (0, 0, 10, 10)), ("cat", (50, 50, 60, 60), True)]
    analysis = analyze(image(objects, []))
    rows = [line.split("  ")[0] for line in str(analysis).splitlines()]
    assert [row for row in rows if "difficult" in row] == ["small, difficult", "all, difficult"]


# ------------------------------------------------------------------------------- similar classes


def test_hoiems_groups_are_the_default_for_voc_names_only():
    def groups(classes):
        return analyze_errors(VOCEvaluator(classes).matching()).similar

    assert groups(VOC_CLASSES) == HOIEM_GROUPS
    assert groups(["dog", "cat"]) == HOIEM_GROUPS
    assert groups([*VOC_CLASSES, "truck"]) == ()
    named = {name for group in HOIEM_GROUPS for name in group}
    assert set(VOC_CLASSES) - named == {"bottle", "pottedplant", "tvmonitor"}
    assert named < set(VOC_CLASSES)


def test_default_groups_of_a_part_of_the_voc_names():
    objects, detections = [("cat", BOX)], [("dog", BOX, 0.9), ("car", BOX, 0.8)]
    kinds = outcomes_of(analyze(image(objects, detections), similar=None))
    assert kinds == ["similar_class", "other_class"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_iou": 0.0}, r"background_iou is 0.0, expected .* \(0, 0.5\]"),
        ({"background_iou": 0.51}, "background_iou is 0.51"),
        ({"background_iou": math.nan}, "background_iou is nan"),
        ({"similar": [("cat", "dog"), ("cat", "mule")]}, r"similar\[1\] has \['mule'\], .* cat, "),
        ({"similar": ["cat", "dog"]}, r"similar\[0\] is 'cat', expected a collection"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        analyze_errors(VOCEvaluator(CLASSES).matching(), **options)


# ------------------------------------------------------------------------------------ worst images


def test_worst_images_by_hand():
    correct = [("cat", BOX, 0.9)]
    false = [("cat", (80, 0, 90, 9), 0.95)]
    below = [("cat", (200, 0, 210, 10), 0.05), ("cat", (300, 0, 310, 10), 0.06)]
    images = [
        image([("cat", BOX)], correct + below),  # no errors shown
        image([("cat", BOX)], correct + false),  # F1 2/3
        image([("cat", BOX), ("cat", FAR)], []),  # F1 0, two errors
        image([("cat", BOX), ("cat", FAR, "difficult")], [*correct, ("cat", FAR, 0.95)]),
        image([], false),  # F1 0, one error
        image([("cat", BOX), ("cat", FAR)], correct),  # F1 2/3
        image([("cat", BOX, "difficult")], []),  # nothing is asked of it
        *[image([("cat", BOX)], correct)] * 6,
    ]
    predictions, targets = zip(*images, strict=True)
    targets = [{**target, "image_id": f"i{i}"} for i, target in enumerate(targets)]
    analysis = analyze_errors(evaluate(predictions, targets).matching())
    worst = worst_images(analysis, 10)
    assert [w.image_id for w in worst] == ["i2", "i4", "i1", "i5"]
    assert [w.image for w in worst] == [2, 4, 1, 5]
    assert [(w.num_correct, w.num_false, w.num_missed) for w in worst] == [
        (0, 0, 2),
        (0, 1, 0),
        (1, 1, 0),
        (1, 0, 1),
    ]
    assert [w.f1 for w in worst] == pytest.approx([0, 0, 2 / 3, 2 / 3])
    assert [w.num_errors for w in worst] == [2, 1, 1, 1]
    matching = analysis.matching
    third, fourth = worst[2:]
    assert third.outcomes == ("background", "correct")  # by decreasing score
    np.testing.assert_array_equal(
        matching.det_boxes[third.detections], [false[0][1], correct[0][1]]
    )
    np.testing.assert_array_equal(matching.gt_boxes[fourth.objects], [BOX, FAR])
    assert fourth.is_missed.tolist() == [False, True]
    assert [w.image for w in worst_images(analysis, 1)] == [2]
    assert worst_images(analysis, 0) == []
    with pytest.raises(ValueError, match="num is -1"):
        worst_images(analysis, -1)


def test_worst_images_show_what_the_analysis_counts():
    predictions, targets = random_case(5, 80, 4, score_levels=20)
    analysis = analyze_errors(evaluate(predictions, targets).matching(), similar=GROUPS)
    worst = worst_images(analysis, 1000)
    totals = analysis.totals("best_f1")
    assert sum(w.num_false for w in worst) == sum(totals[kind] for kind in KINDS)
    assert sum(w.num_missed for w in worst) == analysis.missed["all"].missed_at_best_f1
    for w in worst:
        assert sum(outcome == "correct" for outcome in w.outcomes) == w.num_correct
        assert sum(outcome in KINDS for outcome in w.outcomes) == w.num_false
        assert w.is_missed.sum() == w.num_missed
        assert (analysis.matching.det_images[w.detections] == w.image).all()
        assert len(w.objects) == len(targets[w.image]["labels"])
    ranks = [(w.f1, -w.num_errors, w.image) for w in worst]
    assert ranks == sorted(ranks)


# ------------------------------------------------------------------------------------------ speed


@pytest.mark.slow
def test_voc_2007_test_is_analysed_in_seconds():
    predictions, targets = random_case(0, 4952, 4)
    rng = np.random.default_rng(0)
    for prediction, target in zip(predictions, targets, strict=True):
        boxes = random_boxes(rng, 100, None)
        boxes[:50] += 200 * rng.integers(0, 2)
        prediction.update(boxes=boxes, labels=rng.integers(1, 5, 100), scores=rng.random(100))
        assert len(target["labels"]) < 5
    matching = evaluate(predictions, targets).matching()
    start = time.perf_counter()
    analysis = analyze_errors(matching)
    worst_images(analysis, 50)
    assert time.perf_counter() - start < 10
    assert sum(analysis.totals("all").values()) == 495_200
