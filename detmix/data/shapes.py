"""Synthetic shapes on textured backgrounds, written to disk as a Pascal VOC devkit.

What is trained on them takes the very path that Pascal VOC takes: JPEG files, XML annotations
and split files. Every image is a function of (seed, split, number) alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from detmix.data.voc.devkit import VOCAnnotation, VOCObject, read_annotation, write_annotation
from detmix.files import write_once

SHAPE_CLASSES = ("circle", "cross", "square", "star", "triangle")
"""The classes of the synthetic data set; label 1 is the first of them."""

FloatArray = npt.NDArray[np.float32]
Square = tuple[float, float, float]  # centre x and y, and half the side

_FORMAT = 1  # raise it whenever the same arguments give other images
_OVERSAMPLING = 3
_MAX_OBJECTS = 4
_DIAMETERS = (22 / 128, 60 / 128)  # of the circumscribed circle, relative to the image's side
_SHORTEST_SIDE = 0.75  # relative to the image's side: batches then really need padding
_MAX_OVERLAP = 0.2  # intersection over the smaller bounding square
_MIN_CONTRAST = 100.0  # largest channel difference between an object and what is behind it
_MIN_COVERAGE = 0.25  # a pixel belongs to an object when the object covers this much of it
_FAINT_SHARE = 0.04  # of the objects are nearly transparent, and marked difficult
_JPEG_QUALITY = 90
_SPLITS = ("trainval", "test")
_CROP_SIDE = 48  # in pixels
_CROP_CONTEXT = 1.2  # side of the square that is cut out, relative to the box's longer side


@dataclass(frozen=True)
class Scene:
    """One drawn image ``(H, W, 3)``, its objects, and which of them each pixel belongs to."""

    image: npt.NDArray[np.uint8]
    owners: npt.NDArray[np.int8]  # (H, W); -1 for none
    objects: tuple[VOCObject, ...]


def write_shapes(
    root: str | Path,
    num_train: int = 1600,
    num_test: int = 300,
    image_size: int = 128,
    seed: int = 0,
) -> Path:
    """Write the data set to ``root/VOC2007``, with the splits ``trainval`` and ``test``.

    An interrupted run leaves nothing that looks finished. If the same data set is already there,
    nothing is done; where something else is, FileExistsError is raised.

    Args:
        root: The devkit folder to write to; returned, as `VOCDetection` takes it.
        num_train: Images in ``trainval``.
        num_test: Images in ``test``.
        image_size: The longest side in pixels; the other is between 3/4 of it and all of it.
        seed: Of all images; not negative.
    """
    description = describe("write_shapes", num_train, num_test, image_size, seed)
    folder = Path(root) / "VOC2007"
    write_once(folder, "shapes.json", description, lambda draft: _write_devkit(draft, description))
    return Path(root)


def write_shape_crops(root: str | Path) -> Path:
    """Cut the objects of a data set of `write_shapes` out, to pretrain a detector's backbone on.

    Every object that is not difficult becomes a square image of 48 pixels around its box, with
    some of what surrounds it: ``root/crops/train/<class>/<image>_<k>.png`` for the split
    ``trainval``, ``root/crops/val/...`` for ``test``. Like `write_shapes` it leaves nothing
    unfinished and does nothing twice. Returns ``root/crops``, as `ImageClasses` takes it.
    """
    devkit, folder = Path(root) / "VOC2007", Path(root) / "crops"
    description = json.loads((devkit / "shapes.json").read_text(encoding="utf-8"))
    description["made_by"] = "detmix.data.write_shape_crops"
    write_once(folder, "crops.json", description, lambda draft: _write_crops(draft, devkit))
    return folder


def describe(
    writer: str, num_train: int, num_test: int, image_size: int, seed: int
) -> dict[str, Any]:
    """Check the arguments of a writer and return what it notes beside its images."""
    numbers = {"num_train": num_train, "num_test": num_test, "image_size": image_size, "seed": seed}
    for (name, value), smallest in zip(numbers.items(), (1, 1, 64, 0), strict=True):
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    return {"made_by": f"detmix.data.{writer}", "format": _FORMAT, **numbers}


def scenes(description: dict[str, Any], split: int) -> Iterator[tuple[int, Scene]]:
    """Draw the images to train on (split 0) or to test on (1), numbered from 1 through both."""
    first = (1, 1 + description["num_train"])[split]
    for index in range(description[("num_train", "num_test")[split]]):
        scene = render_scene(description["seed"], split, index, description["image_size"])
        yield first + index, scene


def save_image(path: Path, scene: Scene) -> None:
    """Write a scene's image as a JPEG file."""
    Image.fromarray(scene.image).save(path, quality=_JPEG_QUALITY)


