"""Configurations: files and overrides, what is refused, and the way back to plain values."""

from __future__ import annotations

import dataclasses
import json
import os
import re
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
from detmix.training import MixingConfig, OptimConfig, PretrainConfig, TrainConfig, parse_args
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
    def test_defaults(self):
        assert parse() == TrainConfig()

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

    def test_a_path_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"there is no configuration nope\.yaml"):
            parse_args(TrainConfig, ["--config", "nope.yaml"])

    def test_a_path_at_home_and_a_pipe(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "mine.yaml").write_text("epochs: 3\n")
        assert parse_args(TrainConfig, ["--config=~/mine.yaml"]).epochs == 3
        reading, writing = os.pipe()
        os.write(writing, b"epochs: 4\n")
        os.close(writing)
        assert parse_args(TrainConfig, [f"--config=/dev/fd/{reading}"]).epochs == 4

    def test_as_many_classes_as_there_are(self):
        classes = [f"class number {number}" for number in range(20_000)]
        text = json.dumps({"data": {"classes": classes}})
        assert parse_args(TrainConfig, ["--config", text]).data.class_names == tuple(classes)

    def test_a_tag_of_yaml_itself(self):
        text = "run_dir: !!str 2007\nepochs: 3"
        assert parse_args(TrainConfig, ["--config", text]).run_dir == Path("2007")

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
            ("optim: {lrr: 1}", "optim.*lrr"),
            ("data: {root: x, trian: []}", "data.*trian"),
            ("optim: {lr: fast}", "optim.lr.*float.*fast"),
            ("epochs: 1.5", "epochs.*int.*1.5"),
            ("data: {train: [['2007']]}", "data.train.*2 elements"),
            ("precision: fp8", "precision.*bf16.*fp8"),
            ("mixing: {place: gpu}", "mixing.place.*gpu"),
            ("backbone: {name: vgg16}", "backbone.name.*vgg16"),
            ("backbone: null", "null|None"),
            ("detector: {options: {nms: 1}}", "detector.options.nms is not an option"),
            ("loss: {background_weight: -1}", "background_weight must be .* got -1"),
            ("loss: {normalizer: ones}", "normalizer.*ones"),
            ("epochs: 0", "epochs must be at least 1, got 0"),
            ("seed: -1", "seed must be at least 0, got -1"),
            ("threads: 0", "threads must be at least 1, got 0"),
            ("eval_every: 0", "eval_every must be at least 1, got 0"),
            ("data: {batch_size: 0}", "data.batch_size must be at least 1, got 0"),
            ("data: {workers: -1}", "data.workers must be at least 0, got -1"),
            ("data: {test_limit: 0}", "data.test_limit must be at least 1, got 0"),
            ("augment: {size: 0}", "augment.size must be at least 1, got 0"),
            ("augment: {flip: 1.5}", r"augment.flip must be in \[0, 1\], got 1.5"),
            ("mixing: {alpha: 0}", "mixing.alpha must be positive and finite, got 0"),
            ("mixing: {p: -0.1}", r"mixing.p must be in \[0, 1\], got -0.1"),
            ("mixing: {name: cutout}", "mixing.name.*cutout"),
            ("mixing: {cutmix_alpha: -1}", "mixing.cutmix_alpha must be positive .* got -1"),
            ("mixing: {min_visibility: 2}", r"mixing.min_visibility must be in \[0, 1\], got 2"),
            ("data: {format: yolo}", "data.format.*yolo"),
            ("data: {format: coco, difficult: drop}", "data.difficult is not for .*format=coco"),
            ("data: {coco: {empty: keep}}", "data.coco is not for data.format=voc"),
            ("data: {num_keypoints: 0}", "data.num_keypoints must be at least 1, got 0"),
            ("data: {coco: {backend: fast}}", "data.coco.backend.*fast"),
            ("detector: {name: maskrcnn}", "name=maskrcnn needs masks.*set data.format=coco"),
            ("mixing: {fill: 256}", r"mixing.fill must be in \[0, 255\], got 256"),
            ("mixing: {off_epochs: -1}", "mixing.off_epochs must be at least 0, got -1"),
            ("optim: {lr: 0}", "optim.lr must be positive and finite, got 0"),
            ("optim: {momentum: 2}", r"optim.momentum must be in \[0, 1\], got 2"),
            ("optim: {weight_decay: -1}", "optim.weight_decay must be in .* got -1"),
            ("optim: {clip_norm: 0}", "optim.clip_norm must be positive or null, got 0"),
            ("optim: {ema_decay: 1}", r"optim.ema_decay must be in \(0, 1\) or null, got 1"),
            ("schedule: {warmup_start: 2}", "schedule.warmup_start must be in .* got 2"),
            ("schedule: {warmup_steps: -1}", "schedule.warmup_steps must be at least 0, got -1"),
            ("schedule: {name: multistep}", "schedule.milestones must name epochs"),
            ("data: {batch_size: 1}", "finds no partner with data.batch_size=1"),
            ("a: [}", "pars"),
            ("just words", "just words"),
            ("[1, 2]", "1, 2"),
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
            (["--optim.lr", "fast"], "optim.lr"),
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

    def test_a_batch_of_one_mixes_on_the_data_set(self):
        assert parse("--data.batch_size=1", "--mixing.place=dataset").data.batch_size == 1
        assert parse("--data.batch_size=1", "--mixing.name=none").data.batch_size == 1

    def test_frozen(self):
        config = TrainConfig()
        for section in (config, config.data, config.mixing, config.loss, config.detector):
            name = dataclasses.fields(section)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(section, name, None)


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

    def test_sections_are_all_there(self):
        plain = TrainConfig().as_dict()
        assert list(plain) == [field.name for field in dataclasses.fields(TrainConfig)]
        assert plain["mixing"] == dataclasses.asdict(MixingConfig())


