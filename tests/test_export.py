"""An exported file finds what the detector finds, in images of any size, or is not written."""

from __future__ import annotations

import copy
import re
from itertools import product, starmap

import pytest
import torch
from builders import FAMILIES, FASTEST, batch, build, shake, small
from PIL import Image
from runs import command, succeed
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import detmix
from detmix.training import Detector

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

FORMATS = ("onnx", "torchscript")
# Of some, torchvision's own export resizes to a pixel less: 58 * float32(64 / 58) < 64.
SIZES = [(58, 70), (123, 71), (40, 140)]


def random_detector(name):
    """Return a detector whose scores differ: the order of equal ones is anybody's."""
    model = build(name) if name == FASTEST[1] else shake(copy.deepcopy(small(name)))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0
        model(*batch())  # for its statistics
        for key, value in model.named_parameters():
            if re.search(r"cls_logits|head\.module_list", key) and value.dim() > 1:
                value.mul_({"retinanet": 300, "fcos": 30}.get(name, 1))
    return model.eval()


def run_file(path, image):
    """Return what a file finds, by name, and what it says about itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        outputs = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
        names = [output.name for output in session.get_outputs()]
        about = session.get_modelmeta().custom_metadata_map
        return dict(zip(names, outputs, strict=True)), about
    about = {"classes": "", "image": ""}
    _, (found,) = torch.jit.load(path, _extra_files=about)([image])
    return found, {key: text.decode() for key, text in about.items()}


def assert_same(found, expected):
    """Compare, in whatever order, which nearly equal scores leave open."""
    assert found.keys() == expected.keys()
    assert len(found["boxes"]) == len(expected["boxes"]) > 0
    rows = [torch.cat([each["boxes"], each["labels"][:, None]], 1) for each in (expected, found)]
    nearest = torch.cdist(*rows).argmin(1)
    assert len(nearest.unique()) == len(nearest)
    for key, value in expected.items():
        torch.testing.assert_close(found[key][nearest], value, rtol=1e-4, atol=1e-3)


def slow(*case):
    """The quick ones export each format once."""
    is_quick = case in (("fasterrcnn", "onnx"), ("torchscript",))
    return pytest.param(*case, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "form"), [*starmap(slow, product(FAMILIES, FORMATS))])
def test_every_family(name, form, tmp_path, monkeypatch):
    model = random_detector(name)
    detector = Detector(copy.deepcopy(model), ["car", "hot dog"], size=96, device="cpu")
    monkeypatch.setattr("detmix.commands.export.load", lambda *_: detector)
    out, _ = succeed("export", tmp_path / "best.pt", "--format", form)
    (path,) = tmp_path.iterdir()
    assert path.name == f"best.{form}"
    assert f"{path.stat().st_size / 1e6:.1f} MB" in out
    assert float(re.search(r"by (\S+)", out)[1]) < 1e-4
    for size in SIZES:
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size)))
        found, about = run_file(path, image)
        with torch.no_grad():
            assert_same(found, model([image])[0])
    assert about["classes"].split("\n") == ["car", "hot dog"]
    assert "96" in about["image"]


@pytest.mark.parametrize("form", [*map(slow, FORMATS)])
def test_a_run_and_the_lines_that_are_printed(whole_run, shapes_root, tmp_path, monkeypatch, form):
    """With averaged weights, as `detmix.load` has them."""
    monkeypatch.chdir(tmp_path)
    photo = sorted((shapes_root / "VOC2007" / "JPEGImages").iterdir())[0]
    Image.open(photo).save("photo.png")
    args = [whole_run / "last.pt", "--format", form, "--image", "photo.png", "--out", "found"]
    out, _ = succeed("export", *args)
    lines = out[out.index("import") :].replace("photo.jpg", "photo.png")
    exec(lines, names := {})
    detector = detmix.load(whole_run / "last.pt", "cpu")
    with torch.no_grad():
        (expected,) = detector.model([pil_to_tensor(Image.open("photo.png")) / 255])
    found = names["found"]
    if form == "onnx":
        found = dict(zip(expected, map(torch.from_numpy, found), strict=True))
    assert_same(found, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", f"found.{form}"}


def differ(file, load=torch.jit.load):
    module = load(file)
    next(iter(module.state_dict().values())).add_(1)
    return module


def fail(*_):
    raise ModuleNotFoundError("spoilt")


@pytest.mark.parametrize(
    ("form", "spoilt", "by", "named"),
    [
        ("torchscript", "torch.jit.load", differ, r"best\.torchscript is not written.*differs"),
        ("torchscript", "torch.jit.script", fail, rf"{re.escape(torch.__version__)}.*spoilt"),
        ("onnx", "detmix.commands.export.import_module", fail, r"detmix\[onnx\].*spoilt"),
        ("onnx", None, None, "--image"),
    ],
)
def test_what_was_not_compared_is_not_written(
    whole_run, tmp_path, monkeypatch, form, spoilt, by, named
):
    detector = detmix.load(whole_run / "best.pt", "cpu")
    monkeypatch.setattr("detmix.commands.export.load", lambda *_: detector)
    if spoilt is None:
        detector.model.roi_heads.score_thresh = 1.0  # nothing is found
    else:
        monkeypatch.setattr(spoilt, by)
    status, _, err = command("export", tmp_path / "best.pt", "--format", form)
    assert status == 2
    assert re.search(f"^error: .*{named}.*\n\\Z", err)
    assert list(tmp_path.iterdir()) == []
