"""Training, evaluating and scoring again on data in the COCO format, by the tools' own path."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from runs import assert_same_run
from tiny import SETTINGS, read_metrics, tiny_config
from torch import nn
from torch.utils.data import DataLoader

from detmix.data import CocoDetection, collate
from detmix.data.shapes_coco import SHAPE_CATEGORY_IDS, write_shapes_coco
from detmix.evaluation import VOCEvaluator, score_predictions
from detmix.training import DetectorTrainer, TrainConfig, evaluate, load_detector, parse_args
from detmix.training.build import build_evaluator, build_test_set, note_data, open_dataset
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


def test_a_builder_of_torchvision_through_the_tools(coco_root, tmp_path):
    """SSDlite has a backbone, an image size and a normalisation of its own."""
    run = tmp_path / "run"
    settings = {
        "detector": {"name": "ssdlite320_mobilenet_v3_large", "options": {"score_thresh": 0.0}},
        "data": {"format": "coco", "root": str(coco_root), "batch_size": 4, "workers": 0},
        "mixing": {"name": "mixup+cutmix"},
        "run_dir": str(run),
        "schedule": {"name": "constant"},
        "threads": 1,
    }
    for epochs in (1, 2):
        DetectorTrainer(
            parse_args(
                TrainConfig,
                ["--config", json.dumps(settings), f"--epochs={epochs}", "--resume=auto"],
            )
        ).fit()
    lines = [line for line in read_metrics(run) if line["event"] == "eval"]
    assert [line["epoch"] for line in lines] == [1, 2]
    command = [sys.executable, ROOT / "tools" / "evaluate.py", run / "last.pt", "--save", run]
    printed = subprocess.run(command, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    again = score_predictions(run / "predictions.json", run / "ground_truth.json")
    assert again.ap == lines[-1]["mean_ap"]
    model, _ = load_detector(run / "last.pt")
    assert model.transform.image_mean == [0.5, 0.5, 0.5]


def test_a_checkpoint_from_before_detectors_had_names(shapes_root, tmp_path):
    """Neither detector.name nor data.format, data.coco and data.num_keypoints were in it."""
    run = tmp_path / "run"
    result = DetectorTrainer(tiny_config(shapes_root, run, "epochs=1")).fit()
    state = torch.load(run / "last.pt", weights_only=True)
    del state["config"]["detector"]["name"]
    for key in ("format", "coco", "num_keypoints"):
        del state["config"]["data"][key]
    for key in ("cutmix_alpha", "min_visibility"):
        del state["config"]["mixing"][key]
    torch.save(state, tmp_path / "old.pt")
    model, config = load_detector(tmp_path / "old.pt")
    evaluator = VOCEvaluator(config.data.class_names)
    data = open_dataset(config, train=False)
    loader = DataLoader(build_test_set(config, data), batch_size=4, collate_fn=collate)
    evaluate(model, loader, [evaluator], Accelerator(cpu=True), truth=data)
    assert evaluator.compute().ap == pytest.approx(result.ap, nan_ok=True)


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
    pairs = [] if name == "none" else [mixed_pair(config, 0, 1, lam=0.6)]
    for images, targets in (mixed_batch(config), *pairs):
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
            prediction = {key: target[key] for key in ("boxes", "labels")}
            prediction["scores"] = torch.ones(len(target["boxes"]))
            if "masks" in target:
                prediction["masks"] = target["masks"][:, None].float()
            if "keypoints" in target:
                prediction["keypoints"] = target["keypoints"]
            found.append(prediction)
        return found


def evaluate_the_truth(config):
    """Evaluate a detector that knows the test images, as `config` says."""
    dataset = open_dataset(config, train=False)
    test_set = build_test_set(config, dataset)
    evaluator = build_evaluator(config, dataset)
    loader = DataLoader(test_set, batch_size=4, collate_fn=collate)
    evaluate(KnowsTheTruth(test_set), loader, [evaluator], Accelerator(cpu=True), truth=dataset)
    return dataset, evaluator


@pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn", "keypointrcnn"])
@pytest.mark.parametrize("size", [None, 48])
def test_scored_as_the_file_has_it(coco_root, tmp_path, name, size):
    """In the coordinates on disk, and with the file's own category ids."""
    overrides = [] if size is None else [f"augment.size={size}"]
    config = config_for(coco_root, tmp_path, name, *overrides)
    config = note_data(config, open_dataset(config, train=True))
    dataset, evaluator = evaluate_the_truth(config)
    assert tuple(dataset.category_ids) == SHAPE_CATEGORY_IDS
    predictions, _ = evaluator.save(tmp_path)
    annotations = coco_root / "annotations" / "instances_val2017.json"
    ids = {entry["category_id"] for entry in json.loads(predictions.read_text())}
    assert ids <= set(SHAPE_CATEGORY_IDS)
    assert len(ids) > 2
    for iou_type in evaluator.iou_types:
        result = evaluator.compute(iou_type)
        assert result.ap50 > 0.9
        assert result.ap > (0.99 if size is None else 0.3)
        assert score_predictions(predictions, annotations, iou_type=iou_type).ap == result.ap
    counts = [len(dataset.target(index)["boxes"]) for index in range(len(dataset))]
    assert sum(evaluator.compute("bbox").num_objects.values()) == sum(counts)


