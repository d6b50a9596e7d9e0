"""Kinds of errors against a per-detection loop, re-evaluated repairs and cases worked by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou
from voc_oracle import CLASSES, evaluate, image, random_case, random_cases

from detmix.data import VOC_CLASSES
from detmix.evaluation import VOCEvaluator, analyze_errors, worst_images
from detmix.evaluation.errors.analysis import HOIEM_GROUPS
from detmix.evaluation.errors.result import KINDS, OUTCOMES, SCOPES

GROUPS = (("c0", "c1"), ("c1", "c2"))  # c0 and c2 are not similar

# ---------------------------------------------------------------------------- the oracle: a loop


def first_best(ious):
    """The first object of highest overlap and the overlap; ``ious`` by object."""
    return max(ious.items(), key=lambda item: item[1], default=(-1, 0.0))


def diagnose(prediction, target, t, b):
    """Outcomes and, if repaired, objects of an image's detections; which objects are found."""
    outcomes, objects = [""] * len(prediction["scores"]), [-1] * len(prediction["scores"])
    found, taken = set(), set()
    sides = (torch.from_numpy(record["boxes"]).double() for record in (prediction, target))
    overlaps = box_iou(*sides).nan_to_num().tolist()
    for d in sorted(range(len(outcomes)), key=lambda d: -prediction["scores"][d]):
        label = prediction["labels"][d]
        ious = dict(enumerate(overlaps[d]))
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
        near = {CLASSES[label - 1]}.union(*(s for s in GROUPS if CLASSES[label - 1] in s))
        similar = {g: v for g, v in ious.items() if CLASSES[target["labels"][g] - 1] in near}
        outcomes[d] = "background"
        for kind, of_kind in (("similar_class", similar), ("other_class", ious)):
            g, iou = first_best(of_kind)
            if iou >= b:
                outcomes[d] = kind
                objects[d] = -1 if iou <= t or target["difficult"][g] else g
                break
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


def check_against_the_loop(predictions, targets, num_classes, threshold, background):
    evaluator = evaluate(predictions, targets, num_classes, threshold)
    result = evaluator.compute("all-point")
    analysis = analyze_errors(evaluator.matching(), similar=GROUPS, background_iou=background)
    targets = [{"difficult": np.zeros(len(t["labels"]), bool)} | t for t in targets]
    images = list(zip(predictions, targets, strict=True))
    found = [diagnose(*pair, threshold, background) for pair in images]
    outcomes = [outcome for of_image, _, _ in found for outcome in of_image]
    assert [OUTCOMES[kind] for kind in analysis.kinds] == outcomes
    assert analysis.is_missed.tolist() == [
        g not in of_image
        for (_, _, of_image), target in zip(found, targets, strict=True)
        for g in range(len(target["labels"]))
    ]
    for kind in KINDS:
        repaired = [
            repair(*pair, *of_image[:2], kind) for pair, of_image in zip(images, found, strict=True)
        ]
        mean_ap = evaluate(repaired, targets, num_classes, threshold).compute().mean_ap
        expected = pytest.approx(mean_ap - result.mean_ap, abs=1e-9, nan_ok=True)
        assert analysis.ap_gain[kind] == expected, kind
    assert analysis.mean_ap == pytest.approx(result.mean_ap, abs=1e-12, nan_ok=True)
    check_counts(analysis, result, predictions, outcomes)
    return analysis


def check_counts(analysis, result, predictions, outcomes):
    """Counts of every class and scope from the outcomes and the result."""
    labels = [label for p in predictions for label in p["labels"]]
    scores = [score for p in predictions for score in p["scores"]]
    rows = sorted(zip(scores, labels, outcomes, strict=True), key=lambda row: -row[0])
    for label, (name, point) in enumerate(result.best_f1().items(), start=1):
        own = [(score, outcome) for score, of, outcome in rows if of == label]
        counted = [outcome for _, outcome in own if outcome != "ignored"]
        scopes = {
            "top_n": counted[: result.num_objects[name]],
            "best_f1": [outcome for score, outcome in own if score >= point.score],
            "all": [outcome for _, outcome in own],
        }
        assert tuple(scopes) == SCOPES
        for scope, members in scopes.items():
            counts = {outcome: members.count(outcome) for outcome in OUTCOMES}
            assert analysis.counts[scope][name] == counts


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_cases, st.sampled_from([(0.5, 0.1), (0.5, 0.5), (0.75, 0.25)]))
def test_equals_the_loop(case, thresholds):
    check_against_the_loop(*case, 5, *thresholds)


