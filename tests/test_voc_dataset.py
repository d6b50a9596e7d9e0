"""Reading the Pascal VOC devkit: against torchvision's reader, hand-made files and real data."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from detmix.data import VOC_CLASSES, VOCAnnotation, VOCDetection, VOCObject
from detmix.data.images import _decode_with_pillow, read_jpeg
from detmix.data.voc.xml import read_annotation, write_annotation

BOX = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
DOG = f"<object><name>dog</name>{BOX}</object>"
SIZE = "<size><width>60</width><height>40</height></size>"


def make_devkit(root: Path, xml: dict[str, str], split: str | None = None, year="2007") -> Path:
    """Write a devkit of 60 x 40 images whose annotations hold the given elements."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name, body in xml.items():
        Image.fromarray(noise).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        content = body if body.startswith("<?") else f"<annotation>{body}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(content)
    lines = "\n".join(xml) if split is None else split
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text(lines + "\n")
    return root


def bndbox(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    fields = {"ymax": ymax, "xmin": xmin, "xmax": xmax, "ymin": ymin}  # not in the usual order
    return "<bndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in fields.items()) + "</bndbox>"


def dog(*corners: object, difficult: str = "") -> str:
    return f"<object><name>dog</name>{difficult}{bndbox(*corners)}</object>"


def test_sample_follows_the_contract(tmp_path):
    hard = dog(1, 1, 60, 40, difficult="<difficult>1</difficult>")
    dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + DOG + hard, "b": SIZE}))
    image, target = dataset[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 40, 60)
    torch.testing.assert_close(
        target["boxes"], torch.tensor([[10.0, 5.0, 30.0, 20.0], [0.0, 0.0, 60.0, 40.0]])
    )
    assert target["labels"].tolist() == [VOC_CLASSES.index("dog") + 1] * 2
    assert target["labels"].dtype == torch.int64
    assert target["difficult"].tolist() == [False, True]
    assert target["image_id"] == 0
    empty = dataset[1][1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == empty["difficult"].shape == (0,)
    assert dataset.names == ["VOC2007/a", "VOC2007/b"]
    assert dataset.image_size(0) == (40, 60)
    assert dataset.report.num_empty_images == 1
    assert dataset[-1][1]["image_id"] == 1
    with pytest.raises(IndexError, match="index 2 is out of range for 2"):
        dataset[2]


def test_image_ids_are_indices(tmp_path):
    dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + DOG, "b": SIZE, "c": SIZE}))
    assert [dataset[i][1]["image_id"] for i in range(3)] == dataset.image_ids == [0, 1, 2]
    assert [dataset.index_of(image_id) for image_id in dataset.image_ids] == [0, 1, 2]
    assert dataset.category_ids == tuple(range(1, 21))
    for image_id in (-1, 3):
        with pytest.raises(ValueError, match=rf"image_id {image_id}: expected 0 to 2"):
            dataset.index_of(image_id)


def test_targets_are_copies(tmp_path):
    dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + DOG}))
    dataset[0][1]["boxes"].zero_()
    assert dataset[0][1]["boxes"].tolist() == [[10.0, 5.0, 30.0, 20.0]]


def test_difficult_objects_can_be_dropped(tmp_path):
    body = SIZE + DOG + dog(1, 1, 9, 9, difficult="<difficult>1</difficult>")
    root = make_devkit(tmp_path, {"a": body})
    assert VOCDetection(root).report.num_difficult == 1
    dropped = VOCDetection(root, difficult="drop")
    assert len(dropped[0][1]["boxes"]) == 1
    assert dropped.report.num_difficult_dropped == 1
    with pytest.raises(ValueError, match=r'"keep" or "drop", got \'ignore\''):
        VOCDetection(root, difficult="ignore")


def test_years_are_joined_and_the_parent_of_vocdevkit_is_accepted(tmp_path):
    devkit = make_devkit(tmp_path / "VOCdevkit", {"a": SIZE + DOG})
    make_devkit(devkit, {"a": SIZE, "c": SIZE}, year="2012")
    image_sets = (("2007", "trainval"), ("2012", "trainval"))
    for root in (tmp_path, devkit):
        dataset = VOCDetection(root, image_sets)
        assert dataset.names == ["VOC2007/a", "VOC2012/a", "VOC2012/c"]
        assert [len(dataset[i][1]["boxes"]) for i in range(3)] == [1, 0, 0]