def _write_devkit(folder: Path, description: dict[str, Any]) -> None:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split, name in enumerate(_SPLITS):
        with (folder / f"ImageSets/Main/{name}.txt").open("w") as file:
            for number, scene in scenes(description, split):
                image_id = f"{number:06d}"
                save_image(folder / f"JPEGImages/{image_id}.jpg", scene)
                height, width = scene.owners.shape
                annotation = VOCAnnotation(f"{image_id}.jpg", width, height, scene.objects)
                write_annotation(folder / f"Annotations/{image_id}.xml", annotation)
                file.write(f"{image_id}\n")


def _write_crops(folder: Path, devkit: Path) -> None:
    for part, split in zip(("train", "val"), _SPLITS, strict=True):
        for image_id in (devkit / f"ImageSets/Main/{split}.txt").read_text().split():
            image = Image.open(devkit / f"JPEGImages/{image_id}.jpg")
            objects = read_annotation(devkit / f"Annotations/{image_id}.xml").objects
            for number, item in enumerate(item for item in objects if not item.difficult):
                path = folder / part / item.name / f"{image_id}_{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                crop = image.crop(_square_around(item.box, image.size))
                crop.resize((_CROP_SIDE, _CROP_SIDE), Image.Resampling.BILINEAR).save(path)


def _square_around(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return the square to cut out, moved inside the image: no shape is too large for that."""
    x1, y1, x2, y2 = box
    side = round(_CROP_CONTEXT * max(x2 - x1, y2 - y1))
    left, top = (
        min(max(round(centre - side / 2), 0), length - side)
        for centre, length in zip(((x1 + x2) / 2, (y1 + y2) / 2), size, strict=True)
    )
    return left, top, left + side, top + side


def render_scene(seed: int, split: int, index: int, image_size: int) -> Scene:
    """Draw one image: a function of its arguments and of nothing else."""
    rng = np.random.default_rng([seed, split, index])
    shorter = int(rng.integers(round(_SHORTEST_SIDE * image_size), image_size + 1))
    height, width = (image_size, shorter) if rng.random() < 0.5 else (shorter, image_size)
    canvas = _draw_background(rng, height, width)
    owners = np.full((height, width), -1, dtype=np.int8)
    squares: list[Square] = []
    looks: list[tuple[str, bool]] = []
    for _ in range(int(rng.integers(1, _MAX_OBJECTS + 1))):
        square = _place(rng, squares, height, width, image_size)
        if square is None:
            continue
        name = SHAPE_CLASSES[int(rng.integers(len(SHAPE_CLASSES)))]
        is_faint = bool(rng.random() < _FAINT_SHARE)
        _draw_object(rng, canvas, owners, len(squares), name, square, is_faint)
        squares.append(square)
        looks.append((name, is_faint))
    image = np.clip(canvas + rng.normal(0, rng.uniform(1, 7), canvas.shape), 0, 255)
    objects = tuple(
        VOCObject(name, _extent(owners == index), is_faint)
        for index, (name, is_faint) in enumerate(looks)
    )
    return Scene(image.astype(np.uint8), owners, objects)


def _draw_background(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    """Return float32 ``(H, W, 3)``: a gradient, soft blotches and sometimes stripes."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle) + 0.5
    first, second = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    canvas = first + ramp[..., None] * 0.6 * (second - first)
    canvas += _draw_blotches(rng, height, width)
    if rng.random() < 0.4:
        frequency, direction = rng.uniform(0.2, 1.0), rng.uniform(0, math.pi)
        stripes = np.sin(frequency * (x * math.cos(direction) + y * math.sin(direction)))
        canvas += (rng.uniform(5, 18) * stripes)[..., None]
    return np.asarray(np.clip(canvas, 0, 255), dtype=np.float32)


def _draw_blotches(rng: np.random.Generator, height: int, width: int) -> FloatArray:
    cells = int(rng.integers(3, 9))
    coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
    fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    strength = rng.uniform(0.05, 0.35)
    return np.asarray(strength * (np.asarray(fine) - 127.5), dtype=np.float32)


def _place(
    rng: np.random.Generator, squares: list[Square], height: int, width: int, image_size: int
) -> Square | None:
    """Return the square around the next object, or None where no room is found."""
    low, high = _DIAMETERS
    for _ in range(20):
        # Uniform in the logarithm: as many small objects as large ones per octave.
        radius = image_size / 2 * math.exp(rng.uniform(math.log(low), math.log(high)))
        x = rng.uniform(radius + 1, width - radius - 1)
        square = (x, rng.uniform(radius + 1, height - radius - 1), radius)
        if all(_overlap(square, other) <= _MAX_OVERLAP for other in squares):
            return square
    return None


def _overlap(a: Square, b: Square) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0] - a[2], b[0] - b[2])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1] - a[2], b[1] - b[2])
    return max(width, 0) * max(height, 0) / (2 * min(a[2], b[2])) ** 2


