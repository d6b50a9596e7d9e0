"""Decode one image file to a tensor; a ValueError names what is broken.

JPEG goes through torchvision's decoder, 1.3 to 1.7 times as fast as Pillow's; every other format,
and what that decoder refuses, through Pillow: the same images are read with or without it.
torchvision 0.29 announces that a later release drops its decoder; Pillow, which gives the same
pixels, then takes over.

Pixel values are unsigned integers of up to 8 or of 16 bits, which are scaled by that range: of 16
bits the upper 8 stay. Of all others nothing says what is black and what is white: refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
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
Image.init()
_READABLE = [name for name in _FORMATS if name in Image.OPEN]  # of those the ones of this Pillow
# Those whose values are integers of a known range; "I" is that of 16 bits in PNG and PPM.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"}
_MODES |= {"I", "I;16", "I;16L", "I;16B", "I;16N"}
# BitsPerSample, SampleFormat, PhotometricInterpretation, PlanarConfiguration.
_TIFF_TAGS = (258, 339, 262, 284)
_EXPECTED = (
    f"expected {', '.join(_FORMATS)} of unsigned integers of up to 8 or of 16 bits (in TIFF with "
    "0 for black, in one plane): scale the values to 0..255 and store them as PNG"
)


def read_image(path: str | Path) -> Tensor:
    """Decode an image file to uint8 ``(3, H, W)`` RGB; an EXIF orientation is not applied."""
    return _read(path)[0]


def read_upright(source: str | PathLike[str] | Image.Image) -> Tensor:
    """Decode an image to uint8 ``(3, H, W)`` RGB, turned as its EXIF orientation says."""
    if isinstance(source, Image.Image):
        _check_pixels(source)
        pixels, orientation = _decode(source), _orientation(source)
    else:
        pixels, orientation = _read(source)
    if orientation > 4:
        pixels = pixels.transpose(1, 2)
    mirrored = {1: orientation in (3, 4, 7, 8), 2: orientation in (2, 3, 6, 7)}
    return pixels.flip([axis for axis, is_mirrored in mirrored.items() if is_mirrored])


def read_sized_image(path: Path, size: tuple[int, int], source: Path) -> tuple[Tensor, int]:
    """Decode an image file, and its orientation, that must have the annotated height and width."""
    image, orientation = _read(path)
    height, width = image.shape[-2:]
    if (height, width) != size:
        hint = _TURNED if (width, height) == size and orientation > 4 else ""
        raise ValueError(
            f"{path}: the image is {width} x {height} pixels, but {source} says "
            f"{size[1]} x {size[0]}{hint}"
        )
    return image, orientation


def read_image_size(path: Path) -> tuple[int, int]:
    """Read an image's height and width in pixels from the head of its file."""
    with open(path, "rb") as file, _opened(file, path) as image:
        return image.height, image.width


def read_orientation(path: Path) -> int:
    """Read the EXIF orientation, 1 to 8, from the head of an image's file; 1 where it has none."""
    with open(path, "rb") as file, _opened(file, path) as image:
        return _orientation(image)


def _read(path: str | PathLike[str]) -> tuple[Tensor, int]:
    data = read_file(path)
    # What the bytes begin with decides, not a file's name: ImageNet has a PNG called ``.JPEG``.
    with _opened(io.BytesIO(data), path) as image:  # reads the head, refuses too many pixels
        pixels = None
        if decode_jpeg is not None and data.startswith(_JPEG_START):
            with suppress(RuntimeError):  # Pillow decides: it reads those without an end marker
                # bytearray: a tensor must not be made on memory that Python takes for immutable.
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        return _decode(image) if pixels is None else pixels, _orientation(image)


@contextmanager
def _opened(file: IO[bytes], name: str | PathLike[str]) -> Iterator[Image.Image]:
    """Open an image with Pillow; what is wrong with it then is a ValueError."""
    try:
        with Image.open(file, formats=_READABLE) as image:
            _check_pixels(image)
            yield image
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(4).hex(" ")
        got = f"it begins with {start}" if start else "the file is empty"
        raise ValueError(f"{name}: not an image of a known kind: {got}; {_EXPECTED}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused: {error}") from error
    except Warning:  # made an error by whoever runs this
        raise
    except Exception as error:  # a broken file leads Pillow's readers to all kinds of errors
        raise ValueError(f"{name}: cannot be decoded: {error}") from error


def _check_pixels(image: Image.Image) -> None:
    """Raise where no range of the values is known, or Pillow does not scale them by it."""
    got, is_known = f"mode {image.mode}", image.mode in _MODES
    if isinstance(image, TiffImageFile):
        bits, kind, colour, planes = (np.max(image.tag_v2.get(tag, 1)) for tag in _TIFF_TAGS)
        got += f" (TIFF: {bits} bits, SampleFormat {kind}, PhotometricInterpretation {colour}, "
        got += f"PlanarConfiguration {planes})"
        # Of 16 bits Pillow does not invert those whose 0 is white, and mixes up separate planes.
        is_known &= kind == 1 and (bits <= 8 or (bits == 16 and colour > 0 and planes == 1))
    if not is_known:
        raise ValueError(f"pixels of {got}; {_EXPECTED}")


def _decode(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut values off at 255
        grey = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(np.repeat(grey[..., None], 3, axis=2)).permute(2, 0, 1)
    if image.mode == "P" and "transparency" in image.info:
        image.apply_transparency()  # Pillow warns of a conversion straight to RGB
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 of a TIFF, whose own one Pillow applies as it decodes."""
    try:
        # PNG's own method would decode a whole image for metadata behind its pixels.
        value: Any = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # broken metadata says nothing of the pixels
        return 1
    is_turned = value in range(2, 9) and not isinstance(image, TiffImageFile)
    return int(value) if is_turned else 1
