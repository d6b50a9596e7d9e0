"""``on_error="skip"``: bad images are left out of training, told and counted, always the same."""

from __future__ import annotations

import errno
import json
import re
import socket
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from PIL import Image
from runs import assert_same_run
from tiny import tiny_config

from detmix.data import SHAPE_CLASSES, CocoDetection, VOCDetection, write_shapes, write_shapes_coco
from detmix.training import DetectorTrainer

NUM = 8


class Voc:
    def __init__(self, folder):
        self.root = write_shapes(folder, num_train=NUM, num_test=2, image_size=64)
        self.split = self.root / "VOC2007/ImageSets/Main/trainval.txt"
        self.names = self.split.read_text().split()
        self.images = [self.root / f"VOC2007/JPEGImages/{name}.jpg" for name in self.names]
        self.xml = [self.root / f"VOC2007/Annotations/{name}.xml" for name in self.names]

    def open(self, **options):
        return VOCDetection(self.root, classes=SHAPE_CLASSES, **options)

    def named(self, index):
        """How an error names an image or its annotation."""
        return f"{self.names[index]}.(jpg|xml)"

    def rename(self, index, name):
        self.split.write_text("\n".join([*self.names[:index], name, *self.names[index + 1 :]]))

    def drop_size(self, index):
        self.change_xml(index, "<size>.*</size>", "")

    def change_xml(self, index, old, new):
        text = re.sub(old, new, self.xml[index].read_text(), flags=re.DOTALL)
        self.xml[index].write_text(text)


class Coco:
    def __init__(self, folder):
        self.root = write_shapes_coco(folder, num_train=NUM, num_test=2, image_size=64)
        self.path = self.root / "annotations/instances_train2017.json"
        content = json.loads(self.path.read_text())
        self.names = [item["file_name"] for item in content["images"]]
        self.images = [self.root / "train2017" / name for name in self.names]

    def open(self, **options):
        return CocoDetection(self.root / "train2017", self.path, **options)

    def named(self, index):
        return f"{self.names[index]}|{self.path}, (image {index + 1}|annotation)"

    @contextmanager
    def content(self):
        content = json.loads(self.path.read_text())
        yield content
        self.path.write_text(json.dumps(content))

    def change_image(self, index, **fields):
        with self.content() as content:
            content["images"][index] |= fields

    def change_object(self, index, **fields):
        """Change the first object of an image; each image of these has one."""
        with self.content() as content:
            image_id = content["images"][index]["id"]
            item = next(a for a in content["annotations"] if a["image_id"] == image_id)
            item |= fields

    def rename(self, index, name):
        self.change_image(index, file_name=name)

    def drop_size(self, index):
        self.change_image(index, width=None)


def truncate(data, index):
    data.images[index].write_bytes(data.images[index].read_bytes()[:300])


def remove(data, index):
    data.images[index].unlink()


def resize(data, index):
    Image.new("RGB", (9, 9)).save(data.images[index])


UNKNOWN = ("<name>.*?</name>", "<name>unicorn</name>")
# What is done to the images 1, 2, ..., and what it is called.
DAMAGES = {
    Voc: [
        (truncate, "unusable image"),
        (remove, "missing file"),
        (lambda data, index: data.xml[index].unlink(), "missing file"),
        (lambda data, index: data.xml[index].write_text("<annotation>"), "unusable annotation"),
        (lambda data, index: data.change_xml(index, *UNKNOWN), "unusable annotation"),
        (resize, "unusable image"),
    ],
    Coco: [
        (truncate, "unusable image"),
        (remove, "missing file"),
        (lambda data, i: data.change_object(i, bbox=[1, 2, "x", 4]), "unusable annotation"),
        (lambda data, i: data.change_image(i, width=-5), "unusable annotation"),
        (resize, "unusable image"),
        (
            lambda data, i: data.change_object(i, segmentation={"size": [3, 3], "counts": [1]}),
            "unusable annotation",
        ),
    ],
}
FORMATS = pytest.mark.parametrize("form", [Voc, Coco])


@pytest.fixture
def make(tmp_path):
    return lambda form: form(tmp_path / "data")


