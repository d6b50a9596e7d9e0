"""The commands as a person runs them: output, errors, exit codes, what they leave behind."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
from PIL import Image
from runs import TOOLS, command, succeed
from tiny import tiny_args
from torch.distributed import DistBackendError, DistNetworkError

import detmix
from detmix.commands import COMMANDS
from detmix.training import Interrupted, TrainConfig, parse_args
from detmix.training.build import build_model
from detmix.training.console import run_tool
from detmix.training.progress import Position
from detmix.training.stopping import OtherProcessError

ONE = ("epochs=1", "mixing.off_epochs=2")  # which the one epoch is not


@pytest.mark.filterwarnings("ignore:mixing.off_epochs=2 is taken as 0")
@pytest.mark.parametrize("kind", ["batch", "pair", "weights"])
def test_mixing_is_drawn(shapes_root, tmp_path, kind):
    args = tiny_args(shapes_root, tmp_path / "run", "mixing.name=mixup+cutmix", *ONE)
    out, _ = succeed("visualize", kind, *args, "--out", tmp_path / "a")
    assert str(tmp_path / "a.png") in out
    assert min(Image.open(tmp_path / "a.png").size) > 200
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tool", "args", "named"),
    [
        ("train", ["--data.root=nowhere"], "nowhere"),
        ("evaluate", ["found.json"], "--annotations"),
        ("evaluate", [".", "--report"], "--report"),
        ("evaluate", ["found.json", "--annotations", "x", "--save", "y"], "--save"),
    ],
)
def test_bad_input_leaves_one_line_and_nothing_else(tmp_path, monkeypatch, tool, args, named):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(tool, *args)
    assert code == 2
    assert re.search(rf"^(detmix \w+: )?error: .*{named}.*\n\Z", err, re.MULTILINE)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


SCRIPTS = {name: "check_data" if name == "check" else name.replace(" ", "_") for name in COMMANDS}


class TestDetmix:
    def test_every_script_is_a_command(self):
        assert sorted(path.stem for path in TOOLS.glob("*.py")) == sorted(SCRIPTS.values())

    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_command_takes_what_its_script_takes(self, name):
        texts = []
        for words in (["detmix", *name.split()], [SCRIPTS[name]]):
            status, text, err = command(*words, "--help")
            assert not status, err
            texts.append(text)
        options = [re.findall(r"--[\w.-]+|\{.*?\}", text) for text in texts]
        assert options[0] == options[1] != []
        assert texts[0].startswith(("usage: detmix " + name, "Pretrain", "Train", "Print"))

    def test_the_commands_are_listed(self):
        status, text, _ = command("detmix", "--help")
        assert not status
        assert set(COMMANDS) <= set(re.findall(r"(?m)^  (\w+(?: \w+)?)  ", text))
        assert command("detmix", "--version")[1].strip() == detmix.__version__

    @pytest.mark.parametrize(
        ("words", "meant"),
        [([], "one of"), (["trian"], "train,"), (["prepare"], "prepare "),
         (["prepare", "coco"], "prepare "), (["predcit", "--score=1"], "predict,")],
    )  # fmt: skip
    def test_another_command_is_told_with_those_that_are(self, words, meant):
        status, _, err = command("detmix", *words)
        assert status == 2
        assert f"error: expected {meant}" in err
        assert err.rstrip().endswith(f"got {' '.join(words)!r}")
        assert all(name in err for name in COMMANDS)


def build(folder, kind):
    """Return the wheel of a copy of the project in a folder named detmix, unpacked."""
    pytest.importorskip("hatchling")
    for name in ("detmix", "configs"):
        shutil.copytree(TOOLS.parent / name, folder / "detmix" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOOLS.parent / name, folder / "detmix")
    code = f"from hatchling import build; print(build.build_{kind}('.'))"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "detmix", check=True)
    (wheel,) = (folder / "detmix").glob("*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")
    return folder / "site"


class TestInstalled:
    def test_a_wheel_is_all_that_a_run_needs(self, tmp_path):
        site = build(tmp_path, "wheel")
        shutil.rmtree(tmp_path / "detmix")
        assert (site / "detmix/training/report.html.jinja").exists()
        assert sorted(path.stem.split("-")[0] for path in site.iterdir()) == ["detmix"] * 2
        configs = TOOLS.parent / "configs"
        for file in configs.rglob("*.yaml"):
            assert (site / "detmix/configs" / file.relative_to(configs)).exists()
        args = ["-m", "detmix", "pretrain", "--config", "pretrain/quickstart", "--print_config"]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        args, where = [sys.executable, *args], {"cwd": tmp_path, "env": environment}
        assert subprocess.check_output(args, **where).startswith(b"run_dir: runs/")

    def test_an_editable_installation_is_found_beside_the_clone(self, tmp_path):
        """Where the folder of the clone is, to Python, a package without a file."""
        site = build(tmp_path, "editable")
        code = "import site, sys, importlib.util as util; site.addsitedir(sys.argv[1]); "
        code += "print(util.find_spec('detmix').origin)"
        args = [sys.executable, "-S", "-c", code, str(site)]
        environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        found = subprocess.check_output(args, cwd=tmp_path, env=environment, text=True)
        assert found.strip() == str(tmp_path / "detmix/detmix/__init__.py")


@pytest.fixture(scope="module")
def told(shapes_root, tmp_path_factory):
    """Return a run's folder, its output and its errors, which here are no terminal."""
    run_dir = tmp_path_factory.mktemp("told") / "a run"
    options = ("epochs=2", "log_every=1", "mixing.off_epochs=1", "backbone.trainable_layers=4")
    return run_dir, *succeed("train", *tiny_args(shapes_root, run_dir, *options))


