"""Thousands of broken files: each is read, or refused by an error that names it.

No other exception, no case that takes long, none that takes much memory; every case is a function
of its number, which a failure tells.
"""

from __future__ import annotations

import json
import random
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from fuzz import (
    NUMBERS,
    XML,
    YAML_BOMBS,
    break_bytes,
    break_image,
    break_jpeg,
    break_values,
    break_xml,
    good_image,
    limits,
    time_limit,
    zigzag,
)
from safetensors.torch import save as save_safetensors
from tiny import SETTINGS

from detmix.data import CocoDetection, VOCDetection
from detmix.data.images import read_image_size
from detmix.pictures.metrics import read_metrics
from detmix.pretrained.read_state import read_weight_file
from detmix.training import PretrainConfig, TrainConfig, load_checkpoint, load_detector, parse_args
from detmix.training.build import build_model

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
# How many cases of each kind by default, and of the long test.
KINDS = {
    "xml": (100, 3200),
    "jpeg": (60, 3000),
    "split": (20, 500),
    "image": (40, 1000),
    "coco": (40, 1000),
    "config": (12, 400),
    "metrics": (40, 1000),
    "checkpoint": (40, 1000),
    "weights": (10, 200),
    "detector": (0, 60),
}
VALUES = (
    None, True, 0, -1, 0.5, 7, 1e300, float("nan"), float("inf"), 10**400, 2**63, "", "x", "\0",
    "../x", "/etc/passwd", "\ud800", "1", [], {}, [[]], [1, 2, 3, 4], [None], {"a": 1},
    ["x"] * 1000, [1e308] * 4, "a" * 10_000,
)  # fmt: skip
TEXTS = (
    "null", "~", "yes", "-1", "1e400", ".nan", ".inf", "[]", "{}", "[1, [2]]", "*a", "&a x",
    "!!x 1", "!!python/object/apply:os.system ['false']", "!!python/name:os.system",
    "!!binary aGk=", "2020-01-01", "'", '"', "|", "? a", "{class_path: os.system}",
    "{class_path: calendar.Calendar, init_args: {firstweekday: 3}}", "[" * 3000, "{a: " * 2000,
    "[" * 990 + "]" * 990, "- " * 500, "\t", "\x00", "\x85", "1:1:1", "0o7", "=", "<<", "@x", "`",
    "9" * 5000, "x" * 100_000, "/dev/zero", "[/dev/zero]", "{<<: [{a: 1}, {b: 2}]}",
    "!!timestamp x", "[" * 50_000 + "]" * 50_000, "1:" * 500 + "1.", "0x_",
)  # fmt: skip
# Of whole files, at the end of a configuration.
BOMBS = (
    *YAML_BOMBS, ["a: &a {b: *a}"], ["config: /dev/zero"], ["__path__: /dev/zero"],
    ["data.coco: /dev/zero"], ["__default_config__: [/dev/zero]"], ["optim: {__path__: /dev/zero}"],
)  # fmt: skip


def voc(root, rng, xml=None, image=None, split=b"a\n"):
    """Write a devkit of one image; return what reads all of it."""
    folder = root / "VOC2007"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "Annotations/a.xml").write_bytes(XML if xml is None else xml)
    (folder / "JPEGImages/a.jpg").write_bytes(good_image(rng) if image is None else image)
    (folder / "ImageSets/Main/trainval.txt").write_bytes(split)

    def read():
        dataset = VOCDetection(root, on_error="skip" if rng.random() < 0.2 else "raise")
        return [dataset[index] for index in range(len(dataset))]

    return read


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


def split(root, rng):
    names = (
        "../a",
        "/etc/passwd",
        "a",
        "a 1",
        "a\0",
        "b",
        "..",
        "\\\\x\\a",
        "é",
        "a" * 300,
        "a -1 1",
    )
    lines = "\n".join(rng.choice(names) for _ in range(rng.randrange(4))).encode()
    data = break_bytes(lines + b"a 1\n", rng) if rng.random() < 0.7 else lines
    return voc(root, rng, split=data), "VOC2007"


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
    root.mkdir(parents=True, exist_ok=True)
    content = break_values(coco_content(), rng, VALUES, 0 if image else rng.choice((1, 1, 2, 4)))
    first = coco_content()["annotations"][0]
    if image is None and rng.random() < 0.1:
        polygon = zigzag(rng.choice((3, 20, 300)), rng.choice((20, 1e4, 1e6)))
        content = coco_content()
        content["annotations"][0] = first | {"segmentation": [polygon] * rng.choice((1, 10))}
    elif image is None and rng.random() < 0.1:
        content = coco_content()
        rng.choice((content["annotations"], content["images"])).append({**first, "file_name": "x"})
    data = json.dumps(content).encode(errors="replace")
    if image is None and rng.random() < 0.3:
        data = break_bytes(data, rng)
    (root / "instances.json").write_bytes(data)
    (root / "a.png").write_bytes(image or good_image(rng, "PNG"))
    options = {"masks": rng.random() < 0.5, "keypoints": rng.random() < 0.5}
    options["on_error"] = "skip" if rng.random() < 0.2 else "raise"

    def read():
        dataset = CocoDetection(root, root / "instances.json", **options)
        return [dataset[index] for index in range(len(dataset))]

    return read, str(root)


