"""One small data set, written as a dozen programs export it: to be read back as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")
WIDTH, HEIGHT = 64, 32
NUM_TRAIN = 8
# Boxes of whole pixels and their classes, by image: of 10 images one has no object.
TRUTH = {
    f"im {n}": [
        ((4 * k + n, 2 * k, 4 * k + n + 20, 2 * k + 16), CLASSES[(n + k) % 2])
        for k in range(n % 4 if n % 4 or n == 4 else 2)
    ]
    for n in range(10)
}
NAMES = [*TRUTH]
PARTS = {"train": NAMES[:NUM_TRAIN], "valid": NAMES[NUM_TRAIN:]}


def pixels(name):
    rng = np.random.default_rng(NAMES.index(name))
    return rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def image(path: Path, name):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(name)).save(path, format="PNG")


def text(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def xml(path: Path, name, shift=(0, 0), source=""):
    """Write VOC's XML with what is added to the first and to the last corner."""
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x1 + shift[0]}</xmin><ymin>{y1 + shift[0]}"
        f"</ymin><xmax>{x2 + shift[1]}</xmax><ymax>{y2 + shift[1]}</ymax></bndbox></object>"
        for (x1, y1, x2, y2), label in TRUTH[name]
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    text(path, f"<annotation><source>{source}</source>{size}{objects}</annotation>")


def coco(path: Path, names, file_name="{}.png", above=False):
    """Write COCO's JSON; ``above`` puts a category above the others, as Roboflow does."""
    categories = [
        {"id": i, "name": c, "supercategory": "pets"} for i, c in enumerate(CLASSES, above)
    ]
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}] * above + categories
    images = [
        {"id": i, "file_name": file_name.format(name), "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(names)
    ]
    objects = [(i, *item) for i, name in enumerate(names) for item in TRUTH[name]]
    annotations = [
        {
            "id": number, "image_id": i, "category_id": CLASSES.index(label) + above, "iscrowd": 0,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "segmentation": [],
        }
        for number, (i, (x1, y1, x2, y2), label) in enumerate(objects, 1)
    ]  # fmt: skip
    text(path, {"images": images, "annotations": annotations, "categories": categories})


def yolo(path: Path, name, polygon=False):
    """Write YOLO's lines, as boxes or as polygons."""
    lines = []
    for (x1, y1, x2, y2), label in TRUTH[name]:
        x1, x2, y1, y2 = x1 / WIDTH, x2 / WIDTH, y1 / HEIGHT, y2 / HEIGHT
        numbers = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        numbers = (x1, y1, x2, y1, x2, y2, x1, y2) if polygon else numbers
        lines.append(" ".join(map(str, (CLASSES.index(label), *numbers))))
    text(path, "\n".join(lines))


def labelimg(root):
    for name in NAMES:
        image(root / f"{name}.PNG", name)
        xml(root / f"{name}.xml", name, (1, 0))


def two_folders(root):
    for name in NAMES:
        image(root / f"images/cam/{name}.Jpeg", name)
        xml(root / f"annotations/cam/{name}.xml", name, (1, 0))


def roboflow_voc(root):
    for part, names in PARTS.items():
        for name in names:
            image(root / f"{part}/{name}.jpg", name)
            xml(root / f"{part}/{name}.xml", name, (1, 1), "<database>roboflow.com</database>")


def label_studio_voc(root):
    for name in NAMES:
        image(root / f"images/{name}.jpg", name)
        xml(root / f"Annotations/{name}.xml", name, source="<name>Label Studio</name>")


def cvat_voc(root, lists=(("default", NAMES),)):
    for name in NAMES:
        image(root / f"JPEGImages/{name}.jpg", name)
        xml(root / f"Annotations/{name}.xml", name)
    for part, names in lists:
        text(root / f"ImageSets/Main/{part}.txt", "\n".join(names))
        text(root / f"ImageSets/Main/cat_{part}.txt", "\n".join(f"{n}  1" for n in names))
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "cat:1,2,3::", "dog:::"]
    text(root / "labelmap.txt", "\n".join(lines))


