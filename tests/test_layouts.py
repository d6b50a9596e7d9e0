"""Own data as labelling programs export it: all exports of one data set are read alike."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path

import exports
import pytest
import torch
import yaml
from exports import CLASSES, EXPORTS, NAMES, PARTS, TRUTH, pixels
from runs import command, succeed
from tiny import SETTINGS, tiny_args

from detmix.data import VOC_CLASSES, VOCDetection, YOLODetection
from detmix.training import TrainConfig, load_detector, parse_args
from detmix.training.build import open_dataset, open_datasets

pytestmark = pytest.mark.filterwarnings("ignore:.*(polygon|no classes, but)")
named = pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
CLASSES_OF = {exports.devkit: ("data.classes=[cat, dog]",)}  # else VOC's twenty


def open_root(root, *options):
    args = (f"data.root={root}", *options)
    return open_datasets(parse_args(TrainConfig, [f"--{option}" for option in args]))


def stems(data):
    return [Path(name).stem for name in data.names]


@named
def test_all_exports_are_read_as_the_same(tmp_path, export):
    export(tmp_path)
    split, kind = EXPORTS[export]
    keep = ("data.coco.empty=keep",) if kind == "coco" else ()
    config, *datasets = open_root(tmp_path, *keep, *CLASSES_OF.get(export, ()))
    assert (config.data.format, config.data.split) == (kind, split)
    assert (config.data.classes, datasets[0].classes) == (CLASSES, CLASSES)
    for data in datasets:
        for index, name in enumerate(stems(data)):
            image, target = data[index]
            assert torch.equal(image, torch.from_numpy(pixels(name)).permute(2, 0, 1))
            boxes = torch.tensor([box for box, _ in TRUTH[name]]).reshape(-1, 4).float()
            assert torch.equal(target["boxes"], boxes)
            labels = [CLASSES[label - 1] for label in target["labels"].tolist()]
            assert labels == [label for _, label in TRUTH[name]]
    if split != "hash":
        assert [sorted(stems(data)) for data in datasets] == [*PARTS.values()]
    assert sorted(stems(datasets[0]) + stems(datasets[1])) == NAMES
    # What was noted is read again, whatever is beside it by then.
    (tmp_path / "docs").mkdir()
    shutil.copy(datasets[0].image_path(0), tmp_path / "docs/figure.png")
    for train, data in zip((True, False), datasets, strict=True):
        assert open_dataset(config, train=train).names == data.names or kind == "yolo"


@pytest.mark.parametrize(
    "export",
    [
        pytest.param(
            export,
            marks=() if export.__name__ in ("labelimg", "roboflow_coco") else pytest.mark.slow,
            id=export.__name__,
        )
        for export in EXPORTS
    ],
)
def test_trains_with_nothing_but_the_root(tmp_path, export):
    """Evaluates, goes on and predicts, too, and says what was recognised."""
    root, run = tmp_path / "data", tmp_path / "run"
    export(root)
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "classes": None}}
    args = tiny_args(root, run, *CLASSES_OF.get(export, ()), settings=settings)
    _, err = succeed("detmix", "train", *args, "--epochs=1")
    split, kind = EXPORTS[export]
    told = re.findall(rf"(?m)^{root}: {kind}, (\d+) images to train and (\d+) to test on", err)
    assert [sum(map(int, numbers)) for numbers in told] == [10] * (split != "given")
    noted = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (noted["format"], noted["split"], noted["classes"]) == (kind, split, [*CLASSES])
    out, _ = succeed("detmix", "evaluate", run / "best.pt")
    assert ("results" in out.splitlines()[-1].split(", ")[-1]) == (export is exports.devkit)
    found = json.loads((run / "evaluation/results.json").read_text())
    assert found["num_images"] == (int(told[0][1]) if told else 2)
    succeed("detmix", "train", *args, "--resume=auto", "--epochs=2")
    image = next(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    succeed("detmix", "predict", run / "best.pt", image, "--out", tmp_path / "found")
    out, _ = succeed("detmix", "check", f"--data.root={root}", *(f"--{o}" for o in CLASSES_OF.get(export, ())))
    assert out.count("0 images left out") == 2


def flat(root, names, suffix=".jpg"):
    for name in names:
        exports.text(root / f"{name}.xml", (root.parent / "im 0.xml").read_text())
        shutil.copy(root.parent / "im 0.PNG", root / f"{name}{suffix}")


def test_the_share_that_is_kept_for_the_test(tmp_path):
    """Of the same images, on any machine, where others are added, converted or moved."""
    exports.labelimg(tmp_path)
    kept = []
    for number, (names, suffix) in enumerate([(range(50), ".jpg"), (range(400), ".png")]):
        root = tmp_path / str(number) / "cam" * number
        root.mkdir(parents=True)
        for name in (*names, "café", unicodedata.normalize("NFD", "naïve")):
            shutil.copy(tmp_path / "im 0.PNG", root / f"{name}{suffix}")
            shutil.copy(tmp_path / "im 0.xml", root / f"{name}.xml")
        train, test = (stems(data) for data in open_root(tmp_path / str(number))[1:])
        assert not {*train} & {*test}
        kept.append({unicodedata.normalize("NFC", name) for name in test})
    assert kept[0] == kept[1] & {*map(str, range(50)), "café", "naïve"}
    assert sorted(kept[0]) == KEPT
    assert 0.15 < len(kept[1]) / 402 < 0.25
    (tmp_path / "few").mkdir()
    for name in "ab":
        shutil.copy(tmp_path / "im 0.PNG", tmp_path / f"few/{name}.png")
        shutil.copy(tmp_path / "im 0.xml", tmp_path / f"few/{name}.xml")
        if name == "b":
            assert [len(data) for data in open_root(tmp_path / "few")[1:]] == [1, 1]
        else:
            with pytest.raises(ValueError, match=r"two images.*a\.png"):
                open_root(tmp_path / "few")


def without(export, *patterns):
    """Return an export without some of its files."""

    def write(root):
        export(root)
        for path in [path for pattern in patterns for path in root.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return write


def with_text(export, name, content):
    def write(root):
        export(root)
        exports.text(root / name, content)

    return write


def both(root):
    exports.labelimg(root)
    exports.cvat_yolo(root)


YOLO_LINE = "labels/im 0.txt"
# What is written, options, the error and what it tells.
BROKEN = [
    (lambda root: None, (), ValueError, r"found 0 images"),
    (shutil.rmtree, (), FileNotFoundError, "no such folder"),
    (without(exports.labelimg, "*.xml"), (), ValueError, r"voc, coco or yolo.*found 10 images"),
    (without(exports.labelimg, "*.PNG"), (), FileNotFoundError, r"im 0: .*\.png.*8 of 8"),
    (without(exports.cvat_yolo, "obj_train_data/im 3.jpg"), (), FileNotFoundError, "im 3: .*1 of"),
    (without(exports.cvat_coco, "images/im 3.png"), (), FileNotFoundError, r"im 3\.png.*1 of"),
    (both, (), ValueError, r"10 \.xml of voc.*10 \.txt of yolo"),
    (exports.labelimg, ("data.format=yolo",), ValueError, r"10 \.xml of voc"),
    (exports.labelimg, ("data.split=named",), ValueError, "train and val"),
    (without(exports.label_studio_yolo, "*.txt"), (), ValueError, r"data\.classes is null"),
    (exports.label_studio_yolo, ("data.classes=[dog, cat]",), ValueError, "dog, cat.*cat, dog"),
    (with_text(exports.label_studio_yolo, "b/classes.txt", "x"), (), ValueError, "b/classes.txt"),
    (with_text(exports.roboflow_yolo, "a.yaml", "names: ["), (), ValueError, r"a\.yaml: .*YAML"),
    (with_text(exports.labelimg, "im 0.jpg", ""), (), ValueError, r"im 0\.PNG and im 0\.jpg"),
    (with_text(exports.cvat_voc, "im 0.xml", "<annotation/>"), (), ValueError, r"im 0\.xml and"),
    (
        with_text(exports.datumaro_voc, "ImageSets/Main/val.txt", "im 1\nim 99"),
        (), FileNotFoundError, r"val\.txt: .*1 .*'im 99'",
    ),
    (exports.labelimg, ("data.classes=[cow, cat]",), ValueError, r"im .\.xml, .*'dog'.*null"),
    *(
        (with_text(exports.label_studio_yolo, YOLO_LINE, line), (), ValueError, f"0.txt, line {n}")
        for n, line in enumerate(
            ("2 0.5 0.5 0.1 0.1", "\n0 0.5 0.5 0.1", "\n\n0 0.5 0.5 nan 0.1", "0 1 1 1 1\n\n\n-1 0 0 1 1", "\n\n\n\n0.5 0 0 1 1", "0 0 1 0 1\n" * 5 + "a 1 1 1 1"), 1
        )
    ),
    (
        with_text(exports.cvat_coco, "b.json", '{"images": [], "annotations": [], "categories": []}'),
        (), ValueError, r"b\.json",
    ),
    (exports.roboflow_yolo, ("data.coco.empty=keep",), ValueError, r"data\.coco .*yolo"),
    (exports.roboflow_yolo, ("detector.name=maskrcnn",), ValueError, "masks.*coco"),
]  # fmt: skip
