"""Reading the Pascal VOC devkit: against torchvision's reader, hand-made files and real data."""

from __future__ import annotations

import pickle
import random
import re
import warnings

import numpy as np
import pytest
import torch
import torchvision
from data_files import DOG, NOISE, SIZE, dog, make_devkit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detmix.data import SHAPE_CLASSES, VOC_CLASSES, VOCAnnotation, VOCDetection, VOCObject
from detmix.data.voc.corners import CORNERS
from detmix.data.voc.devkit import read_annotation, write_annotation


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("root", "classes"), [("shapes_root", SHAPE_CLASSES), ("voc_root", VOC_CLASSES)]
)
def test_everything_equals_torchvisions_reader(tmp_path, request, root, classes):
    root = request.getfixturevalue(root)
    (tmp_path / "VOCdevkit").symlink_to(root)
    reader = torchvision.datasets.VOCDetection(str(tmp_path), "2007", "trainval")
    dataset = pickle.loads(pickle.dumps(VOCDetection(root, classes=classes)))  # as for a worker
    lines = (root / "VOC2007/ImageSets/Main/trainval.txt").read_text().split()
    assert dataset.names == [f"VOC2007/{name}" for name in lines]
    assert dataset.image_ids == list(range(len(reader)))
    assert dataset.category_ids == tuple(range(1, len(classes) + 1))
    for index in random.Random(0).sample(range(len(dataset)), 20):
        image, target = dataset[index]
        photo, tree = reader[index]
        assert image.dtype == torch.uint8
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(photo).astype(int)).max() <= 2
        assert dataset.image_size(index) == image.shape[1:]
        assert dataset.image_path(index).stem == dataset.names[index][8:]
        items = tree["annotation"]["object"]
        boxes = [[float(i["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for i in items]
        expected = {
            "boxes": torch.tensor(boxes) - torch.tensor([1.0, 1.0, 0.0, 0.0]),
            "labels": torch.tensor([classes.index(i["name"]) + 1 for i in items]),
            "difficult": torch.tensor([i["difficult"] == "1" for i in items]),
        }
        assert dataset.index_of(target.pop("image_id")) == index
        assert target.keys() == expected.keys()
        for key, value in expected.items():
            assert target[key].dtype == value.dtype
            assert torch.equal(target[key], value)
            target[key].fill_(1)  # a copy
            assert torch.equal(dataset.target(index)[key], value)
    with pytest.raises(IndexError, match="is out of range for"):
        dataset[len(dataset)]
    with pytest.raises(ValueError, match=f"image_id {len(dataset)}"):
        dataset.index_of(len(dataset))


@pytest.mark.filterwarnings("ignore:.* boxes were")
def test_empty_images_and_difficult_objects(tmp_path):
    hard = dog(60, 40, 60, 40, "<difficult>1</difficult>")  # of one pixel
    hard += dog(60, 40, 59, 40, "<difficult>1</difficult>")  # without area
    root = make_devkit(tmp_path, {"a": SIZE + DOG + hard, "b": SIZE})
    for choice, expected in (
        ("keep", [[10, 5, 30, 20], [59, 39, 60, 40]]),
        ("drop", [[10, 5, 30, 20]]),
    ):
        dataset = VOCDetection(root, difficult=choice)
        assert dataset[0][1]["boxes"].tolist() == expected
        report, num_hard = dataset.report, len(expected) - 1
        assert (report.num_objects, report.num_empty_images) == (len(expected), 1)
        assert (report.num_difficult, report.num_difficult_dropped) == (num_hard, 1 - num_hard)
    empty = dataset[-1][1]
    assert empty.pop("image_id") == 1
    assert [tuple(column.shape) for column in empty.values()] == [(0, 4), (0,), (0,)]


def test_years_are_joined_and_the_parent_of_vocdevkit_is_accepted(tmp_path):
    devkit = make_devkit(tmp_path / "VOCdevkit", {"a": SIZE + DOG})
    make_devkit(devkit, {"a": SIZE, "c": SIZE}, year="2012")
    for root in (tmp_path, devkit):
        dataset = VOCDetection(root, ((2007, "trainval"), ("2012", "trainval")))
        assert dataset.names == ["VOC2007/a", "VOC2012/a", "VOC2012/c"]
        assert [year for year, _ in dataset.image_sets] == ["2007", "2012", "2012"]
        assert [len(dataset[i][1]["boxes"]) for i in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("present", "lines", "names"),
    [
        (["a", "b", "c"], "a  1\n\n b -1 \nc  0\n", ["a", "c"]),
        (["a", "b", "c"], "\ufeffa\r\nb\r\nc", ["a", "b", "c"]),
        (["a"], "a 1\nb -1", ["a"]),
        (["cam1/a", "cam2/a"], "cam1/a\ncam2\\a 1", ["cam1/a", "cam2/a"]),
        (["a 0", "a 1", "my dogs/a 1"], "a 0\na 1\nmy dogs/a 1", ["a 0", "a 1", "my dogs/a 1"]),
        (["img 7", "img 8", "a  b"], "img 7 1\nimg 8 -1\na  b", ["img 7", "a  b"]),
    ],
)
def test_split_files(tmp_path, present, lines, names):
    """With flags, as Windows' editors write them, with subfolders and blanks in names."""
    root = make_devkit(tmp_path, dict.fromkeys(present, SIZE), split=lines)
    dataset = VOCDetection(root)
    assert dataset.names == [f"VOC2007/{name}" for name in names]
    images = [root / f"VOC2007/JPEGImages/{name}.jpg" for name in names]
    assert [dataset.image_path(index) for index in range(len(dataset))] == images


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".png", "PNG"), (".PNG", "PNG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".JPEG", "JPEG"),
        (".jpg", "PNG"), (".png", "JPEG"), (".bmp", "BMP"), (".Tif", "TIFF"), (".webp", "WEBP"),
    ],
)  # fmt: skip
def test_images_of_other_formats(tmp_path, suffix, form, on_error):
    """Whatever they are called; an annotation's suffix may be in capitals, too."""
    folder = make_devkit(tmp_path, {"x.y": SIZE + DOG}) / "VOC2007"
    (folder / "JPEGImages/x.y.jpg").unlink()
    (folder / "JPEGImages/x.y.txt").touch()
    path = folder / f"JPEGImages/x.y{suffix}"
    Image.fromarray(NOISE).save(path, form)
    (folder / "Annotations/x.y.xml").rename(folder / "Annotations/x.y.XML")
    dataset = VOCDetection(tmp_path, on_error=on_error)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), pixels)
    assert dataset.image_path(0) == path


