"""Kinds of errors against a per-detection loop and re-evaluated repairs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou
from voc_oracle import CLASSES, evaluate, random_case, random_cases

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
    """Of an image's detections the outcomes, the objects if repaired, and the objects found."""
    num = len(prediction["scores"])
    outcomes, objects, hits, taken = [""] * num, [-1] * num, [-1] * num, set()
    sides = (torch.from_numpy(record["boxes"]).double() for record in (prediction, target))
    overlaps = box_iou(*sides).nan_to_num().tolist()
    for d in sorted(range(num), key=lambda d: -prediction["scores"][d]):
        label = prediction["labels"][d]
        ious = dict(enumerate(overlaps[d]))
        g, iou = first_best({g: v for g, v in ious.items() if target["labels"][g] == label})
        if iou > t:
            hits[d] = g
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
    return outcomes, objects, hits


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
    for kind in KINDS:
        repaired = [
            repair(*pair, *of_image[:2], kind) for pair, of_image in zip(images, found, strict=True)
        ]
        mean_ap = evaluate(repaired, targets, num_classes, threshold).compute().mean_ap
        expected = pytest.approx(mean_ap - result.mean_ap, abs=1e-9, nan_ok=True)
        assert analysis.ap_gain[kind] == expected, kind
    assert analysis.mean_ap == pytest.approx(result.mean_ap, abs=1e-12, nan_ok=True)
    check_counts(analysis, result, predictions, outcomes)
    check_images(analysis, result, images, found)
    best = [point.score for point in result.best_f1().values()]
    expected = confusion(images, [of for of, _, _ in found], best, threshold)
    np.testing.assert_array_equal(analysis.confusion, expected)
    return analysis


def confusion(images, outcomes, best, t):
    """Truth by prediction, the background last, of the detections that score the best of F1."""
    counts = np.zeros((len(best) + 1, len(best) + 1), int)
    for (prediction, target), of_image in zip(images, outcomes, strict=True):
        scores, labels, difficult = prediction["scores"], prediction["labels"], target["difficult"]
        shown = {d for d, label in enumerate(labels) if scores[d] >= best[label - 1]}
        lost = set(range(len(difficult)))
        sides = (torch.from_numpy(record["boxes"]).double() for record in (prediction, target))
        overlaps = box_iou(*sides).nan_to_num().tolist()
        pairs = [(overlaps[d][g], scores[d], -d, -g) for d in shown for g in lost]
        for iou, _, d, g in sorted(pairs, reverse=True):
            if iou > t and -d in shown and -g in lost:
                shown.remove(-d)
                lost.remove(-g)
                counts[target["labels"][-g] - 1, labels[-d] - 1] += not difficult[-g]
        for d in shown:
            counts[-1, labels[d] - 1] += of_image[d] != "ignored"
        for g in lost:
            counts[target["labels"][g] - 1, -1] += not difficult[g]
    return counts


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


def check_images(analysis, result, images, found):
    """What is missed, by size and difficulty, and the images with errors, the worst first."""
    best = [point.score for point in result.best_f1().values()]
    objects, worst = [], []
    for index, ((prediction, target), (outcomes, _, hits)) in enumerate(
        zip(images, found, strict=True)
    ):
        scores, labels = prediction["scores"], prediction["labels"]
        ranked = np.argsort(-scores, kind="stable").tolist()
        shown = [d for d in ranked if scores[d] >= best[labels[d] - 1]]
        hits_shown, outcomes = [hits[d] for d in shown], tuple(outcomes[d] for d in shown)
        lost = []
        for g, (x1, y1, x2, y2) in enumerate(target["boxes"]):
            late, difficult = g not in hits_shown, bool(target["difficult"][g])
            objects.append(((x2 - x1) * (y2 - y1), difficult, g not in hits, late))
            lost.append(late and not difficult)
        num_correct = outcomes.count("correct")
        num_errors = sum(outcome in KINDS for outcome in outcomes) + sum(lost)
        if num_errors:
            f1 = 2 * num_correct / (2 * num_correct + num_errors)
            boxes = prediction["boxes"][shown].tolist(), target["boxes"].tolist()
            worst.append((f1, -num_errors, index, outcomes, lost, *boxes))
    matching = analysis.matching
    for each, expected in zip(worst_images(analysis, len(images)), sorted(worst), strict=True):
        boxes = matching.det_boxes[each.detections], matching.gt_boxes[each.objects]
        got = (each.f1, -each.num_errors, each.image, each.outcomes, each.is_missed.tolist())
        assert (*got, *(rows.tolist() for rows in boxes)) == expected
    assert len(worst_images(analysis, 1)) == min(len(worst), 1)
    assert [missed for _, _, missed, _ in objects] == analysis.is_missed.tolist()
    limits = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}
    for of_difficulty, by_size in ((False, analysis.missed), (True, analysis.missed_difficult)):
        for size, (low, high) in (limits | {"all": (0, np.inf)}).items():
            own = [
                (missed, late)
                for area, difficult, missed, late in objects
                if difficult == of_difficulty and low <= area < high
            ]
            counts = [len(own), *np.sum(own or [(0, 0)], axis=0)]
            shares = [count / len(own) if own else math.nan for count in counts[1:]]
            expected = counts[0], counts[1], shares[0], counts[2], shares[1]
            got = tuple(by_size[size].as_dict().values())
            np.testing.assert_allclose(got, expected, err_msg=size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_cases, st.sampled_from([(0.5, 0.1), (0.5, 0.5), (0.75, 0.25)]))
def test_equals_the_loop(case, thresholds):
    check_against_the_loop(*case, 5, *thresholds)


def test_equals_the_loop_on_a_large_set_with_all_kinds():
    """And objects of just the sizes where one begins, and what is printed and saved of it."""
    case = random_case(3, 300, 4, grid=32, limit=200)
    analysis = check_against_the_loop(*case, 4, 0.5, 0.1)
    x1, y1, x2, y2 = analysis.matching.gt_boxes.T
    assert {32**2, 96**2} <= set(((x2 - x1) * (y2 - y1)).tolist())
    assert all(count > 20 for count in analysis.totals("all").values())
    assert all(gain > 0.001 for gain in analysis.ap_gain.values())
    values = json.loads(json.dumps(analysis.as_dict(), allow_nan=False))
    missed = analysis.missed["all"]
    assert values["similar"] == [list(group) for group in GROUPS]
    assert values["ap_gain"] == analysis.ap_gain
    names = (*analysis.matching.classes, None)
    confused = {(names[i], names[j]): n for (i, j), n in np.ndenumerate(analysis.confusion) if n}
    assert {(true, found): n for true, found, n in values["confusion"]} == confused
    assert (analysis.confusion > 0).sum() >= 15
    for scope in SCOPES:
        totals, by_class = values["counts"][scope].values()
        assert totals == analysis.totals(scope)
        assert totals == {k: sum(of[k] for of in by_class.values()) for k in OUTCOMES}
    assert values["missed"]["all"] == missed.as_dict()
    cells = {line.split("  ")[0]: line.split() for line in str(analysis).splitlines() if line}
    assert cells["all"][1:4] == [str(missed.objects), str(missed.missed), f"{missed.share:.1%}"]


# ------------------------------------------------------------------- nothing, names, bad arguments


def test_nothing_at_all():
    analysis = analyze_errors(VOCEvaluator(CLASSES).matching())
    with pytest.raises(ValueError, match="num is -1"):
        worst_images(analysis, -1)
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
