"""The commands as a person runs them: output, exit codes, and what they leave behind."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_args, tiny_pretrain_args, tiny_pretrain_config

from detmix.training import ClassifierTrainer
from detmix.training.console import run_tool

TOOLS = Path(__file__).parents[1] / "tools"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# So low a threshold that the mAP of the tiny detector is not 0.
TRAINED = (
    "optim.lr=0.003", "mixing.name=none", "augment.photometric=0", "augment.crop=0",
    "detector.options.box_score_thresh=0.005", "detector.options.box_detections_per_img=60",
    "detector.options.rpn_post_nms_top_n_test=60", "detector.options.rpn_pre_nms_top_n_test=60",
    "data.workers=0",
)  # fmt: skip


def start(tool, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **kwargs,
    )


def run_process(tool, *args):
    process = start(tool, *args)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def run(capsys, fresh_accelerator):
    """Return a function that runs a command within this process: its import takes seconds."""

    def run(tool, *args):
        main = runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]
        code = run_tool(main, [str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


def assert_refused(result, message):
    """Assert that a command ended with one line that says what is wrong."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert err.strip().splitlines()[-1] == lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in out + err


def maps_of(out):
    """Return what `evaluate.py` prints as all-point and 11-point mAP."""
    return [
        re.search(rf"mAP, {kind} .*?(\d\.\d{{4}})\n", out)[1] for kind in ("all-point", "11-point")
    ]


class TestVisualize:
    @pytest.mark.parametrize("command", ["batch", "pair", "weights"])
    def test_mixing_is_drawn(self, run, shapes_root, tmp_path, command):
        args = tiny_args(shapes_root, tmp_path / "run", "mixing.name=mixup+cutmix")
        code, out, err = run("visualize", command, *args, "--out", tmp_path / "a")
        assert code == 0, err
        assert out.strip() == f"wrote {tmp_path / 'a.png'}"
        assert min(Image.open(tmp_path / "a.png").size) > 200
        assert not (tmp_path / "run").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.root=nowhere", "nowhere"),
            ("optim.lr=fast", "optim.lr.*number.*fast"),
        ],
    )
    def test_leaves_nothing_behind(self, run, shapes_root, tmp_path, override, message):
        args = tiny_args(shapes_root, tmp_path / "run", override)
        assert_refused(run("train", *args), message)
        assert list(tmp_path.iterdir()) == []


class TestPretrain:
    def test_chain(self, run, stripes_root, shapes_root, tmp_path):
        """The README's commands, one after the other."""
        pretrained, run_dir = tmp_path / "pretrained", tmp_path / "run"
        code, out, err = run("pretrain", *tiny_pretrain_args(stripes_root, pretrained))
        assert code == 0, err
        assert re.findall(r"^epoch (\d): top-1 \d\.\d{4}, top-5 1", out, re.M) == ["1", "2"]
        weights = pretrained / "best.pt"
        assert f"--backbone.weights {weights}" in out

        overrides = (*TRAINED, "epochs=6")
        args = tiny_args(shapes_root, run_dir, *overrides, f"backbone.weights={weights}")
        code, out, err = run("train", *args)
        assert code == 0, err
        found = re.search(rf"{weights}.*: (\d+) of (\d+) tensors.*fc.weight, fc.bias", err)
        assert found[1] == found[2]
        *_, score = re.finditer(r"mAP (\d\.\d{4}) \(all-point\), (\d\.\d{4}) \(11-point\)", out)

        code, out, err = run("evaluate", run_dir / "last.pt")
        assert code == 0, err
        assert maps_of(out) == list(score.groups())
        assert float(score[1]) > 0, score

        path = tmp_path / "predictions.png"
        code, out, err = run("visualize", "predictions", run_dir / "last.pt", "--out", path)
        assert code == 0, err
        assert out.strip() == f"wrote {path}"
        assert min(Image.open(path).size) > 200


class TestSignals:
    def test_pretraining_stops_with_a_checkpoint(self, stripes_root, tmp_path):
        """Its workers import OpenCV, and with it threads, only after they were forked."""
        run_dir = tmp_path / "run"
        overrides = ("epochs=400", "log_every=1", "data.workers=1")
        args = tiny_pretrain_args(stripes_root, run_dir, *overrides)
        process = start("pretrain", *args, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "Traceback" not in out + err
        assert (run_dir / "last.pt").exists()


@pytest.mark.slow
def test_quickstart(tmp_path):
    run_dir = tmp_path / "run"
    code, out, err = run_process(
        "quickstart", f"--run_dir={run_dir}", f"--data.root={tmp_path / 'shapes'}", "--epochs=2",
        "--mixing.off_epochs=1", "--data.train_limit=16", "--data.test_limit=8", "--threads=1",
        "--device=cpu",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"^mAP \d\.\d{4} on 8 unseen images$", out, re.MULTILINE)
    report = run_dir / "evaluation" / "report.html"
    assert str(report) in out
    for name in ("learning_curve", "precision_recall", "mixed_batch", "box_weights", "errors"):
        assert min(Image.open(report.with_name(f"{name}.png")).size) > 200
    assert report.read_text().count("<img ") > 8
    assert re.search(r"best.pt: (\d+) of \1 tensors of resnet18", err)
    assert (tmp_path / "run_pretrain" / "learning_curve.png").exists()


@pytest.mark.slow
def test_pretraining_on_two_processes_scores_as_one(stripes_root, tmp_path):
    """Every validation image counts once: 20 in batches of 3 in each of the processes."""
    run_dir = tmp_path / "run"
    args = tiny_pretrain_args(
        stripes_root, run_dir, "data.batch_size=4", "data.eval_batch_size=3", "epochs=1",
        "mix=none",
    )  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += ["--master_addr=127.0.0.1", "--master_port=0", "--rdzv_backend=c10d"]
    launcher += ["--rdzv_endpoint=127.0.0.1:0", str(TOOLS / "pretrain.py")]
    done = subprocess.run(
        [*launcher, *args], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    options = ("epochs=1", "mix=none", "resume=auto", "data.batch_size=8")
    alone = ClassifierTrainer(tiny_pretrain_config(stripes_root, run_dir, *options))
    result = alone.evaluate().result
    found = re.search(r"top-1 (\S+), top-5 (\S+), loss (\S+) \(20 images, 4 c", done.stdout)
    assert [float(value) for value in found.groups()] == pytest.approx(
        [result.top1, result.top5, result.loss], abs=1e-3
    )
