"""Results as files of the VOC devkit and of COCO: written, read and scored again the same."""

import json
import re

import numpy as np
import pytest
import torch
from coco_oracle import (
    CATEGORY_IDS,
    IOU_TYPES,
    as_entries,
    check_by_hand,
    evaluator_of,
    foreign_files,
    full_case,
    uncompressed,
)
from coco_oracle import CLASSES as COCO_CLASSES
from pycocotools import mask as coco_mask
from voc_oracle import devkit_lines, random_case

from detmix.evaluation import encode_masks, read_voc_results, score_predictions, write_voc_results

CLASSES = ("cat", "dog", "hot dog")


# ------------------------------------------------------------------------ files of the VOC devkit


@pytest.mark.parametrize(
    ("seed", "grid", "name"), [(0, None, "{:06d}"), (1, 5, "{}"), (2, 20, "1{:_>9}")]
)
def test_files_are_the_devkits_and_every_digit_comes_back(tmp_path, seed, grid, name):
    """Whatever blanks and numbers the names of images hold."""
    predictions, _ = random_case(seed, 30, 3, grid, levels=20)
    names = [name.format(index).replace("_", " ") for index in range(28)]
    names += ["1 1", f"{names[0]} 0.5 1 2 3 4"]
    paths = write_voc_results(tmp_path / "new", names, predictions, CLASSES, image_set="val")
    expected = [tmp_path / "new" / f"comp4_det_val_{name}.txt" for name in CLASSES]
    assert paths == sorted((tmp_path / "new").iterdir()) == expected
    for path, lines in zip(paths, devkit_lines(CLASSES, names, predictions).values(), strict=True):
        fields = [line.rsplit(" ", 5) for line in path.read_text().splitlines()]
        assert lines == [(image, float(score), [*map(float, box)]) for image, score, *box in fields]

    back = read_voc_results(tmp_path / "new", names, CLASSES, image_set="val")
    for got, wrote in zip(back, predictions, strict=True):
        order = np.argsort(wrote["labels"], kind="stable")  # an image's detections come by class
        for key, values in wrote.items():
            np.testing.assert_array_equal(got[key], values[order])
            assert got[key].dtype == (np.int64 if key == "labels" else np.float64)
    for path in paths:  # the images in any order
        lines = path.read_text().splitlines(keepends=True)
        lines.sort(key=lambda line: line.rsplit(" ", 5)[0], reverse=True)
        path.write_text("".join(lines))
    np.testing.assert_equal(read_voc_results(tmp_path / "new", names, CLASSES), back)


def test_devkit_files_of_other_tools(tmp_path):
    """Also sides that cross by rounding: 1.24 and 1.26, the first one 1-based, with one decimal."""
    (tmp_path / "comp3_det_2012_test_cat.txt").write_bytes(
        b"\xef\xbb\xbfb 0.5 11 21 30 40\r\n\r\n  a\t9e-1 1 1 5.50 7  \r\nb .75 2 2 3 3\r\n"
    )
    (tmp_path / "comp3_det_2012_test_dog.txt").write_text("a 1 3 3 3 3\nc 0.5 2.3 5.3 1.2 4.3\n")
    (tmp_path / "comp3_det_2012_test_hot dog.txt").write_text("\n \n")
    (tmp_path / "comp3_cls_2012_test_cat.txt").write_text("another task")
    (tmp_path / "notes.txt").write_text("nothing of it")
    a, b, c = read_voc_results(tmp_path, ["a", "b", "c"], CLASSES)
    np.testing.assert_array_equal(a["boxes"], [[0, 0, 5.5, 7], [2, 2, 3, 3]])
    assert (a["labels"].tolist(), a["scores"].tolist()) == ([1, 2], [0.9, 1])
    np.testing.assert_array_equal(b["boxes"], [[10, 20, 30, 40], [1, 1, 3, 3]])
    assert (b["labels"].tolist(), b["scores"].tolist()) == ([1, 1], [0.5, 0.75])
    np.testing.assert_allclose(c["boxes"], [[1.3, 4.3, 1.3, 4.3]])
    assert (c["boxes"][:, :2] <= c["boxes"][:, 2:]).all()


SALT = "comp4_8bd1c0de-6f3a-4d5b-9c1e-0123456789ab_det_test_"
PREFIXES = [  # those of the results, those of other files beside them, and the image set asked for
    *[([prefix], [], None) for prefix in ("comp4_det_test_", "comp3_det_2012_test_", SALT)],
    *[([prefix], [], "test") for prefix in ("det_test_", "", "run 7-", "det_", "test_")],
    (["comp4_det_test_"], ["", "comp1_cls_test_", "comp3_det_val_"], "test"),
    ([SALT], ["", "comp1_cls_test_", "my_"], None),
    ([SALT, "comp4_det_test_"], ["x_"], None),
    ([SALT, "comp3_det_test_"], ["comp3_det_val_"], "test"),
    (["", "my_"], [], None),
    ([], ["comp3_det_val_", ""], "test"),
    ([], ["comp3_det_2012_test_", "comp1_cls_test_"], "test"),
    ([], ["comp3_det_test_hot_"], "test"),
    ([], [], None),
]


