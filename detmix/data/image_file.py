"""Decode one image file, or the bytes of one, to a tensor.

JPEG goes through torchvision's decoder, 1.3 to 1.7 times as fast as Pillow's; every other format
through Pillow. torchvision 0.29 announces that a later release drops its decoder; Pillow, which
gives the same pixels, then takes over.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # a torchvision without decoders
    decode_image = None

__all__ = ["decode_image_bytes", "read_image_size", "read_jpeg"]

_JPEG_START = b"\xff\xd8"


def read_jpeg(path: Path) -> Tensor:
    """Decode a JPEG file to uint8 ``(3, H, W)`` RGB; grey and CMYK images are converted.

    Pixels are returned as they are stored: an EXIF orientation is not applied. The memory
    layout is the decoder's (channels last), so that ``image.permute(1, 2, 0)`` is contiguous.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, not a JPEG file, truncated or broken; names the file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such image file") from None
    if not data.startswith(_JPEG_START):
        start = data[:4].hex(" ") or "nothing, it is empty"
        raise ValueError(f"{path}: not a JPEG file: expected it to begin with ff d8, got {start}")
    return decode_image_bytes(data, path)


def decode_image_bytes(data: bytes, name: str | Path) -> Tensor:
    """Decode a JPEG, PNG, WebP, BMP, ... image to uint8 ``(3, H, W)`` RGB.

    What the bytes begin with decides, not a file's name: ImageNet has a PNG called ``.JPEG``.
    Grey, palette and CMYK images are converted; an alpha channel is left out and 16 bits are
    reduced to their upper 8. An EXIF orientation is not applied. The memory layout is channels
    last, so that ``image.permute(1, 2, 0)`` is contiguous.

    Args:
        data: The content of an image file.
        name: Names the image in errors.

    Raises:
        ValueError: The image is empty, of no known format, truncated, broken or so large that
            Pillow takes it for an attack; names the image.
    """
    if not data:
        raise ValueError(f"{name}: not an image: the file is empty")
    if data.startswith(_JPEG_START):
        return _decode_jpeg(data, name)
    from PIL import Image, UnidentifiedImageError

    try:
        return _decode_with_pillow(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(
            f"{name}: not an image of a known format: it begins with {data[:4].hex(' ')}"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: refused: {error}") from error
    except Exception as error:  # a broken file leads Pillow's readers to all kinds of errors
        raise ValueError(f"{name}: broken image file of {len(data)} bytes: {error}") from error


def read_image_size(path: Path) -> tuple[int, int]:
    """Read an image's height and width in pixels from the head of its file.

    Raises:
        ValueError: The file is not an image that Pillow knows; names the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise ValueError(f"{path}: the image's size cannot be read: {error}") from error


def _decode_jpeg(data: bytes, name: str | Path) -> Tensor:
    try:
        if decode_image is None:
            return _decode_with_pillow(io.BytesIO(data))
        # bytearray: a tensor must not be made on memory that Python takes for immutable.
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image: Tensor = decode_image(encoded, mode=ImageReadMode.RGB)
        return image
    except (OSError, RuntimeError, SyntaxError) as error:
        reason = str(error).partition("\n")[0].rpartition(", ")[2]
        raise ValueError(f"{name}: broken JPEG file of {len(data)} bytes: {reason}") from error


def _decode_with_pillow(file: Path | IO[bytes]) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow would cut values off at 255
            grey = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return torch.from_numpy(np.repeat(grey[..., None], 3, axis=2)).permute(2, 0, 1)
        if image.mode == "P" and "transparency" in image.info:
            image.apply_transparency()  # Pillow warns of a conversion straight to RGB
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
