"""Decode one JPEG file to a tensor.

torchvision's decoder is 1.3 to 1.7 times as fast as Pillow's. torchvision 0.29 announces that a
later release drops it; Pillow, which gives the same pixels, then takes over.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # a torchvision without decoders
    decode_image = None

__all__ = ["read_image_size", "read_jpeg"]

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
    try:
        return _decode_with_pillow(path) if decode_image is None else _decode(data)
    except (OSError, RuntimeError, SyntaxError) as error:
        reason = str(error).partition("\n")[0].rpartition(", ")[2]
        raise ValueError(f"{path}: broken JPEG file of {len(data)} bytes: {reason}") from error


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


def _decode(data: bytes) -> Tensor:
    # bytearray: a tensor must not be made on memory that Python takes for immutable.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Tensor = decode_image(encoded, mode=ImageReadMode.RGB)
    return image


def _decode_with_pillow(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
