"""Broken images among images by class: all listed at once, left out, or raised."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detmix.data import ImageClasses
from detmix.data.check_images import check_images
from detmix.training import ClassifierTrainer, PretrainConfig, parse_args
from detmix.training.console import run_tool

SPLITS = {"train": "train", "test": "val"}
TOOL = Path(__file__).parents[1] / "tools/check_data.py"


@pytest.fixture
def root(tmp_path):
    """Return a tree of good images: 8 of each of two classes to train on, 2 to validate on."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def damage(root):
    """Break two training images; return their names."""
    names = ["train/cat/1.png", "train/dog/3.png"]
    (root / names[0]).write_bytes((root / names[0]).read_bytes()[:100])
    (root / names[1]).write_bytes(b"")
    return names


def pack(root):
    """Turn the training folder into two archives, one for each class."""
    for number, name in enumerate(("cat", "dog")):
        with tarfile.open(root / f"train-{number}.tar", "w") as archive:
            for path in sorted((root / "train" / name).iterdir()):
                archive.add(path, path.relative_to(root).as_posix())
    shutil.rmtree(root / "train")


def found_in(root, **options):
    found = check_images(root, SPLITS, **options)
    return [(problem.kind, problem.subset) for problem in found.problems], found


def test_good_data_is_clean(root):
    problems, found = found_in(root)
    assert problems == found.notes == []
    assert str(found) == "train: 16 images\ntest: 4 images\n\nno problems"


@pytest.mark.parametrize("packed", [False, True])
def test_all_problems_at_once(root, packed):
    names = damage(root)
    shutil.copy(root / "train/cat/0.png", root / "train/dog/9.png")
    shutil.copy(root / "train/cat/2.png", root / "val/cat/9.png")
    (root / "val/fox").mkdir()
    Image.new("RGB", (4, 4)).save(root / "val/fox/0.png")
    if packed:
        pack(root)
    problems, found = found_in(root)
    assert problems == [
        ("unusable image", "train"),
        ("unusable image", "train"),
        ("unknown class", "test"),
        ("in train and test", "test"),
    ]
    messages = [problem.message for problem in found.problems]
    assert names[0] in messages[0]
    assert "broken image file of 100 bytes" in messages[0]
    assert names[1] in messages[1]
    assert "the file is empty" in messages[1]
    assert "'fox', not among those of train" in messages[2]
    assert "train/cat/2.png" in messages[3]
    assert "val/cat/9.png" in messages[3]
    (note,) = found.notes
    assert note.kind == "same picture twice"
    assert dict(found.num_images) == {"train": 17, "test": 5}
    with pytest.raises(ValueError, match="fox"):  # as the data set has it
        ImageClasses(root, "val", classes=("cat", "dog"))


def test_what_is_wrong_with_the_whole(root):
    (root / "train/ant").mkdir()
    shutil.rmtree(root / "val")
    problems, found = found_in(root)
    assert problems == [("missing file", "train"), ("missing file", "test")]
    assert "ant: the class has no image" in found.problems[0].message
    assert "holds no split 'val'" in found.problems[1].message


def test_archives(root):
    pack(root)
    with tarfile.open(root / "train-2.tar", "w") as archive:
        data = (root / "val/cat/0.png").read_bytes()
        for name in ("../cat/a.png", "b.png", "train/ant/c.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (root / "train-3.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    problems, found = found_in(root)
    assert problems == [
        ("name that leads outside", "train"),
        ("unusable image", "train"),
        ("unusable image", "train"),
        ("unusable list", "train"),
        ("in train and test", "test"),
    ]
    for problem, part in zip(
        found.problems, ("leads outside", "in no folder", "a link", "gzip", "ant/c"), strict=True
    ):
        assert part in problem.message
    assert dict(found.num_images) == {"train": 17, "test": 4}


def test_few_classes(root):
    damage(root)
    problems, found = found_in(root, class_limit=1)
    assert problems == [("unusable image", "train")]
    assert dict(found.num_images) == {"train": 8, "test": 2}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_skip(root, packed, in_memory):
    whole = ImageClasses(root)
    expected = {name: whole[index] for index, name in enumerate(whole.names)}
    names = damage(root)
    if packed:
        pack(root)
    with pytest.warns(UserWarning, match=r"2 of 16 images left out \(unusable image: 2\)"):
        dataset = ImageClasses(root, in_memory=in_memory, on_error="skip")
    assert [image.name for image in dataset.skipped] == names
    assert dataset.names == tuple(name for name in whole.names if name not in names)
    assert dataset.classes == ("cat", "dog")
    assert len(dataset) == len(dataset.labels) == 14
    for index, name in enumerate(dataset.names):
        image, label = dataset[index]
        assert torch.equal(image, expected[name][0])
        assert label == dataset.labels[index] == expected[name][1]


def test_a_class_without_a_good_image_keeps_its_label(root):
    for path in (root / "train/cat").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        dataset = ImageClasses(root, on_error="skip")
    assert dataset.classes == ("cat", "dog")
    assert set(dataset.labels) == {1}
    for path in (root / "train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"16 of 16 images left out .*; there is none left"):
        ImageClasses(root, on_error="skip")


def test_good_data_and_wrong_values(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ImageClasses(root, on_error="skip").skipped == ()
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip", got \'no\''):
        ImageClasses(root, on_error="no")


def config_for(root, run_dir, *overrides):
    text = json.dumps(
        {
            "run_dir": str(run_dir),
            "epochs": 1,
            "device": "cpu",
            "mix": "cutmix",
            "data": {"root": str(root), "batch_size": 4, "eval_batch_size": 4, "workers": 0},
            "augment": {"size": 16},
            "model": {"name": "resnet18", "stem": "small"},
        }
    )
    return parse_args(PretrainConfig, ["--config", text, *overrides])


def test_pretraining(root, tmp_path):
    damage(root)
    with pytest.raises(ValueError, match=r"(?s)train/(cat/1|dog/3)\.png"):
        ClassifierTrainer(config_for(root, tmp_path / "runs/raise")).fit()
    with pytest.warns(UserWarning, match="left out"):
        trainer = ClassifierTrainer(
            config_for(root, tmp_path / "runs/skip", "--data.on_error", "skip")
        )
    assert len(trainer.train_set) == 14
    assert trainer.fit().num_images == 4
    (root / "val/cat/0.png").write_bytes(b"")
    config = config_for(root, tmp_path / "runs/val", "--data.on_error", "skip")
    with pytest.warns(UserWarning, match="left out"):
        trainer = ClassifierTrainer(config)
    with pytest.raises(ValueError, match=r"val/cat/0\.png"):
        trainer.fit()


def test_tool(root, capsys):
    main = runpy.run_path(str(TOOL))["main"]
    args = ["--pretrain", f"--data.root={root}"]
    assert run_tool(main, args) == 0
    assert "train: 16 images" in capsys.readouterr().out
    names = damage(root)
    with pytest.raises(SystemExit) as stop:
        run_tool(main, [*args, "--json"])
    assert stop.value.code == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["kind"] for problem in problems] == ["unusable image"] * 2
    assert all(name in p["message"] for name, p in zip(names, problems, strict=True))
