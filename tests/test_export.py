"""An exported file finds what the detector finds, in images of any size, or is not written."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from builders import FAMILIES, shake, small
from PIL import Image
from runs import command, succeed

import detmix
from detmix.data.images import read_upright
from detmix.training import Detector

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Of some, torchvision's own export resizes to a pixel less: 58 * float32(64 / 58) < 64.
SIZES = [(58, 70), (123, 71), (40, 140), (77, 77)]


def run_file(path, image):
    """Return what a file finds, by name, and what it says about itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        outputs = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
        about = session.get_modelmeta().custom_metadata_map
        return dict(zip([each.name for each in session.get_outputs()], outputs, strict=True)), about
    about = {"classes": "", "image": ""}
    _, (found,) = torch.jit.load(path, _extra_files=about)([image])
    return found, {key: text.decode() for key, text in about.items()}


def assert_same(found, expected):
    """Compare whatever the order of detections, which nearly equal scores leave open."""
    assert found.keys() == expected.keys()
    assert len(found["boxes"]) == len(expected["boxes"]) > 0
    rows = [torch.cat([each["boxes"], each["labels"][:, None]], 1) for each in (expected, found)]
    nearest = torch.cdist(*rows).argmin(1)
    assert len(nearest.unique()) == len(nearest)
    for key, value in expected.items():
        torch.testing.assert_close(found[key][nearest], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, form, tmp_path, monkeypatch):
    model = shake(copy.deepcopy(small(name))).eval()
    detector = Detector(model, [*"abcd"], size=96, device="cpu")
    monkeypatch.setattr("detmix.commands.export.load", lambda *_: detector)
    reference = copy.deepcopy(model)
    out, _ = succeed("export", tmp_path / "best.pt", "--format", form)
    (path,) = tmp_path.iterdir()
    assert path.name == f"best.{form}"
    assert float(re.search(r"by (\S+)", out)[1]) < 1e-4
    for size in SIZES:
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size)))
        found, about = run_file(path, image)
        with torch.no_grad():
            assert_same(found, reference([image])[0])
    assert about["classes"].split() == [*"abcd"]
    assert "96" in about["image"]