@pytest.mark.parametrize(("prefixes", "others", "image_set"), PREFIXES)
def test_names_as_other_programs_have_them(tmp_path, prefixes, others, image_set):
    """Darknet's, py-faster-rcnn's with a salt, ssd.pytorch's, detectron2's; no choice of two."""
    classes = ("dog", "hot_dog")
    for prefix in (*prefixes, *others):
        for label, name in enumerate(classes, 1):
            score = f"0.{label}" if prefix in prefixes else "no score"
            (tmp_path / f"{prefix}{name}.txt").write_text(f"a {score} 1 2 3 4\n")
    (tmp_path / "notes_dog.txt").write_text("of one class only")
    (tmp_path / "bulldog.txt").write_text("of another class")
    read = lambda: read_voc_results(tmp_path, ["a"], classes, image_set=image_set)  # noqa: E731
    if len(prefixes) == 1:
        ((found),) = read()
        assert (found["labels"].tolist(), found["scores"].tolist()) == ([1, 2], [0.1, 0.2])
    elif prefixes:
        with pytest.raises(ValueError, match=f"{prefixes[-1]}<class>.*expected one"):
            read()
    else:
        with pytest.raises(FileNotFoundError, match=r"lacks .*dog\.txt;.*such as comp4_det_"):
            read()


BAD_LINES = (
    *("d 0.5 1 2 3 4", "VOC2007/a 0.5 1 2 3 4", "\udcff 0.5 1 2 3 4"),  # no such image
    *("a 0.5 1 2 3", "a 0.5 1 2 3 4 5", "a"),
    *("a 0.5 1 2 3 nan", "a inf 1 2 3 4", "a 0.5 1 2 -inf inf", "a 0.5 1 2 3 4,"),
    *("a 0.5 9 2 3 4", "a 0.5 1 9 3 4"),  # right of its right side, below its lower one
)


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(tmp_path, line):
    paths = write_voc_results(tmp_path, [], [], CLASSES)
    text = f"a 0.5 1 2 3 4\n\n{line}\na 0.5 1 2 3 4\n"
    paths[1].write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"comp4_det_test_dog\.txt.* 3"):
        read_voc_results(tmp_path, ["a", "b"], CLASSES)


def test_folders_without_all_files(tmp_path):
    paths = write_voc_results(tmp_path, [], [], CLASSES, image_set="val")
    assert read_voc_results(tmp_path, [], CLASSES) == []
    paths[1].unlink()
    for folder, image_set, named in (
        (tmp_path, None, "lacks comp4_det_val_dog.txt;"),
        (tmp_path, "test", "comp4_det_test_cat.txt, comp4_det_test_dog.txt"),
        (tmp_path / "nowhere", None, "nowhere"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(named)):
            read_voc_results(folder, ["a"], CLASSES, image_set=image_set)


INSIDE_OUT = {"boxes": [[1, 2, 3, 4], [5, 5, 4.5, 9]], "labels": [1, 1], "scores": [1, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "a"]}, r"names\[1\] is 'a'"),
        ({"names": ["a", "b\nc"]}, r"names\[1\] is 'b\\nc'"),
        ({"names": ["a", " b"]}, r"names\[1\] is ' b'"),
        ({"names": ["a"]}, "2 predictions for 1 names"),
        ({"classes": ["cat", "a/b"]}, "'a/b'"),
        ({"image_set": "../test"}, r"'\.\./test'"),
        ({"predictions": [INSIDE_OUT] * 2}, r"predictions\[0\] \(.*'a'\): boxes\[1\] is \[5"),
        ({"classes": ["cat"]}, r"predictions\[0\] \(image_id 'a'\): labels\[0\] is 3"),
    ],
)
def test_writing_replaces_all_files_or_none(tmp_path, change, message):
    one = {"boxes": np.ones((1, 4)), "labels": [3], "scores": [0.5]}
    good = {"names": ["a", "b"], "predictions": [one, one], "classes": CLASSES}
    paths = write_voc_results(tmp_path, **good)
    before = [path.read_text() for path in paths]
    with pytest.raises(ValueError, match=message):
        write_voc_results(tmp_path, **(good | change))
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == before
    write_voc_results(tmp_path, ["a"], [one], CLASSES)
    assert "".join(path.read_text() for path in paths).count("\n") == 1


# --------------------------------------------------------------------------------- files of COCO


def test_saved_predictions_score_the_same_to_the_last_bit(tmp_path):
    """With crowds and difficult objects."""
    predictions, targets = full_case()
    for target in targets[::2]:
        target["difficult"] = np.arange(len(target["labels"])) % 3 == 0
    evaluator = evaluator_of(predictions, targets, iou_types=IOU_TYPES)
    paths = evaluator.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["predictions.json", "ground_truth.json"]
    for iou_type in IOU_TYPES:
        again = score_predictions(*paths, iou_type=iou_type)
        assert again.as_dict() == evaluator.compute(iou_type).as_dict()
        assert again.ap > 0.05


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
    results, ground_truth = (json.loads(path.read_text()) for path in paths)
    result = score_predictions(*map(str, paths), iou_type=iou_type, backend="pycocotools")
    check_by_hand(result, ground_truth, results, iou_type)
    assert result.ap > 0.05


# ------------------------------------------------------------------------------- run-length masks


def test_all_forms_are_the_same_masks():
    probabilities = np.random.default_rng(1).random((3, 1, 9, 7)).astype(np.float32)
    probabilities[0, 0, 0] = 0.5  # not above it
    inside = probabilities[:, 0] > 0.5
    expected = encode_masks(inside)
    np.testing.assert_array_equal(coco_mask.decode(expected).transpose(2, 0, 1), inside)
    assert json.loads(json.dumps(expected)) == expected
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
def test_broken_run_lengths_are_refused(counts):
    broken = {"size": [60, 80], "counts": counts}
    for wrong in (broken, counts):  # files are read by the same rules
        with pytest.raises(ValueError, match=r"masks\[1\]"):
            encode_masks([{"size": [60, 80], "counts": [4800]}, wrong])