def test_boxes_beyond_the_image_are_scored_as_the_file_has_them(coco_root, tmp_path):
    annotations = coco_root / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    for number, entry in enumerate(content["annotations"]):
        if number % 2:
            entry["bbox"][2] += 60  # reaches over the right edge of an image of 64 pixels
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    config = config_for(coco_root, tmp_path, "fasterrcnn", f"data.coco.test_annotations={other}")
    config = note_data(config, open_dataset(config, train=True))
    _, evaluator = evaluate_the_truth(config)
    predictions, _ = evaluator.save(tmp_path)
    result = evaluator.compute()
    assert 0 < result.ap < 0.9
    assert score_predictions(predictions, other).ap == result.ap


def test_some_classes_in_another_order(coco_root, tmp_path):
    config = config_for(coco_root, tmp_path, "fasterrcnn", "data.classes=[star, circle]")
    _, evaluator = evaluate_the_truth(config)
    assert evaluator.compute().ap == pytest.approx(1.0)
    predictions, _ = evaluator.save(tmp_path)
    by_class = score_predictions(
        predictions, coco_root / "annotations" / "instances_val2017.json"
    ).ap_by_class
    assert by_class["star"] == by_class["circle"] == pytest.approx(1.0)
    assert by_class["square"] == 0


def test_saved_ground_truth_leads_back_to_the_images(coco_root, tmp_path):
    config = config_for(coco_root, tmp_path)
    config = note_data(config, open_dataset(config, train=True))
    dataset, evaluator = evaluate_the_truth(config)
    _, ground_truth = evaluator.save(tmp_path)
    again = CocoDetection(coco_root / "val2017", ground_truth)
    assert again.names == dataset.names
    for index in range(len(dataset)):
        assert torch.equal(again.target(index)["boxes"], dataset.target(index)["boxes"])


class TestErrors:
    @pytest.mark.parametrize("name", ["maskrcnn", "keypointrcnn_resnet50_fpn"])
    def test_voc_has_neither_masks_nor_keypoints(self, name):
        with pytest.raises(ValueError, match=f"{name} needs (masks|keypoints).*data.format=coco"):
            parse_args(TrainConfig, [f"--detector.name={name}"])

    def test_another_number_of_keypoints(self, coco_root, tmp_path):
        config = config_for(coco_root, tmp_path, "keypointrcnn", "data.num_keypoints=17")
        with pytest.raises(ValueError, match=r"names 4 keypoints .*num_keypoints=17 needs 17"):
            DetectorTrainer(config)

    def test_keypoints_to_evaluate_that_are_not_those_to_train(self, coco_root, tmp_path):
        path = coco_root / "annotations" / "instances_val2017.json"
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["keypoints"].reverse()
        other = tmp_path / "other.json"
        other.write_text(json.dumps(content))
        config = config_for(
            coco_root, tmp_path, "keypointrcnn", f"data.coco.test_annotations={other}"
        )
        with pytest.raises(ValueError, match=r"right_side, .*top, are not those to train, top"):
            DetectorTrainer(config)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["found.json"], "found.json needs --annotations"),
            (["best.pt", "--iou_type", "segm"], "--iou_type is for --annotations"),
            (["best.pt", "--backend", "mine"], "invalid choice: 'mine'"),
            ([".", "--report"], "--report needs a checkpoint"),
            (["found.json", "--annotations", "x", "--save", "y"], "no use for --save"),
            (["found.json", "--annotations", "x"], r"found\.json|x"),
        ],
    )
    def test_arguments_of_evaluate(self, tmp_path, args, message):
        command = [sys.executable, ROOT / "tools" / "evaluate.py", *args]
        printed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert printed.returncode == 2
        assert re.search(message, printed.stderr)
        assert "Traceback" not in printed.stderr

    def test_missing_annotations(self, coco_root, tmp_path):
        config = config_for(
            coco_root, tmp_path, "fasterrcnn", "data.coco.test_annotations=missing.json"
        )
        with pytest.raises(FileNotFoundError, match=r"missing\.json"):
            DetectorTrainer(config)