def test_equals_the_loop_on_a_large_set_with_all_kinds():
    """And what is printed and saved of it."""
    analysis = check_against_the_loop(*random_case(3, 300, 4), 4, 0.5, 0.1)
    assert all(count > 20 for count in analysis.totals("all").values())
    assert all(gain > 0.001 for gain in analysis.ap_gain.values())
    values = json.loads(json.dumps(analysis.as_dict(), allow_nan=False))
    missed = analysis.missed["all"]
    assert values["similar"] == [list(group) for group in GROUPS]
    assert values["ap_gain"] == analysis.ap_gain
    for scope in SCOPES:
        totals, by_class = values["counts"][scope].values()
        assert totals == analysis.totals(scope)
        assert totals == {k: sum(of[k] for of in by_class.values()) for k in OUTCOMES}
    assert values["missed"]["all"] == missed.as_dict()
    assert missed.share == pytest.approx(missed.missed / missed.objects)
    cells = {line.split("  ")[0]: line.split() for line in str(analysis).splitlines() if line}
    assert cells["all"][1:4] == [str(missed.objects), str(missed.missed), f"{missed.share:.1%}"]


# ------------------------------------------------------------------------------- worked by hand

UNIT, FAR = (0, 0, 10, 10), (50, 50, 60, 60)
HALF, QUARTER = (0, 0, 10, 5), (0, 0, 5, 5)  # overlaps of exactly 1/2 and 1/4 with UNIT
LABELS = {"cat": 1, "dog": 2, "cow": 3}


def analyze(*images, **options):
    """Each image is (objects, detections): class, box and what else there is."""
    evaluator = VOCEvaluator(tuple(LABELS))
    for number, (objects, detections) in enumerate(images):
        target = image([o[1] for o in objects], labels=[LABELS[o[0]] for o in objects])
        target["difficult"] = np.array([len(o) > 2 for o in objects], bool)
        target["image_id"] = f"i{number}"
        labels, boxes, scores = zip(*detections, strict=True) if detections else ((), (), ())
        found = image(list(boxes), list(scores), [LABELS[label] for label in labels])
        evaluator.update([found], [target])
    return analyze_errors(evaluator.matching(), **options)


@pytest.mark.parametrize(
    ("label", "box", "options", "kind"),
    [
        ("cat", UNIT, {}, "correct"),
        ("cat", HALF, {}, "localization"),  # the threshold itself is no match
        ("cat", QUARTER, {"background_iou": 0.25}, "localization"),
        ("cat", QUARTER, {"background_iou": 0.26}, "background"),
        ("dog", QUARTER, {"background_iou": 0.25}, "other_class"),
        ("dog", QUARTER, {"similar": [("cat", "dog")]}, "similar_class"),
        ("dog", QUARTER, {"similar": [("dog", "cow")]}, "other_class"),
        ("dog", UNIT, {"similar": [("cat", "dog")]}, "similar_class"),
        ("dog", QUARTER, {"background_iou": 0.26}, "background"),
        ("cat", FAR, {}, "background"),
    ],
)
def test_kinds_at_their_limits(label, box, options, kind):
    analysis = analyze(([("cat", UNIT)], [(label, box, 0.9)]), **({"similar": ()} | options))
    totals = analysis.totals("all")
    assert {name for name, count in totals.items() if count} == {kind}