def _draw_object(
    rng: np.random.Generator,
    canvas: FloatArray,
    owners: npt.NDArray[np.int8],
    number: int,
    name: str,
    square: Square,
    is_faint: bool,
) -> None:
    """Draw one object into ``canvas`` and enter it in ``owners``, both in place."""
    centre_x, centre_y, radius = square
    left, top = int(centre_x - radius) - 1, int(centre_y - radius) - 1
    side = 2 * math.ceil(radius) + 3
    rows, columns = slice(max(top, 0), top + side), slice(max(left, 0), left + side)
    square = (centre_x - columns.start, centre_y - rows.start, radius)
    patch = canvas[rows, columns]
    coverage = _draw_mask(rng, name, square, patch.shape[:2])
    is_inside = coverage >= _MIN_COVERAGE
    colour = _draw_colour(rng, patch[is_inside].mean(axis=0))
    opacity = rng.uniform(0.2, 0.35) if is_faint else 1.0
    # Shading across the object, so that it is no flat patch.
    shade = np.linspace(-1, 1, patch.shape[1], dtype=np.float32)[None, :, None]
    painted = colour + np.float32(rng.uniform(-20, 20)) * shade
    patch += (coverage * np.float32(opacity))[..., None] * (painted - patch)
    owners[rows, columns][is_inside] = number


def _draw_mask(
    rng: np.random.Generator, name: str, square: Square, shape: tuple[int, ...]
) -> FloatArray:
    """Return the share of each pixel that the shape covers, float32 ``(H, W)`` in [0, 1]."""
    height, width = shape
    fine = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    draw = ImageDraw.Draw(fine)
    x, y, r = (_OVERSAMPLING * value for value in square)
    if name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        corners = _corners(name) * r
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        turned = corners @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
        draw.polygon([(float(px), float(py)) for px, py in turned], fill=255)
    return np.asarray(np.asarray(fine.reduce(_OVERSAMPLING)) / 255, dtype=np.float32)


def _corners(name: str) -> npt.NDArray[np.float64]:
    """Return a polygon ``(K, 2)`` around the origin, its outermost corner at distance 1."""
    if name == "cross":
        arm = 0.32
        quarter = np.array([[arm, arm], [arm, 1.0], [-arm, 1.0]])
        turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        polygon = np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])
        return polygon / math.hypot(arm, 1.0)
    points = {"square": 4, "star": 10, "triangle": 3}[name]
    angles = np.arange(points) * (2 * math.pi / points)
    radii = np.where(np.arange(points) % 2, 0.45, 1.0) if name == "star" else np.ones(points)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _draw_colour(rng: np.random.Generator, behind: FloatArray) -> FloatArray:
    """Draw a colour that stands out from what is behind the object."""
    colours = rng.uniform(0, 255, (32, 3)).astype(np.float32)
    contrast = np.abs(colours - behind).max(axis=1)
    # argmax: the first that does, or simply the first where none does.
    return np.asarray(colours[np.argmax(contrast >= _MIN_CONTRAST)])


def _extent(mask: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return the tight box around the pixels of a mask, in continuous coordinates."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
