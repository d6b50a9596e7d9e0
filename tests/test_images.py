"""Decoding images: against Pillow, and what is refused; broken ones are in test_fuzz.py."""

from __future__ import annotations

import io
import struct
import zlib
from unittest import mock

import numpy as np
import pytest
from fuzz import limits, time_limit
from PIL import EpsImagePlugin, Image

from detmix.data.images import read_image, read_image_size


def encoded(kind="jpeg", mode="RGB", height=33, width=47, **options):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def with_size(data, width, height):
    """Have the head of a JPEG claim another size."""
    start = data.find(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


TURNED = Image.Exif()
TURNED[0x0112] = 6  # rotate by 90 degrees to display
BOMB = with_size(encoded(), 65_500, 65_500)  # 12.9 GB of pixels in a few thousand bytes


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("P", "png", {}), ("RGBA", "png", {}), ("1", "png", {}), ("RGBA", "webp", {}),
        ("L", "bmp", {}), ("P", "gif", {}), ("RGB", "jpeg", {"exif": TURNED}), ("CMYK", "jpeg", {}),
        ("L", "jpeg", {"comment": BOMB}), ("RGB", "jpeg", {"progressive": True}),
    ],
)  # fmt: skip
def test_pixels_are_pillows(tmp_path, mode, kind, options):
    """Whatever a file is called; the EXIF orientation is not applied."""
    data = encoded(kind, mode, **options)
    (tmp_path / "a.jpg").write_bytes(data)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    image = read_image(tmp_path / "a.jpg")
    tolerance = 2 if kind == "jpeg" else 0
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=tolerance)
    assert read_image_size(tmp_path / "a.jpg") == (33, 47)
    with mock.patch("detmix.data.images.decode_jpeg", None):  # a torchvision without decoders
        other = read_image(tmp_path / "a.jpg")
    np.testing.assert_array_equal(other.permute(1, 2, 0).numpy(), expected)


def test_sixteen_bits(tmp_path):
    values = np.arange(0, 65536, 1000, dtype=np.uint16)[None]
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0], values >> 8)


HEAD = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + HEAD + struct.pack(">I", zlib.crc32(HEAD))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (BOMB, "4290250000 pixels"),
        (PNG + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4, "bomb"),
        (EPS, "not an image"),  # Pillow would hand it to Ghostscript, an interpreter
    ],
)
def test_refused(tmp_path, monkeypatch, data, named):
    """Decoded or asked for its size, without taking memory or running anything."""
    run = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for call in (read_image, read_image_size):
        with limits(), time_limit(), pytest.raises(ValueError, match=rf"{path}: .*{named}"):
            call(path)
    assert not run.called
