"""Training, evaluating and scoring again on data in the COCO format, by the tools' own path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from runs import assert_same_run
from tiny import SETTINGS, read_metrics
from torch import nn
from torch.utils.data import DataLoader

from detmix.data import AugmentedDataset, CocoDetection, collate, detection_transforms
from detmix.data.shapes_coco import write_shapes_coco
from detmix.evaluation import COCOEvaluator, score_predictions
from detmix.training import DetectorTrainer, TrainConfig, evaluate, load_detector, parse_args
from detmix.training.datasets import note_data, open_dataset
from detmix.training.preview import mixed_batch, mixed_pair

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("fresh_accelerator")

FAMILIES = {
    "fasterrcnn": {},
    "maskrcnn": {},
    "keypointrcnn": {},
    "retinanet": {"anchor_sizes": [16, 32, 64]},
    "fcos": {"anchor_sizes": [4, 8, 16]},
}
METRICS = {"mean_ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory) -> Path:
    """Return 16 images of shapes to train on and 6 to test on, with masks and keypoints."""
    root = tmp_path_factory.mktemp("coco")
    return write_shapes_coco(root, num_train=16, num_test=6, image_size=64)


def config_for(root, run_dir, name="fasterrcnn", *overrides):
    settings = json.loads(json.dumps(SETTINGS))
    del settings["data"]["classes"]
    settings["data"].update(format="coco", root=str(root))
    settings["run_dir"] = str(run_dir)
    settings["mixing"]["name"] = "mixup+cutmix"
    detector = settings["detector"]
    if name in ("retinanet", "fcos"):
        options = {"topk_candidates": 20, "score_thresh": 0.0}
        detector = {"min_size": 64, "max_size": 64, "options": options}
        settings["backbone"]["fpn_channels"] = 32
    settings["detector"] = {"name": name, **detector, **FAMILIES.get(name, {})}
    return parse_args(
        TrainConfig, ["--config", json.dumps(settings), *(f"--{item}" for item in overrides)]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_of_each_family(coco_root, tmp_path, name):
    run = tmp_path / "run"
    DetectorTrainer(config_for(coco_root, run, name)).fit()
    metrics = [line for line in read_metrics(run) if line["event"] == "eval"]
    more = {"maskrcnn": {"mask_ap"}, "keypointrcnn": {"keypoint_ap"}}.get(name, set())
    assert len(metrics) == 2
    assert METRICS | more <= metrics[-1].keys()
    # What the data set says is noted, so that evaluating needs no training annotations.
    noted = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    assert noted["classes"] == ["circle", "cross", "square", "star", "triangle"]
    assert noted["num_keypoints"] == (4 if name == "keypointrcnn" else None)
    # Evaluated anew, and scored again from the files, it is the same to the last digit.
    _, config = load_detector(run / "last.pt")
    dataset = open_dataset(config, train=False)
    assert (
        dataset.category_ids
        == CocoDetection(
            coco_root / "val2017", coco_root / "annotations/instances_val2017.json"
        ).category_ids
    )
    command = [sys.executable, ROOT / "tools" / "evaluate.py", run / "last.pt", "--save"]
    printed = subprocess.run([*command, tmp_path / "saved"], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    files = [tmp_path / "saved" / f"{stem}.json" for stem in ("predictions", "ground_truth")]
    again = score_predictions(*files)
    assert again.ap == metrics[-1]["mean_ap"]
    assert again.num_images == 6
    if more:
        iou_type, key = ("segm", "mask_ap") if name == "maskrcnn" else ("keypoints", "keypoint_ap")
        assert score_predictions(*files, iou_type=iou_type).ap == metrics[-1][key]


def test_resumes_exactly(coco_root, tmp_path):
    for run_dir, epochs in ((tmp_path / "whole", 2), (tmp_path / "parts", 1)):
        DetectorTrainer(config_for(coco_root, run_dir, "maskrcnn", f"epochs={epochs}",
                                   "schedule.name=constant")).fit()  # fmt: skip
    DetectorTrainer(
        config_for(coco_root, tmp_path / "parts", "maskrcnn", "schedule.name=constant",
                   "resume=auto")
    ).fit()  # fmt: skip
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_some_of_the_classes(coco_root, tmp_path):
    config = config_for(coco_root, tmp_path, "fasterrcnn", "data.classes=[star, circle]")
    dataset = open_dataset(config, train=True)
    assert note_data(config, dataset).data.class_names == ("star", "circle")
    assert {int(k) for i in range(len(dataset)) for k in dataset.target(i)["labels"]} <= {1, 2}


@pytest.mark.parametrize("name", ["mixup", "cutmix", "mixup+cutmix", "none"])
def test_previews_have_masks(coco_root, tmp_path, name):
    config = config_for(coco_root, tmp_path, "maskrcnn", f"mixing.name={name}")
    for images, targets in (mixed_batch(config), mixed_pair(config, 0, 1, lam=0.6)):
        for image, target in zip(images, targets, strict=True):
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])


class KnowsTheTruth(nn.Module):
    """Finds every object of the images it is given, in their own coordinates."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([dataset[index][1] for index in range(len(dataset))])

    def forward(self, images):
        found = []
        for target in (next(self.targets) for _ in images):
            scores = torch.ones(len(target["boxes"]))
            found.append(
                {
                    "boxes": target["boxes"],
                    "labels": target["labels"],
                    "scores": scores,
                    "masks": target["masks"][:, None].float(),
                    "keypoints": target["keypoints"],
                }
            )
        return found