def image(root, rng):
    data = break_image(rng) or b"x"
    read, name = coco(root, rng, data)
    return (read, name) if rng.random() < 0.8 else (lambda: read_image_size(root / name), name)


def break_config(text, rng):
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        number = rng.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        match rng.randrange(6):
            case 0:
                del lines[number]
                lines = lines or [""]
            case 1:
                lines.insert(number, rng.choice(lines))
            case 2:
                lines += rng.choice(BOMBS)
            case _ if colon:
                lines[number] = f"{key}: {rng.choice((*TEXTS, *NUMBERS))}"
    data = "\n".join(lines).encode(errors="replace")
    return break_bytes(data, rng) if rng.random() < 0.3 else data


def config(root, rng):
    path = rng.choice(CONFIGS)
    (root / "config.yaml").write_bytes(break_config(path.read_text(), rng))
    kind = PretrainConfig if path.parent.name == "pretrain" else TrainConfig
    return lambda: parse_args(kind, ["--config", str(root / "config.yaml")]), "config.yaml"


def metrics(root, rng):
    lines = [
        {"event": "train", "step": 1, "epoch": 0.5, "loss": 3.5, "lr": 0.1},
        {"event": "eval", "step": 2, "epoch": 1.0, "mean_ap": 0.25, "ap50": None, "seconds": 2.0},
    ]
    text = rng.choice([t for t in (*NUMBERS, *TEXTS) if t.strip()])
    data = "\n".join(map(json.dumps, lines)).replace("2", text).encode()
    path = root / "metrics.jsonl"
    path.write_bytes(break_bytes(data, rng))
    return lambda: read_metrics(path), "metrics.jsonl"


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


@cache
def detector_state():
    """Return what the checkpoint of a tiny detector holds, with other tensors."""
    config = parse_args(TrainConfig, ["--config", json.dumps(SETTINGS)])
    model = build_model(config, load_weights=False)
    return {
        "format": 1,
        "model": dict.fromkeys(model.state_dict(), torch.zeros(1)),
        "config": config.as_dict(),
        "classes": list(config.data.class_names),
    }


def detector(root, rng):
    whole = detector_state()
    changed = json.loads(json.dumps({key: whole[key] for key in ("format", "config", "classes")}))
    values = tuple(v for v in VALUES if not isinstance(v, str) or v.isascii())
    changed = break_values(changed, rng, values, rng.choice((1, 1, 2)))
    if isinstance(changed, dict):
        changed |= rng.choice(({}, {"model": whole["model"]}, {"model": 5}, {"model": {1: 2}}))
    torch.save(changed, root / "last.pt")
    return lambda: load_detector(root / "last.pt"), "last.pt"


MAKE = {name: globals()[name] for name in KINDS}


def result_of(call, name):
    """Return "read", "refused", or what is wrong with how a file was refused."""
    try:
        with time_limit():
            call()
    except (ValueError, OSError) as error:
        return "refused" if name in str(error) else f"{name} is not named by {error!r}"
    except Exception as error:
        return repr(error)
    return "read"


def run_cases(kind, folder, numbers):
    """Run cases and return how many were read, and how many refused."""
    counts = {"read": 0, "refused": 0}
    for number in numbers:
        rng = random.Random(f"{kind} {number}")
        call, name = MAKE[kind](folder, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = result_of(call, name)
        assert outcome in counts, f"{kind} {number}: {outcome}"
        counts[outcome] += 1
    return counts


@pytest.mark.parametrize("kind", [kind for kind, (few, _) in KINDS.items() if few])
def test_broken_files_are_read_or_refused(kind, tmp_path):
    few = KINDS[kind][0]
    with limits():
        counts = run_cases(kind, tmp_path, range(few))
    assert counts["refused"] >= few // 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_broken_files(kind, tmp_path):
    assert sum(many for _, many in KINDS.values()) >= 10_000
    first, many = KINDS[kind]
    with limits():
        counts = run_cases(kind, tmp_path, range(first, first + many))
    print(f"{kind}: {counts}")
    assert counts["refused"] >= many // 10
