"""Own data as labelling programs export it: all exports of one data set are read alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import CLASSES, EXPORTS, PARTS, TRUTH, devkit, labelimg, pixels

from detmix.training import TrainConfig, parse_args
from detmix.training.build import open_datasets


def open_root(root, *overrides):
    return open_datasets(parse_args(TrainConfig, [f"--data.root={root}", *overrides]))


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
def test_all_exports_are_read_as_the_same(tmp_path, export, recwarn):
    export(tmp_path)
    split, kind = EXPORTS[export]
    classes = ("--data.classes=[cat, dog]",) if export is devkit else ()
    corners = ("--data.corners=null",)
    config, *datasets = open_root(tmp_path, "--data.coco.empty=keep" if export.__name__ == "official_coco" else "--seed=1", *classes)
    assert (config.data.format, config.data.split) == (kind, split)
    assert config.data.classes == CLASSES
    seen = [[Path(name).stem for name in data.names] for data in datasets]
    empty = {"im 4"} if kind == "coco" and export.__name__ != "official_coco" else set()
    for data, names in zip(datasets, seen, strict=True):
        for index, name in enumerate(names):
            image, target = data[index]
            assert torch.equal(image, torch.from_numpy(pixels(name)).permute(2, 0, 1))
            boxes = torch.tensor([box for box, _ in TRUTH[name]]).reshape(-1, 4)
            torch.testing.assert_close(target["boxes"], boxes.float(), atol=1e-4, rtol=0)
            found = [CLASSES[label - 1] for label in target["labels"].tolist()]
            assert found == [label for _, label in TRUTH[name]]
    if split == "hash":
        assert {*seen[0], *seen[1]} | empty == {*TRUTH}
    else:
        assert [{*names} for names in seen] == [{*names} - empty for names in PARTS.values()]
    print(recwarn.list)
