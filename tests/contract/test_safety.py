"""Files from elsewhere are data only: none runs code, opens another file or fills the memory."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from data_files import box_object, make_devkit, write_coco
from fuzz import DOCTYPES, XML, limits, time_limit, zigzag
from PIL import Image

from detmix.commands import evaluate
from detmix.data import CocoDetection, VOCDetection
from detmix.detectors import BackboneConfig, build_backbone, load_backbone_weights
from detmix.evaluation import score_predictions
from detmix.training import TrainConfig, load_checkpoint, load_detector, parse_args
from detmix.training.checkpoint import load_newest


@pytest.fixture
def devkit(tmp_path):
    return make_devkit(tmp_path / "devkit", {"a": XML.decode()}) / "VOC2007"


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_malicious(path, how, touched):
    """Write a checkpoint that makes a file when it is unpickled."""
    bad = Malicious(touched)
    state = {"format": 1, "model": bad, "config": {"detector": {}}, "classes": []}
    if how == "plain":
        path.write_bytes(pickle.dumps(state))
    elif how == "in a namespace":
        torch.save({**state, "model": {}, "args": argparse.Namespace(a=bad)}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "archive")


READERS = {
    "checkpoint": load_checkpoint,
    "detector": load_detector,
    "backbone": lambda path: load_backbone_weights(torchvision.models.resnet18(), path),
    "build": lambda path: build_backbone(BackboneConfig("resnet18", str(path))),
    "evaluate": lambda path: evaluate.main([str(path)]),
    "resume": lambda path: load_newest(path.parent),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("reader", "how", "name"),
    [(reader, "archive", "last.pt") for reader in READERS]
    + [("checkpoint", how, "last.pt") for how in ("old format", "plain", "in a namespace")]
    + [("backbone", "plain", "a.safetensors")],
)
def test_code_is_not_run(tmp_path, reader, how, name):
    path, touched = tmp_path / name, tmp_path / "touched"
    write_malicious(path, how, touched)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        READERS[reader](path)
    assert not touched.exists()
    if how == "plain":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert touched.exists(), "it would have run"


CALL = {"class_path": "subprocess.Popen", "init_args": {"args": "mkdir made", "shell": True}}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"detector": CALL}),
        json.dumps({"detector": {"options": {"rpn_nms_thresh": CALL}}}),
        "seed: !!python/object/apply:os.mkdir [made]",
        "optim: pipe",
        "config: [pipe]",
    ],
)
def test_configurations_run_and_open_nothing(tmp_path, monkeypatch, text):
    """Alone or in a checkpoint."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("a.yaml").write_text(text)
    with limits(), time_limit(), pytest.raises(ValueError, match=r"a\.yaml"):
        parse_args(TrainConfig, ["--config", "a.yaml"])
    if "!!" in text:
        with pytest.raises(ValueError, match="python/"):
            parse_args(TrainConfig, [f"--{text.replace(': ', '=')}"])
    else:
        config = {"detector": {}} | yaml.safe_load(text)
        torch.save({"format": 1, "model": {}, "classes": [], "config": config}, "last.pt")
        with limits(), time_limit(), pytest.raises(ValueError, match=r"last\.pt"):
            load_detector("last.pt")
    time.sleep(0.1)
    assert not Path("made").exists()


class TestNames:
    """None leads out of a data set's folders, or is merely left out."""

    @pytest.mark.parametrize(
        "name",
        [
            "../secret",
            "/etc/passwd",
            "..",
            ".",
            "a/../../secret",
            "..\\secret",
            "a\\..\\..\\secret",
            "\\secret",
            "../secret 1",
            "C:/secret",
            "a\0",
        ],
    )
    def test_in_lists(self, devkit, name):
        Image.new("RGB", (60, 40)).save(devkit / "secret.jpg")
        (devkit / "secret.xml").write_bytes(XML)
        (devkit / "ImageSets/Main/trainval.txt").write_text(f"a\n{name}\n")
        with pytest.raises(ValueError, match=rf"trainval\.txt, line 2: .*{re.escape(repr(name))}"):
            VOCDetection(devkit.parent, on_error="skip")

    @pytest.mark.parametrize(
        "name",
        ["../b.png", "/etc/passwd", "a/../../b.png", "a\0.png", "..\\b.png", "\\etc\\passwd"],
    )
    def test_in_coco_files(self, tmp_path, name):
        folder, path = write_coco(tmp_path, [box_object()])
        Image.new("RGB", (60, 40)).save(tmp_path / "b.png")
        path.write_text(path.read_text().replace('"a.jpg"', json.dumps(name)))
        with pytest.raises(ValueError, match=r"instances\.json, image 1: .*file_name"):
            CocoDetection(folder, path, on_error="skip")

    def test_in_annotations(self, devkit):
        """The image is the one beside the annotation, whatever the annotation says."""
        expected = VOCDetection(devkit.parent)[0][0]
        Image.new("RGB", (8, 8)).save(devkit / "JPEGImages/b.jpg")
        (devkit / "Annotations/a.xml").write_bytes(XML.replace(b"a.jpg", b"b.jpg"))
        assert torch.equal(VOCDetection(devkit.parent)[0][0], expected)


@pytest.mark.parametrize("doctype", DOCTYPES)
def test_entities_are_refused(devkit, doctype):
    text = XML.decode().replace("<annotation>", doctype + "<annotation>")
    (devkit / "Annotations/a.xml").write_text(text.replace("dog", "&l9;"))
    with limits(), time_limit(), pytest.raises(ValueError, match=r"a\.xml"):
        VOCDetection(devkit.parent, classes=["person", "dog"])


@pytest.mark.parametrize("shape", [(20, 1e6), (60_000, 20)])
def test_outlines_that_would_fill_the_memory_are_refused(tmp_path, shape):
    folder, path = write_coco(tmp_path, [box_object(segmentation=[zigzag(*shape)])])
    (tmp_path / "found.json").write_text("[]")
    with limits(), time_limit():
        with pytest.raises(ValueError, match=r"instances\.json, annotation 1 "):
            CocoDetection(folder, path, masks=True)
        with pytest.raises(ValueError, match=r"instances\.json"):
            score_predictions(tmp_path / "found.json", path, iou_type="segm")