def test_parts_of_a_person_are_not_objects(tmp_path):
    part = f"<part><name>head</name>{bndbox(2, 2, 5, 5)}</part>"
    person = f"<object>{part}<name>person</name>{bndbox(1, 1, 20, 30)}{part}</object>"
    dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + person}))
    assert dataset[0][1]["boxes"].tolist() == [[0.0, 0.0, 20.0, 30.0]]
    assert dataset[0][1]["labels"].tolist() == [15]


def test_transforms_get_image_and_target(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG})
    dataset = VOCDetection(
        root, transforms=lambda image, target: (image[:, :7], {**target, "x": 1})
    )
    image, target = dataset[0]
    assert image.shape == (3, 7, 60)
    assert target["x"] == 1


def test_boxes_are_clipped_or_dropped_with_one_warning(tmp_path):
    bodies = {
        "a": SIZE + DOG + dog(0, -3, 30.5, 45.75),
        "b": SIZE + dog(61, 1, 70, 9) + dog(20, 9, 19, 20) + dog(1, 41, 9, 80),
    }
    root = make_devkit(tmp_path, bodies)
    with pytest.warns(UserWarning, match="boxes were") as caught:
        dataset = VOCDetection(root)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "1 of 5 boxes were clipped" in message
    assert "3 of 5 boxes were dropped" in message
    assert "a.xml" in message
    assert "b.xml, xmin, ymin, xmax, ymax = 61, 1, 70, 9 in 60 x 40" in message
    assert caught[0].filename == __file__
    assert dataset[0][1]["boxes"].tolist() == [[10.0, 5.0, 30.0, 20.0], [0.0, 0.0, 30.5, 40.0]]
    assert len(dataset[1][1]["boxes"]) == 0
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (2, 1, 3)


def test_one_pixel_box_is_kept(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + dog(60, 40, 60, 40)}))
    assert dataset[0][1]["boxes"].tolist() == [[59.0, 39.0, 60.0, 40.0]]


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>", "<size/>"])
def test_missing_size_is_read_from_the_image(tmp_path, size):
    with pytest.warns(UserWarning, match="clipped"):
        dataset = VOCDetection(make_devkit(tmp_path, {"a": size + dog(1, 1, 99, 99)}))
    assert dataset[0][1]["boxes"].tolist() == [[0.0, 0.0, 60.0, 40.0]]


