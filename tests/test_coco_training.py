"""Training, evaluating and scoring again on data in the COCO format, by the tools' own path."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from tiny import SETTINGS, read_metrics
from torch import nn
from torch.utils.data import DataLoader

from detmix.data import collate
from detmix.data.shapes_coco import SHAPE_CATEGORY_IDS, write_shapes_coco
from detmix.evaluation import score_predictions
from detmix.training import DetectorTrainer, TrainConfig, evaluate, parse_args
from detmix.training.build import build_evaluator, build_test_set, open_dataset, open_datasets
from detmix.training.console import run_tool

EVALUATE = Path(__file__).parents[1] / "tools" / "evaluate.py"
pytestmark = pytest.mark.usefixtures("fresh_accelerator")

FAMILIES = {
    "fasterrcnn": {},
    "maskrcnn": {},
    "keypointrcnn": {},
    "retinanet": {"anchor_sizes": [16, 32, 64]},
    "fcos": {"anchor_sizes": [4, 8, 16]},
    # a builder of torchvision with a backbone and an image size of its own
    "ssdlite320_mobilenet_v3_large": {"options": {"score_thresh": 0.0}},
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
    elif name.startswith("ssdlite"):
        del settings["backbone"]
        settings["data"]["train_limit"] = 4  # of 320 pixels
        detector = {}
    settings["detector"] = {"name": name, **detector, **FAMILIES.get(name, {})}
    return parse_args(
        TrainConfig, ["--config", json.dumps(settings), *(f"--{item}" for item in overrides)]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_of_each_family(coco_root, tmp_path, name, capsys):
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
    main = runpy.run_path(str(EVALUATE))["main"]
    assert run_tool(main, [str(run / "last.pt"), "--save", str(tmp_path / "saved")]) == 0
    assert f"{metrics[-1]['mean_ap']:.4f}" in capsys.readouterr().out
    files = [tmp_path / "saved" / f"{stem}.json" for stem in ("predictions", "ground_truth")]
    again = score_predictions(*files)
    assert again.ap == metrics[-1]["mean_ap"]
    assert again.num_images == 6
    if more:
        iou_type, key = ("segm", "mask_ap") if name == "maskrcnn" else ("keypoints", "keypoint_ap")
        assert score_predictions(*files, iou_type=iou_type).ap == metrics[-1][key]


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
    config, _, _ = open_datasets(config)
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
    config, _, _ = open_datasets(config)
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


class TestErrors:
    def test_another_number_of_keypoints(self, coco_root, tmp_path):
        config = config_for(coco_root, tmp_path, "keypointrcnn", "data.num_keypoints=17")
        with pytest.raises(ValueError, match=r"names 4 keypoints .*num_keypoints=17 needs 17"):
            DetectorTrainer(config)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["found.json"], "--annotations"),
            (["best.pt", "--iou_type", "segm"], "--annotations"),
            (["best.pt", "--backend", "mine"], "mine"),
            ([".", "--report"], "--report"),
            (["found.json", "--annotations", "x", "--save", "y"], "--save"),
        ],
    )
    def test_arguments_of_evaluate(self, capsys, args, message):
        main = runpy.run_path(str(EVALUATE))["main"]
        try:
            code = run_tool(main, args)
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert message in capsys.readouterr().err
