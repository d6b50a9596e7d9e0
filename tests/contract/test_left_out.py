"""``on_error="skip"``: bad images are left out of training, told and counted, always the same."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import warnings
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from runs import assert_same_run
from tiny import tiny_config

from detmix.data import SHAPE_CLASSES, CocoDetection, VOCDetection, write_shapes, write_shapes_coco
from detmix.training import DetectorTrainer

NUM = 14


class Voc:
    write = staticmethod(write_shapes)

    def __init__(self, root):
        self.root = root
        self.split = self.root / "VOC2007/ImageSets/Main/trainval.txt"
        self.names = self.split.read_text().split()
        self.images = [self.root / f"VOC2007/JPEGImages/{name}.jpg" for name in self.names]
        self.xml = [self.root / f"VOC2007/Annotations/{name}.xml" for name in self.names]

    def open(self, *, shapes=True, **options):
        return VOCDetection(self.root, classes=SHAPE_CLASSES, **options)

    def named(self, index):
        """How an error names an image or its annotation."""
        return f"{self.names[index]}.(jpg|xml)"

    def rename(self, index, name):
        self.names[index] = name
        self.split.write_text("\n".join(self.names))

    def drop_size(self, index):
        self.change_xml(index, "<size>.*</size>", "")

    def change_xml(self, index, old, new):
        text = re.sub(old, new, self.xml[index].read_text(), flags=re.DOTALL)
        self.xml[index].write_text(text)


class Coco:
    write = staticmethod(write_shapes_coco)

    def __init__(self, root):
        self.root = root
        self.path = self.root / "annotations/instances_train2017.json"
        self.content = json.loads(self.path.read_text())
        self.names = [item["file_name"] for item in self.content["images"]]
        self.images = [self.root / "train2017" / name for name in self.names]

    def open(self, *, shapes=True, **options):
        self.path.write_text(json.dumps(self.content))
        options |= {"masks": shapes, "keypoints": shapes}
        return CocoDetection(self.root / "train2017", self.path, **options)

    def named(self, index):
        return f"{self.names[index]}|{self.path}, (image {index + 1}|annotation)"

    def change_image(self, index, **fields):
        self.content["images"][index] |= fields

    def change_object(self, index, **fields):
        """Change the first object of an image; each image of these has one."""
        image_id = self.content["images"][index]["id"]
        next(a for a in self.content["annotations"] if a["image_id"] == image_id).update(fields)

    def rename(self, index, name):
        self.names[index] = name or f"image {index + 1}"
        self.change_image(index, file_name=name)

    def drop_size(self, index):
        self.change_image(index, width=None)


def link_to_itself(data, index):
    data.images[index].unlink()
    data.images[index].symlink_to(data.images[index])


def put_socket(data, index):
    data.images[index].unlink()
    os.mknod(data.images[index], stat.S_IFSOCK | 0o600)


def resize(data, index):
    Image.new("RGB", (9, 9)).save(data.images[index])


UNKNOWN = ("<name>.*?</name>", "<name>unicorn</name>")
RLE = {"size": [3, 3], "counts": [1]}
IMAGES = [
    (lambda data, i: os.truncate(data.images[i], 300), "unusable image"),
    (lambda data, i: data.images[i].write_bytes(b"\xff\xd8junk"), "unusable image"),
    (lambda data, i: data.images[i].unlink(), "missing file"),
    (link_to_itself, "unusable image"),
    (put_socket, "unusable image"),
    (resize, "unusable image"),
]
# What is done to the images 1, 2, ..., and what it is called.
DAMAGES = {
    Voc: [
        *IMAGES,
        (lambda data, i: data.rename(i, "n" * 300), "unusable annotation"),
        (lambda data, i: data.xml[i].unlink(), "missing file"),
        (lambda data, i: data.xml[i].write_text("<annotation>"), "unusable annotation"),
        (lambda data, i: data.change_xml(i, *UNKNOWN), "unusable annotation"),
    ],
    Coco: [
        *IMAGES,
        (lambda data, i: data.rename(i, "n" * 300), "unusable image"),
        (lambda data, i: data.rename(i, None), "unusable annotation"),
        (lambda data, i: data.change_object(i, bbox=[1, 2, "x", 4]), "unusable annotation"),
        (lambda data, i: data.change_image(i, width=-5), "unusable annotation"),
        (lambda data, i: data.change_object(i, segmentation=RLE), "unusable annotation"),
        (lambda data, i: data.change_object(i, keypoints=[1, 2]), "unusable annotation"),
    ],
}
FORMATS = pytest.mark.parametrize("form", [Voc, Coco])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    options = {"num_train": NUM, "num_test": 2, "image_size": 64}
    return {form: form.write(folder / form.__name__, **options) for form in DAMAGES}


@pytest.fixture
def make(pristine, tmp_path):
    def make(form):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return form(shutil.copytree(pristine[form], tmp_path / "data"))

    return make


@pytest.mark.parametrize(
    ("form", "shapes", "size"),
    [(Voc, True, True), (Voc, True, False), (Coco, True, True), (Coco, True, False),
     (Coco, False, True)],
)  # fmt: skip
def test_bad_images_are_left_out_and_told_once(make, form, shapes, size):
    """Also where the annotation leaves its size to the image; masks not asked for are not read."""
    data, damages = make(form), DAMAGES[form]
    whole = data.open(shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert data.open(shapes=shapes, on_error="skip").report == whole.report
    for index, (damage, _) in enumerate(damages, 1):
        if not size and damage is not resize:
            data.drop_size(index)
        damage(data, index)
    bad = range(1, len(damages) + (1 if shapes else -1))
    with pytest.warns(UserWarning, match=f"{len(bad)} of {NUM}") as caught:
        dataset = data.open(shapes=shapes, on_error="skip")
    assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
    for image, index in zip(dataset.skipped, bad, strict=True):
        assert image.name.endswith(data.names[index])
        assert image.kind == damages[index - 1][1]
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


@FORMATS
def test_each_of_them_raises_by_default(make, form):
    for damage, _ in DAMAGES[form]:
        data = make(form)
        damage(data, 3)
        with pytest.raises((ValueError, OSError), match=data.named(3)):
            data.open()[3]


@FORMATS
def test_an_error_of_the_machine_raises(make, form, monkeypatch):
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


def test_what_is_dropped_anyway_may_be_unusable(make):
    """As labelling tools write boxes without area; each image of the training has an object."""
    data = make(Coco)
    bad = [
        {"bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": RLE},
        {"bbox": [1, 1, 0, 9], "iscrowd": 0, "segmentation": [[1, 1, 1, 10]]},
        {"bbox": [500, 1, 9, 9], "iscrowd": 0},
    ]
    data.content["annotations"] += [
        {"id": 1000 + number, "image_id": image["id"], "category_id": 1, **bad[number % 3]}
        for number, image in enumerate(data.content["images"])
    ]
    options = {"crowd": "drop", "empty": "drop"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected, dataset = data.open(**options), data.open(**options, on_error="skip")
    assert dataset.skipped == ()
    assert dataset.report == expected.report
    assert dataset.names == expected.names


@pytest.mark.parametrize("subset", ["trainval", "test"])
def test_evaluation_leaves_nothing_out(make, tmp_path, subset):
    """A score without an image is another score; and by default neither does training."""
    root = make(Voc).root
    name = (root / f"VOC2007/ImageSets/Main/{subset}.txt").read_text().split()[0]
    (root / f"VOC2007/Annotations/{name}.xml").write_text("<annotation>")
    options = ["data.on_error=skip"] if subset == "test" else []
    with pytest.raises(ValueError, match=rf"{name}\.xml"):
        DetectorTrainer(tiny_config(root, tmp_path / "run", *options))


def test_a_run_equals_one_on_the_good_images(make, tmp_path):
    """With a worker, too: what is left out does not depend on who reads it."""
    data = make(Voc)
    damages = DAMAGES[Voc]
    for index, (damage, _) in enumerate(damages, 1):
        damage(data, index)

    def train(name, *options, told):
        fixed = ("data.batch_size=2", "epochs=1", "schedule.name=constant", *options)
        with pytest.warns(UserWarning, match=f"{len(damages)} of {NUM}") if told else nullcontext():
            DetectorTrainer(tiny_config(data.root, tmp_path / name, *fixed)).fit()

    train("skip", "data.on_error=skip", "data.workers=1", told=True)
    data.split.write_text("\n".join([data.names[0], *data.names[1 + len(damages) :]]))
    train("good", told=False)
    assert_same_run(tmp_path / "skip", tmp_path / "good")
