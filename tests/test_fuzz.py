"""Broken files of data and weights: each is read, or an error that names it.

No other exception; every case is a function of its number, which a failure tells.
"""

from __future__ import annotations

import json
import random
import warnings
from unittest import mock

import pytest
import torch
from fuzz import (
    XML,
    break_bytes,
    break_image,
    break_jpeg,
    break_values,
    break_xml,
    good_image,
    time_limit,
    zigzag,
)
from safetensors.torch import save as save_safetensors

from detmix.data import CocoDetection, VOCDetection
from detmix.data.images import read_image_size
from detmix.pretrained.read_state import read_weight_file
from detmix.training import load_checkpoint

VALUES = (
    None, True, 0, -1, 0.5, 7, 1e300, float("nan"), float("inf"), 10**400, 2**63, "", "x", "\0",
    "../x", "/etc/passwd", "\ud800", "1", [], {}, [[]], [1, 2, 3, 4], [None], {"a": 1},
    ["x"] * 1000, [1e308] * 4, "a" * 10_000,
)  # fmt: skip


def voc(root, rng, xml=None, image=None):
    """Write a devkit of one image; return what reads all of it."""
    folder = root / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "Annotations/a.xml").write_bytes(XML if xml is None else xml)
    (folder / "JPEGImages/a.jpg").write_bytes(good_image(rng) if image is None else image)
    (folder / "ImageSets/Main/trainval.txt").write_text("a\n")
    return lambda: VOCDetection(root)[0]


def xml(root, rng):
    return voc(root, rng, xml=break_xml(rng)), "a.xml"


def jpeg(root, rng):
    # Without a size in the annotation it is Pillow that reads the image's first.
    plain = XML if rng.random() < 0.8 else XML.replace(b"width", b"x")
    read = voc(root, rng, plain, break_jpeg(rng))
    if rng.random() < 0.8:
        return read, "a.jpg"
    # As with a torchvision that has no decoders any more.
    return mock.patch("detmix.data.images.decode_jpeg", None)(read), "a.jpg"


def coco_content():
    objects = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [11, 6, 19.5, 14.25], "area": 100.5,
         "iscrowd": 0, "segmentation": [[11.0, 6.0, 30.0, 6.5, 12.5, 20.25]],
         "keypoints": [12, 7, 2, 15.5, 8, 1]},
        {"id": 2, "image_id": 1, "category_id": 5, "bbox": [0, 0, 60, 40], "iscrowd": 1,
         "segmentation": {"size": [40, 60], "counts": [1200, 600, 600]}},
    ]  # fmt: skip
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": objects,
        "categories": [
            {"id": 3, "name": "person", "keypoints": ["left_eye", "right_eye"]},
            {"id": 5, "name": "dog"},
        ],
    }


def coco(root, rng, image=None):
    content = break_values(coco_content(), rng, VALUES, 0 if image else rng.choice((1, 1, 2, 4)))
    if image is None and rng.random() < 0.1:
        polygon = zigzag(rng.choice((3, 20, 300)), rng.choice((20, 1e4, 1e6)))
        content = coco_content()
        content["annotations"][0]["segmentation"] = [polygon] * rng.choice((1, 10))
    data = json.dumps(content).encode(errors="replace")
    if image is None and rng.random() < 0.3:
        data = break_bytes(data, rng)
    (root / "instances.json").write_bytes(data)
    (root / "a.png").write_bytes(image or good_image(rng, "PNG"))
    wanted = {"masks": rng.random() < 0.5, "keypoints": rng.random() < 0.5}

    def read():
        dataset = CocoDetection(root, root / "instances.json", **wanted)
        return [dataset[index] for index in range(len(dataset))]

    return read, str(root)


def image(root, rng):
    data = break_image(rng) or b"x"
    read, name = coco(root, rng, data)
    return (read, name) if rng.random() < 0.8 else (lambda: read_image_size(root / name), name)


def state():
    return {
        "format": 1,
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)},
        "config": {"optim": {"lr": 0.1, "clip_norm": None}, "data": {"classes": ["a", "b"]}},
        "classes": ["a", "b"],
        "position": {"step": 7, "best": None, "due": True},
    }


def checkpoint(root, rng):
    path = root / "last.pt"
    old = rng.random() < 0.3
    torch.save(state(), path, _use_new_zipfile_serialization=not old)
    path.write_bytes(break_bytes(path.read_bytes(), rng))
    return lambda: (load_checkpoint(path), read_weight_file(path)), "last.pt"


def weights(root, rng):
    path = root / "a.safetensors"
    path.write_bytes(break_bytes(save_safetensors(state()["model"]), rng))
    return lambda: read_weight_file(path), "a.safetensors"


def result_of(call, name):
    """Return "read", "refused", or what is wrong with how a file was refused."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (ValueError, OSError) as error:
        return "refused" if name in str(error) else f"{name} is not named by {error!r}"
    except Exception as error:
        return repr(error)
    return "read"


@pytest.mark.parametrize(
    ("make", "number"),
    [(xml, 100), (jpeg, 60), (image, 40), (coco, 40), (checkpoint, 40), (weights, 10)],
)
def test_broken_files_are_read_or_refused(make, number, tmp_path):
    results = []
    for case in range(number):
        results.append(result_of(*make(tmp_path, random.Random(f"{make.__name__} {case}"))))
        assert results[-1] in ("read", "refused"), f"case {case}: {results[-1]}"
    assert results.count("refused") >= number // 10
