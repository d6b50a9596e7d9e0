"""The devkit's result files: real objects, image sets, what is replaced, refused and held."""

import numpy as np
import pytest
from voc_oracle import random_case

from detmix.evaluation import COCOEvaluator, VOCEvaluator, read_voc_results, write_voc_results

CLASSES = ("cat", "dog", "hot dog")


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
    names, predictions = [f"{index:06d}" for index in range(30)], random_case(0, 30, 3)[0]
    write_voc_results(tmp_path, names, predictions, CLASSES)
    before = [path.read_text() for path in sorted(tmp_path.iterdir())]
    worse = [predictions[0] | {"labels": predictions[0]["labels"] + 3}, *predictions[1:]]
    with pytest.raises(ValueError, match=r"predictions\[0\] \(image_id '000000'\): labels\[0\] is"):
        write_voc_results(tmp_path, names, worse, CLASSES)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == before
    write_voc_results(tmp_path, names[:1], predictions[:1], CLASSES)
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == len(predictions[0]["labels"])


# ------------------------------------------------------------------------------------------ errors


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_voc_results(tmp_path / "nowhere", ["a"], CLASSES)
    (tmp_path / "comp3_det_val_dog.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"comp3_det_val_cat\.txt"):
        read_voc_results(tmp_path, ["a"], CLASSES)
    with pytest.raises(FileNotFoundError, match="comp4_det_test_cat"):
        read_voc_results(tmp_path, ["a"], CLASSES, image_set="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "a"]}, r"names\[1\] is 'a'"),
        ({"names": ["a", "b c"]}, r"names\[1\] is 'b c'"),
        ({"names": ["a"]}, "2 predictions for 1 names"),
        ({"classes": ["cat", "a/b"]}, "'a/b'"),
        ({"image_set": "../test"}, r"'\.\./test'"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    good = {"names": ["a", "b"], "predictions": [nothing] * 2, "classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        write_voc_results(tmp_path / "new", **(good | change))
    assert not (tmp_path / "new").exists()
