"""The commands as a person runs them: output, exit codes, and what they leave behind."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from PIL import Image
from runs import TOOLS, command
from tiny import tiny_args

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("kind", ["batch", "pair", "weights"])
def test_mixing_is_drawn(shapes_root, tmp_path, kind):
    args = tiny_args(shapes_root, tmp_path / "run", "mixing.name=mixup+cutmix")
    code, out, err = command("visualize", kind, *args, "--out", tmp_path / "a")
    assert code == 0, err
    assert str(tmp_path / "a.png") in out
    assert min(Image.open(tmp_path / "a.png").size) > 200
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [("data.root=nowhere", "nowhere"), ("optim.lr=fast", "optim.lr.*fast")],
)
def test_bad_input_leaves_one_line_and_nothing_else(shapes_root, tmp_path, override, named):
    code, out, err = command("train", *tiny_args(shapes_root, tmp_path / "run", override))
    assert code == 2
    assert re.search(rf"^error: .*{named}.*\n\Z", err, re.MULTILINE)
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["found.json"], "--annotations"),
        (["best.pt", "--iou_type", "segm"], "--annotations"),
        ([".", "--report"], "--report"),
        (["found.json", "--annotations", "x", "--save", "y"], "--save"),
    ],
)
def test_arguments_of_evaluate(args, named):
    code, _, err = command("evaluate", *args)
    assert code == 2
    assert named in err


@pytest.mark.slow
def test_quickstart(tmp_path):
    run_dir = tmp_path / "run"
    args = [sys.executable, str(TOOLS / "quickstart.py"), f"--run_dir={run_dir}"]
    args += [f"--data.root={tmp_path / 'shapes'}", "--data.train_limit=16", "--epochs=2"]
    args += ["--mixing.off_epochs=1", "--data.test_limit=8", "--threads=1", "--device=cpu"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^mAP \d\.\d{4} on 8 unseen images$", done.stdout, re.MULTILINE)
    report = run_dir / "evaluation" / "report.html"
    assert str(report) in done.stdout
    for name in ("learning_curve", "precision_recall", "mixed_batch", "box_weights", "errors"):
        assert min(Image.open(report.with_name(f"{name}.png")).size) > 200
    assert report.read_text().count("<img ") > 8
    assert re.search(r"best.pt: (\d+) of \1 tensors of resnet18", done.stderr)
    assert (tmp_path / "run_pretrain" / "learning_curve.png").exists()