class TestWhatARunSays:
    def test_before_the_first_step(self, shapes_root, told):
        lines = told[2].splitlines()
        plan = dict(re.split("  +", line) for line in lines[:8])
        wanted = {
            "device": "CPU .*1", "precision": "float32", "mixing": "mixup.* 0.5.* 1, .*weighted",
            "model": "fasterrcnn.*resnet18.*random", "run folder": re.escape(str(told[0])),
            "training": "2 epochs.* 12 steps, .*4", "frozen": r"backbone\.body\.conv1",
            "data": f"{shapes_root}.* 24 .*train.* 8 .*test.* 5 ",
        }  # fmt: skip
        assert plan.keys() == wanted.keys()
        for topic, pattern in wanted.items():
            assert re.search(pattern, plan[topic]), topic
        frozen = tuple(f"{name}." for name in plan["frozen"].split(", "))
        config = parse_args(TrainConfig, ["--config", str(told[0] / "config.yaml")])
        for name, parameter in build_model(config).named_parameters():
            assert name.startswith(frozen) != parameter.requires_grad

    def test_in_a_file_losses_come_at_once_and_are_few(self, told):
        steps = [line for line in told[2].splitlines() if " step " in line]
        assert re.match(r"epoch 1/2 step 1/12 \[.*loss \d", next(x for x in steps if "loss" in x))
        assert re.match(r"epoch 2/2 step 12/12 \[.*loss .*images/s", steps[-1])
        assert len(steps) <= 4

    def test_what_to_do_next_can_be_done(self, told, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        commands = [line for line in told[1].splitlines() if line.startswith("  detmix ")]
        assert len(commands) == 3
        for line in commands:
            succeed(*shlex.split(line))
        assert {"predictions", "predictions.png", "evaluation"} < {
            p.name for p in told[0].iterdir()
        }

    @pytest.mark.parametrize("args", [["--config=a b"], ["--resume", "runs/x"]])
    def test_how_to_go_on(self, capsys, monkeypatch, args):
        monkeypatch.setattr("sys.argv", ["detmix train"])
        assert run_tool(raising(Interrupted(2, Position(step=5))), args) == 130
        first, line = capsys.readouterr().err.splitlines()
        assert "step 5" in first
        assert shlex.split(line) == ["detmix", "train", "--resume", "auto", *args]


@pytest.mark.slow
def test_quickstart(tmp_path):
    """Stopped while it pretrains, it goes on; done, it is not done again."""
    run_dir, pretrained = tmp_path / "run", tmp_path / "run_pretrain"
    args = [sys.executable, str(TOOLS / "quickstart.py"), f"--run_dir={run_dir}"]
    args += [f"--data.root={tmp_path / 'shapes'}", "--data.train_limit=16", "--epochs=2"]
    args += ["--mixing.off_epochs=1", "--data.test_limit=8", "--threads=1", "--device=cpu"]
    args += ["--log_every=1"]
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    while not (pretrained / "last.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "--resume auto" in process.communicate()[1]
    assert process.returncode == 130
    done, again = (subprocess.run(args, capture_output=True, text=True) for _ in range(2))
    assert done.returncode == again.returncode == 0, done.stderr
    assert f"going on from {pretrained / 'last.pt'}" in done.stderr
    assert "mixing" in done.stderr
    assert "mixing" not in again.stderr
    assert next(x for x in again.stdout.splitlines() if x.startswith("mAP")) in done.stdout
    assert re.search(r"^mAP \d\.\d{4} on 8 unseen images$", done.stdout, re.MULTILINE)
    report = run_dir / "evaluation" / "report.html"
    assert str(report) in done.stdout
    for name in ("learning_curve", "precision_recall", "box_weights", "errors"):
        assert min(Image.open(report.with_name(f"{name}.png")).size) > 200
    assert report.read_text().count("<img ") > 8
    assert re.search(r"best.pt: (\d+) of \1 tensors of resnet18", done.stderr)
    assert (pretrained / "learning_curve.png").exists()


def raising(error):
    def main(args):
        raise error

    return main


IN_A_WORKER = ValueError("Caught it in DataLoader worker process 0.\n  at x\nValueError: a: broken")
STACK = 99 * "frame #0"
LOST = "error in process 3: lost another process"
CASES = [
    ("1", OtherProcessError("another process stops:\n no image"),
     "error: another process stops: no image"),
    ("1", IN_A_WORKER, "error: a: broken"),
    ("1", ValueError(), "error: ValueError"),
    ("1", DistNetworkError(f"port 29500 is in use\n{STACK}"), "error: port 29500 is in use frame"),
    ("8", RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:6296."),
     f"{LOST}.*Connection closed by peer .*:6296"),
    ("8", DistBackendError("NCCL error: remote process exited or there was a network error"),
     f"{LOST}.*NCCL error: remote process exited"),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "error", "line"), CASES)
def test_one_line_for_an_error(processes, error, line, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("RANK", "3")
    assert run_tool(raising(error), []) == 2
    err = capsys.readouterr().err
    assert re.match(line, err)
    assert (err.count("\n"), len(err) < 600) == (1, True)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="out of ideas"):
        run_tool(raising(RuntimeError("out of ideas")), [])


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_of_detmix_are_short_and_of_the_first_process(rank, monkeypatch):
    texts, before = [], warnings.formatwarning

    def main(args):
        for file in (detmix.__file__, "/elsewhere/module.py"):
            texts.append(warnings.formatwarning("2 images left out", UserWarning, file, 7))

    monkeypatch.setenv("RANK", str(rank))
    assert run_tool(main, []) == 0
    assert warnings.formatwarning is before
    assert texts[0] == ("" if rank else "warning: 2 images left out\n")
    assert texts[1].startswith("/elsewhere/module.py:7: UserWarning: 2 images left out")
