"""The whole of an evaluation: what `evaluate.py` writes, reads back and reports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from data_files import DOG, SIZE, make_devkit
from runs import command, on_two_processes, succeed
from tiny import tiny_config
from voc_oracle import check_against_the_devkit, evaluate

from detmix.data import SHAPE_CLASSES, VOCDetection
from detmix.evaluation import analyze_errors, read_voc_results, score_predictions
from detmix.training.build import open_dataset
from detmix.training.full_evaluation import (
    check_before,
    load_devkit_results,
    save_devkit_results,
)

CLASSES = ("--data.classes", f"[{', '.join(SHAPE_CLASSES)}]")


def run(*args):
    return succeed("evaluate", *args)[0]


@pytest.fixture(scope="module")
def run_dir(whole_run, tmp_path_factory):
    """Return a copy of a run, to be written into."""
    return shutil.copytree(whole_run, tmp_path_factory.mktemp("evaluation") / "run")


def test_writes_and_reads_back(run_dir, shapes_root, tmp_path):
    """Of several image sets: the same names of images in two years, and two splits of one year."""
    for year in ("2007", "2012"):
        (tmp_path / f"VOC{year}").symlink_to(shapes_root / "VOC2007")
    sets = (("2007", "test"), ("2012", "test"), ("2007", "trainval"))
    data = ("--data.root", tmp_path, "--data.test", json.dumps(sets))
    printed = run(run_dir / "last.pt", *data, "--report")
    folder = run_dir / "evaluation"
    assert "Not shown" not in (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == str(run_dir / "last.pt")
    for number in (results["voc"]["mean_ap"], results["coco"]["bbox"]["ap"]):
        assert f"{number:.4f}" in printed

    again = run(folder / "results", *data, *CLASSES, "--save", tmp_path)
    assert again.splitlines()[:-2] == printed.splitlines()[: len(again.splitlines()) - 2]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["data"]["test"] == results["data"]["test"]
    for name in ("num_images", "voc", "voc07", "coco", "errors"):
        assert saved[name] == results[name]

    files = folder / "predictions.json", folder / "ground_truth.json"
    scored = score_predictions(*files)
    assert scored.as_dict() == results["coco"]["bbox"]
    assert run(files[0], "--annotations", files[1]).strip() == str(scored)

    predictions, targets = [], []
    for year, split in sets:
        dataset = VOCDetection(tmp_path, [(year, split)], classes=SHAPE_CLASSES)
        names = [name.rpartition("/")[2] for name in dataset.names]
        main = folder / "results" / f"VOC{year}" / "Main"
        predictions += read_voc_results(main, names, SHAPE_CLASSES, image_set=split)
        targets += [dataset.target(index) | {"image_id": None} for index in range(len(dataset))]
    assert results["num_images"] == len(targets) == 40
    voc = evaluate(predictions, targets, SHAPE_CLASSES)
    assert check_against_the_devkit(voc, predictions, targets) > 0
    for key, interpolation in (("voc", "all-point"), ("voc07", "11point")):
        assert results[key]["ap"] == pytest.approx(voc.compute(interpolation).ap, abs=1e-9)
    counts = analyze_errors(voc.matching()).totals("all")
    assert results["errors"]["counts"]["all"]["total"] == counts


def test_names_with_folders_and_blanks(tmp_path):
    names = ("cam1/a", "cam2/a", "img 1", "img  1 0.5")
    dataset = VOCDetection(make_devkit(tmp_path, dict.fromkeys(names, SIZE + DOG)))
    found = [
        (index, {"boxes": [[index, 1.0, 9.0, 9.0]], "labels": [12], "scores": [0.5]})
        for index in range(len(names))
    ]
    back = load_devkit_results(save_devkit_results(tmp_path / "out", dataset, found), dataset)
    assert [(index, read["boxes"].tolist()) for index, read in back] == [
        (index, written["boxes"]) for index, written in found
    ]


def work(rank, runs):
    return [command("evaluate", *args) for args in runs]


def test_two_processes_as_one(run_dir, tmp_path):
    """Seven images, and one, of which the second process sees none; not batched, to the bit."""
    runs = {
        num: [run_dir / "last.pt", f"--data.test_limit={num}", "--data.eval_batch_size=1"]
        for num in (7, 1)
    }
    for num, args in runs.items():
        run(*args, "--save", tmp_path / f"one{num}")
    two = [[*args, "--save", tmp_path / f"two{num}"] for num, args in runs.items()]
    first, second = on_two_processes(work, tmp_path, two)
    assert [re.findall(r"(\d) images;", out) for _, out, _ in first] == [["7"], ["1"]]
    assert [code for code, *_ in first + second] == [0] * 4
    assert [out for _, out, _ in second] == ["", ""]
    written = [path for num in runs for path in (tmp_path / f"one{num}").rglob("*.*")]
    assert len(written) == 2 * (3 + len(SHAPE_CLASSES))
    for path in written:
        other = Path(str(path).replace("/one", "/two"))
        assert other.read_bytes() == path.read_bytes(), path


def test_what_cannot_be_evaluated_is_told_before(shapes_root, tmp_path, monkeypatch):
    config = tiny_config(shapes_root, tmp_path / "run")
    truth = open_dataset(config, train=False)
    monkeypatch.setattr(truth, "classes", ("car", "truck/bus"))
    with pytest.raises(ValueError, match="truck/bus"):
        check_before(truth, "pycocotools")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="faster-coco-eval"):
        check_before(truth, "faster-coco-eval")
