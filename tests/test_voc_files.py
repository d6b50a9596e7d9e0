"""The devkit's result files: real objects, image sets, what is replaced, refused and held."""

import tracemalloc
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from voc_oracle import check_against_the_devkit, random_case

from detmix.data import VOC_CLASSES, VOCDetection
from detmix.evaluation import COCOEvaluator, VOCEvaluator, read_voc_results, write_voc_results

CLASSES = ("cat", "dog", "hot dog")


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


def test_tensors_of_any_float_type(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        boxes = torch.tensor([[0.1, 0.2, 30.3, 40.4]], dtype=dtype, requires_grad=True)
        scores = torch.tensor([0.3], dtype=dtype)
        record = {"boxes": boxes, "labels": torch.tensor([2]), "scores": scores}
        write_voc_results(tmp_path, ["a"], [record], CLASSES)
        (back,) = read_voc_results(tmp_path, ["a"], CLASSES)
        np.testing.assert_allclose(back["boxes"], boxes.detach().double(), rtol=0, atol=1e-15)
        assert back["scores"].item() == scores.item()


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
