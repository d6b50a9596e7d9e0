"""``on_error="skip"``: bad images are left out of training, told and counted, always the same."""

from __future__ import annotations

import json
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import assert_same_run
from tiny import tiny_config

from detmix.data import SHAPE_CLASSES, CocoDetection, VOCDetection, write_shapes, write_shapes_coco
from detmix.training import DetectorTrainer

SPLIT = (("2007", "trainval"),)


def open_voc(root, **options):
    return VOCDetection(root, classes=SHAPE_CLASSES, **options)


@pytest.fixture
def voc(tmp_path):
    """Return a devkit of 12 images, and a function that breaks six of them in six ways."""
    root = write_shapes(tmp_path / "shapes", num_train=12, num_test=4, image_size=64)
    folder = root / "VOC2007"
    ids = (folder / "ImageSets/Main/trainval.txt").read_text().split()

    def damage():
        images = [folder / "JPEGImages" / f"{name}.jpg" for name in ids]
        xml = [folder / "Annotations" / f"{name}.xml" for name in ids]
        images[1].write_bytes(images[1].read_bytes()[:300])
        images[3].unlink()
        xml[4].unlink()
        xml[6].write_text("<annotation>")
        xml[7].write_text(re.sub("<name>.*?</name>", "<name>unicorn</name>", xml[7].read_text()))
        Image.new("RGB", (9, 9)).save(images[10])
        return [ids[index] for index in (1, 3, 4, 6, 7, 10)]

    return root, ids, damage


KINDS = [
    "unusable image", "missing file", "missing file", "unusable annotation",
    "unusable annotation", "unusable image",
]  # fmt: skip


class TestVOC:
    def test_bad_images_are_left_out_and_told_once(self, voc):
        root, ids, damage = voc
        whole = open_voc(root)
        bad = damage()
        with pytest.warns(UserWarning, match="6 of 12") as caught:
            dataset = open_voc(root, on_error="skip")
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        assert [image.name for image in dataset.skipped] == [f"VOC2007/{name}" for name in bad]
        assert [image.kind for image in dataset.skipped] == KINDS
        for image, name in zip(dataset.skipped, bad, strict=True):
            assert name in image.reason
        assert all(Path(dataset.image_path(index)).is_file() for index in range(6))
        assert dataset.report.num_skipped == 6
        assert dataset.report.num_images == len(dataset) == 6
        good = [name for name in ids if name not in bad]
        assert dataset.names == [f"VOC2007/{name}" for name in good]
        for index, name in enumerate(good):
            (image, target), (same, expected) = dataset[index], whole[ids.index(name)]
            assert torch.equal(image, same)
            assert torch.equal(target["boxes"], expected["boxes"])
            assert torch.equal(target["labels"], expected["labels"])
            assert target["image_id"] == index
        assert dataset.report.num_objects == sum(
            len(dataset.target(index)["boxes"]) for index in range(6)
        )

    def test_each_of_them_raises_by_default(self, voc):
        root, ids, damage = voc
        bad = damage()
        split = root / "VOC2007/ImageSets/Main/trainval.txt"
        for name in ids:
            split.write_text(f"{name}\n")
            if name in bad:
                with pytest.raises((ValueError, FileNotFoundError), match=name):
                    open_voc(root)[0]
            else:
                open_voc(root)[0]

    def test_nothing_is_told_of_good_data(self, voc, coco):
        for read, root in ((open_voc, voc[0]), (open_coco, coco)):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                dataset = read(root, on_error="skip")
            assert dataset.skipped == read(root).skipped == ()
            assert dataset.report == read(root).report

    def test_no_image_left(self, voc):
        root, _, _ = voc
        for path in (root / "VOC2007/JPEGImages").iterdir():
            path.write_bytes(b"")
        with pytest.raises(ValueError, match="12 of 12"):
            open_voc(root, on_error="skip")

    @pytest.mark.parametrize("part", ["split", "year", "repeat"])
    def test_what_is_wrong_as_a_whole_raises(self, voc, part):
        root, ids, _ = voc
        split = root / "VOC2007/ImageSets/Main/trainval.txt"
        image_sets = (("2012", "trainval"),) if part == "year" else SPLIT
        if part == "split":
            split.unlink()
        elif part == "repeat":
            split.write_text(f"{ids[0]}\n{ids[0]}\n")
        with pytest.raises((ValueError, FileNotFoundError)):
            open_voc(root, image_sets=image_sets, on_error="skip")

    @pytest.mark.parametrize("kind", ["link to itself", "socket", "long name"])
    def test_errors_of_the_data(self, voc, monkeypatch, kind):
        root, ids, _ = voc
        folder = root / "VOC2007"
        put_in_place(kind, folder / "JPEGImages" / f"{ids[1]}.jpg", monkeypatch)
        if kind == "long name":
            split = folder / "ImageSets/Main/trainval.txt"
            split.write_text("\n".join([*ids, "n" * 300]))
        with pytest.warns(UserWarning, match=r"1 of 1[23]"):
            dataset = open_voc(root, on_error="skip")
        (skipped,) = dataset.skipped
        assert skipped.name == f"VOC2007/{ids[1] if kind != 'long name' else 'n' * 300}"
        with pytest.raises((OSError, ValueError), match=skipped.name[8:]):
            open_voc(root)[1]

    @pytest.mark.parametrize("size", [True, False])
    def test_a_broken_image_is_no_annotation(self, voc, size):
        """Also where the annotation leaves its size to the image."""
        root, ids, _ = voc
        image, xml = (root / "VOC2007" / part for part in ("JPEGImages", "Annotations"))
        (image / f"{ids[1]}.jpg").write_bytes(b"\xff\xd8junk")
        if not size:
            path = xml / f"{ids[1]}.xml"
            path.write_text(re.sub("<size>.*</size>", "", path.read_text(), flags=re.DOTALL))
        with pytest.warns(UserWarning, match="1 of 12"):
            (skipped,) = open_voc(root, on_error="skip").skipped
        assert skipped.kind == "unusable image"

    def test_the_argument_is_checked(self, voc):
        with pytest.raises(ValueError, match="ignore"):
            open_voc(voc[0], on_error="ignore")


