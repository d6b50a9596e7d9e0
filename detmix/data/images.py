"""Decode one image file to a tensor; a ValueError names what is broken.

JPEG goes through torchvision's decoder, 1.3 to 1.7 times as fast as Pillow's; every other format
through Pillow. torchvision 0.29 announces that a later release drops its decoder; Pillow, which
gives the same pixels, then takes over.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from detmix.files import read_file

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # a torchvision without decoders
    decode_jpeg = None


_TURNED = (
    "; the annotations seem to be for the image turned by its EXIF orientation, which is not "
    "applied here: store the pixels turned, as PIL.ImageOps.exif_transpose does"
)
_JPEG_START = b"\xff\xd8"
# Not all that Pillow opens: for EPS it would run Ghostscript.
_FORMATS = ("JPEG", "PNG", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 ``(3, H, W)`` RGB; an EXIF orientation is not applied."""
    data = read_file(path)
    # What the bytes begin with decides, not a file's name: ImageNet has a PNG called ``.JPEG``.
    with _opened(io.BytesIO(data), path) as image:  # reads the head, refuses too many pixels
        if decode_jpeg is not None and data.startswith(_JPEG_START):
            return _decode_jpeg(data)
        return _decode(image)


def read_sized_image(path: Path, size: tuple[int, int], source: Path) -> Tensor:
    """Decode an image file that must have the height and width that its annotation says."""
    image = read_image(path)
    height, width = image.shape[-2:]
    if (height, width) != size:
        hint = _TURNED if (width, height) == size else ""
        raise ValueError(
            f"{path}: the image is {width} x {height} pixels, but {source} says "
            f"{size[1]} x {size[0]}{hint}"
        )
    return image


def read_image_size(path: Path) -> tuple[int, int]:
    """Read an image's height and width in pixels from the head of its file."""
    with open(path, "rb") as file, _opened(file, path) as image:
        return image.height, image.width


@contextmanager
def _opened(file: IO[bytes], name: str | Path) -> Iterator[Image.Image]:
    """Open an image with Pillow; what is wrong with it then is a ValueError."""
    try:
        with Image.open(file, formats=_formats()) as image:
            yield image
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(4).hex(" ")
        got = f"it begins with {start}" if start else "the file is empty"
        raise ValueError(f"{name}: not an image of a known format: {got}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused: {error}") from error
    except Warning:  # made an error by whoever runs this
        raise
    except Exception as error:  # a broken file leads Pillow's readers to all kinds of errors
        raise ValueError(f"{name}: broken image file: {error}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow has and that are read here."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_jpeg(data: bytes) -> Tensor:
    # bytearray: a tensor must not be made on memory that Python takes for immutable.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image: Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        # torch puts its function, source file and line before the reason.
        reason = re.sub(r"^\w+, \S+:\d+, ", "", str(error).partition("\n")[0])
        raise ValueError(f"{reason} ({len(data)} bytes)") from error
    return image


def _decode(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut values off at 255
        grey = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(np.repeat(grey[..., None], 3, axis=2)).permute(2, 0, 1)
    if image.mode == "P" and "transparency" in image.info:
        image.apply_transparency()  # Pillow warns of a conversion straight to RGB
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