@FORMATS
class TestDatasets:
    @pytest.mark.parametrize("masks", [False, True])
    def test_bad_images_are_left_out_and_told_once(self, make, form, masks):
        data, options = make(form), {"masks": masks} if form is Coco else {}
        whole, damages = data.open(**options), DAMAGES[form]
        for index, (damage, _) in enumerate(damages, 1):
            damage(data, index)
        bad = range(1, 7 if masks or form is Voc else 6)  # masks that nobody asks for are not read
        with pytest.warns(UserWarning, match=f"{len(bad)} of {NUM}") as caught:
            dataset = data.open(**options, on_error="skip")
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        assert [image.name for image in dataset.skipped] == [whole.names[index] for index in bad]
        assert [image.kind for image in dataset.skipped] == [damages[i - 1][1] for i in bad]
        for image, index in zip(dataset.skipped, bad, strict=True):
            assert re.search(data.named(index), image.reason)
        good = sorted(set(range(NUM)) - set(bad))
        assert dataset.report.num_skipped == len(bad)
        assert dataset.report.num_images == len(dataset) == len(good)
        assert dataset.names == [whole.names[index] for index in good]
        for mine, theirs in enumerate(good):
            (image, target), (same, expected) = dataset[mine], whole[theirs]
            assert torch.equal(image, same)
            assert dataset.image_path(mine) == data.images[theirs]
            assert target.keys() == expected.keys()
            for key in target.keys() - {"image_id"}:
                assert torch.equal(target[key], expected[key])
            assert target["image_id"] == (mine if form is Voc else expected["image_id"])
        objects = sum(len(dataset.target(index)["boxes"]) for index in range(len(dataset)))
        assert dataset.report.num_objects == objects

    @pytest.mark.parametrize("number", range(6))
    def test_each_of_them_raises_by_default(self, make, form, number):
        data = make(form)
        DAMAGES[form][number][0](data, 3)
        options = {"masks": True} if form is Coco else {}
        with pytest.raises((ValueError, FileNotFoundError), match=data.named(3)):
            data.open(**options)[3]

    def test_nothing_is_told_of_good_data(self, make, form):
        data = make(form)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            dataset = data.open(on_error="skip")
        assert dataset.skipped == data.open().skipped == ()
        assert dataset.report == data.open().report

    @pytest.mark.parametrize("size", [True, False])
    @pytest.mark.parametrize("kind", ["link to itself", "socket", "long name", "junk"])
    def test_errors_of_the_data(self, make, form, monkeypatch, kind, size):
        """Also where the annotation leaves its size to the image; a broken one is no annotation."""
        data = make(form)
        path, name = data.images[1], data.names[1]
        if not size:
            data.drop_size(1)
        if kind == "long name":
            data.rename(1, name := "n" * 300)
        elif kind == "junk":
            path.write_bytes(b"\xff\xd8junk")
        else:
            path.unlink()
        if kind == "link to itself":
            path.symlink_to(path)
        elif kind == "socket":
            monkeypatch.chdir(path.parent)  # a socket's path must be short
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        with pytest.warns(UserWarning, match=f"1 of {NUM}"):
            (skipped,) = data.open(on_error="skip").skipped
        assert skipped.name.endswith(name)
        assert kind != "junk" or skipped.kind == "unusable image"
        with pytest.raises((OSError, ValueError), match=re.escape(name)):
            data.open()[1]

    def test_an_error_of_the_machine_raises(self, make, form, monkeypatch):
        """A disk that fails for a moment must not change what is trained on."""
        data = make(form)

        def fail(path):
            raise OSError(errno.EIO, "Input/output error", str(path))

        monkeypatch.setattr("detmix.data.images.read_file", fail)
        with pytest.raises(OSError, match=r"Input/output error.*jpg"):
            data.open(on_error="skip")