def test_scored_in_the_coordinates_on_disk(coco_root):
    """COCO's small, medium and large are of the images as they are, not as they are shrunk to."""
    files = coco_root / "val2017", coco_root / "annotations/instances_val2017.json"
    dataset = CocoDetection(*files, masks=True, keypoints=True)
    shrunk = AugmentedDataset(dataset, detection_transforms(48, train=False))
    evaluator = COCOEvaluator(
        dataset.classes, category_ids=dataset.category_ids, iou_types=("bbox", "segm")
    )
    loader = DataLoader(shrunk, batch_size=4, collate_fn=collate)
    evaluate(KnowsTheTruth(shrunk), loader, [evaluator], Accelerator(cpu=True), truth=dataset)
    result = evaluator.compute("bbox")
    assert result.ap > 0.9
    assert evaluator.compute("segm").ap50 == pytest.approx(1.0)
    counts = [len(dataset.target(index)["boxes"]) for index in range(len(dataset))]
    assert sum(result.num_objects.values()) == sum(counts)


class TestErrors:
    @pytest.mark.parametrize("name", ["maskrcnn", "keypointrcnn_resnet50_fpn"])
    def test_voc_has_neither_masks_nor_keypoints(self, name):
        with pytest.raises(ValueError, match=f"{name} needs (masks|keypoints).*data.format=coco"):
            parse_args(TrainConfig, [f"--detector.name={name}"])

    def test_another_number_of_keypoints(self, coco_root, tmp_path):
        config = config_for(coco_root, tmp_path, "keypointrcnn", "data.num_keypoints=17")
        with pytest.raises(ValueError, match=r"names 4 keypoints .*num_keypoints=17 needs 17"):
            DetectorTrainer(config)

    def test_predictions_without_annotations(self, tmp_path):
        command = [sys.executable, ROOT / "tools" / "evaluate.py", tmp_path / "found.json"]
        printed = subprocess.run(command, capture_output=True, text=True)
        assert printed.returncode == 2
        assert "needs --annotations" in printed.stderr

    def test_missing_annotations(self, coco_root, tmp_path):
        config = config_for(
            coco_root, tmp_path, "fasterrcnn", "data.coco.test_annotations=missing.json"
        )
        with pytest.raises(FileNotFoundError, match=r"missing\.json"):
            DetectorTrainer(config)