DOGS = "<annotation>" + DOG.replace("dog", "{}") + "</annotation>"
XML = '<?xml version="1.0" encoding="{}"?>\n'


@pytest.mark.parametrize(
    ("name", "head", "encoding"),
    [
        ("猫", "", "utf-8"),
        ("猫", XML.format("UTF-8"), "utf-8-sig"),
        ("猫", XML.format("utf8"), "utf-8"),
        ("猫", XML.format("utf-16"), "utf-16"),
        ("猫", XML.format("gb2312"), "gb2312"),
        ("猫", "<?xml version='1.0' encoding='GBK' ?>", "gbk"),
        ("ネコ", XML.format("Shift_JIS"), "shift_jis"),
        ("고양이", XML.format("euc-kr"), "euc-kr"),
        ("café", XML.format("ISO-8859-1"), "latin-1"),
        ("dog", '<!DOCTYPE annotation SYSTEM "file:///dev/zero">', "utf-8"),  # which is not read
        ("dog", "<!-- made by x --><?x y?>", "utf-8"),
    ],
)
def test_encodings(tmp_path, name, head, encoding):
    text = head + DOGS.format(name)
    dataset = VOCDetection(make_devkit(tmp_path, {"a": text.encode(encoding)}), classes=[name])
    assert dataset.target(0)["boxes"].tolist() == [[10, 5, 30, 20]]


