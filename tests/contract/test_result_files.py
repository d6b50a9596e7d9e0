"""Results as files of the VOC devkit and of COCO: written, read and scored again the same."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_oracle import (
    CATEGORY_IDS,
    IOU_TYPES,
    as_entries,
    by_hand,
    decode,
    evaluator_of,
    foreign_files,
    full_case,
    only,
    uncompressed,
)
from coco_oracle import CLASSES as COCO_CLASSES
from hypothesis import given, settings
from hypothesis import strategies as st
from voc_oracle import check_against_the_devkit, guesses, loop_ap, random_case, results_of

from detmix.data import SHAPE_CLASSES, VOCDetection
from detmix.evaluation import (
    COCOEvaluator,
    VOCEvaluator,
    analyze_errors,
    encode_masks,
    read_voc_results,
    score_predictions,
    write_voc_results,
)

CLASSES = ("cat", "dog", "hot dog")
NOTHING = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}


# ------------------------------------------------------------------------ files of the VOC devkit


def inclusive_boxes(largest):
    """Boxes in whole pixels from 1 on, both ends included, down to a single pixel."""
    pair = st.tuples(st.integers(1, largest), st.integers(1, largest)).map(sorted)
    return st.tuples(pair, pair).map(lambda xy: [xy[0][0], xy[1][0], xy[0][1], xy[1][1]])


@st.composite
def annotated_images(draw):
    """For each image its objects as an annotation has them, and detections.

    Few places, scores and classes: overlaps and scores are often equal (also to the threshold),
    objects found repeatedly.
    """
    images = []
    label = st.integers(1, draw(st.integers(1, 3)))  # there may be classes without objects
    for _ in range(draw(st.integers(1, 5))):
        objects = draw(st.lists(st.tuples(label, st.booleans(), inclusive_boxes(4)), max_size=4))
        anything = st.tuples(st.integers(1, 3), inclusive_boxes(4))
        known = st.sampled_from([(k, box) for k, _, box in objects]) if objects else anything
        wider = known.map(lambda found: (found[0], [*found[1][:3], found[1][3] + 1]))
        score = st.sampled_from([0.1, 0.5, 0.7, 1.0])
        found = st.lists(st.tuples(score, st.one_of(known, wider, anything)), max_size=6)
        images.append((objects, draw(found)))
    return images


def continuous(boxes):
    inclusive = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return inclusive - torch.tensor([1.0, 1, 0, 0])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(annotated_images())
def test_the_devkits_own_algorithm_finds_the_same_in_the_files(images):
    annotations, predictions, targets = {}, [], []
    for index, (objects, found) in enumerate(images):
        annotations[f"{index:06d}"] = [(CLASSES[k - 1], hard, box) for k, hard, box in objects]
        predictions.append(
            {
                "boxes": continuous([box for _, (_, box) in found]),
                "labels": torch.tensor([k for _, (k, _) in found], dtype=torch.int64),
                "scores": torch.tensor([score for score, _ in found]),
            }
        )
        targets.append(
            {
                "boxes": continuous([box for _, _, box in objects]),
                "labels": torch.tensor([k for k, _, _ in objects], dtype=torch.int64),
                "difficult": torch.tensor([hard for _, hard, _ in objects], dtype=torch.bool),
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        check_against_the_devkit(folder, annotations, predictions, targets, CLASSES)


def test_devkit_files_to_the_letter(tmp_path):
    predictions = [
        {"boxes": [[0, 0, 10, 20]], "labels": [3], "scores": [0.5]},
        NOTHING,
        {"boxes": [[1.5, 2, 3, 4], [0, 1, 2, 3]], "labels": [1, 3], "scores": [0.25, 1e-7]},
    ]
    paths = write_voc_results(tmp_path / "new", ["000005", "a", "b"], predictions, CLASSES)
    names = [f"comp4_det_test_{name}.txt" for name in CLASSES]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    assert [path.read_text() for path in paths] == [
        "b 0.25 2.5 3.0 3.0 4.0\n",
        "",
        "000005 0.5 1.0 1.0 10.0 20.0\nb 1e-07 1.0 2.0 2.0 3.0\n",
    ]


def test_every_digit_comes_back_from_lines_in_any_order(tmp_path):
    predictions, targets = random_case(0, 30, 3)
    names = [f"{index:06d}" for index in range(30)]
    expected = [result.as_dict() for result in results_of(predictions, targets, CLASSES)]
    paths = write_voc_results(tmp_path, names, predictions, CLASSES, image_set="val")
    back = read_voc_results(tmp_path, names, CLASSES, image_set="val")
    for got, wrote in zip(back, predictions, strict=True):
        order = np.argsort(wrote["labels"], kind="stable")  # an image's detections come by class
        for key, values in wrote.items():
            np.testing.assert_array_equal(got[key], values[order])
            assert got[key].dtype == (np.int64 if key == "labels" else np.float64)
    assert [result.as_dict() for result in results_of(back, targets, CLASSES)] == expected
    for path in paths:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(np.random.default_rng(1).permutation(lines)))
    back = read_voc_results(tmp_path, names, CLASSES)
    assert [result.as_dict() for result in results_of(back, targets, CLASSES)] == expected


@pytest.mark.parametrize("names", [["a", "b"], []])
def test_images_without_detections_and_no_images(tmp_path, names):
    write_voc_results(tmp_path, names, [NOTHING] * len(names), CLASSES)
    back = read_voc_results(tmp_path, names, CLASSES)
    assert [p["boxes"].shape for p in back] == [(0, 4)] * len(names)


def test_devkit_files_of_other_tools(tmp_path):
    (tmp_path / "comp3_det_2012_test_cat.txt").write_bytes(
        b"\xef\xbb\xbfb 0.5 11 21 30 40\r\n\r\n  a\t9e-1 1 1 5.50 7  \r\nb .75 2 2 3 3\r\n"
    )
    (tmp_path / "comp3_det_2012_test_dog.txt").write_text("a 1 3 3 3 3")
    (tmp_path / "comp3_det_2012_test_hot dog.txt").write_text("\n \n")
    (tmp_path / "comp3_cls_2012_test_cat.txt").write_text("another task")
    (tmp_path / "notes.txt").write_text("nothing of it")
    a, b, c = read_voc_results(tmp_path, ["a", "b", "c"], CLASSES)
    np.testing.assert_array_equal(a["boxes"], [[0, 0, 5.5, 7], [2, 2, 3, 3]])
    assert (a["labels"].tolist(), a["scores"].tolist()) == ([1, 2], [0.9, 1])
    np.testing.assert_array_equal(b["boxes"], [[10, 20, 30, 40], [1, 1, 3, 3]])
    assert (b["labels"].tolist(), b["scores"].tolist()) == ([1, 1], [0.5, 0.75])
    assert len(c["scores"]) == 0


BAD_LINES = (
    *("d 0.5 1 2 3 4", "VOC2007/a 0.5 1 2 3 4", "\udcff 0.5 1 2 3 4"),  # no such image
    *("a 0.5 1 2 3", "a 0.5 1 2 3 4 5", "a"),
    *("a 0.5 1 2 3 nan", "a inf 1 2 3 4", "a 0.5 1 2 -inf inf", "a 0.5 1 2 3 4,"),
    "a 0.5 9 2 3 4",  # right of its right side
)


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(tmp_path, line):
    paths = write_voc_results(tmp_path, ["a", "b"], [NOTHING] * 2, CLASSES)
    text = f"a 0.5 1 2 3 4\n\n{line}\na 0.5 1 2 3 4\n"
    paths[1].write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"comp4_det_test_dog\.txt.* 3"):
        read_voc_results(tmp_path, ["a", "b"], CLASSES)


# --------------------------------------------------------------------------------- files of COCO


@pytest.fixture
def saved(tmp_path):
    """An evaluator with crowds and difficult objects, boxes, masks and keypoints; its files."""
    predictions, targets = full_case()
    for target in targets[::2]:
        target["difficult"] = np.arange(len(target["labels"])) % 3 == 0
    evaluator = evaluator_of(predictions, targets, iou_types=IOU_TYPES)
    return evaluator, evaluator.save(tmp_path / "new" / "folder")


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_saved_predictions_score_the_same_to_the_last_bit(saved, iou_type):
    evaluator, paths = saved
    assert [path.name for path in paths] == ["predictions.json", "ground_truth.json"]
    again = score_predictions(*paths, iou_type=iou_type)
    assert again.as_dict() == evaluator.compute(iou_type).as_dict()
    assert again.ap > 0.05


def test_any_program_reads_the_saved_files(saved):
    evaluator, paths = saved
    results, ground_truth = (json.loads(path.read_text()) for path in paths)
    stats, _ = by_hand(ground_truth, only(results, "bbox"))
    result = evaluator.compute("bbox")
    assert {name: getattr(result, name) for name in stats} == pytest.approx(stats, abs=1e-12)


def test_what_is_saved(tmp_path):
    predictions, targets = full_case(num_images=4)
    targets[0]["file_name"] = "one.jpg"
    paths = evaluator_of(predictions, targets, iou_types=IOU_TYPES).save(tmp_path)
    saved, ground_truth = (json.loads(path.read_text()) for path in paths)
    expected, results = as_entries(predictions, targets, CATEGORY_IDS, COCO_CLASSES)
    expected["images"][0]["file_name"] = "one.jpg"
    assert saved == results
    for part in ("categories", "annotations", "images"):
        assert ground_truth[part] == expected[part]


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_foreign_files_score_as_pycocotools_says(tmp_path, iou_type):
    """Polygons, crowds as uncompressed runs."""
    paths = foreign_files(tmp_path, iou_type)
    before = [path.read_bytes() for path in paths]
    results, ground_truth = map(json.loads, before)
    stats, by_class = by_hand(ground_truth, results, iou_type)
    result = score_predictions(*map(str, paths), iou_type=iou_type, backend="pycocotools")
    np.testing.assert_array_equal([getattr(result, name) for name in stats], [*stats.values()])
    assert result.ap > 0.05
    for name, category in zip(COCO_CLASSES, CATEGORY_IDS, strict=True):
        pair = result.ap_by_class[name], result.ap50_by_class[name]
        np.testing.assert_array_equal(pair, by_class[category])
    assert [path.read_bytes() for path in paths] == before


# ------------------------------------------------------------------------------- run-length masks


def test_encoded_masks_are_pycocotools_and_json():
    masks = np.random.default_rng(0).random((4, 13, 17)) < 0.5
    encoded = encode_masks(masks)
    np.testing.assert_array_equal(decode(encoded).transpose(2, 0, 1), masks)
    assert json.loads(json.dumps(encoded)) == encoded


def test_all_forms_are_the_same_masks():
    probabilities = np.random.default_rng(1).random((3, 1, 9, 7)).astype(np.float32)
    probabilities[0, 0, 0] = 0.5  # not above it
    inside = probabilities[:, 0] > 0.5
    expected = encode_masks(inside)
    forms = [
        probabilities,
        torch.tensor(probabilities).requires_grad_(),
        torch.tensor(probabilities).double(),
        torch.tensor(inside).to(torch.uint8) * 255,
        inside.astype(np.int64)[:, None],
        expected,
        [{**rle, "counts": rle["counts"].encode()} for rle in expected],
        [{"size": [9, 7], "counts": uncompressed(mask)} for mask in inside],
    ]
    for form in forms:
        assert encode_masks(form) == expected
    assert encode_masks(torch.zeros(0, 1, 5, 5)) == encode_masks([]) == []


# Given to pycocotools they are a score of 0, or an evaluation that never ends.
BROKEN_COUNTS = (
    *("R1oooo", "0PPPP", "", "11", "hello world", "é", "\ud800"),
    *(["a", 3], [4801, -1], [4799], [4800.0], None, 7),
)


@pytest.mark.parametrize("counts", BROKEN_COUNTS)
def test_broken_run_lengths_are_refused(tmp_path, counts):
    broken = {"size": [60, 80], "counts": counts}
    with pytest.raises(ValueError, match=r"masks\[1\]"):
        encode_masks([{"size": [60, 80], "counts": [4800]}, broken])

    def change(ground_truth, results):
        entries = results if part == "predictions" else ground_truth["annotations"]
        entries[1]["segmentation"] = broken

    for part, name in (("predictions", "p"), ("annotations", "gt")):
        files = foreign_files(tmp_path, "segm", change)
        message = rf"{name}\.json.*{part}\[1\].*{re.escape(repr(broken))}"
        with pytest.raises(ValueError, match=message):
            score_predictions(*files, iou_type="segm")


# ---------------------------------------------------------------------------- tools/evaluate.py

EVALUATE = Path(__file__).parents[2] / "tools" / "evaluate.py"


def evaluate_tool(*args):
    command = [sys.executable, *map(str, (EVALUATE, *args))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_tool_scores_devkit_files_of_several_image_sets(shapes_root, tmp_path):
    """The same image names in two years, and two splits of one year."""
    sets = (("2007", "test"), ("2012", "test"), ("2007", "trainval"))
    for year in ("2007", "2012"):
        (tmp_path / f"VOC{year}").symlink_to(shapes_root / "VOC2007")
    predictions, targets = [], []
    for seed, (year, split) in enumerate(sets):
        dataset = VOCDetection(tmp_path, [(year, split)], classes=SHAPE_CLASSES)
        names = [name.rpartition("/")[2] for name in dataset.names]
        found = guesses(dataset, seed)
        folder = tmp_path / "results" / f"VOC{year}" / "Main"
        write_voc_results(folder, names, found, SHAPE_CLASSES, image_set=split)
        predictions += found
        targets += [dataset.target(index) for index in range(len(dataset))]
    options = ("--data.root", tmp_path, "--data.test", json.dumps(sets))
    options += ("--data.classes", f"[{', '.join(SHAPE_CLASSES)}]", "--save", tmp_path)
    printed = evaluate_tool(tmp_path / "results", *options)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_images"] == len(targets) == 40

    targets = [target | {"image_id": index} for index, target in enumerate(targets)]
    voc, coco = VOCEvaluator(SHAPE_CLASSES), COCOEvaluator(SHAPE_CLASSES)
    for evaluator in (voc, coco):
        evaluator.update(predictions, targets)
    arrays = [{k: np.asarray(v) for k, v in t.items() if k != "image_id"} for t in targets]
    for key, interpolation in (("voc", "all-point"), ("voc07", "11point")):
        expected = loop_ap(predictions, arrays, len(SHAPE_CLASSES), 0.5, interpolation)
        assert list(results[key]["ap"].values()) == pytest.approx(expected, abs=1e-9)
        assert results[key]["ap"] == pytest.approx(voc.compute(interpolation).ap, abs=1e-9)
        assert 0.1 < results[key]["mean_ap"] < 0.9
        assert f"{results[key]['mean_ap']:.4f}" in printed
    ap = coco.compute().ap
    assert results["coco"]["bbox"]["ap"] == pytest.approx(ap, abs=1e-9)
    assert f"{ap:.4f}" in printed
    counts = analyze_errors(voc.matching()).totals("all")
    assert results["errors"]["counts"]["all"]["total"] == counts


def test_tool_scores_coco_files(shapes_root, tmp_path):
    dataset = VOCDetection(shapes_root, [("2007", "test")], classes=SHAPE_CLASSES)
    evaluator = COCOEvaluator(SHAPE_CLASSES)
    evaluator.update(guesses(dataset), [dataset.target(index) for index in range(len(dataset))])
    predictions, ground_truth = evaluator.save(tmp_path)
    printed = evaluate_tool(predictions, "--annotations", ground_truth)
    assert printed.strip() == str(evaluator.compute())
    assert 0.1 < evaluator.compute().ap < 0.9