def put_in_place(kind, path, monkeypatch):
    """Put something that is no image in an image's place."""
    if kind == "link to itself":
        path.unlink()
        path.symlink_to(path)
    elif kind == "socket":
        path.unlink()
        monkeypatch.chdir(path.parent)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)


def break_coco(root):
    """Break images 1, 2, 3, 4 and 5 of 8 in five ways; return their names."""
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    names = [entry["file_name"] for entry in content["images"]]
    ids = [entry["id"] for entry in content["images"]]
    images = root / "train2017"
    (images / names[1]).write_bytes((images / names[1]).read_bytes()[:-200])
    (images / names[2]).unlink()
    first = {
        image_id: next(a for a in content["annotations"] if a["image_id"] == image_id)
        for image_id in ids
    }
    first[ids[3]]["bbox"] = [1, 2, "x", 4]
    content["images"][4]["width"] = -5
    first[ids[5]]["segmentation"] = {"size": [3, 3], "counts": [1]}
    path.write_text(json.dumps(content))
    return names


@pytest.fixture
def coco(tmp_path):
    return write_shapes_coco(tmp_path / "coco", num_train=8, num_test=2, image_size=64)


def open_coco(root, **options):
    path = root / "annotations/instances_train2017.json"
    return CocoDetection(root / "train2017", path, **options)


