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
from runs import succeed
from tiny import SETTINGS, tiny_args
from torchvision.datasets.folder import IMG_EXTENSIONS

from detmix.data import VOC_CLASSES, VOCDetection
from detmix.training import TrainConfig, parse_args
from detmix.training.build import open_dataset, open_datasets

pytestmark = pytest.mark.filterwarnings("ignore:.*(polygon|are no classes)")
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
    image = next(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    succeed("detmix", "predict", run / "best.pt", image, "--out", tmp_path / "found")
    out, _ = succeed(
        "detmix", "check", f"--data.root={root}", *(f"--{o}" for o in CLASSES_OF.get(export, ()))
    )
    assert out.count("0 images left out") == 2


KEPT = {"3", "9", "14", "16", "21", "25", "é6"}  # by BLAKE2b, of 8 bytes, below a fifth of all


def test_the_share_that_is_kept_for_the_test(tmp_path):
    """Of the same images, on any machine, where others are added, converted or moved."""

    def write(folder, names, suffix):
        for name in names:
            exports.image(folder / f"{name}{suffix}", NAMES[0])
            exports.xml(folder / f"{name}.xml", NAMES[0], (1, 0))

    def kept(root):
        _, train, test = open_root(root)
        assert {*stems(train)}.isdisjoint(stems(test))
        return {unicodedata.normalize("NFC", name) for name in stems(test)}

    some, more = [*map(str, range(30)), "é6"], [*map(str, range(300)), "e\u03016"]
    write(tmp_path / "a", some, ".jpg")
    write(tmp_path / "b/cam 1", more, ".PNG")
    assert kept(tmp_path / "a") == kept(tmp_path / "b") & {*some} == KEPT
    assert 0.15 < len(kept(tmp_path / "b")) / len(more) < 0.25
    write(tmp_path / "c", "a", ".jpg")
    with pytest.raises(ValueError, match=r"two images.*a\.jpg"):
        kept(tmp_path / "c")
    write(tmp_path / "c", "b", ".jpg")
    assert len(kept(tmp_path / "c")) == 1


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


def in_circles(root):
    """With links to folders that they lie in, and one to images elsewhere."""
    exports.two_folders(root)
    (root / "images").rename(root.parent / f"{root.name}-images")
    (root / "images").symlink_to(root.parent / f"{root.name}-images")
    for name in ("annotations/all", "annotations/above", "cam 1/b", "cam 2/a"):
        (root / name).parent.mkdir(exist_ok=True)
        places = {"all": root, "above": root.parent, "b": root / "cam 2", "a": root / "cam 1"}
        (root / name).symlink_to(places[Path(name).name])


def both(root):
    exports.labelimg(root)
    exports.cvat_yolo(root)


COCO_KEYS = ("images", "annotations", "categories")
# What is written, options, the error and what it tells.
BROKEN = [
    (lambda root: None, (), ValueError, r"found 0 images"),
    (shutil.rmtree, (), FileNotFoundError, r"data\.root is .*no such folder, in "),
    (without(exports.labelimg, "*.xml"), (), ValueError, r"voc, coco or yolo.*found 10 images"),
    (without(exports.labelimg, "*.PNG"), (), FileNotFoundError, r"im \d: .*\.png.*9 of 9"),
    (without(exports.cvat_yolo, "obj_train_data/im 3.jpg"), (), FileNotFoundError, "im 3: .*1 of"),
    (without(exports.cvat_coco, "images/im 3.png"), (), FileNotFoundError, r"im 3\.png.*1 of"),
    (both, (), ValueError, "10 files of voc.*10 files of yolo"),
    (exports.labelimg, ("data.format=yolo",), ValueError, "10 files of voc"),
    (exports.labelimg, ("data.split=named",), ValueError, "train and val"),
    (without(exports.label_studio_yolo, "*.txt"), (), ValueError, r"data\.classes is null"),
    (exports.label_studio_yolo, ("data.classes=[dog, cat]",), ValueError, "dog.* numbers cat"),
    (with_text(exports.label_studio_yolo, "b/classes.txt", "x"), (), ValueError, "b/classes.txt"),
    (with_text(exports.roboflow_yolo, "a.yaml", "names: ["), (), ValueError, r"a\.yaml: .*YAML"),
    (with_text(exports.labelimg, "im 0.jpg", ""), (), ValueError, r"im 0\.PNG and im 0\.jpg"),
    (with_text(exports.cvat_voc, "im 0.xml", "<annotation/>"), (), ValueError, r"im 0\.xml and"),
    (
        with_text(exports.datumaro_voc, "ImageSets/Main/val.txt", "im 1\nim 99"),
        (), FileNotFoundError, r"val\.txt: .*1 .*'im 99'",
    ),
    (
        without(exports.datumaro_voc, "Annotations/im 1.xml"),
        (), FileNotFoundError, r"train\.txt: 1 of 8 .*annotation.*'im 1'",
    ),
    (
        with_text(exports.roboflow_yolo, "data.yaml", "names: [cat, dog]\nkpt_shape: [4, 3]"),
        (), ValueError, "kpt_shape",
    ),
    (exports.labelimg, ('data.train=[["2012", "train"]]',), FileNotFoundError, "data.split=hash"),
    (exports.labelimg, ("data.classes=[cow, cat]",), ValueError, r"im .\.xml, .*'dog'.*null"),
    *(
        (with_text(exports.label_studio_yolo, "labels/im 0.txt", f"\n{line}"), (), ValueError, x)
        for line in ("2 0 0 1 1", "0 0 1 1", "0 0 0 nan 1", "-1 0 0 1 1", "0.5 0 0 1 1",
                     "a 0 0 1 1", "0 0 0 1 1 0", "0 0 0 1 1 0 1 0.5")
        for x in [rf"im 0\.txt, line 2: .*0 to 1 \(cat, dog\).*{re.escape(line)}"]
    ),
    (
        with_text(exports.label_studio_coco, "b.json", dict.fromkeys(COCO_KEYS)),
        (), ValueError, r"b\.json, result\.json",
    ),
    (exports.roboflow_yolo, ("data.coco.empty=keep",), ValueError, r"data\.coco .*yolo"),
    (exports.roboflow_yolo, ("detector.name=maskrcnn",), ValueError, "masks.*coco"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "options", "kind", "told"), BROKEN)
def test_what_is_refused(tmp_path, write, options, kind, told):
    write(tmp_path)
    with pytest.raises(kind, match=f"(?s){told}") as error:
        open_root(tmp_path, *options)
    assert re.search(rf"{tmp_path}|data\.\w+", str(error.value))


def only_train(root):
    exports.roboflow_yolo(root)
    shutil.rmtree(root / "valid")


def three_parts(root):
    exports.roboflow_voc(root)
    for name in NAMES[:4]:
        exports.image(root / f"test/{name}.jpg", name)
        exports.xml(root / f"test/{name}.xml", name, (1, 1))


def same_twice(root):
    only_train(root)
    text = "train: [train/images]\nval: train/images\nnames: {1: dog, 0: cat}"
    exports.text(root / "data.yaml", text)


def not_val(root):
    """A list of other things, and the images of a test where there are some to choose by."""
    exports.roboflow_coco(root)
    exports.text(root / "test.txt", "the test")
    (root / "valid").rename(root / "Testing")


def beside_results(export):
    """Return an export with what trainings, evaluations and predictions write, in it."""

    def write(root):
        export(root)
        exports.text(
            root / "found/predictions.json", [{"image_id": 1, "bbox": [1, 2, 3, 4]}] * 5000
        )
        exports.image(root / "found/train/im 0.jpg.png", NAMES[0])
        exports.image(root / "run/evaluation/im 0.png", NAMES[0])
        for name in ("versions.json", "metrics.jsonl", "a/b.xml", "a/b.txt"):
            exports.text(
                root / f"run/{name}", "<annotation/>" if name[2:] == "b.xml" else "1 1 1 1 1"
            )
        for name in ("predictions", "ground_truth"):
            exports.coco(root / f"evaluation/{name}.json", NAMES)
        for name in ("x.json", "y.jpg", "z.txt"):
            (root / name).mkdir()

    return write


def odd_names(root):
    """Those of macOS for images, a year, and suffixes of all kinds."""
    for name, suffix in zip(NAMES, (".GIF", ".AVIF", ".jp2", ".TIF", *[".jpg"] * 6), strict=True):
        exports.image(root / f"JPEGImages/VOC2007 e\u0301{name}{suffix}", name)
        exports.xml(root / f"Annotation/VOC2007 é{name}.XML", name, (1, 0))
        exports.image(root / f"VOC2008{name}.jpg", name)


def copies(root):
    """As Roboflow augments: all of one image are trained on, or all tested on."""
    for name in (f"{number}_jpg.rf.{copy}" for number in range(10) for copy in ("1a", "2b", "3c")):
        exports.image(root / f"train/{name}.jpg", NAMES[0])
        exports.xml(root / f"train/{name}.xml", NAMES[0], (1, 1))


# What is written, options, the numbers of images, and what is told of them.
READ = [
    (beside_results(exports.labelimg), (), "9 1", "1 images .* left out"),
    (beside_results(exports.cvat_yolo), (), "9 1", r"names\); 1 images .* left out$"),
    (beside_results(exports.cvat_coco), ("data.coco.empty=keep",), "9 1", r"names\)$"),
    (odd_names, (), "", "voc.*10 images .* left out"),
    (copies, (), "21 9", "hash"),
    (with_text(exports.label_studio_yolo, "a.yaml", "names: {a: b}"), (), "9 1", None),
    (without(exports.devkit, "VOC2007/ImageSets"), ("data.classes=[cat, dog]",), "9 1", "hash"),
    (without(exports.label_studio_yolo, "labels/im 4.txt"), (), "9 1", "1 images .* background"),
    (without(exports.labelimg, "im 3.xml"), (), "", "1 images .* left out"),
    (without(exports.labelimg, "im 3.PNG"), ("data.on_error=skip",), "", None),
    (only_train, (), "", "hash"),
    (three_parts, (), "8 2", r"folders train and folders val\)"),
    (in_circles, (), "9 1", "hash"),
    (same_twice, (), "8 8", "8 images are in both"),
    (not_val, ("data.coco.empty=keep",), "8 2", "Testing/_annotations"),
    (exports.roboflow_yolo, ("data.split=hash",), "", "hash"),
    (both, ("data.format=yolo",), "", None),
    (both, ("data.format=voc",), "", None),
    (exports.roboflow_voc, (), "8 2", "1-exclusive"),
    (exports.label_studio_voc, (), "", "0-exclusive"),
    (exports.cvat_voc, (), "", "0-exclusive"),
    (with_text(exports.labelimg, "classes.txt", "other"), (), "9 1", r"names\)$"),
    (with_text(exports.labelimg, "data.yaml", "names: [a]"), (), "9 1", r"names\)$"),
]


@pytest.mark.filterwarnings("ignore:.*left out|.*no object of")
@pytest.mark.parametrize(("write", "options", "numbers", "told"), READ)
def test_what_is_read_and_said(tmp_path, caplog, write, options, numbers, told):
    write(tmp_path)
    with caplog.at_level("INFO", "detmix"):
        _, train, test = open_root(tmp_path, *options)
    if numbers:
        assert f"{len(train)} {len(test)}" == numbers
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{len(train)} images to train and {len(test)} to test" in line or "skip" in str(options)
    assert told is None or re.search(told, line)


def test_data_to_evaluate_alone_are_where_the_configuration_says(tmp_path):
    exports.official_coco(tmp_path)
    (tmp_path / "annotations/instances_train2017.json").unlink()
    for kind in ("auto", "coco"):
        args = (f"--data.root={tmp_path}", f"--data.format={kind}")
        data = open_dataset(parse_args(TrainConfig, args), train=False)
        assert sorted(stems(data)) == PARTS["valid"]


def test_voc_classes_that_never_occur_and_unknown_ones(tmp_path):
    exports.devkit(tmp_path)
    with pytest.warns(UserWarning, match=r"aeroplane, bicycle, .*data\.classes") as caught:
        open_root(tmp_path)
    assert len(caught) == 1
    for xml in (tmp_path / "VOC2007/Annotations").glob("*.xml"):
        xml.write_text(xml.read_text().replace("cat", "cot").replace("dog", "dig"))
    with pytest.raises(ValueError, match=r"\.xml, object 0: unknown class .*cot, dig.*null"):
        open_root(tmp_path)


def test_warnings_of_polygons_and_categories_above(tmp_path):
    for export, told in (
        (exports.yolo_folders, "line 1.*polygon"),
        (exports.roboflow_coco, "pets"),
    ):
        export(tmp_path / export.__name__)
        with pytest.warns(UserWarning, match=told) as caught:
            open_root(tmp_path / export.__name__)
        # Of YOLO's both sets tell; COCO's test set has its classes from the other.
        assert len(caught) == (2 if export is exports.yolo_folders else 1)


def test_a_category_of_its_own_name_is_a_class(tmp_path):
    """As COCO's person, of the super-category person."""
    exports.cvat_coco(tmp_path)
    path = tmp_path / "annotations/instances_default.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 9, "name": "cow", "supercategory": "cow"})
    path.write_text(json.dumps(content))
    assert open_root(tmp_path)[0].data.classes == (*CLASSES, "cow")


@pytest.mark.filterwarnings("ignore:.*no object to train on")
def test_real_images_in_one_folder(voc_root, tmp_path):
    """Those of the devkit's split, as they are there."""
    folder = voc_root / "VOC2007"
    names = (folder / "ImageSets/Main/trainval.txt").read_text().split()[:40]
    for name in names:
        (tmp_path / f"{name}.jpg").symlink_to(folder / f"JPEGImages/{name}.jpg")
        (tmp_path / f"{name}.xml").symlink_to(folder / f"Annotations/{name}.xml")
    _, *datasets = open_root(tmp_path, f"data.classes={[*VOC_CLASSES]}")
    expected = VOCDetection(voc_root)
    for data in datasets:
        for index, name in enumerate(stems(data)):
            target, true = data.target(index), expected.target(names.index(name))
            assert all(torch.equal(target[key], true[key]) for key in ("boxes", "labels"))
    assert sum(map(len, datasets)) == 40
