"""Decoding images: against Pillow, and what is refused; broken ones are in test_fuzz.py."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from data_files import DOG, SIZE, make_devkit
from fuzz import limits, time_limit
from image_files import png, ramp, tiff
from PIL import EpsImagePlugin, Image, ImageOps
from torch.utils.data import DataLoader

from detmix.commands import check
from detmix.data import VOCDetection
from detmix.data.images import read_image, read_image_size, read_orientation, read_upright


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
        ("RGB", "png", {"exif": TURNED}), ("RGB", "webp", {"exif": TURNED}),
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a").write_bytes(encoded("png", "RGB", exif=exif))
    with Image.open(tmp_path / "a") as image:
        expected = np.array(ImageOps.exif_transpose(image))
        for source in (tmp_path / "a", image):
            upright = read_upright(source)
            np.testing.assert_array_equal(upright.permute(1, 2, 0).numpy(), expected)


GREY, GREY16, RGB, RGB16 = ramp("u1"), ramp("u2"), ramp("u1", 3), ramp("u2", 3)
ALPHA16, CMYK = ramp("u2", 4), ramp("u1", 4)
LEVELS = {bits: np.arange(320).reshape(5, 64, 1) % 2**bits for bits in (1, 2, 4)}
RED = np.tile(np.array([136, 80, 67], np.uint8), (5, 64, 1))  # L* 53.3 of 100, a* 80, b* 67


def full_range(ycbcr):
    """JFIF's formulas."""
    y, cb, cr = (ycbcr.astype(float) - [0, 128, 128]).transpose(2, 0, 1)
    rgb = (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)
    return np.stack(rgb, axis=-1).round().clip(0, 255)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def netpbm(kind, values, most):
    return f"{kind}\n64 5\n{most}\n".encode() + values.tobytes()