class TestCoco:
    def test_what_is_dropped_anyway_may_be_unusable(self, coco):
        """As labelling tools write boxes without area; each image of the training has an object."""
        path = coco / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        for number, image in enumerate(content["images"]):
            size = {"size": [3, 3], "counts": [9]}
            content["annotations"] += [
                {"id": 1000 + number, "image_id": image["id"], "category_id": 1, **item}
                for item in [
                    {"bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": size},
                    {"bbox": [1, 1, 0, 9], "iscrowd": 0, "segmentation": [[1, 1, 1, 10]]},
                    {"bbox": [500, 1, 9, 9], "iscrowd": 0},
                ][number % 3 : number % 3 + 1]
            ]
        path.write_text(json.dumps(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            options = {"masks": True, "crowd": "drop", "empty": "drop"}
            expected = open_coco(coco, **options)
            dataset = open_coco(coco, **options, on_error="skip")
        assert dataset.skipped == ()
        assert dataset.report == expected.report
        assert dataset.names == expected.names

    @pytest.mark.parametrize("masks", [False, True])
    def test_bad_images_are_left_out_and_told_once(self, coco, masks):
        whole = open_coco(coco, masks=masks)
        names = break_coco(coco)
        bad = [1, 2, 3, 4, 5] if masks else [1, 2, 3, 4]
        with pytest.warns(UserWarning, match=f"{len(bad)} of 8") as caught:
            dataset = open_coco(coco, masks=masks, on_error="skip")
        assert [w.filename for w in caught if w.category is UserWarning] == [__file__]
        assert [image.name for image in dataset.skipped] == [names[index] for index in bad]
        assert [image.kind for image in dataset.skipped] == [
            "unusable image", "missing file", *["unusable annotation"] * (len(bad) - 2)
        ]  # fmt: skip
        assert dataset.report.num_skipped == len(bad)
        good = [index for index in range(8) if index not in bad]
        assert dataset.image_ids == [whole.image_ids[index] for index in good]
        for mine, theirs in enumerate(good):
            (image, target), (same, expected) = dataset[mine], whole[theirs]
            assert torch.equal(image, same)
            assert target.keys() == expected.keys()
            for key in target.keys() - {"image_id"}:
                assert torch.equal(target[key], expected[key])
            assert target["image_id"] == expected["image_id"]

    @pytest.mark.parametrize("size", [True, False])
    @pytest.mark.parametrize("kind", ["link to itself", "socket", "long name", "no folder"])
    def test_errors_of_the_data(self, coco, monkeypatch, kind, size):
        path = coco / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        item, other = content["images"][1], content["images"][0]["file_name"]
        put_in_place(kind, coco / "train2017" / item["file_name"], monkeypatch)
        renamed = {"long name": "n" * 300, "no folder": f"{other}/a.jpg"}
        item["file_name"] = renamed.get(kind, item["file_name"])
        if not size:
            del item["width"]
        path.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="1 of 8"):
            dataset = open_coco(coco, on_error="skip")
        assert [image.name for image in dataset.skipped] == [item["file_name"]]
        with pytest.raises((OSError, ValueError), match=re.escape(item["file_name"])):
            open_coco(coco)[1]

    def test_an_image_without_a_file_name(self, coco):
        path = coco / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        image_id = content["images"][1]["id"]
        del content["images"][1]["file_name"]
        path.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match=f"1 of 8.*image {image_id}.*file_name"):
            dataset = open_coco(coco, on_error="skip")
        assert len(dataset) == 7
        assert [image.name for image in dataset.skipped] == [f"image {image_id}"]
        with pytest.raises(ValueError, match=f"image {image_id}.*file_name"):
            open_coco(coco)

    @pytest.mark.parametrize("field", ["image_id", "id"])
    def test_an_annotation_of_no_image_raises(self, coco, field):
        path = coco / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0][field] = 10**6 if field == "image_id" else None
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="id must be"):
            open_coco(coco, on_error="skip")

    def test_bad_keypoints(self, coco):
        path = coco / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["keypoints"] = [1, 2]
        path.write_text(json.dumps(content))
        assert open_coco(coco, on_error="skip").skipped == ()
        with pytest.warns(UserWarning, match="1 of 8.*keypoints"):
            assert len(open_coco(coco, keypoints=True, on_error="skip")) == 7


class TestTraining:
    @pytest.mark.parametrize("subset", ["trainval", "test"])
    def test_evaluation_leaves_nothing_out(self, voc, tmp_path, subset, fresh_accelerator):
        """A score without an image is another score; and by default neither does training."""
        folder = voc[0] / "VOC2007"
        name = (folder / f"ImageSets/Main/{subset}.txt").read_text().split()[0]
        (folder / "Annotations" / f"{name}.xml").write_text("<annotation>")
        options = ["data.on_error=skip"] if subset == "test" else []
        with pytest.raises(ValueError, match=rf"{name}\.xml"):
            DetectorTrainer(tiny_config(voc[0], tmp_path / "run", *options))

    def test_a_run_equals_one_on_the_good_images(self, voc, tmp_path, fresh_accelerator):
        """Also with a worker; what is left out does not depend on who reads it."""
        root, ids, damage = voc
        bad = damage()
        options = ("epochs=1", "data.batch_size=2", "eval_every=1")
        for name, workers in (("skip", 0), ("worker", 1)):
            config = tiny_config(
                root, tmp_path / name, *options, "data.on_error=skip", f"data.workers={workers}"
            )
            with pytest.warns(UserWarning, match="6 of 12"):
                DetectorTrainer(config).fit()
        good = [name for name in ids if name not in bad]
        (root / "VOC2007/ImageSets/Main/trainval.txt").write_text("\n".join(good))
        DetectorTrainer(tiny_config(root, tmp_path / "good", *options)).fit()
        assert_same_run(tmp_path / "skip", tmp_path / "good")
        assert_same_run(tmp_path / "skip", tmp_path / "worker")

    def test_a_resumed_run_leaves_out_the_same(self, voc, tmp_path, fresh_accelerator):
        root, _, damage = voc
        damage()
        options = ("data.batch_size=2", "data.on_error=skip", "schedule.name=constant")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            DetectorTrainer(tiny_config(root, tmp_path / "whole", *options, "epochs=2")).fit()
            DetectorTrainer(tiny_config(root, tmp_path / "parts", *options, "epochs=1")).fit()
            again = tiny_config(root, tmp_path / "parts", *options, "epochs=2", "resume=auto")
            DetectorTrainer(again).fit()
        whole, parts = (
            torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
            for name in ("whole", "parts")
        )
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=0, atol=0)