def datumaro_voc(root):
    cvat_voc(root, [("train", PARTS["train"]), ("val", [f'"{n}"' for n in PARTS["valid"]])])
    for name in NAMES:
        image(root / f"SegmentationClass/{name}.png", name)


def devkit(root):
    folder = root / "VOC2007"
    cvat_voc(folder, [("trainval", PARTS["train"]), ("test", PARTS["valid"])])
    for name in NAMES:
        xml(folder / f"Annotations/{name}.xml", name, (1, 0))


def roboflow_coco(root):
    for part, names in PARTS.items():
        coco(root / f"{part}/_annotations.coco.json", names, "{}.jpg", above=True)
        for name in names:
            image(root / f"{part}/{name}.jpg", name)


def cvat_coco(root):
    coco(root / "annotations/instances_default.json", NAMES)
    for name in NAMES:
        image(root / f"images/{name}.png", name)


def label_studio_coco(root, file_name="images\\{}.png"):
    coco(root / "result.json", NAMES, file_name)
    for name in NAMES:
        image(root / f"images/{name}.png", name)


def label_studio_upload(root):
    label_studio_coco(root, "..\\..\\label-studio\\media\\upload\\4\\{}.png")


def datumaro_coco(root):
    for part, names in (("train", PARTS["train"]), ("val", PARTS["valid"])):
        coco(root / f"annotations/instances_{part}.json", names)
        coco(root / f"annotations/person_keypoints_{part}.json", names)
        for name in names:
            image(root / f"images/{part}/{name}.png", name)


def official_coco(root):
    for part, names in (("train2017", PARTS["train"]), ("val2017", PARTS["valid"])):
        coco(root / f"annotations/instances_{part}.json", names)
        for name in names:
            image(root / f"{part}/{name}.png", name)


def roboflow_yolo(root):
    text(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cat, dog]",
    )
    text(root / "README.roboflow.txt", "2 images")
    for part, names in PARTS.items():
        for name in names:
            image(root / f"{part}/images/{name}.jpg", name)
            yolo(root / f"{part}/labels/{name}.txt", name)


def yolo_folders(root):
    """As for segmentation: polygons, and names by number, and paths of another machine."""
    yaml = "path: /content/x\ntrain: /content/x/images/a\nval: images/b\nnames: {0: cat, 1: dog}"
    text(root / "coco8.yaml", yaml)
    for part, names in (("a", PARTS["train"]), ("b", PARTS["valid"])):
        for name in names:
            image(root / f"images/{part}/{name}.jpg", name)
            if TRUTH[name]:
                yolo(root / f"labels/{part}/{name}.txt", name, polygon=True)


def cvat_yolo(root):
    text(root / "obj.names", "cat\ndog\n")
    text(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
    text(root / "train.txt", "".join(f"data/obj_train_data/{name}.jpg\n" for name in NAMES))
    for name in NAMES:
        image(root / f"obj_train_data/{name}.jpg", name)
        yolo(root / f"obj_train_data/{name}.txt", name)


def label_studio_yolo(root):
    text(root / "classes.txt", "cat\ndog\n")
    text(root / "notes.json", {"categories": [], "info": {}})
    for name in NAMES:
        image(root / f"images/{name}.jpg", name)
        yolo(root / f"labels/{name}.txt", name)


# Whether a split is named; the format; arguments that are needed beside data.root.
EXPORTS = {
    labelimg: ("hash", "voc"), two_folders: ("hash", "voc"), roboflow_voc: ("named", "voc"),
    label_studio_voc: ("hash", "voc"), cvat_voc: ("hash", "voc"), datumaro_voc: ("named", "voc"),
    devkit: ("given", "voc"), roboflow_coco: ("named", "coco"), cvat_coco: ("hash", "coco"),
    label_studio_coco: ("hash", "coco"), label_studio_upload: ("hash", "coco"),
    datumaro_coco: ("named", "coco"), official_coco: ("given", "coco"),
    roboflow_yolo: ("named", "yolo"), yolo_folders: ("named", "yolo"), cvat_yolo: ("hash", "yolo"),
    label_studio_yolo: ("hash", "yolo"),
}  # fmt: skip
