"""Every family of detectors learns: its loss falls within some mixed steps on real images."""

from __future__ import annotations

import json
from statistics import mean

import pytest
from tiny import read_metrics

from detmix.data.shapes_coco import write_shapes_coco
from detmix.training import DetectorTrainer, TrainConfig, parse_args

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

BACKBONE = {"name": "resnet18", "norm": "batch", "fpn_channels": 32, "levels": [2, 3, 4]}
PROPOSALS = {
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100,
    "box_batch_size_per_image": 32,
}
SIZES = {"min_size": 96, "max_size": 96}
SMALL_RCNN = {**SIZES, "anchor_sizes": [16, 32, 64, 96], "roi_sampling_ratio": 1, "head_dim": 64}
FAMILIES = {
    "fasterrcnn": {**SMALL_RCNN, "options": PROPOSALS},
    "retinanet": {**SIZES, "anchor_sizes": [16, 32, 64, 96]},
    "fcos": {**SIZES, "anchor_sizes": [8, 16, 32, 64]},
}
# With the backbones that torchvision gives them.
BUILDERS = {
    "ssdlite320_mobilenet_v3_large": {},
    "ssd300_vgg16": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {**SIZES, "options": PROPOSALS},
    "retinanet_resnet50_fpn_v2": SIZES,
}
# What VOC's annotations do not have.
WITH_MORE = {
    "maskrcnn": {**SMALL_RCNN, "options": PROPOSALS},
    "keypointrcnn": {**SMALL_RCNN, "options": PROPOSALS},
}


def losses_of_a_run(data, run_dir, name, detector, backbone, *, steps):
    """Train on 8 images with mixup and CutMix in turn; return the loss of each step."""
    settings = {
        "run_dir": str(run_dir),
        "epochs": steps // 2,
        "eval_every": steps,
        "save_every": steps,
        "log_every": 1,
        "threads": 1,
        "device": "cpu",
        "data": {"batch_size": 4, "workers": 0, "train_limit": 8, "test_limit": 1, **data},
        "augment": {"size": 160},
        "mixing": {"name": "mixup+cutmix", "p": 0.5, "fill": 114},
        "detector": {"name": name, **detector},
        "optim": {"name": "adamw", "lr": 0.0005, "clip_norm": 10.0},
        "schedule": {"warmup_steps": 5},
    }
    if backbone is not None:
        settings["backbone"] = backbone
    DetectorTrainer(parse_args(TrainConfig, ["--config", json.dumps(settings)])).fit()
    lines = [line for line in read_metrics(run_dir) if line["event"] == "train"]
    assert len(lines) == steps
    return [line["loss"] for line in lines]


def assert_falls(losses):
    num = len(losses) // 4
    assert mean(losses[-num:]) < 0.8 * mean(losses[:num])


@pytest.mark.parametrize("name", FAMILIES)
def test_families_on_real_images(voc_root, tmp_path, name):
    data = {"root": str(voc_root)}
    assert_falls(losses_of_a_run(data, tmp_path / "run", name, FAMILIES[name], BACKBONE, steps=32))


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_builders_on_real_images(voc_root, tmp_path, name):
    data = {"root": str(voc_root)}
    assert_falls(losses_of_a_run(data, tmp_path / "run", name, BUILDERS[name], None, steps=24))


@pytest.mark.parametrize("name", WITH_MORE)
def test_masks_and_keypoints_on_shapes(tmp_path, name):
    root = write_shapes_coco(tmp_path / "coco", num_train=8, num_test=1, image_size=96)
    data = {"format": "coco", "root": str(root)}
    assert_falls(losses_of_a_run(data, tmp_path / "run", name, WITH_MORE[name], BACKBONE, steps=32))
