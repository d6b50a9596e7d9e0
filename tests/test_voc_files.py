"""The devkit's result files: the devkit's own algorithm reads them, and they read back the same."""

import tempfile
import tracemalloc
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from voc_oracle import devkit_ap, random_case

from detmix.data import VOC_CLASSES, VOCDetection
from detmix.evaluation import COCOEvaluator, VOCEvaluator
from detmix.evaluation.voc_files import read_voc_results, write_voc_results

CLASSES = ("cat", "dog", "hot dog")
INTERPOLATIONS = ("11point", "all-point")


def scores_of(predictions, targets, classes=CLASSES):
    """The results by both interpolations."""
    evaluator = VOCEvaluator(classes)
    for first in range(0, len(targets), 3):
        evaluator.update(predictions[first : first + 3], targets[first : first + 3])
    return [evaluator.compute(interpolation) for interpolation in INTERPOLATIONS]


def check_against_the_devkit(folder, annotations, predictions, targets, classes=CLASSES):
    """AP equals the devkit's from the files, and is the very same once they are read back."""
    names = list(annotations)
    paths = write_voc_results(folder, names, predictions, classes)
    results = scores_of(predictions, targets, classes)
    for result in results:
        expected = [
            devkit_ap(path, annotations, name, result.interpolation)
            for path, name in zip(paths, classes, strict=True)
        ]
        np.testing.assert_allclose(list(result.ap.values()), expected, rtol=0, atol=1e-12)
    back = read_voc_results(folder, names, classes)
    for again, result in zip(scores_of(back, targets, classes), results, strict=True):
        assert again.as_dict() == result.as_dict()
    return results


# ------------------------------------------------------------------------- the devkit's algorithm


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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(annotated_images())
def test_equals_the_devkit(images):
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
        check_against_the_devkit(folder, annotations, predictions, targets)


def continuous(boxes):
    inclusive = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return inclusive - torch.tensor([1.0, 1, 0, 0])


def test_equals_the_devkit_on_real_objects(voc_root, tmp_path):
    """The objects themselves, moved, under wrong names and repeatedly, as the detections."""
    dataset = VOCDetection(voc_root, (("2007", "test"),))
    rng = np.random.default_rng(0)
    annotations, predictions, targets = {}, [], []
    for index in range(400):
        target = dataset.target(index)
        copies = rng.integers(0, len(target["labels"]), rng.integers(0, 12))
        boxes = target["boxes"].numpy()[copies]
        size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        wrong = rng.random(len(copies)) < 0.1
        labels = np.where(wrong, rng.integers(1, 20, len(copies)), target["labels"].numpy()[copies])
        shifts = rng.normal(0, 0.08, boxes.shape) * size
        scores = rng.random(len(copies)).round(1 if index % 2 else 6)
        predictions.append(
            {
                "boxes": (boxes + shifts).astype(np.float32),
                "labels": labels,
                "scores": scores.astype(np.float32),
            }
        )
        targets.append(target)
        name = dataset.names[index].rpartition("/")[2]
        annotations[name] = read_objects(voc_root / f"VOC2007/Annotations/{name}.xml")
    difficult = sum(hard for found in annotations.values() for _, hard, _ in found)
    results = check_against_the_devkit(tmp_path, annotations, predictions, targets, VOC_CLASSES)
    assert difficult > 50
    assert all(0.2 < result.mean_ap < 0.9 for result in results)  # a case that says something