def test_missed_objects_by_size_and_difficulty():
    sides = {"small": (31.999,), "medium": (32, 95.999), "large": (96, 200)}
    objects = [("cat", (0, 0, side, side)) for of_size in sides.values() for side in of_size]
    hit, low = ("cat", (300, 0, 310, 10), 0.9), ("cat", (400, 0, 410, 10), 0.1)
    objects += [(hit[0], hit[1]), ("cat", low[1]), ("cat", (500, 0, 540, 40), "difficult")]
    blunders = [("cat", (600, 10 * i, 610, 10 * i + 10), 0.5) for i in range(20)]
    difficult_hit = ("cat", (500, 0, 540, 40), 0.2)
    analysis = analyze((objects, [hit, low, difficult_hit, *blunders]))
    assert analysis.best_f1_scores["cat"] == pytest.approx(0.9)
    assert math.isnan(analysis.best_f1_scores["dog"])
    numbers = {
        size: (m.objects, m.missed, m.missed_at_best_f1) for size, m in analysis.missed.items()
    }
    expected = {"small": (3, 1, 2), "medium": (2, 2, 2), "large": (2, 2, 2), "all": (7, 5, 6)}
    assert numbers == expected
    medium = analysis.missed_difficult["medium"]
    assert (medium.objects, medium.share, medium.share_at_best_f1) == (1, 0.0, 1.0)
    assert math.isnan(analysis.missed_difficult["small"].share)


def test_nothing_at_all():
    analysis = analyze_errors(VOCEvaluator(CLASSES).matching())
    assert math.isnan(analysis.mean_ap)
    assert all(math.isnan(gain) for gain in analysis.ap_gain.values())
    assert worst_images(analysis, 5) == []
    assert json.loads(json.dumps(analysis.as_dict(), allow_nan=False))["mean_ap"] is None
    assert "n/a" in str(analysis)


def test_hoiems_groups_are_the_default_for_voc_names_only():
    for classes, groups in (
        (VOC_CLASSES, HOIEM_GROUPS),
        (["dog", "cat"], HOIEM_GROUPS),
        ([*VOC_CLASSES, "truck"], ()),
    ):
        assert analyze_errors(VOCEvaluator(classes).matching()).similar == groups
    named = {name for group in HOIEM_GROUPS for name in group}
    assert named | {"bottle", "pottedplant", "tvmonitor"} == set(VOC_CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_iou": 0.0}, "background_iou is 0.0"),
        ({"background_iou": 0.6}, r"background_iou is 0.6.*0\.5"),
        ({"similar": [("c0", "c1"), ("c0", "mule")]}, r"similar\[1\] has \['mule'\], "),
        ({"similar": ["c0", "c1"]}, r"similar\[0\] is 'c0'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        analyze_errors(VOCEvaluator(CLASSES).matching(), **options)


# ------------------------------------------------------------------------------------ worst images


def test_worst_images_by_hand():
    correct = [("cat", UNIT, 0.9)]
    false = [("cat", (80, 0, 90, 9), 0.95)]
    below = [("cat", (200, 0, 210, 10), 0.05), ("cat", (300, 0, 310, 10), 0.06)]
    images = [
        ([("cat", UNIT)], correct + below),  # no errors shown
        ([("cat", UNIT)], correct + false),  # F1 2/3
        ([("cat", UNIT), ("cat", FAR)], []),  # F1 0, two errors
        ([("cat", UNIT), ("cat", FAR, "difficult")], [*correct, ("cat", FAR, 0.95)]),
        ([], false),  # F1 0, one error
        ([("cat", UNIT), ("cat", FAR)], correct),  # F1 2/3
        ([("cat", UNIT, "difficult")], []),  # nothing is asked of it
        *[([("cat", UNIT)], correct)] * 6,
    ]
    analysis = analyze(*images)
    worst = worst_images(analysis, 10)
    assert [(w.image, w.image_id, w.num_correct, w.num_false, w.num_missed) for w in worst] == [
        (2, "i2", 0, 0, 2),
        (4, "i4", 0, 1, 0),
        (1, "i1", 1, 1, 0),
        (5, "i5", 1, 0, 1),
    ]
    assert [w.f1 for w in worst] == pytest.approx([0, 0, 2 / 3, 2 / 3])
    assert [w.num_errors for w in worst] == [2, 1, 1, 1]
    third = worst[2]
    assert third.outcomes == ("background", "correct")  # by decreasing score
    boxes = analysis.matching.det_boxes[third.detections]
    np.testing.assert_array_equal(boxes, [false[0][1], correct[0][1]])
    assert third.is_missed.tolist() == [False]
    assert worst[3].is_missed.tolist() == [False, True]
    objects = analysis.matching.gt_boxes[worst[3].objects]
    np.testing.assert_array_equal(objects, [UNIT, FAR])
    assert [w.image for w in worst_images(analysis, 1)] == [2]
    with pytest.raises(ValueError, match="num is -1"):
        worst_images(analysis, -1)
