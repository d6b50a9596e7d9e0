"""Predicting on one's own images: what evaluation finds, on whatever is given, told and written."""

from __future__ import annotations

import json
import re
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from runs import command, succeed
from torchvision.models import WeightsEnum, get_model, get_model_weights
from torchvision.transforms.functional import pil_to_tensor

import detmix
from detmix.data.loaders import eval_loader
from detmix.detectors import BackboneConfig, DetectorConfig, build_detector
from detmix.training import Detector, load_detector
from detmix.training.build import build_test_set, open_dataset
from detmix.training.inference import detect
from detmix.training.processes import make_accelerator

SSDLITE = "ssdlite320_mobilenet_v3_large"


def assert_same(found, expected):
    for key in ("boxes", "labels", "scores"):
        ours, theirs = getattr(found, key), getattr(expected, key)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def photos(shapes_root, tmp_path_factory):
    """Return a folder with images of three shapes, a broken one, a text and a subfolder."""
    folder = tmp_path_factory.mktemp("photos")
    files = sorted((shapes_root / "VOC2007" / "JPEGImages").iterdir())
    for file, name, size in (
        (files[0], "0007.png", (64, 64)),
        (files[1], "12.JPG", (64, 40)),
        (files[2], "more/3.jpg", (64, 64)),
        (files[3], "more/deep/4.jpg", (48, 64)),
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.open(file).resize(size).save(folder / name)
    (folder / "more" / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize("size", [None, 40])
def test_finds_what_evaluation_finds(whole_run, tmp_path, size):
    """With averaged weights, in images as large as in training, in the pixels of the file."""
    state = torch.load(whole_run / "last.pt", weights_only=True)
    state["config"]["augment"]["size"] = size
    torch.save(state, tmp_path / "last.pt")
    model, config = load_detector(tmp_path / "last.pt")
    dataset = open_dataset(config, train=False)
    loader = eval_loader(build_test_set(config, dataset), 3, workers=0)
    expected = detect(model, loader, make_accelerator(config), truth=dataset)
    detector = detmix.load(tmp_path / "last.pt", "cpu")
    paths = [dataset.image_path(index) for index in range(len(dataset))]
    for one, (_, other) in zip(detector.predict(paths, score=0), expected, strict=True):
        assert len(one) == len(other["boxes"]) > 0
        for key in ("boxes", "labels", "scores"):
            torch.testing.assert_close(getattr(one, key), other[key], rtol=1e-4, atol=1e-4)
        assert one.names == tuple(dataset.classes[label - 1] for label in one.labels)
        assert one.scores.tolist() == sorted(one.scores.tolist(), reverse=True)


def test_takes_whatever_an_image_is_and_others_change_nothing(whole_run, photos):
    detector = detmix.load(whole_run / "best.pt", "cpu")
    paths = [photos / name for name in ("0007.png", "12.JPG", "more/3.jpg", "more/deep/4.jpg")]
    alone = [detector.predict(path, score=0) for path in paths]
    opened = [Image.open(path) for path in paths]
    kinds = (paths, [*map(str, paths)], tuple(opened), [*map(pil_to_tensor, opened)])
    for images in kinds:
        together = detector.predict(images, score=0)
        for found, expected in zip(together, alone, strict=True):
            assert_same(found, expected)
    assert detector.predict([]) == []
    threshold = float(alone[0].scores[1])
    chosen = detector.predict(paths[0], score=threshold)
    assert chosen.scores.tolist() == [s for s in alone[0].scores.tolist() if s >= threshold]
    assert str(detector.predict(paths[0], score=1)) == "nothing"
    told = re.findall(r"(\d+) (\w+) \((\d\.\d\d)\)", str(alone[0]))
    assert {name for _, name, _ in told} == {*alone[0].names}
    for number, name, best in told:
        assert int(number) == alone[0].names.count(name)
        assert best == f"{alone[0].scores[alone[0].names.index(name)]:.2f}"


def test_a_turned_photograph_is_upright(whole_run, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photos / "12.JPG") as image:
        image.save(tmp_path / "upright.png")
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    detector = detmix.load(whole_run / "best.pt", "cpu")
    upright, turned = detector.predict([tmp_path / f"{n}.png" for n in ("upright", "turned")], 0)
    assert_same(turned, upright)


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (torch.zeros(3, 8, 8), r"images\[0\].*float32.*\(3, 8, 8\).*uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"\(8, 8, 3\)"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8).numpy(), r"images\[0\].*ndarray.*\(3, H, W\)"),
        (Image.new("F", (4, 4)), r"images\[0\].*mode F"),
        (__file__, r"images\[0\].*test_predict\.py"),
    ],
)
def test_what_is_no_image_is_named(whole_run, image, named):
    detector = detmix.load(whole_run / "best.pt", "cpu")
    with pytest.raises(ValueError, match=named):
        detector.predict(image)
    with pytest.raises(ValueError, match=r"score.*50"):
        detector.predict([], score=50)


@pytest.mark.parametrize(
    ("source", "device", "error", "named"),
    [
        ("torchvision:resnet18", None, ValueError, f"torchvision:resnet18.*{SSDLITE}"),
        ("nowhere/best.pt", None, FileNotFoundError, "nowhere/best.pt"),
        (".", None, FileNotFoundError, "folder.*best.pt"),
        (f"torchvision:{SSDLITE}", "cuda:99", ValueError, "device=cuda:99"),
        (f"torchvision:{SSDLITE}", "gpu", ValueError, "device=gpu"),
    ],
)
def test_what_cannot_be_loaded_is_named(monkeypatch, source, device, error, named):
    state = get_model(SSDLITE, weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    with pytest.raises(error, match=named):
        detmix.load(source, device)


def test_torchvisions_detectors(monkeypatch, photos):
    """With COCO's names and ids, and what the builder makes of weights."""
    torch.manual_seed(0)
    model = get_model(SSDLITE, weights=None, weights_backbone=None).eval()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: model.state_dict())
    found = detmix.load(f"torchvision:{SSDLITE}", "cpu").predict(photos / "12.JPG", score=0)
    with torch.no_grad(), Image.open(photos / "12.JPG") as image:
        (expected,) = model([pil_to_tensor(image) / 255])
    assert len(found) > 0
    torch.testing.assert_close(found.boxes, expected["boxes"])
    categories = get_model_weights(SSDLITE).DEFAULT.meta["categories"]
    assert found.names == tuple(categories[label] for label in expected["labels"])

    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    with pytest.raises(ConnectionError, match=r"no network.*https://.*\.pth"):
        detmix.load(f"torchvision:{SSDLITE}")


def test_the_tool(whole_run, photos, tmp_path, monkeypatch):
    """Files, folders and patterns, each image once; what is broken is told, the rest goes on."""
    monkeypatch.chdir(photos)
    names = ["more/3.jpg", "0007.png", "more/../12.JPG", "more/deep/4.jpg"]
    detector = detmix.load(whole_run / "best.pt", "cpu")
    score = min(float(each.scores[2]) for each in detector.predict(names, score=0))
    given = ["more", "0007.png", "more/../*.[pJ]*", "./**/deep/*.jpg", "--out", tmp_path / "a"]
    options = ["--score", score, "--device", "cpu", "--batch_size", 3]
    out, _ = succeed("predict", whole_run / "best.pt", *given, *options)
    assert [line.split()[0] for line in out.splitlines()[:-1]] == names
    pictures = {path.relative_to(tmp_path / "a").as_posix() for path in tmp_path.rglob("*.png")}
    assert pictures == {f"{name}.png".replace("more/../", "") for name in names}
    entries = json.loads((tmp_path / "a" / "predictions.json").read_text())
    for name, image_id in zip(names, (3, 7, 12, 4), strict=True):  # as the files are called
        found = detector.predict(name, score)
        own = [entry for entry in entries if entry["file_name"] == name]
        assert [entry["category_name"] for entry in own] == list(found.names)
        assert [entry["category_id"] for entry in own] == found.labels.tolist()
        assert {entry["image_id"] for entry in own} == {image_id}
        sides = torch.tensor([entry["bbox"] for entry in own])
        sides[:, 2:] += sides[:, :2]
        torch.testing.assert_close(sides, found.boxes, rtol=1e-4, atol=1e-4)

    (tmp_path / "broken.jpg").write_text("broken")
    given = [tmp_path / "broken.jpg", "0007.png", "--out", tmp_path / "b", "--score", 1]
    status, out, err = command("predict", whole_run / "best.pt", *given)
    assert status == 1
    assert str(tmp_path / "broken.jpg") in err
    assert re.search(r"^0007\.png +nothing$", out, re.MULTILINE)
    assert json.loads((tmp_path / "b" / "predictions.json").read_text()) == []
    assert len([*(tmp_path / "b").rglob("*.png")]) == 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["nowhere.jpg"], "nowhere.jpg"), (["."], r"\."), (["*.png"], r"\*\.png"),
        (["a.txt", "--score", "50"], "50"), (["a.txt", "--batch_size", "0"], "0"),
    ],
)  # fmt: skip
def test_what_the_tool_refuses_before_it_begins(tmp_path, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("")
    status, _, err = command("predict", "best.pt", *args)
    assert status == 2
    assert re.search(f"error: .*{named}", err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["maskrcnn", "keypointrcnn"])
def test_masks_and_keypoints_are_written(name, photos, tmp_path, monkeypatch):
    options = {"box_score_thresh": 0.0, "box_detections_per_img": 5}
    config = DetectorConfig(
        name, min_size=64, max_size=64, anchor_sizes=(16, 32), head_dim=16, options=options
    )
    torch.manual_seed(0)
    model = build_detector(config, BackboneConfig("resnet18", fpn_channels=8, levels=(3,)), 3)
    detector = Detector(model, ["cat", "dog"])
    monkeypatch.setattr("detmix.commands.predict.load", lambda *_: detector)
    succeed("predict", "x", photos / "12.JPG", "--out", tmp_path, "--score", 0)
    truth = COCO()
    truth.dataset = {"images": [{"id": 12, "height": 40, "width": 64}], "annotations": []}
    truth.dataset["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    truth.createIndex()
    found = truth.loadRes(str(tmp_path / "predictions.json")).dataset["annotations"]
    assert len(found) == 5
    if name == "maskrcnn":
        assert all(coco_mask.decode(entry["segmentation"]).shape == (40, 64) for entry in found)
    else:
        assert all(len(entry["keypoints"]) == 17 * 3 for entry in found)
