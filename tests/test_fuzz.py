"""Broken files of data and weights: each is read, or a ValueError or OSError names it.

No other exception; every case is a function of its number, which a failure tells.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from data_files import CATEGORIES, POINTS, box_object, image_entry, make_devkit
from fuzz import XML, time_limit
from PIL import Image
from safetensors.torch import save as save_safetensors

from detmix.data import CocoDetection, VOCDetection
from detmix.data.images import read_image_size
from detmix.pretrained.read_state import read_weight_file

VALUES = (
    None, True, 0, -1, 0.5, 7, 1e300, float("nan"), float("inf"), 10**400, 2**63, "", "x", "\0",
    "../x", "\ud800", [], {}, [[]], [1, 2, 3, 4], [None], {"a": 1}, ["x"] * 1000, "a" * 10_000,
    "1e400", "-inf", "9" * 400, "0x10", "1_0", "١٢", "7,5", "½", "\u00a0", "&lol;",
)  # fmt: skip
STATE = {
    "format": 1,
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(3)},
    "config": {},
    "classes": ["a", "b"],
}
CROWD = {"segmentation": {"size": [40, 60], "counts": [1200, 600, 600]}, "iscrowd": 1}
COCO = {
    "images": [image_entry(name="a.png")],
    "annotations": [box_object(keypoints=POINTS), box_object(2, category_id=18, **CROWD)],
    "categories": CATEGORIES,
}


def break_bytes(data, rng):
    """Flip bits, cut off, cut out, double or overwrite bytes."""
    broken = bytearray(data)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 2, 8, 100)))
    match rng.randrange(5):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        case 2:
            del broken[start:]
        case 3:
            broken[start:end] = broken[start:end] * rng.choice((0, 2, 1000))
        case _:
            broken[start:end] = rng.choice((b"\0", b"\xff", b"<", b"&", b"\xc3(")) * (end - start)
    return bytes(broken) or b"x"


def places(value):
    """Yield each container within nested dicts and lists, with a key of it."""
    items = value.items() if isinstance(value, dict) else ()
    for key, item in list(enumerate(value) if isinstance(value, list) else items):
        yield value, key
        yield from places(item)


def break_values(value, rng):
    """Drop, rename or replace entries anywhere in nested dicts and lists."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        container, key = rng.choice(list(places(value)) or [({"a": 1}, "a")])
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(("x", "", "name", "id"))] = container.pop(key)
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def good_image(rng, kind):
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (40, 60, 3), np.uint8)
    modes = {"GIF": ("P",), "PNG": ("P", "RGBA", "1"), "JPEG": ("RGB", "L", "CMYK")}
    file = io.BytesIO()
    Image.fromarray(pixels).convert(rng.choice(modes.get(kind, ("RGB",)))).save(file, kind)
    return file.getvalue()


def xml(root, rng):
    make_devkit(root, {"a": ""})

    def broken(part):
        return f">{rng.choice(VALUES)}<" if rng.random() < 0.07 else part[0]

    name = rng.choice(("utf-8",) * 9 + ("utf-16", "cp037", "utf-7"))
    text = re.sub(r">[\w.]+<", broken, XML.decode().replace("UTF-8", name))
    text = text.replace(rng.choice(("size", "xmin", "bndbox", "name", *["?"] * 4)), "x")
    data = text.encode(name, errors="ignore")
    data = break_bytes(data, rng) if rng.random() < 0.3 else data
    (root / "VOC2007/Annotations/a.xml").write_bytes(data)
    return lambda: VOCDetection(root)[0], "a.xml"


def open_coco(root, data, image, **options):
    (root / "instances.json").write_bytes(data)
    (root / "a.png").write_bytes(image)
    return lambda: CocoDetection(root, root / "instances.json", **options)[0]


def coco(root, rng):
    data = json.dumps(break_values(COCO, rng)).encode(errors="replace")
    data = break_bytes(data, rng) if rng.random() < 0.3 else data
    wanted = {"masks": rng.random() < 0.5, "keypoints": rng.random() < 0.5}
    return open_coco(root, data, good_image(rng, "PNG"), **wanted), str(root)


def image(root, rng):
    kind = rng.choice(("JPEG",) * 6 + ("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"))
    data = good_image(rng, kind)
    frame = data.find(b"\xff\xc0")
    if kind == "JPEG" and rng.random() < 0.5:  # has its head claim another size
        sides = [rng.choice((0, 1, 39, 41, 20_000, 65_500, 65_535)) for _ in range(2)]
        data = data[: frame + 5] + np.array(sides, ">u2").tobytes() + data[frame + 9 :]
    else:
        for _ in range(rng.choice((1, 1, 3))):
            data = break_bytes(data, rng)
    read = open_coco(root, json.dumps(COCO).encode(), data)
    if rng.random() < 0.2:
        read = lambda: read_image_size(root / "a.png")  # noqa: E731
    elif rng.random() < 0.2:  # as with a torchvision that has no decoders any more
        read = mock.patch("detmix.data.images.decode_jpeg", None)(read)
    return read, "a.png"


def weights(root, rng):
    path = root / rng.choice(("a.pt", "a.safetensors"))
    if path.suffix == ".pt":
        torch.save(STATE, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    else:
        path.write_bytes(save_safetensors(STATE["model"]))
    path.write_bytes(break_bytes(path.read_bytes(), rng))
    return lambda: read_weight_file(path), path.name


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
    [(xml, 100), (image, 100), (coco, 60), (weights, 40)],
)
def test_broken_files_are_read_or_refused(make, number, tmp_path):
    results = []
    for case in range(number):
        results.append(result_of(*make(tmp_path, random.Random(f"{make.__name__} {case}"))))
        assert results[-1] in ("read", "refused"), f"case {case}: {results[-1]}"
    assert results.count("refused") >= number // 10


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """Read, a file is as large in memory as on the disk."""
    sizes = [2**20, *[1000] * 98]
    torch.save({str(i): torch.zeros(size) for i, size in enumerate(sizes)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        first, *others = [i for i in archive.infolist() if "/data/" in i.filename]
        for info in others:
            info.header_offset = first.header_offset
            info.file_size = info.compress_size = first.file_size
        archive.writestr(zipfile.ZipInfo("b"), "")  # has the directory written again
    with pytest.raises(ValueError, match=r"a\.pt is broken: its entries are larger"):
        read_weight_file(tmp_path / "a.pt")
