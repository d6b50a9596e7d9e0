"""Broken images among images by class: left out, or raised."""

from __future__ import annotations

import json
import shutil
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from detmix.data import ImageClasses
from detmix.training import ClassifierTrainer, PretrainConfig, parse_args


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
