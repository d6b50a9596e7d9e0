"""Configurations: files and overrides, what is refused, and the way back to plain values."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from detmix.detectors import build_classifier
from detmix.losses import LossWeighting
from detmix.mixing import RandomChoice
from detmix.training import OptimConfig, PretrainConfig, TrainConfig, parse_args
from detmix.training.build import build_mixer, build_model
from detmix.training.classifier import build_batch_mix, build_image_transform
from detmix.training.config import flat_options
from detmix.training.parse import from_dict

FOLDER = Path(__file__).parents[1] / "configs"
# These change a few settings of another file, which their heads name.
BASES = {"overfit16_voc2007": "voc2007_cpu"}


def parse(*args):
    return parse_args(TrainConfig, args)


SCORES = '{"box_score_thresh": 0.1}'
# Arguments, and what options come to by them. What begins with "--" is given on the command line,
# anything else is the text of a file.
ACCEPTED = [
    (
        ["optim: {lr: 0.5, momentum: 0.8}\nseed: 7", "optim: {lr: 0.25}", "--optim.momentum=0.7"],
        {"optim": OptimConfig(lr=0.25, momentum=0.7), "seed": 7},
    ),
    (["--optim.momentum=0.1", "--optim={lr: 0.5}"], {"optim": OptimConfig(lr=0.5, momentum=0.1)}),
    (["data: {coco.empty: keep, format: coco}"], {"data.coco.empty": "keep"}),
    (["--loss.normalizer=weights", "--loss=null"], {"loss": None}),
    (["loss: null", "--loss.normalizer=weights"], {"loss": LossWeighting(1.0, "weights")}),
    ([f"detector: {{options: {SCORES}}}", "--detector.options.box_nms_thresh=0.3"],
     {"detector.options": {"box_score_thresh": 0.1, "box_nms_thresh": 0.3}}),
    ([f"detector: {{options: {SCORES}}}", "detector: {options: {box_nms_thresh: 0.3}}"],
     {"detector.options": {"box_nms_thresh": 0.3}}),
    (["--channels_last=true", "--precision=no"], {"channels_last": True, "precision": "no"}),
    (["--run_dir=2007"], {"run_dir": Path("2007")}),
    (["--data.train=[['2007', val]]"], {"data.train": (("2007", "val"),)}),
    (["--device=cuda:1", "--tracker=none"], {"device": "cuda:1", "tracker": "none"}),
    (["--detector.min_size=480"], {"detector.min_size": 480}),
    (["--detector.min_size=[480, 512]"], {"detector.min_size": (480, 512)}),
]  # fmt: skip


def arguments(folder, given):
    """Return arguments for what is given, texts as files."""
    args = []
    for number, text in enumerate(given):
        file = folder / f"{number}.yaml"
        file.write_text(text)
        args += text.split("=", 1) if text.startswith("--") else ["--config", str(file)]
    return args


@pytest.mark.parametrize(("given", "expected"), ACCEPTED, ids=lambda value: str(value)[:60])
def test_values_and_their_order(tmp_path, given, expected):
    config = parse(*arguments(tmp_path, given))
    for name, value in expected.items():
        found = attrgetter(name)(config)
        assert (found, type(found)) == (value, type(value))
    assert config == parse(*[t if t.startswith("--") else f"--config={t}\n" for t in given])


# What is given, and what an error says of it; of a file's text its name, too.
REFUSED = [
    ("data: {root: x, trian: []}", r"data\.trian .*data\.train"),
    ("dat: {root: x}", r"dat\.root .*expected data\.root"),
    ("--lr=1", r"lr .*expected optim\.lr"),
    ("--batch-size=4", r"batch-size .*expected data\.batch_size"),
    ("--data.rot=x", r"data\.rot .*expected data\.root"),
    ("--optim.batch_size=4", r"optim\.batch_size .*expected data\.batch_size"),
    ("--weights=x", r"weights .*expected backbone\.weights or detector\.weights"),
    ("--weights-prefix=x", r".*backbone\.weights_prefix or detector\.weights_prefix"),
    ("--confg=x", r"confg .*expected config"),
    ("--gpus=2", r"gpus .*--help"),
    ("data: x", r"data must be options .*'x'"),
    ("epochs: 1.5", r"epochs must be a whole number, got 1\.5"),
    ("detector: {min_size: 0}", r"detector\.min_size must be greater than 0, got 0"),
    ("precision: fp8", r"precision must be 'auto', 'no', 'bf16' or 'fp16', got 'fp8'"),
    ("--resume=nowhere", r"resume .*auto.*nowhere"),
    ("--resume=best.pt", r"resume .*last\.pt.*best\.pt"),
    ("loss: 5", "loss .*5"),
    ("detector: {options: {nms: 1}}", r"detector\.options\.nms"),
    ("optim: {lr: '0.5'}", r"optim\.lr .*number.*'0\.5'"),
    ("optim: {lr: .nan}", r"optim\.lr .*nan"),
    ("data: {train: [[2007, val]]}", r"data\.train.*2007"),
    ("data: {format: coco, difficult: drop}", r"data\.difficult .*drop"),
    ("data: {format: coco, corners: 0-exclusive}", r"data\.corners .*0-exclusive"),
    ("data: {format: voc, coco: {empty: keep}}", r"data\.coco .*voc"),
    ("backbone: {levels: ['1']}", r"backbone\.levels\.0 .*whole number.*'1'"),
    ("loss: {background_weight: -1}", r"loss\.background_weight .* -1"),
    ("a: [}", ""),
    ("--epochs=--seed", ".* --epochs"),
    ("--config=missing.yaml", r".*missing\.yaml.*expected .*voc2007_cpu"),
    ("--config=voc2007", r".*voc2007;.*expected .* pretrain/quickstart.* voc2007_cpu"),
    ("--optim.lr=-1e-3", r"optim\.lr .*-0\.001"),
    ("schedule: {name: multistep}", r"schedule\.milestones .*multistep"),
    ("device: mps", r"device .*cuda.*'mps'"),
    ("device: cuda:one", r"device .*cuda.*'cuda:one'"),
    ("tracker: excel", r"tracker .*wandb.*'excel'"),
    ("augment: {scale_jitter: [0.1]}", r"augment\.scale_jitter\.1 .*required"),
]
OUT_OF_RANGE = {
    "epochs": 0, "seed": -1, "eval_every": 0, "save_minutes": 0, "precision": "fp8",
    "data.batch_size": 0, "data.workers": -1, "data.train_limit": 0, "data.coco.empty": "no",
    "augment.flip": 1.5, "mixing.alpha": 0, "mixing.min_visibility": 2, "mixing.fill": 256,
    "data.corners": "0", "backbone.weights": 5, "detector.name": "yolo", "optim.lr": 0,
    "optim.clip_norm": 0, "optim.ema_decay": 1, "schedule.warmup_start": 2,
}  # fmt: skip


class TestErrors:
    @pytest.mark.parametrize(("given", "message"), REFUSED)
    def test_name_the_option_the_value_and_the_file(self, tmp_path, given, message):
        file = "" if given.startswith("--") else "0.yaml"
        with pytest.raises(ValueError, match=f"(?s)^{message}.*{file}"):
            parse(*arguments(tmp_path, [given]))

    @pytest.mark.parametrize("cls", [TrainConfig, PretrainConfig])
    def test_a_command_asks_for_a_configuration_or_data(self, tmp_path, cls):
        """And lists those of its kind."""
        names = [
            path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")
        ]
        own = {name for name in names if ("/" in name) == (cls is PretrainConfig)}
        for args in ([], ["--epochs=3"], ["--resume=auto"], ["--data.batch_size", "4"]):
            with pytest.raises(ValueError, match=r"--data\.root.*--config") as error:
                parse_args(cls, args, "", min(own))
            told = set(re.split(r",? ", str(error.value)))
            assert told & set(names) == own
            assert parse_args(cls, args) == from_dict(cls, {}, args)
        (tmp_path / "config.yaml").write_text("epochs: 3")
        for args in (["--data.root", "x"], ["--config=epochs: 3\n"], [f"--resume={tmp_path}"]):
            parse_args(cls, args, "", min(own))

    @pytest.mark.parametrize("suffix", ["", "/last.pt"])
    def test_resume_takes_a_run(self, tmp_path, suffix):
        run = tmp_path / "a run"
        run.mkdir()
        (run / "config.yaml").write_text(f"{{epochs: 7, seed: 3, run_dir: {tmp_path}}}")
        for args in (["--config=run_dir: x\n", "--seed=5"], ["--seed=5", "--resume=auto"]):
            config = parse("--resume", f"{run}{suffix}", *args)
            assert (config.epochs, config.seed, config.run_dir) == (7, 5, run)
            assert config.resume == "auto"

    def test_all_are_told_at_once(self):
        with pytest.raises(ValueError, match="epochs") as error:
            from_dict(TrainConfig, OUT_OF_RANGE, ["--mixing.p=7"])
        for name, value in (OUT_OF_RANGE | {"mixing.p": 7}).items():
            assert re.search(rf"{re.escape(name)} [^;]*got {value!r}", str(error.value)), name
        with pytest.raises(ValueError, match=r"(?s)lr.*-1"):  # built in Python
            OptimConfig(lr=-1)


CHANGED = (
    "--loss=null", "--optim.ema_decay=0.5", "--data.format=coco", "--data.coco.empty=keep",
    "--data.classes=[null_, '12', yes_]", "--run_dir=a b/ü", "--schedule.milestones=[1, 3]",
    "--detector.options={box_score_thresh: 0.2, image_mean: [0.1, 0.2, 0.3]}", "--optim.lr=1e-05",
)  # fmt: skip


class TestPlainValues:
    @pytest.mark.parametrize("args", [(), CHANGED], ids=["defaults", "changed"])
    def test_round_trip(self, tmp_path, capsys, args):
        config = parse(*args)
        plain = config.as_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert from_dict(TrainConfig, plain, ["--seed=5"]) == replace(config, seed=5)
        assert plain == config.as_dict()
        with pytest.raises(SystemExit) as end:
            parse("--print_config", *args)
        assert not end.value.code
        file = tmp_path / "config.yaml"
        file.write_text(capsys.readouterr().out, encoding="utf-8")
        assert parse("--config", str(file)) == config

    @pytest.mark.parametrize("cls", [TrainConfig, PretrainConfig])
    def test_help_tells_every_option_with_its_default_and_words(self, capsys, cls):
        with pytest.raises(SystemExit):
            parse_args(cls, ["--epochs=3", "--help"], "Train it.")
        text = capsys.readouterr().out
        assert text.startswith("Train it.")
        for name, default in flat_options(cls().as_dict()).items():
            comment = r"    # .*\n"
            option = rf"--{re.escape(name)}: .* = .*"
            (found,) = re.findall(rf"(?m)^(?:{comment}{option}|{option}  # .+)$", text)
            if isinstance(default, str):
                assert f'"{default}"' in found
        assert "learning rate after the warm-up" in text


class TestShippedConfigs:
    @pytest.mark.parametrize("given", ["voc2007_cpu", "voc2007_cpu.yaml"])
    def test_are_found_by_name_where_no_file_is(self, tmp_path, monkeypatch, given):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "voc2007_cpu").mkdir()
        assert parse("--config", given) == parse(f"--config={FOLDER / 'voc2007_cpu.yaml'}")
        Path("voc2007_cpu").rmdir()
        Path(given).write_text("epochs: 77")
        assert parse("--config", given).epochs == 77

    @pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=attrgetter("stem"))
    def test_builds(self, path):
        args = [f"--config={path.parent / BASES[path.stem]}.yaml"] if path.stem in BASES else []
        config = parse(*args, f"--config={path}")
        if config.data.format == "coco":  # whose classes are those of its file
            config = replace(config, data=replace(config.data, classes=("one", "two")))
        with torch.device("meta"):  # which takes neither time nor memory
            model = build_model(config, saved={})
        assert any("Weighted" in type(module).__name__ for module in model.modules())
        assert isinstance(build_mixer(config), RandomChoice) == ("+" in config.mixing.name)

    @pytest.mark.parametrize("path", sorted(FOLDER.glob("pretrain/*.yaml")), ids=attrgetter("stem"))
    def test_pretraining_builds(self, path):
        for mix in ("cutout", "mixup+cutmix"):
            config = parse_args(PretrainConfig, [f"--config={path}", f"--mix={mix}"])
            build_image_transform(config, train=True)
            assert (build_batch_mix(config, 10) is None) == (mix == "cutout")
        assert build_classifier(config.model, 10).fc.out_features == 10