NO, YES = ("", "0", "0.0", "False", "no", "Unspecified", "None"), (" 1 ", "1.0", "True", "yes")


@pytest.mark.parametrize(
    ("old", "new", "difficult"),
    [
        *(("</name>", f"</name><difficult>{word}</difficult>", word in YES) for word in NO + YES),
        *((f"<{tag}>", f"<{tag} xmlns='x'>", False) for tag in ("annotation", "object", "bndbox")),
        ("<name>", f"<part><name>head</name>{dog(1, 2, 3, 4)}</part><name>", False),
    ],
)
def test_difficult_in_words_namespaces_and_parts(tmp_path, old, new, difficult):
    text = f"<annotation>{SIZE}{DOG}</annotation>".replace(old, new)
    target = VOCDetection(make_devkit(tmp_path, {"a": text.encode()})).target(0)
    assert target["boxes"].tolist() == [[10, 5, 30, 20]]
    assert target["difficult"].tolist() == [difficult]


# How each writes the object that covers the columns x to x + w - 1, counted from 0.
WRITERS = {
    "1-inclusive": lambda x, w: (x + 1, x + w),  # pixels as MATLAB counts them
    "0-inclusive": lambda x, w: (x, x + w - 1),  # pixels as NumPy counts them
    "0-exclusive": lambda x, w: (x, x + w),  # its edges
    "1-exclusive": lambda x, w: (x + 1, x + w + 1),
}


def write_boxes(root, corners, boxes):
    """Write x, y, width, height in the way of these corners."""
    write = WRITERS[corners]
    pairs = [(write(x, w), write(y, h)) for x, y, w, h in boxes]
    body = "".join(dog(x1, y1, x2, y2) for (x1, x2), (y1, y2) in pairs)
    return make_devkit(root, {"a": SIZE + body})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("corners", WRITERS)
def test_boxes_equal_themselves_whatever_their_corners(tmp_path, corners):
    boxes = torch.tensor([[0, 0, 8, 8], [52, 32, 8, 8], [20, 10, 8, 8], [0, 0, 60, 40]])
    root = write_boxes(tmp_path, corners, boxes.tolist())
    read = VOCDetection(root, corners=corners).target(0)["boxes"]
    expected = torchvision.ops.box_convert(boxes.float(), "xywh", "xyxy")
    assert torchvision.ops.box_iou(read, expected).diagonal().tolist() == [1] * 4


