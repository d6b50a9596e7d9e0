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

from detmix.data.images import decode_image_bytes, read_image, read_image_size


def encoded(kind="jpeg", mode="RGB", height=33, width=47, **options):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **options)
    return file.getvalue()


def with_size(data, width, height):
    """Have the head of a JPEG claim another size."""
    start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


TURNED = Image.Exif()
TURNED[0x0112] = 6  # rotate by 90 degrees to display
LARGE_THUMBNAIL = {"comment": with_size(encoded(), 65_500, 65_500)}


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "png", {}), ("L", "png", {}), ("P", "png", {}), ("RGBA", "png", {}),
        ("1", "png", {}), ("RGB", "webp", {"lossless": True}), ("RGBA", "webp", {}),
        ("L", "bmp", {}), ("P", "gif", {}), ("L", "jpeg", {"progressive": True}),
        ("RGB", "jpeg", {"exif": TURNED}), ("CMYK", "jpeg", {"restart_marker_blocks": 1}),
        ("RGB", "jpeg", {"progressive": True, **LARGE_THUMBNAIL}), ("L", "jpeg", LARGE_THUMBNAIL),
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
    assert decode_image_bytes(data, "x").equal(image)
    with mock.patch("detmix.data.images.decode_jpeg", None):  # a torchvision without decoders
        other = decode_image_bytes(data, "x")
    np.testing.assert_array_equal(other.permute(1, 2, 0).numpy(), expected)


def test_sixteen_bits():
    values = np.arange(0, 65536, 1000, dtype=np.uint16)[None]
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    image = decode_image_bytes(file.getvalue(), "x")
    np.testing.assert_array_equal(image[0], values >> 8)


def refused(path, data, named):
    """Assert that a file is refused, decoded or asked for its size, without taking memory."""
    path.write_bytes(data)
    for call in (lambda: decode_image_bytes(data, path), lambda: read_image_size(path)):
        with limits(), time_limit(), pytest.raises(ValueError, match=rf"{path}: .*{named}"):
            call()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("before", [b"", b"\xff\xfe\0\x08\xff\xc0\0\x0b\x08\0"])
def test_a_jpeg_bomb(tmp_path, progressive, before):
    """12.9 GB of pixels in a few thousand bytes; a comment that looks like a frame is none."""
    data = with_size(encoded(progressive=progressive), 65_500, 65_500)
    refused(tmp_path / "a.jpg", data[:2] + before + data[2:], "4290250000 pixels")


def test_a_png_bomb(tmp_path):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4
    refused(tmp_path / "a.png", data, "bomb")


@pytest.mark.filterwarnings("ignore:Image size")
def test_large_images_are_decoded_if_pillow_is_told_to(monkeypatch):
    data = encoded(height=60, width=80)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2399)
    with pytest.raises(ValueError, match=r"x: .*4800 pixels\).*4798"):
        decode_image_bytes(data, "x")
    for limit in (2400, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode_image_bytes(data, "x").shape == (3, 60, 80)


def test_no_postscript_is_run(tmp_path, monkeypatch):
    """Pillow hands an EPS file to Ghostscript, an interpreter."""

    def run(*args, **kwargs):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    refused(tmp_path / "a.png", data, "not an image")
    with Image.open(io.BytesIO(data)) as image, pytest.raises(AssertionError):
        image.load()  # Pillow would