BROKEN = {
    "not closed": ("<?xml version='1.0'?><annotation><object>", "not well-formed XML.*line 1"),
    "root": ("<?xml version='1.0'?><html/>", "expected the root element <annotation>, got <html>"),
    "entity": (
        '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>',
        "document type declarations and entities are refused",
    ),
    "encoding": ("<?xml version='1.0' encoding='none'?><annotation/>", "XML"),
    "no name": (f"<object>{BOX}</object>", "object 0: <name> is missing or empty"),
    "no box": ("<object><name>dog</name></object>", r"object 0 \(dog\): <bndbox> is missing"),
    "no xmax": (
        DOG + "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin></bndbox></object>",
        r"object 1 \(cat\): <xmax> is missing",
    ),
    "text": (dog(1, "one", 3, 4), "<ymin> must be a finite number, got 'one'"),
    "nan": (dog(1, 2, "nan", 4), "<xmax> must be a finite number, got 'nan'"),
    "inf": (dog(1, 2, 3, "1e999"), "<ymax> must be a finite number, got '1e999'"),
    "empty": (dog("", 2, 3, 4), "<xmin> must be a finite number, got ''"),
    "difficult": (dog(1, 2, 3, 4, difficult="<difficult>maybe</difficult>"), "0 or 1, got 'maybe'"),
    "class": (f"<object><name>unicorn</name>{BOX}</object>", "'unicorn'; known are aeroplane"),
    "size": ("<size><width>-4</width><height>3</height></size>", "whole pixels, got -4 x 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_annotations_are_named(tmp_path, name):
    xml, message = BROKEN[name]
    body = xml if xml.startswith("<?") or "<size>" in xml else SIZE + xml
    root = make_devkit(tmp_path, {"good": SIZE + DOG, "bad": body})
    with pytest.raises(ValueError, match=rf"bad\.xml.*{message}"):
        VOCDetection(root)


def test_missing_files_are_named(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG, "b": SIZE})
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder; expected ROOT"):
        VOCDetection(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no VOC2012; found VOC2007"):
        VOCDetection(root, (("2012", "trainval"),))
    with pytest.raises(FileNotFoundError, match=r"is .* meant"):
        VOCDetection(root / "VOC2007")
    with pytest.raises(FileNotFoundError, match=r"no split 'test'; found trainval"):
        VOCDetection(root, (("2007", "test"),))
    (root / "VOC2007/JPEGImages/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: .*1 of 2 listed files are missing"):
        VOCDetection(root)
    (root / "VOC2007/Annotations/a.xml").unlink()
    (root / "VOC2007/JPEGImages/b.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"a\.xml: there is no such file"):
        VOCDetection(root)


def test_split_files(tmp_path):
    bodies = {"a": SIZE + DOG, "b": SIZE, "c": SIZE}
    root = make_devkit(tmp_path, bodies, split="a  1\n\n b -1 \nc  0\n")
    assert VOCDetection(root).names == ["VOC2007/a", "VOC2007/c"]
    make_devkit(tmp_path, bodies, split="\ufeffa\nb\nc")  # as Windows' editors write it
    assert VOCDetection(root).names == ["VOC2007/a", "VOC2007/b", "VOC2007/c"]
    for lines, message in (
        ("a\nb\na", "'a' is listed twice"),
        ("", "lists no image"),
        ("a -1", "lists no image"),
        ("a\nb 7", "line 2: .* got 'b 7'"),
        ("a b c", "line 1: .* got 'a b c'"),
    ):
        make_devkit(tmp_path, bodies, split=lines)
        with pytest.raises(ValueError, match=rf"trainval\.txt.*{message}"):
            VOCDetection(root)


def test_arguments_are_checked(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG})
    for image_sets in ((), "2007", ("2007", "trainval"), (("2007",),)):
        with pytest.raises(ValueError, match="pairs of year and split"):
            VOCDetection(root, image_sets)
    with pytest.raises(ValueError, match=r"'VOC2007/a' is listed twice"):
        VOCDetection(root, (("2007", "trainval"), ("2007", "trainval")))
    with pytest.raises(ValueError, match="names 'dog' twice"):
        VOCDetection(root, classes=("dog", "cat", "dog"))
    for classes in ((), "dog", ("",)):
        with pytest.raises(ValueError, match="sequence of class names"):
            VOCDetection(root, classes=classes)
    own = VOCDetection(root, ((2007, "trainval"),), classes=("cat", "dog"))
    assert own[0][1]["labels"].tolist() == [2]


def test_broken_images_are_named(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG})
    dataset = VOCDetection(root)
    path = root / "VOC2007/JPEGImages/a.jpg"
    good = path.read_bytes()
    for content, message in (
        (b"", "nothing, it is empty"),
        (b"\x89PNG\r\n\x1a\n", "got 89 50 4e 47"),
        (good[: len(good) // 2], "broken JPEG file"),
        (good[:20], "broken JPEG file"),
        (b"\xff\xd8" + b"\0" * 100, "broken JPEG file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.jpg: .*{message}"):
            dataset[0]
    Image.new("RGB", (40, 60)).save(path)
    with pytest.raises(ValueError, match=r"a\.jpg: the image is 40 x 60 .*a\.xml says 60 x 40"):
        dataset[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        dataset[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoding_equals_pillow(tmp_path, mode):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(1).integers(0, 255, (33, 47, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    image = read_jpeg(path)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert image.shape == (3, 33, 47)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 2
    assert (image.int() - _decode_with_pillow(path).int()).abs().max() <= 2


def test_exif_orientation_is_not_applied(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG})
    path = root / "VOC2007/JPEGImages/a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    Image.open(path).copy().save(path, exif=exif)
    assert VOCDetection(root)[0][0].shape == (3, 40, 60)


coordinates = st.integers(-40, 4000).map(lambda n: n / 8) | st.integers(-5, 500).map(float)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            VOCObject,
            st.sampled_from(VOC_CLASSES),
            st.tuples(coordinates, coordinates, coordinates, coordinates),
            st.booleans(),
        ),
        max_size=4,
    )
)
def test_annotations_survive_writing_and_reading(tmp_path_factory, objects):
    path = tmp_path_factory.mktemp("xml") / "a.xml"
    annotation = VOCAnnotation("a & <b>.jpg", 60, 40, tuple(objects))
    write_annotation(path, annotation)
    assert read_annotation(path) == annotation


def test_written_boxes_are_one_based_and_inclusive_and_torchvision_reads_them(tmp_path):
    root = make_devkit(tmp_path / "VOCdevkit", {"a": SIZE}).parent
    written = VOCAnnotation("a.jpg", 60, 40, (VOCObject("cow", (0.0, 4.0, 1.0, 9.5), True),))
    write_annotation(root / "VOCdevkit/VOC2007/Annotations/a.xml", written)
    reader = torchvision.datasets.VOCDetection(str(root), "2007", "trainval")
    item = reader[0][1]["annotation"]["object"][0]
    assert item["bndbox"] == {"xmin": "1", "ymin": "5", "xmax": "1", "ymax": "9.5"}
    assert (item["name"], item["difficult"]) == ("cow", "1")
    with pytest.raises(ValueError, match="not finite"):
        write_annotation(
            tmp_path / "b.xml",
            VOCAnnotation("", 1, 1, (VOCObject("cow", (0, 0, 1, float("inf"))),)),
        )


def _collate(batch):
    return list(zip(*batch, strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_samples(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform cannot {method}")
    root = make_devkit(tmp_path, {name: SIZE + DOG * k for k, name in enumerate("abcd")})
    dataset = VOCDetection(root)
    loader = DataLoader(
        dataset, 2, num_workers=1, collate_fn=_collate, multiprocessing_context=method
    )
    targets = [target for _, batch in loader for target in batch]
    assert [t["image_id"] for t in targets] == [0, 1, 2, 3]
    assert [len(t["boxes"]) for t in targets] == [0, 1, 2, 3]


def test_pickle(tmp_path):
    dataset = VOCDetection(make_devkit(tmp_path, {"a": SIZE + DOG}))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0][0], dataset[0][0])
    assert torch.equal(copy[0][1]["boxes"], dataset[0][1]["boxes"])
    assert copy.report == dataset.report


def test_real_data_equals_torchvisions_reader(voc_root):
    dataset = VOCDetection(voc_root)
    reader = torchvision.datasets.VOCDetection(str(voc_root.parent), "2007", "trainval")
    assert len(dataset) == len(reader) == dataset.report.num_images
    for index in random.Random(0).sample(range(len(dataset)), 60):
        image, target = dataset[index]
        photo, tree = reader[index]
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(photo).astype(int)).max() <= 2
        items = tree["annotation"]["object"]
        boxes = [[float(i["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for i in items]
        expected = torch.tensor(boxes) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        torch.testing.assert_close(target["boxes"], expected, rtol=0, atol=0)
        assert [VOC_CLASSES[k - 1] for k in target["labels"]] == [i["name"] for i in items]
        assert target["difficult"].tolist() == [i["difficult"] == "1" for i in items]


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_all_real_boxes_lie_inside_their_images(voc_root, split):
    dataset = VOCDetection(voc_root, (("2007", split),))
    lines = (voc_root / "VOC2007/ImageSets/Main" / f"{split}.txt").read_text().split()
    assert len(dataset) == len(lines)
    assert dataset.report.num_clipped == dataset.report.num_without_area == 0
    num_objects = 0
    for index in range(len(dataset)):
        height, width = dataset.image_size(index)
        boxes = dataset.target(index)["boxes"]
        num_objects += len(boxes)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert num_objects == dataset.report.num_objects