@pytest.mark.parametrize("assumed", CORNERS)
@pytest.mark.parametrize("true", WRITERS)
@pytest.mark.parametrize("seed", range(3))
def test_corners_that_seem_wrong_are_told(tmp_path, true, assumed, seed):
    """Boxes drawn at random, beyond the edges too, and cut off there as programs do."""
    rng, size = np.random.default_rng(seed), (60, 40)
    first = rng.integers(-9, (55, 35), (40, 2))
    low, high = first.clip(0), (first + rng.integers(10, 25, (40, 2))).clip(0, size)
    root = write_boxes(tmp_path, true, np.hstack([low, high - low]).tolist())
    whole = [WRITERS[way](0, 60) for way in (true, assumed)]
    is_beyond = whole[0][0] < whole[1][0] or whole[0][1] > whole[1][1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = VOCDetection(root, corners=assumed).report.corners
    assert [warning.filename for warning in caught] == [__file__] * is_beyond
    told = f"corners='{assumed}'.* {found.num_below_1} boxes .*; {true} fits best"
    assert all(re.search(told, str(warning.message)) for warning in caught)
    starts, ends = (low == 0).any(axis=1).sum(), (high == size).any(axis=1).sum()
    assert found == (
        starts * true.startswith("0"),
        (high - size == {"0-inclusive": 1, "1-exclusive": -1}.get(true, 0)).any(axis=1).sum(),
        ends * (true == "1-exclusive"),
        true,
    )


@pytest.mark.parametrize(
    ("corners", "assumed", "fitting"),
    [
        ([(2, 2, 59, 39), (5, 3, 40, 20)], "1-inclusive", "1-inclusive"),  # nothing is known
        ([(2, 2, 59, 39), (5, 3, 40, 20)], "0-exclusive", "0-exclusive"),
        ([(0, 5, 8, 13)], "1-inclusive", "0-exclusive"),
        ([(0.25, 5.5, 59.75, 13)], "1-inclusive", "0-exclusive"),
        ([(1, 5, 61, 13)], "1-inclusive", "1-exclusive"),
        ([(5, 5, 61, 13)], "1-inclusive", "1-exclusive"),
        ([*[(1, 1, 60, 40)] * 9, (0, 3, 7, 9), (3, 3, 61, 9)], "1-inclusive", "1-inclusive"),
        ([(-3, 5, 70, 13)], "1-inclusive", "1-inclusive"),
        ([], "1-inclusive", "1-inclusive"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* boxes were")
def test_evidence_of_few_boxes(tmp_path, corners, assumed, fitting):
    """Without any what is assumed stays; nor is it given up for single boxes among many."""
    root = make_devkit(tmp_path, {"a": SIZE + "".join(dog(*box) for box in corners)})
    assert VOCDetection(root, corners=assumed).report.corners.fitting == fitting


def test_classes_and_transforms_can_be_given(tmp_path):
    root = make_devkit(tmp_path, {"a": SIZE + DOG})
    dataset = VOCDetection(root, classes=("cat", "dog"), transforms=lambda i, t: (i[:, :7], t))
    image, target = dataset[0]
    assert image.shape == (3, 7, 60)
    assert target["labels"].tolist() == [2]


@pytest.mark.parametrize(
    "size",
    [
        SIZE, "", "<size/>", "<size><width/><height/></size>",
        *(f"<size><width>{side}</width><height>{side}</height></size>" for side in ("0", "None")),
        "<size><width>60.0</width><height> 40 </height></size>",
    ],
)  # fmt: skip
def test_boxes_are_clipped_or_dropped_with_one_warning(tmp_path, size):
    """By the size that the annotation says, or else the image's."""
    bodies = {
        "a": size + DOG + dog(0, -3, 30.5, 45.75),
        "b": size + dog(61, 1, 70, 9) + dog(20, 9, 19, 20) + dog(1, 41, 9, 80),
    }
    root = make_devkit(tmp_path, bodies)
    with pytest.warns(UserWarning, match="boxes were") as caught:
        dataset = VOCDetection(root)
    assert [warning.filename for warning in caught] == [__file__]
    for told in ("1 of 5", "a.xml", "3 of 5", "b.xml", "61, 1, 70, 9 in 60 x 40"):
        assert told in str(caught[0].message)
    assert dataset[0][1]["boxes"].tolist() == [[10.0, 5.0, 30.0, 20.0], [0.0, 0.0, 30.5, 40.0]]
    report = dataset.report
    assert (report.num_objects, report.num_clipped, report.num_without_area) == (2, 1, 3)


coordinates = st.integers(-40, 4000).map(lambda n: n / 8) | st.integers(-5, 500).map(float)
corners = st.tuples(*[coordinates] * 4)
objects = st.builds(VOCObject, st.sampled_from(VOC_CLASSES), corners, st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(objects, max_size=4))
def test_annotations_survive_writing_and_reading(tmp_path_factory, objects):
    """What is written is one-based, as torchvision's reader of the shapes shows above."""
    path = tmp_path_factory.mktemp("xml") / "a.xml"
    annotation = VOCAnnotation("a & <b>.jpg", 60, 40, tuple(objects))
    write_annotation(path, annotation)
    assert read_annotation(path) == annotation
