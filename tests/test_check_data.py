"""``tools/check_data.py``: every kind of problem is found, counted and told with file and value."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detmix.data import CocoDetection, VOCDetection, write_shapes_coco
from detmix.data.check import NOTES, PROBLEMS, DataCheck
from detmix.data.check_coco import check_coco
from detmix.data.check_voc import check_voc
from detmix.training.console import run_tool

TOOL = Path(__file__).parents[1] / "tools/check_data.py"
SETS = {"train": [("2007", "trainval")], "test": [("2007", "test")]}


def xml(*objects, size=(60, 40)):
    width, height = size
    items = []
    for name, xmin, ymin, xmax, ymax in objects:
        box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
        items.append(f"<object><name>{name}</name><bndbox>{box}</bndbox></object>")
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{size}{''.join(items)}</annotation>"


GOOD = xml(("dog", 11, 6, 30, 20))


@pytest.fixture
def devkit(tmp_path):
    """Return a function that writes a devkit: annotations by name, and lists of names."""
    folder = tmp_path / "devkit/VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)

    def write(annotations, train=None, test="t\n"):
        for number, (name, text) in enumerate({"t": GOOD, **annotations}.items()):
            rng = np.random.default_rng(number)
            pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.jpg")
            (folder / f"Annotations/{name}.xml").write_text(text)
        train = "\n".join(annotations) if train is None else train
        (folder / "ImageSets/Main/trainval.txt").write_text(train)
        (folder / "ImageSets/Main/test.txt").write_text(test)
        return folder

    return write


def check(folder):
    return check_voc(folder.parent, SETS, classes=("dog",))


def kinds(found):
    return [problem.kind for problem in found.problems]


def test_good_data_is_clean(devkit):
    found = check(devkit({"a": GOOD, "b": GOOD}))
    assert found.is_clean
    assert found.notes == []
    assert dict(found.num_images) == dict(found.num_objects) == {"train": 2, "test": 1}
    assert str(found) == "train: 2 images, 2 objects\ntest: 1 images, 1 objects\n\nno problems"


# Annotations, and the kinds and parts of the messages that they give, in their order.
BAD = {
    "not closed": ("<annotation>", [("unusable annotation", "a.xml: not well-formed XML")]),
    "two objects": (
        xml(("dog", "x", 2, 3, 4), ("dog", 1, 1, 9, 9), ("", 1, 2, 3, 4)),
        [
            ("unusable annotation", "a.xml, object 0 (dog): <xmin> must be a finite number, got"),
            ("unusable annotation", "a.xml, object 2: <name> is missing"),
        ],
    ),
    "class": (xml(("cat", 1, 1, 9, 9)), [("unknown class", "a.xml: 'cat'")]),
    "size": (xml(size=(40, 60)), [("another size", "a.jpg: the image is 60 x 40 pixels, but")]),
    "turned": (xml(size=(40, 60)), [("another size", "EXIF orientation")]),
    "outside": (
        xml(("dog", 61, 1, 70, 9)),
        [("box without area", "xmin, ymin, xmax, ymax = 61, 1, 70, 9 in 60 x 40 pixels")],
    ),
    "turned around": (xml(("dog", 30, 6, 11, 20)), [("box without area", "= 30, 6, 11, 20 in")]),
    "beyond": (xml(("dog", 0, -5, 1e9, 9)), [("box beyond the image", "= 0, -5, 1e+09, 9 in")]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations(devkit, name):
    text, expected = BAD[name]
    found = check(devkit({"a": text, "b": GOOD}))
    assert kinds(found) == [kind for kind, _ in expected]
    for problem, (kind, part) in zip(found.problems, expected, strict=True):
        assert part in problem.message
        assert problem.subset == "train"
        assert kind in PROBLEMS
    assert not found.is_clean


def test_bad_and_missing_images(devkit):
    folder = devkit({name: GOOD for name in "abcde"})
    images = folder / "JPEGImages"
    (images / "a.jpg").unlink()
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:400])
    (images / "c.jpg").write_bytes(b"")
    (folder / "Annotations/d.xml").unlink()
    shutil.copy(images / "t.jpg", images / "e.jpg")
    found = check(folder)
    assert [(p.kind, p.subset) for p in found.problems] == [
        ("missing file", "train"),
        ("unusable image", "train"),
        ("unusable image", "train"),
        ("missing file", "train"),
        ("in train and test", "test"),
    ]
    for problem, name in zip(
        found.problems, ("a.jpg", "b.jpg", "c.jpg", "d.xml", "e.jpg"), strict=True
    ):
        assert name in problem.message
    assert found.notes == []


def test_lists(devkit):
    folder = devkit({"a": GOOD, "b": GOOD}, train="a\nb\na\nt\n../a\nb 7\n\n", test="t\nb\n")
    found = check(folder)
    assert kinds(found) == [
        "name that leads outside", "unusable list", "listed twice",
        "in train and test", "in train and test",
    ]  # fmt: skip
    assert "line 5: expected an image id, got '../a'" in found.problems[0].message
    assert "line 6: " in found.problems[1].message
    assert "image 'a' is listed twice" in found.problems[2].message
    assert dict(found.num_images) == {"train": 3, "test": 2}
    (folder / "ImageSets/Main/test.txt").write_bytes(b"\xff")
    (folder / "ImageSets/Main/trainval.txt").unlink()
    assert kinds(check(folder)) == ["missing file", "unusable list"]
    (folder / "ImageSets/Main/trainval.txt").write_text("\n")
    assert kinds(check(folder))[0] == "unusable list"
    twice = {"train": [*SETS["train"], *SETS["train"]]}
    devkit({"a": GOOD})
    assert kinds(check_voc(folder.parent, twice, classes=("dog",))) == ["listed twice"]


def test_no_data_at_all(tmp_path):
    found = check_voc(tmp_path / "nowhere", SETS)
    assert kinds(found) == ["missing file", "missing file"]
    assert "nowhere: there is no such folder" in str(found)


def test_what_is_worth_a_look_is_no_problem(devkit):
    tiny = xml(("dog", 1, 1, 1, 9), ("dog", 5, 5, 20, 20), ("dog", 5, 5, 20, 20))
    folder = devkit({"a": tiny, "b": xml(), "c": GOOD})
    shutil.copy(folder / "JPEGImages/a.jpg", folder / "JPEGImages/c.jpg")
    found = check_voc(folder.parent, SETS, classes=("dog", "cow"))
    assert found.is_clean
    assert [(note.kind, note.subset) for note in found.notes] == [
        ("tiny box", "train"),
        ("same object twice", "train"),
        ("image without objects", "train"),
        ("same picture twice", "train"),
        ("class without objects", "train"),
    ]
    assert found.notes[-1].message == "cow"
    assert {note.kind for note in found.notes} <= NOTES.keys()


def test_few_of_many_are_shown():
    found = DataCheck(())
    for number in range(25):
        found.add("unknown class", "train", f"{number}.xml: 'cat'")
    assert "unknown class (25): not among the classes" in str(found)
    assert "19.xml" in str(found)
    assert "20.xml" not in str(found)
    assert "... and 5 more" in str(found)
    assert "24.xml" in found.describe()
    assert "more" not in found.describe()
    assert found.describe(1).count(".xml") == 1


@pytest.fixture
def coco(tmp_path):
    return write_shapes_coco(tmp_path / "coco", num_train=10, num_test=3, image_size=64)


def check_shapes(root, **options):
    return check_coco(
        {
            "train": (root / "train2017", root / "annotations/instances_train2017.json"),
            "test": (root / "val2017", root / "annotations/instances_val2017.json"),
        },
        **options,
    )


class TestCoco:
    def test_good_data_is_clean(self, coco):
        found = check_shapes(coco, masks=True, keypoints=True)
        assert found.is_clean, found
        assert dict(found.num_images) == {"train": 10, "test": 3}
        dataset = CocoDetection(coco / "train2017", coco / "annotations/instances_train2017.json")
        assert found.num_objects["train"] == dataset.report.num_objects

    def test_every_problem_is_found(self, coco):
        path = coco / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        images, objects = content["images"], content["annotations"]
        names = [entry["file_name"] for entry in images]
        folder = coco / "train2017"
        images[0]["width"] = "x"
        images[1]["file_name"] = "../b.jpg"
        objects[:] = [item for item in objects if item["image_id"] != images[1]["id"]]
        (folder / names[2]).unlink()
        (folder / names[3]).write_bytes(b"\xff\xd8")
        images[4]["file_name"] = names[5]
        images[6]["height"] += 1
        first = {item["image_id"]: item for item in reversed(objects)}
        first[images[7]["id"]]["bbox"] = [1, 2, None, 4]
        first[images[8]["id"]]["bbox"] = [500, 2, 7, 4]
        first[images[8]["id"]]["segmentation"] = {"size": [1, 1], "counts": [1]}
        first[images[9]["id"]]["category_id"] = 99
        objects.append({**objects[0], "id": 10**6, "image_id": 10**6})
        path.write_text(json.dumps(content))
        (coco / "annotations/instances_val2017.json").write_text("[]")
        found = check_shapes(coco, masks=True)
        messages = {
            kind: [p.message for p in found.problems if p.kind == kind] for kind in kinds(found)
        }
        assert sorted(messages) == sorted([
            "unusable annotation", "name that leads outside", "missing file", "unusable image",
            "listed twice", "another size", "box without area", "unusable list",
        ])  # fmt: skip
        assert "'../b.jpg'" in messages["name that leads outside"][0]
        assert names[2] in messages["missing file"][0]
        assert names[3] in messages["unusable image"][0]
        assert names[5] in messages["listed twice"][0]
        assert any(names[6] in message for message in messages["another size"])
        assert "bbox = 500, 2, 7, 4 in" in messages["box without area"][0]
        assert "instances_val2017.json: expected an object" in messages["unusable list"][0]
        parts = ("width must be", "bbox must be", "category_id must be", "image_id must be", "RLE")
        for part in parts:
            assert any(part in message for message in messages["unusable annotation"]), part

    def test_missing_files_and_classes(self, coco):
        shutil.rmtree(coco / "val2017")
        found = check_shapes(coco, classes=("circle", "unicorn"))
        assert kinds(found).count("unknown class") == 2
        assert any("there is no such folder of images" in p.message for p in found.problems)
        assert kinds(found).count("missing file") == 1 + 3
        (coco / "annotations/instances_val2017.json").unlink()
        assert "missing file" in kinds(check_shapes(coco))


def test_it_finds_what_the_data_sets_find(devkit):
    """Boxes that the data set clips or drops, and no others, are reported."""
    rng = np.random.default_rng(0)
    texts = {}
    for name in "abcdefgh":
        corners = rng.integers(-10, 75, (6, 4)).tolist()
        texts[name] = xml(*(("dog", *corner) for corner in corners))
    texts["i"] = xml(("dog", 61, 1, 70, 9))
    folder = devkit(texts)
    with pytest.warns(UserWarning, match="boxes were"):
        report = VOCDetection(folder.parent, classes=("dog",)).report
    found = check_voc(folder.parent, {"train": SETS["train"]}, classes=("dog",))
    assert found.num_objects["train"] == report.num_objects
    notes = [note.message for note in found.notes if note.kind == "image without objects"]
    assert len(notes) == report.num_empty_images > 0
    assert str(folder / "JPEGImages/i.jpg") in notes
    assert kinds(found).count("box without area") == report.num_without_area > 0
    assert kinds(found).count("box beyond the image") == report.num_clipped > 0


class TestTool:
    @pytest.fixture
    def run(self, capsys):
        main = runpy.run_path(str(TOOL))["main"]

        def run(*args):
            try:
                code = run_tool(main, [str(arg) for arg in args])
            except SystemExit as stop:
                code = stop.code
            return code, *capsys.readouterr()

        return run

    def test_exit_codes_and_text(self, run, devkit):
        folder = devkit({"a": GOOD, "b": xml(("cat", 1, 1, 9, 9))})
        options = ("--data.root", folder.parent, "--data.classes")
        code, out, _ = run(*options, '["dog", "cat"]')
        assert code == 0
        assert "no problems" in out
        code, out, _ = run(*options, '["dog"]')
        assert code == 1
        assert re.search(r"unknown class \(1\): .*\n  .*b\.xml: 'cat'\n", out)
        code, _, err = run(*options, "5")
        assert code == 2
        assert "error: " in err
        for wrong in ("x", "-1", "1.5", "9" * 5000):
            code, _, err = run(f"--show={wrong}")
            assert code == 2
            assert f"--show: must be a whole number, not negative, got '{wrong}'" in err

    def test_json_and_config(self, run, devkit, tmp_path):
        folder = devkit({"a": GOOD, "b": xml(("cat", 1, 1, 9, 9)), "c": xml(("cat", 1, 1, 9, 9))})
        path = tmp_path / "config.yaml"
        path.write_text(f"data: {{root: {folder.parent}, classes: [dog]}}\n")
        code, out, _ = run("--config", path, "--json")
        found = json.loads(out)
        assert code == 1
        assert found["num_images"] == {"train": 3, "test": 1}
        assert found["num_problems"] == len(found["problems"]) == 2
        assert found["problems"][0]["kind"] == "unknown class"
        assert found["problems"][0]["subset"] == "train"
        _, out, _ = run("--config", path, "--show", "1")
        assert "... and 1 more" in out
        _, out, _ = run("--config", path, "--show", "0")
        assert "more" not in out

    def test_coco(self, run, coco):
        code, out, _ = run(
            "--data.format=coco", f"--data.root={coco}", "--detector.name=keypointrcnn"
        )
        assert code == 0, out
        assert "train: 10 images" in out
        options = ("--detector.name=keypointrcnn", "--data.num_keypoints=17")
        code, out, _ = run("--data.format=coco", f"--data.root={coco}", *options)
        assert code == 1
        assert "names 4 keypoints for each object, expected 17" in out


@pytest.mark.slow
def test_real_data_is_clean(voc_root):
    found = check_voc(voc_root, {"test": [("2007", "test")]})
    assert found.is_clean
    assert found.num_images["test"] == 2000
    assert found.num_objects["test"] == VOCDetection(voc_root, SETS["test"]).report.num_objects
