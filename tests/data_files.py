"""Small data sets of 60 x 40 images in the formats of COCO and of Pascal VOC."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from coco_oracle import uncompressed
from PIL import Image
from pycocotools import mask as coco_mask

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)

CATEGORIES = [
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"]},
    {"id": 90, "name": "toothbrush"},
    {"id": 3, "name": "car"},
]
TRIANGLE = [[11.0, 6.0, 30.0, 6.5, 12.5, 20.25]]
POINTS = [12, 7, 2, 15.5, 8, 1, 0, 0, 0]

BOX = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
DOG = f"<object><name>dog</name>{BOX}</object>"
SIZE = "<size><width>60</width><height>40</height></size>"


def box_object(annotation_id=1, image_id=1, category_id=1, bbox=(11, 6, 19.5, 14.25), **fields):
    """Return an entry of "annotations"."""
    ids = {"id": annotation_id, "image_id": image_id, "category_id": category_id}
    others = {"iscrowd": 0, "area": 100.5, "segmentation": TRIANGLE}
    return {**ids, "bbox": bbox, **others, **fields}


def image_entry(image_id=1, name="a.jpg", **fields):
    """Return an entry of "images"."""
    return {"id": image_id, "file_name": name, "width": 60, "height": 40, **fields}


def write_coco(root: Path, annotations, images=None, categories=CATEGORIES):
    """Write the JSON and the images; return the arguments that a data set takes."""
    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    images = [image_entry()] if images is None else images
    for name in [entry["file_name"] for entry in images]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(folder / name)
    path = root / "instances.json"
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return folder, path


def plain_rle(mask) -> dict:
    return {"size": list(mask.shape), "counts": uncompressed(mask)}


def compressed_rle(mask) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def make_devkit(
    root: Path, xml: dict[str, str | bytes], split: str | None = None, year="2007"
) -> Path:
    """Write a devkit of images whose annotations hold the given elements, or are given whole."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, body in xml.items():
        image, annotation = folder / f"JPEGImages/{name}.jpg", folder / f"Annotations/{name}.xml"
        for path in (image, annotation):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(image, quality=95)
        if isinstance(body, str):
            whole = body if body.startswith("<?") else f"<annotation>{body}</annotation>"
            body = whole.encode()
        annotation.write_bytes(body)
    lines = "\n".join(xml) if split is None else split
    data = f"{lines}\n".encode(errors="surrogateescape")
    (folder / "ImageSets" / "Main" / "trainval.txt").write_bytes(data)
    return root


def dog(xmin, ymin, xmax, ymax, difficult: str = "") -> str:
    """Return an object whose corners are not in the usual order."""
    fields = {"ymax": ymax, "xmin": xmin, "xmax": xmax, "ymin": ymin}
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in fields.items())
    return f"<object><name>dog</name>{difficult}<bndbox>{corners}</bndbox></object>"