def empty_all(data):
    for path in data.images:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("form", "change", "named"),
    [
        (Voc, empty_all, f"{NUM} of {NUM}"),
        (Coco, empty_all, f"{NUM} of {NUM}"),
        (Voc, lambda data: data.split.unlink(), "trainval"),
        (Voc, lambda data: data.rename(1, data.names[0]), "twice"),
        (Coco, lambda data: data.change_object(0, image_id=10**6), "image_id must be"),
        (Coco, lambda data: data.change_object(0, id=None), "id must be"),
    ],
)
def test_what_is_wrong_as_a_whole_raises(make, form, change, named):
    data = make(form)
    with pytest.raises(ValueError, match=r"on_error.*'ignore'"):
        data.open(on_error="ignore")
    change(data)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        data.open(on_error="skip")


class TestCoco:
    def test_what_is_dropped_anyway_may_be_unusable(self, make):
        """As labelling tools write boxes without area; each image of the training has an object."""
        data = make(Coco)
        with data.content() as content:
            size = {"size": [3, 3], "counts": [9]}
            bad = [
                {"bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": size},
                {"bbox": [1, 1, 0, 9], "iscrowd": 0, "segmentation": [[1, 1, 1, 10]]},
                {"bbox": [500, 1, 9, 9], "iscrowd": 0},
            ]
            content["annotations"] += [
                {"id": 1000 + number, "image_id": image["id"], "category_id": 1, **bad[number % 3]}
                for number, image in enumerate(content["images"])
            ]
        options = {"masks": True, "crowd": "drop", "empty": "drop"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            expected, dataset = data.open(**options), data.open(**options, on_error="skip")
        assert dataset.skipped == ()
        assert dataset.report == expected.report
        assert dataset.names == expected.names

    def test_an_image_without_a_file_name(self, make):
        data = make(Coco)
        data.rename(1, None)
        with pytest.warns(UserWarning, match=f"1 of {NUM}.*image 2.*file_name"):
            dataset = data.open(on_error="skip")
        assert dataset.names == [data.names[0], *data.names[2:]]
        assert [image.name for image in dataset.skipped] == ["image 2"]
        with pytest.raises(ValueError, match=r"image 2.*file_name"):
            data.open()

    def test_bad_keypoints(self, make):
        data = make(Coco)
        data.change_object(0, keypoints=[1, 2])
        assert data.open(on_error="skip").skipped == ()
        with pytest.warns(UserWarning, match=f"1 of {NUM}.*keypoints"):
            assert len(data.open(keypoints=True, on_error="skip")) == NUM - 1


class TestTraining:
    @pytest.mark.parametrize("subset", ["trainval", "test"])
    def test_evaluation_leaves_nothing_out(self, make, tmp_path, subset):
        """A score without an image is another score; and by default neither does training."""
        root = make(Voc).root
        name = (root / f"VOC2007/ImageSets/Main/{subset}.txt").read_text().split()[0]
        (root / f"VOC2007/Annotations/{name}.xml").write_text("<annotation>")
        options = ["data.on_error=skip"] if subset == "test" else []
        with pytest.raises(ValueError, match=rf"{name}\.xml"):
            DetectorTrainer(tiny_config(root, tmp_path / "run", *options))

    def test_a_run_equals_one_on_the_good_images(self, make, tmp_path):
        """Also with a worker, and resumed; what is left out does not depend on who reads it."""
        data = make(Voc)
        for index, (damage, _) in enumerate(DAMAGES[Voc][:4], 1):
            damage(data, index)

        def train(name, *options, told=True):
            fixed = ("data.batch_size=2", "eval_every=2", "schedule.name=constant", *options)
            with pytest.warns(UserWarning, match=f"4 of {NUM}") if told else nullcontext():
                DetectorTrainer(tiny_config(data.root, tmp_path / name, *fixed)).fit()

        train("skip", "epochs=2", "data.on_error=skip")
        train("parts", "epochs=1", "data.on_error=skip", "data.workers=1")
        train("parts", "epochs=2", "data.on_error=skip", "resume=auto")
        data.split.write_text("\n".join([data.names[0], *data.names[5:]]))
        train("good", "epochs=2", told=False)
        assert_same_run(tmp_path / "skip", tmp_path / "good")
        skip, parts = (
            torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
            for name in ("skip", "parts")
        )
        for name, tensor in skip.items():
            assert torch.equal(parts[name], tensor)