def read_objects(path):
    """An annotation's objects as `devkit_ap` takes them."""
    return [
        (
            item.findtext("name"),
            item.findtext("difficult") == "1",
            [int(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")],
        )
        for item in ET.parse(path).getroot().iter("object")
    ]


# ------------------------------------------------------------------------------ writing and reading


def cases(seed=0, num_images=30, score_levels=5):
    predictions, targets = random_case(seed, num_images, 3, score_levels=score_levels)
    return [f"{index:06d}" for index in range(num_images)], predictions, targets


def test_files_are_those_of_the_devkit(tmp_path):
    predictions = [
        {"boxes": [[0, 0, 10, 20]], "labels": [3], "scores": [0.5]},
        {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)},
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


def test_every_digit_comes_back(tmp_path):
    names, predictions, targets = cases(score_levels=None)
    write_voc_results(tmp_path, names, predictions, CLASSES, image_set="val")
    back = read_voc_results(tmp_path, names, CLASSES, image_set="val")
    assert len(back) == len(names)
    for got, wrote in zip(back, predictions, strict=True):
        order = np.argsort(wrote["labels"], kind="stable")  # an image's detections come by class
        for key, values in wrote.items():
            np.testing.assert_array_equal(got[key], values[order])
            assert got[key].dtype == (np.int64 if key == "labels" else np.float64)
    for again, result in zip(
        scores_of(back, targets), scores_of(predictions, targets), strict=True
    ):
        assert again.as_dict() == result.as_dict()


def test_images_without_detections_and_no_images(tmp_path):
    for names in (["a", "b"], []):
        nothing = [{"boxes": np.zeros((0, 4)), "labels": [], "scores": []} for _ in names]
        write_voc_results(tmp_path, names, nothing, CLASSES)
        back = read_voc_results(tmp_path, names, CLASSES)
        assert [p["boxes"].shape for p in back] == [(0, 4)] * len(names)
    assert np.isnan(scores_of(back, [])[0].mean_ap)


def test_tensors_of_any_float_type(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        boxes = torch.tensor([[0.1, 0.2, 30.3, 40.4]], dtype=dtype, requires_grad=True)
        scores = torch.tensor([0.3], dtype=dtype)
        record = {"boxes": boxes, "labels": torch.tensor([2]), "scores": scores}
        write_voc_results(tmp_path, ["a"], [record], CLASSES)
        (back,) = read_voc_results(tmp_path, ["a"], CLASSES)
        np.testing.assert_allclose(back["boxes"], boxes.detach().double(), rtol=0, atol=1e-15)
        assert back["scores"].item() == scores.item()


def test_files_of_other_tools(tmp_path):
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


def test_any_order_of_lines(tmp_path):
    names, predictions, targets = cases(score_levels=None)
    expected = scores_of(predictions, targets)
    for path in write_voc_results(tmp_path, names, predictions, CLASSES):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(np.random.default_rng(1).permutation(lines)))
    again = scores_of(read_voc_results(tmp_path, names, CLASSES), targets)
    assert [result.as_dict() for result in again] == [result.as_dict() for result in expected]


def test_sides_that_cross_by_rounding(tmp_path):
    """As 1.24 and 1.26, the first one 1-based, become with one decimal."""
    for name in CLASSES:
        line = "a 0.5 2.3 5.3 1.2 4.3\n" if name == "dog" else ""
        (tmp_path / f"comp4_det_test_{name}.txt").write_text(line)
    (found,) = read_voc_results(tmp_path, ["a"], CLASSES)
    np.testing.assert_allclose(found["boxes"], [[1.3, 4.3, 1.3, 4.3]])
    target = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "image_id": 1}
    for evaluator in (VOCEvaluator(CLASSES), COCOEvaluator(CLASSES)):
        evaluator.update([found], [target])


def test_finds_the_image_set(tmp_path):
    classes = ("dog", "hot_dog")
    record = {"boxes": np.ones((2, 4)), "labels": [1, 2], "scores": [0.5, 0.75]}
    write_voc_results(tmp_path, ["a"], [record], classes, image_set="test")
    (only,) = read_voc_results(tmp_path, ["a"], classes)
    assert only["scores"].tolist() == [0.5, 0.75]  # hot_dog is no dog of an image set test_hot
    write_voc_results(tmp_path, ["b"], [record], classes, image_set="val")
    with pytest.raises(ValueError, match=r"comp4_det_test, comp4_det_val; expected one"):
        read_voc_results(tmp_path, ["a"], classes)
    assert len(read_voc_results(tmp_path, ["b"], classes, image_set="val")[0]["scores"]) == 2


def test_writing_again_replaces_the_files(tmp_path):
    names, predictions, _ = cases()
    write_voc_results(tmp_path, names, predictions, CLASSES)
    before = [path.read_text() for path in sorted(tmp_path.iterdir())]
    worse = [predictions[0] | {"labels": predictions[0]["labels"] + 3}, *predictions[1:]]
    with pytest.raises(ValueError, match=r"predictions\[0\] \(image_id '000000'\): labels\[0\] is"):
        write_voc_results(tmp_path, names, worse, CLASSES)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == before
    write_voc_results(tmp_path, names[:1], predictions[:1], CLASSES)
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == len(predictions[0]["labels"])


def test_memory_is_that_of_the_numbers(tmp_path):
    names = ["000001", "000002"]
    line = "000002 0.123456789 100.5 100.25 200.125 200.5\n"
    for name, num in zip(CLASSES, (20000, 20000, 0), strict=True):
        (tmp_path / f"comp4_det_test_{name}.txt").write_text(line * num)
    tracemalloc.start()
    back = read_voc_results(tmp_path, names, CLASSES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(back[1]["scores"]) == 40000
    assert peak < 200 * 40000  # bytes for each line


# ------------------------------------------------------------------------------------------ errors

GOOD_LINE = "a 0.5 1 2 3 4"
BAD_LINES = [
    ("d 0.5 1 2 3 4", r"names the image 'd', expected one of the 2 images"),
    ("VOC2007/a 0.5 1 2 3 4", r"names the image 'VOC2007/a'"),
    ("\udcff 0.5 1 2 3 4", r"names the image '\\udcff'"),
    ("a 0.5 1 2 3", r"has 5 fields, expected 6"),
    ("a 0.5 1 2 3 4 5", r"has 7 fields, expected 6"),
    ("a", r"has 1 fields, expected 6"),
    ("a 0.5 1 2 3 nan", r"holds '0.5 1 2 3 nan', expected five finite numbers"),
    ("a inf 1 2 3 4", r".*expected five finite numbers"),
    ("a 0.5 1 2 -inf inf", r".*expected five finite numbers"),
    ("a 0.5 9 2 3 4", r"holds '0.5 9 2 3 4', expected .*xmin <= xmax"),
    ("a 0.5 1 2 3 4,", r"holds '0.5 1 2 3 4,', expected five finite numbers"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines(tmp_path, line, message):
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    paths = write_voc_results(tmp_path, ["a", "b"], [nothing] * 2, CLASSES)
    text = f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}\n"
    paths[1].write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"comp4_det_test_dog\.txt, line 3: {message}"):
        read_voc_results(tmp_path, ["a", "b"], CLASSES)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_voc_results(tmp_path / "nowhere", ["a"], CLASSES)
    with pytest.raises(FileNotFoundError, match=r"no result files, expected comp4_det_.*_cat.txt"):
        read_voc_results(tmp_path, ["a"], CLASSES)
    (tmp_path / "comp3_det_val_dog.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"comp3_det_val_cat\.txt, comp3_det_val_hot dog"):
        read_voc_results(tmp_path, ["a"], CLASSES)
    with pytest.raises(FileNotFoundError, match=r"no result files, expected comp4_det_test_cat"):
        read_voc_results(tmp_path, ["a"], CLASSES, image_set="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "a"]}, r"names\[1\] is 'a', which came before"),
        ({"names": ["a", "b c"]}, r"names\[1\] is 'b c', expected a name without white space"),
        ({"names": ["", "b"]}, r"names\[0\] is ''"),
        ({"names": [5, 6]}, r"names\[0\] is 5"),
        ({"classes": ["cat", "cat"]}, "cat more than once"),
        ({"names": ["a"]}, "2 predictions for 1 names"),
        ({"classes": ["cat", "a/b"]}, "'a/b', expected what can be part of a file's name"),
        ({"image_set": "../test"}, r"'\.\./test', expected"),
        ({"image_set": ""}, "'', expected"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    good = {"names": ["a", "b"], "predictions": [nothing] * 2, "classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        write_voc_results(tmp_path / "new", **(good | change))
    assert not (tmp_path / "new").exists()
