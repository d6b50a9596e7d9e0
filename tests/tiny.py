"""A detector and a classifier so small that a training step takes some hundredths of a second."""

from __future__ import annotations

import json

import yaml

from detmix.training import PretrainConfig, TrainConfig, parse_args

SETTINGS = yaml.safe_load("""
epochs: 2
log_every: 2
device: cpu
precision: "no"
threads: 1
data: {classes: [circle, cross, square, star, triangle], batch_size: 4, eval_batch_size: 4,
       workers: 0}
augment: {photometric: 0.5, crop: 0.5}
mixing: {p: 0.5, fill: 114}
backbone: {name: resnet18, fpn_channels: 16, levels: [1, 2]}
detector:
    {min_size: 64, max_size: 64, anchor_sizes: [16, 32, 64], roi_sampling_ratio: 1, head_dim: 32,
     options: {rpn_pre_nms_top_n_train: 40, rpn_pre_nms_top_n_test: 20,
               rpn_post_nms_top_n_train: 20, rpn_post_nms_top_n_test: 10,
               rpn_batch_size_per_image: 32, box_batch_size_per_image: 16,
               box_detections_per_img: 5}}
optim: {name: adamw, lr: 0.001}
schedule: {warmup_steps: 2}
""")
CLASSIFIER = yaml.safe_load("""
data: {batch_size: 8, eval_batch_size: 5, workers: 0}
augment: {size: 16, crop: padded, padding: 2, flip: 0}
model: {name: resnet18}
optim: {name: sgd, lr: 0.02, nesterov: true}
""")
CLASSIFIER |= {
    k: SETTINGS[k] for k in ("epochs", "log_every", "device", "precision", "threads", "schedule")
}
# Everything that has a state: an average, clipping, augmentation, mixing, a schedule; and so low a
# threshold that the score of a bad detector is not 0. Two epochs of three steps.
STATEFUL = (
    "data.train_limit=12", "optim.ema_decay=0.9", "optim.clip_norm=1", "optim.lr=0.002",
    "mixing.p=0.8", "mixing.off_epochs=1", "schedule.name=multistep", "schedule.milestones=[1]",
    "detector.options.box_score_thresh=1e-4", "detector.options.box_detections_per_img=60",
    "detector.options.rpn_post_nms_top_n_test=60", "detector.options.rpn_pre_nms_top_n_test=60",
)  # fmt: skip


def tiny_args(root, run_dir, *overrides, settings=SETTINGS):
    """Return command-line arguments; overrides are given as ``"optim.lr=0.1"``."""
    options = (f"data.root={root}", f"run_dir={run_dir}", *overrides)
    return ["--config", json.dumps(settings), *(f"--{option}" for option in options)]


def tiny_config(root, run_dir, *overrides, settings=SETTINGS):
    cls = PretrainConfig if settings is CLASSIFIER else TrainConfig
    return parse_args(cls, tiny_args(root, run_dir, *overrides, settings=settings))


def read_metrics(run_dir):
    """Return the lines of a run's metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
