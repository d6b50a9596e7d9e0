"""Configurations: files and overrides, what is refused, and the way back to plain values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet

from detmix.detectors import build_classifier
from detmix.losses import LossWeighting
from detmix.losses.ssd import WeightedSSD
from detmix.mixing import DetectionCutMix, DetectionMixUp, RandomChoice
from detmix.training import OptimConfig, PretrainConfig, TrainConfig, parse_args
from detmix.training.build import build_mixer, build_model
from detmix.training.classifier import build_batch_mix, build_image_transform
from detmix.training.optim import learning_rate_factor

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
PRETRAIN_CONFIGS = sorted(FOLDER.glob("pretrain/*.yaml"))
# These change a few settings of another file, which their heads name.
BASES = {"overfit16_voc2007": "voc2007_cpu"}
# Each family's class, and the part of it that has weighted losses.
MODELS = {
    "fasterrcnn": (FasterRCNN, "roi_heads"),
    "maskrcnn": (MaskRCNN, "roi_heads"),
    "keypointrcnn": (KeypointRCNN, "roi_heads"),
    "retinanet": (RetinaNet, "head"),
    "fcos": (FCOS, "head"),
    "ssdlite320_mobilenet_v3_large": (WeightedSSD, ""),
    "ssd300_vgg16": (WeightedSSD, ""),
}
MIXERS = {
    "mixup": DetectionMixUp,
    "cutmix": DetectionCutMix,
    "mixup+cutmix": RandomChoice,
    "none": type(None),
}


def parse(*args):
    return parse_args(TrainConfig, args)


class TestPrecedence:
    def test_overrides_win_over_files_and_later_over_earlier(self, tmp_path):
        first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
        first.write_text("epochs: 3\noptim: {lr: 0.5, momentum: 0.8}\nseed: 7\n")
        second.write_text("optim: {lr: 0.25}\nmixing: {p: 0.75}\n")
        config = parse("--config", str(first), "--config", str(second), "--optim.momentum", "0.7")
        assert config.epochs == 3
        assert config.seed == 7
        assert config.optim == OptimConfig(lr=0.25, momentum=0.7)
        assert config.mixing.p == 0.75
        assert parse("--epochs", "9", f"--config={first}").epochs == 3
        assert parse("--epochs", "9", "--epochs", "8").epochs == 8

    def test_dotted_names_and_merged_sections_in_a_file(self):
        config = parse("--config", "optim.lr: 0.5\nmixing: {<<: {p: 0.25}, alpha: 2.0}")
        assert config.optim.lr == 0.5
        assert (config.mixing.p, config.mixing.alpha) == (0.25, 2.0)

    def test_types(self):
        config = parse(
            "--data.train", '[["2007", "trainval"], ["2012", "trainval"]]',
            "--data.classes", "[a, b]", "--data.train_limit", "5", "--augment.size", "null",
            "--backbone.levels", "[2, 3]", "--schedule.milestones", "[4]", "--run_dir", "x/y",
        )  # fmt: skip
        assert config.data.train == (("2007", "trainval"), ("2012", "trainval"))
        assert config.data.classes == ("a", "b")
        assert config.data.train_limit == 5
        assert config.augment.size is None
        assert config.backbone.levels == (2, 3)
        assert config.schedule.milestones == (4,)
        assert config.run_dir == Path("x/y")

    def test_loss(self):
        assert parse("--loss", "null").loss is None
        assert parse("--config", "loss: null").loss is None
        assert parse("--loss.background_weight", "0.5").loss == LossWeighting(0.5, "samples")
        both = parse("--config", "loss: null", "--loss.normalizer", "weights")
        assert both.loss == LossWeighting(1.0, "weights")

    def test_options_of_the_detector_are_joined_by_dotted_overrides(self):
        config = parse(
            "--config", "detector: {options: {box_score_thresh: 0.1}}",
            "--detector.options.box_nms_thresh", "0.3",
        )  # fmt: skip
        assert config.detector.options == {"box_score_thresh": 0.1, "box_nms_thresh": 0.3}


class TestErrors:
    @pytest.mark.parametrize(
        ("yaml_text", "message"),
        [
            ("epoch: 3", "epoch"),
            ("data: {root: x, trian: []}", "data.*trian"),
            ("optim: {lr: fast}", "optim.lr.*float.*fast"),
            ("epochs: 1.5", "epochs.*int.*1.5"),
            ("data: {train: [['2007']]}", r"data\.train"),
            ("precision: fp8", "precision.*fp8"),
            ("detector: {options: {nms: 1}}", r"detector\.options\.nms"),
            ("detector: {name: maskrcnn}", r"maskrcnn needs masks.*data\.format=coco"),
            ("loss: {background_weight: -1}", "background_weight .* -1"),
            ("seed: -1", "seed .* -1"),
            ("eval_every: 0", "eval_every .* 0"),
            ("data: {batch_size: 0}", r"data\.batch_size .* 0"),
            ("data: {batch_size: 1}", r"data\.batch_size=1"),
            ("data: {format: coco, difficult: drop}", r"data\.difficult"),
            ("data: {coco: {empty: keep}}", r"data\.coco .*voc"),
            ("augment: {flip: 1.5}", r"augment\.flip .* 1.5"),
            ("mixing: {alpha: 0}", r"mixing\.alpha .* 0"),
            ("mixing: {min_visibility: 2}", r"mixing\.min_visibility .* 2"),
            ("mixing: {fill: 256}", r"mixing\.fill .* 256"),
            ("optim: {lr: 0}", r"optim\.lr .* 0"),
            ("optim: {clip_norm: 0}", r"optim\.clip_norm .* 0"),
            ("optim: {ema_decay: 1}", r"optim\.ema_decay .* 1"),
            ("schedule: {warmup_start: 2}", r"schedule\.warmup_start .* 2"),
            ("schedule: {name: multistep}", r"schedule\.milestones"),
            ("a: [}", ""),
            ("[1, 2]", ""),
        ],
    )
    def test_names_the_key_the_value_and_the_file(self, tmp_path, yaml_text, message):
        file = tmp_path / "mine.yaml"
        file.write_text(yaml_text)
        with pytest.raises(ValueError, match=f"(?s){message}.*mine.yaml"):
            parse("--config", str(file))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--optim.lrr", "1"], "optim.lrr"),
            (["--optim.lr=.nan"], "optim.lr"),
            (["--epochs"], "epochs"),
            (["runs/x"], "runs/x"),
            (["--config", "missing.yaml"], "missing.yaml"),
        ],
    )
    def test_in_arguments(self, args, message):
        with pytest.raises(ValueError, match=message):
            parse(*args)

    @pytest.mark.parametrize("off", [4, 5])
    def test_mixing_that_never_happens(self, off):
        message = f"mixing.off_epochs={off} of epochs=4 would never mix"
        with pytest.raises(ValueError, match=message):
            parse("--epochs", "4", "--mixing.off_epochs", str(off))
        config = parse("--epochs=4", f"--mixing.off_epochs={off}", "--mixing.name=none")
        assert build_mixer(config) is None


class TestPlainValues:
    CHANGED = (
        "--loss=null", "--augment.size=77", "--data.train_limit=3", "--optim.ema_decay=0.5",
        '--data.train=[["2012", "val"]]', "--data.classes=[null_, '12', yes_]",
        "--data.num_keypoints=4", "--detector.name=fasterrcnn",
        "--detector.options.box_score_thresh=0.2", "--backbone.trainable_layers=2",
        "--schedule.milestones=[1, 3]", "--run_dir=a b/ü", "--threads=2", "--optim.lr=1e-05",
    )  # fmt: skip

    COCO = (
        "--data.format=coco", "--data.coco.test_images=a/b", "--data.coco.empty=keep",
        "--data.coco.backend=faster-coco-eval", "--detector.name=keypointrcnn_resnet50_fpn",
    )  # fmt: skip

    @pytest.mark.parametrize("args", [(), CHANGED, COCO], ids=["defaults", "changed", "coco"])
    def test_round_trip(self, tmp_path, args):
        config = parse(*args)
        plain = config.as_dict()
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(plain, allow_unicode=True), encoding="utf-8")
        assert parse("--config", str(file)) == config
        assert parse("--config", json.dumps(plain)) == config
        assert json.loads(json.dumps(plain)) == plain


class TestShippedConfigs:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_builds(self, path):
        args = [f"--config={path.parent / BASES[path.stem]}.yaml"] if path.stem in BASES else []
        config = parse(*args, f"--config={path}")
        if config.data.format == "coco":  # whose classes are those of its file
            config = replace(config, data=replace(config.data, classes=("one", "two")))
        model = build_model(config, saved={})
        detector, part = MODELS[config.detector.name]
        assert type(model) is detector
        assert "Weighted" in type(model.get_submodule(part)).__name__
        classes = len(config.data.class_names) + 1
        heads = ("cls_score", "cls_logits", "classification_head.module_list")
        state = model.state_dict()
        last = [name for name in state if any(head in name for head in heads)][-1]
        anchors = {"retinanet": 9, "ssd300_vgg16": 4, "ssdlite320_mobilenet_v3_large": 6}
        assert len(state[last]) == classes * anchors.get(config.detector.name, 1)
        assert isinstance(build_mixer(config), MIXERS[config.mixing.name])
        with torch.device("meta"):  # what load_detector compares a checkpoint with
            outline = build_model(config, saved={}).state_dict()
        assert {k: v.shape for k, v in outline.items()} == {k: v.shape for k, v in state.items()}

    @pytest.mark.parametrize("path", PRETRAIN_CONFIGS, ids=lambda path: path.stem)
    @pytest.mark.parametrize("mix", ["cutout", "mixup+cutmix"])
    def test_pretraining_builds(self, path, mix):
        config = parse_args(PretrainConfig, [f"--config={path}", f"--mix={mix}"])
        assert config.mix == mix
        build_image_transform(config, train=True)
        assert (build_batch_mix(config, 10) is None) == (mix == "cutout")
        assert build_classifier(config.model, 10).fc.out_features == 10

    def test_imagenet_is_trained_as_in_the_paper(self):
        """300 epochs, batches of 256, 0.1 divided by 10 every 75; CutMix always, alpha 1."""
        path = FOLDER / "pretrain" / "imagenet_resnet50_cutmix.yaml"
        config = parse_args(PretrainConfig, [f"--config={path}"])
        assert (config.epochs, config.data.batch_size, config.optim.lr) == (300, 256, 0.1)
        assert (config.mix, config.mixing.p, config.mixing.cutmix_alpha) == ("cutmix", 1.0, 1.0)
        rates = [
            learning_rate_factor(
                epoch * 5004, config.schedule, steps_per_epoch=5004, num_epochs=300
            )
            for epoch in (0, 74, 75, 149, 150, 224, 225, 299)
        ]
        assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("path", CONFIGS + PRETRAIN_CONFIGS, ids=lambda path: path.stem)
def test_the_head_says_command_time_and_score(path):
    head = path.read_text(encoding="utf-8").partition("run_dir:")[0]
    is_detector = path.parent == FOLDER
    tool = "quickstart" if path.stem == "quickstart" else "train" if is_detector else "pretrain"
    assert f"tools/{tool}.py" in head
    assert "time" in head.lower()
    assert ("mAP" if is_detector else "top-1") in head


@pytest.mark.parametrize(
    ("config", "args"),
    [
        (PretrainConfig, ["--data.class_limit", "5"]),
        (PretrainConfig, ["--config", '{"data": {"in_memory": true}}']),
        (TrainConfig, ["--config", '{"backbone": {"reduced_tail": null}}']),
    ],
)
def test_an_option_that_is_gone_is_told_with_what_to_do(config, args):
    with pytest.raises(ValueError, match=r"(class_limit|in_memory|reduced_tail) is gone: \w+"):
        parse_args(config, args)
