"""Every family learns; data in the COCO format are scored in training as by the tools after it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from accelerate import Accelerator
from runs import command
from tiny import SETTINGS, read_metrics, tiny_config
from torch import nn
from torch.utils.data import DataLoader

from detmix.data import collate
from detmix.data.shapes_coco import write_shapes_coco
from detmix.evaluation import score_predictions
from detmix.training import DetectorTrainer
from detmix.training.build import build_evaluator, build_test_set, open_dataset, with_data_noted
from detmix.training.inference import detect, score

RCNN = SETTINGS["detector"] | {"head_dim": 64}
SMALL = {"min_size": 64, "max_size": 64, "anchor_sizes": [8, 16, 32]}
ONE_STAGE = {**SMALL, "options": {"score_thresh": 0.001}}
FAMILIES = {
    "fasterrcnn": RCNN,
    "maskrcnn": RCNN,
    "keypointrcnn": RCNN,
    "retinanet": ONE_STAGE,
    "fcos": ONE_STAGE,
    # a builder of torchvision, with a backbone and image size of its own
    "ssdlite320_mobilenet_v3_large": {"options": {"score_thresh": 0.0}},
}
MORE = {"maskrcnn": ("segm", "mask_ap"), "keypointrcnn": ("keypoints", "keypoint_ap")}


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory) -> Path:
    """Return 8 images of shapes, with strings for ids, to train on and 6 to test on."""
    root = write_shapes_coco(tmp_path_factory.mktemp("coco"), 8, 6, image_size=64)
    path = root / "annotations/instances_train2017.json"
    path.write_text(json.dumps(with_names(json.loads(path.read_text()))))
    return root


def with_names(content):
    """Put strings in the place of the images' ids."""
    for key, entries in (("id", content["images"]), ("image_id", content["annotations"])):
        for entry in entries:
            entry[key] = f"img {entry[key]}"
    return content


def config_for(folder, run_dir, name="fasterrcnn", *overrides, steps=24, **data):
    """Return a training on 8 images with mixup and CutMix in turn, evaluated at the end."""
    settings = {
        **SETTINGS,
        "data": {"format": "coco", "batch_size": 4, "workers": 0, **data},
        "augment": {},
        "mixing": {"name": "mixup+cutmix", "p": 0.5, "fill": 114},
        "backbone": SETTINGS["backbone"] | {"fpn_channels": 32},
        "detector": {"name": name, **FAMILIES[name]},
        "epochs": steps // 2, "eval_every": steps, "save_every": steps, "log_every": 1,
    }  # fmt: skip
    if "_" in name:
        del settings["backbone"]
    return tiny_config(folder, run_dir, *overrides, settings=settings)


@pytest.mark.parametrize("name", list(FAMILIES)[1:])
def test_learns_and_is_scored(coco_root, tmp_path, name):
    run, takes_long = tmp_path / "run", "_" in name or name == "keypointrcnn"
    few = {"steps": 2, "train_limit": 4, "test_limit": 3} if takes_long else {}
    DetectorTrainer(config_for(coco_root, run, name, **few)).fit()
    if not takes_long:
        losses = [line["loss"] for line in read_metrics(run) if line["event"] == "train"]
        assert mean(losses[-6:]) < 0.85 * mean(losses[:6])
    (metrics,) = (line for line in read_metrics(run) if line["event"] == "eval")
    iou_type, key = MORE.get(name, ("bbox", "mean_ap"))
    assert metrics.keys() >= {"mean_ap", "ap50", "ap75", "ap_small", "ap_large", key}
    # What the data set says is noted, so that evaluating needs no training annotations.
    noted = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    assert noted["classes"] == ["circle", "cross", "square", "star", "triangle"]
    assert noted["num_keypoints"] == (4 if name == "keypointrcnn" else None)
    # Evaluated anew, and scored again from the files, it is the same to the last digit.
    status, out, _ = command("evaluate", run / "last.pt", "--save", tmp_path / "saved")
    assert status == 0
    assert f"{metrics['mean_ap']:.4f}" in out
    files = [tmp_path / "saved" / f"{stem}.json" for stem in ("predictions", "ground_truth")]
    again = score_predictions(*files)
    assert again.ap == metrics["mean_ap"]
    assert again.num_images == few.get("test_limit", 6)
    assert score_predictions(*files, iou_type=iou_type).ap == metrics[key]


class KnowsTheTruth(nn.Module):
    """Finds every object of the images it is given, in their own coordinates."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([dataset[index][1] for index in range(len(dataset))])

    def forward(self, images):
        keys = {"boxes", "labels", "masks", "keypoints"}
        targets = [next(self.targets) for _ in images]
        found = [{key: target[key] for key in keys & target.keys()} for target in targets]
        for prediction in found:
            prediction["scores"] = torch.ones(len(prediction["boxes"]))
            if "masks" in prediction:
                prediction["masks"] = prediction["masks"][:, None].float()
        return found


BEYOND, NAMES = "boxes beyond the image", "names for ids"
CASES = {
    "masks": ("maskrcnn",),
    "keypoints at another size": ("keypointrcnn", "augment.size=48"),
    "some classes in another order": ("fasterrcnn", "data.classes=[star, circle]"),
    BEYOND: ("fasterrcnn",),
    NAMES: ("fasterrcnn",),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_file(coco_root, tmp_path, case):
    """In the coordinates on disk, and with the file's own category ids."""
    content = json.loads((coco_root / "annotations/instances_val2017.json").read_text())
    for entry in content["annotations"][1::2] if case == BEYOND else ():
        entry["bbox"][2] += 60  # of an image of 64 pixels
    content["annotations"][0]["iscrowd"] = int(case == BEYOND)
    annotations = tmp_path / "truth.json"
    annotations.write_text(json.dumps(with_names(content) if case == NAMES else content))
    options = (*CASES[case], f"data.coco.test_annotations={annotations}")
    config = with_data_noted(config_for(coco_root, tmp_path, *options))
    dataset = open_dataset(config, train=False)
    test_set, evaluator = build_test_set(config, dataset), build_evaluator(config, dataset)
    loader = DataLoader(test_set, batch_size=4, collate_fn=collate)
    found = detect(KnowsTheTruth(test_set), loader, Accelerator(cpu=True), truth=dataset)
    score(found, [evaluator], dataset)
    predictions, _ = evaluator.save(tmp_path)
    for iou_type in evaluator.iou_types:
        result = evaluator.compute(iou_type)
        assert result.ap > 0
        assert (result.ap50 > 0.9) == (case != BEYOND)
        again = score_predictions(predictions, annotations, iou_type=iou_type).ap_by_class
        assert {name: again[name] for name in result.ap_by_class} == result.ap_by_class
        count = sum(len(dataset.target(index)["boxes"]) for index in range(len(dataset)))
        assert sum(result.num_objects.values()) == count - (case == BEYOND)
        assert count == len(content["annotations"]) or len(dataset.classes) == 2


def test_another_number_of_keypoints(coco_root, tmp_path):
    config = config_for(coco_root, tmp_path, "keypointrcnn", "data.num_keypoints=17")
    with pytest.raises(ValueError, match=r"4 keypoints .*num_keypoints=17"):
        DetectorTrainer(config)