class TestShippedConfigs:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_builds(self, path):
        args = [f"--config={path.parent / BASES[path.stem]}.yaml"] if path.stem in BASES else []
        config = parse(*args, f"--config={path}")
        if config.data.format == "coco":  # whose classes are those of its file
            config = replace(config, data=replace(config.data, classes=("one", "two")))
        model = build_model(config, load_weights=False)
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
            outline = build_model(config, load_weights=False).state_dict()
        assert {k: v.shape for k, v in outline.items()} == {k: v.shape for k, v in state.items()}

    @pytest.mark.parametrize("path", PRETRAIN_CONFIGS, ids=lambda path: path.stem)
    @pytest.mark.parametrize("mix", ["none", "mixup", "cutout", "cutmix", "mixup+cutmix"])
    def test_pretraining_builds(self, path, mix):
        config = parse_args(PretrainConfig, [f"--config={path}", f"--mix={mix}"])
        assert config.mix == mix
        build_image_transform(config, train=True)
        assert (build_batch_mix(config, 10) is None) == (mix in ("none", "cutout"))
        assert build_classifier(config.model, 10).fc.out_features == 10

    def test_there_are_some(self):
        assert {
            "quickstart", "voc2007_cpu", "voc0712_fasterrcnn_resnet50", "voc0712_fasterrcnn_coco",
            "voc0712_fasterrcnn_resnet50_cutmix", "coco_fasterrcnn_resnet50",
        } <= {path.stem for path in CONFIGS}  # fmt: skip
        names = {parse(f"--config={path}").detector.name for path in CONFIGS}
        assert names == MODELS.keys()  # one for each family
        assert {"tiny_imagenet_resnet18", "imagenet_resnet50_cutmix"} <= {
            path.stem for path in PRETRAIN_CONFIGS
        }

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
    def test_head_says_command_time_and_score(self, path):
        head = path.read_text(encoding="utf-8").partition("run_dir:")[0]
        is_detector = path.parent == FOLDER
        tool = "train" if is_detector else "pretrain"
        assert f"tools/{'quickstart' if path.stem == 'quickstart' else tool}.py" in head
        assert "time" in head.lower()
        assert ("mAP" if is_detector else "top-1") in head
        assert not re.search(r"\b(TIME|SCORE|TODO)\b", head)  # to be filled in
        is_measured = not any(large in path.stem for large in ("resnet50", "coco", "vgg16"))
        assert ("not measured" not in head.replace("on a GPU: not measured", "")) == is_measured


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