SCALED = {
    **{f"PNG grey {n}": (png(LEVELS[n], 0, n), LEVELS[n] * 255 // (2**n - 1)) for n in LEVELS},
    "PNG grey 16": (png(GREY16, 0, 16), GREY16 >> 8),
    "PNG grey 16, alpha": (png(ramp("u2", 2), 4, 16), ramp("u2", 2)[..., :1] >> 8),
    "PNG RGB 16": (png(RGB16, 2, 16), RGB16 >> 8),
    "PNG RGBA 16": (png(ALPHA16, 6, 16), ALPHA16[..., :3] >> 8),
    "PNG RGBA 8": (png(CMYK, 6, 8), CMYK[..., :3]),
    "PPM of 1023": (
        netpbm("P5", (GREY16 >> 6).astype(">u2"), 1023),
        np.round((GREY16 >> 6) * (65535 / 1023)).astype(int) >> 8,
    ),
    "PPM of 65535": (netpbm("P5", GREY16.astype(">u2"), 65535), GREY16 >> 8),
    "JPEG 2000 grey 16": (saved(Image.fromarray(GREY16[..., 0]), "JPEG2000"), GREY16 >> 8),
    **{
        f"TIFF {order} {name}": (tiff(values, photometric, order=order, **tags), expected)
        for order in "<>"
        for name, values, photometric, tags, expected in (
            ("grey", GREY, 1, {}, GREY),
            ("grey, 0 is white", GREY, 0, {}, 255 - GREY),
            ("grey 16", GREY16, 1, {}, GREY16 >> 8),
            ("grey, alpha", ramp("u1", 2), 1, {"extra": 2}, ramp("u1", 2)[..., :1]),
            ("RGB 16", RGB16, 2, {}, RGB16 >> 8),
            ("RGBA 16", ALPHA16, 2, {"extra": 2}, ALPHA16[..., :3] >> 8),
            ("RGB in planes", RGB, 2, {"planes": 2}, RGB),
            ("CMYK", CMYK, 5, {}, (255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255),
            ("YCbCr", RGB, 6, {}, full_range(RGB)),
            ("L*a*b*", RED, 8, {}, np.tile([255, 0, 0], (5, 64, 1))),
            # Part of the format, and not of EXIF: the decoder's business.
            ("turned", GREY, 1, {"orientation": 6}, np.rot90(GREY, -1)),
        )
    },
}


@pytest.mark.parametrize("name", SCALED)
def test_values_are_scaled_by_the_range_of_their_type(tmp_path, name):
    """Of any byte order; alpha is left out."""
    data, expected = SCALED[name]
    (tmp_path / "a").write_bytes(data)
    image = read_image(tmp_path / "a")
    assert read_image_size(tmp_path / "a") == image.shape[1:]
    assert read_orientation(tmp_path / "a") == 1
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    loose = {"CMYK": 1, "YCbCr": 1, "L*a*b*": 12}.get(name.split()[-1], 0)
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=loose)


UNKNOWN = {
    **{
        f"{dtype}, {white}, {order}": (tiff(ramp(dtype), 1 - white, order=order), "")
        for dtype in ("i1", "i2", "i4", "u4", "f2", "f4", "f8")
        for white in (0, 1)
        for order in "<>"
    },
    "float": (tiff(ramp("f4"), 1), r"mode F .*32 bits"),
    "float PFM": (netpbm("Pf", ramp("f4"), "-1.0"), "mode F"),
    "float RGB": (tiff(ramp("f4", 3), 2), "49 49 2a 00"),
    "32 bits": (tiff(ramp("u4"), 1), r"mode I .*32 bits"),
    "signed 16 bits": (tiff(ramp("i2"), 1), r"16 bits, SampleFormat 2"),
    "signed 8 bits": (tiff(ramp("i1"), 1), r"mode L .*8 bits, SampleFormat 2"),
    "12 bits": (tiff(GREY16 >> 4, 1, bits=12), "12 bits"),
    "16 bits, 0 is white": (tiff(GREY16, 0), r"16 bits.*PhotometricInterpretation 0"),
    "16 bits in planes": (tiff(RGB16, 2, planes=2), r"16 bits.*PlanarConfiguration 2"),
    "multiplied by alpha": (tiff(ramp("u1", 2), 1, extra=1), "mode La"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_values_of_no_known_range_are_refused(tmp_path, name):
    data, named = UNKNOWN[name]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'a'}: .*{named}.*expected .*8 .*16 bits"):
        read_image(tmp_path / "a")


DAMAGES = {
    "no end marker": lambda data: data[:-2],
    "half an end marker": lambda data: data[:-1],
    "cut": lambda data: data[: len(data) * 2 // 3],
    "more behind": lambda data: data + b"\0" * 500,
    "two": lambda data: data + data,
    "zeros": lambda data: data[:700] + b"\0" * 9 + data[709:],
    "a hole": lambda data: data[:700] + data[709:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_jpegs_are_read_or_refused_as_pillow_does(tmp_path, damage):
    """With torchvision's decoder as without it."""
    path, num_read = tmp_path / "a.jpg", 0
    for width in range(17, 65):
        path.write_bytes(DAMAGES[damage](encoded(width=width, progressive=width % 8 == 0)))
        try:
            expected = np.array(Image.open(path).convert("RGB"))
        except OSError:
            with pytest.raises(ValueError, match=r"a\.jpg"):
                read_image(path)
        else:
            np.testing.assert_array_equal(read_image(path).permute(1, 2, 0), expected)
            num_read += 1
    assert (num_read > 0) == (damage != "cut")


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 6, 9, "broken"])
def test_an_orientation_is_told_once_and_not_applied(tmp_path, capsys, orientation):
    make_devkit(tmp_path, dict.fromkeys("abcd", SIZE + DOG))
    dataset = VOCDetection(tmp_path, classes=["dog"])
    expected = torch.stack([image for image, _ in dataset])
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = b"Exif\0\0broken" if orientation == "broken" else exif.tobytes()
    segment = b"\xff\xd8" + struct.pack(">2sH", b"\xff\xe1", len(content) + 2) + content
    for path in map(dataset.image_path, (1, 3)):
        path.write_bytes(path.read_bytes().replace(segment[:2], segment, 1))
    is_told, log = orientation in (2, 3, 6), tmp_path / "log"
    log.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".*EXIF")
        warnings.showwarning = lambda text, *_: log.write_text(f"{log.read_text()}{text}\n")
        loader = DataLoader(dataset, None, num_workers=2)
        for images in (loader, loader, dataset):  # workers, those of the next epoch, this process
            assert torch.equal(torch.stack([image for image, _ in images]), expected)
    told = f"{dataset.image_path(1)}: has EXIF orientation {orientation}, which is not applied"
    assert [line[: len(told)] for line in log.read_text().splitlines()] == [told] * is_told
    test = '--data.test=[["2007", "trainval"]]'
    check.main([f"--data.root={tmp_path}", "--data.classes=[dog]", test])
    found = re.findall("(.*) with an EXIF orientation, .*: (.*) in (.*)", capsys.readouterr().out)
    assert found == [("  2", str(orientation), str(dataset.image_path(1)))] * 2 * is_told


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
