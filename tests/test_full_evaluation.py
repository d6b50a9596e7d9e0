"""The whole of an evaluation: what `evaluate.py` writes, reads back and reports."""

from __future__ import annotations

import json
import os
import re
import runpy
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import tiny_config
from torch import nn
from torch.utils.data import DataLoader
from voc_oracle import check_against_the_devkit, evaluate

from detmix.data import SHAPE_CLASSES, VOCDetection
from detmix.data.loaders import collate, eval_loader
from detmix.evaluation import COCOEvaluator, analyze_errors, score_predictions, write_voc_results
from detmix.training import DetectorTrainer, load_detector
from detmix.training.build import build_test_set, open_dataset
from detmix.training.console import run_tool
from detmix.training.full_evaluation import check_before
from detmix.training.inference import detect
from detmix.training.processes import make_accelerator

TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"
CLASSES = ("--data.classes", f"[{', '.join(SHAPE_CLASSES)}]")
# So low a threshold that the mAP of the tiny detector is not 0.
TRAINED = (
    "epochs=3", "optim.lr=0.003", "augment.photometric=0", "augment.crop=0", "data.workers=0",
    "detector.options.box_score_thresh=0.005", "detector.options.box_detections_per_img=60",
    "detector.options.rpn_post_nms_top_n_test=60", "detector.options.rpn_pre_nms_top_n_test=60",
)  # fmt: skip


@pytest.fixture
def run(capsys, fresh_accelerator):
    """Return a function that evaluates within this process and returns what was printed."""
    main = runpy.run_path(str(TOOL))["main"]

    def run(*args):
        assert run_tool(main, [str(arg) for arg in args]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def run_dir(shapes_root, tmp_path_factory):
    """Train once and return the run's folder."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    DetectorTrainer(tiny_config(shapes_root, folder, *TRAINED)).fit()
    return folder


def test_writes_and_reads_back(run, run_dir, shapes_root, tmp_path):
    printed = run(run_dir / "last.pt", "--report")
    folder = run_dir / "evaluation"
    report = (folder / "report.html").read_text()
    assert "Not shown" not in report
    for name in ("precision_recall", "errors", "learning_curve", "box_weights"):
        assert (folder / f"{name}.png").is_file()
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == str(run_dir / "last.pt")
    assert results["num_images"] == 8
    assert results["voc"]["mean_ap"] > 0
    for number in (results["voc"]["mean_ap"], results["coco"]["bbox"]["ap"]):
        assert f"{number:.4f}" in printed
        assert f"{number:.4f}" in report
    names = sorted(path.name for path in (folder / "results" / "VOC2007" / "Main").iterdir())
    assert names == sorted(f"comp4_det_test_{name}.txt" for name in SHAPE_CLASSES)

    again = run(folder / "results", "--data.root", shapes_root, *CLASSES, "--save", tmp_path)
    assert again.splitlines()[:-2] == printed.splitlines()[: len(again.splitlines()) - 2]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["data"]["test"] == results["data"]["test"]
    for name in ("num_images", "voc", "voc07", "coco", "errors"):
        assert saved[name] == results[name]

    files = folder / "predictions.json", folder / "ground_truth.json"
    scored = score_predictions(*files)
    assert scored.as_dict() == results["coco"]["bbox"]
    assert run(files[0], "--annotations", files[1]).strip() == str(scored)


def test_devkit_files_of_several_image_sets(run, shapes_root, tmp_path):
    """The same image names in two years, and two splits of one year."""
    sets = (("2007", "test"), ("2012", "test"), ("2007", "trainval"))
    for year in ("2007", "2012"):
        (tmp_path / f"VOC{year}").symlink_to(shapes_root / "VOC2007")
    rng, predictions, targets = np.random.default_rng(0), [], []
    for year, split in sets:
        dataset = VOCDetection(tmp_path, [(year, split)], classes=SHAPE_CLASSES)
        truth = [dataset.target(index) for index in range(len(dataset))]
        found = []
        for target in truth:  # some of another class, many scores equal
            num = len(target["labels"])
            labels = np.where(rng.random(num) < 0.3, 1, target["labels"])
            boxes = target["boxes"].numpy() + rng.normal(0, 3, (num, 1))
            found.append({"boxes": boxes, "labels": labels, "scores": rng.integers(1, 9, num) / 8})
        names = [name.rpartition("/")[2] for name in dataset.names]
        folder = tmp_path / "results" / f"VOC{year}" / "Main"
        write_voc_results(folder, names, found, SHAPE_CLASSES, image_set=split)
        predictions += found
        targets += truth
    options = ("--data.root", tmp_path, "--data.test", json.dumps(sets), *CLASSES)
    run(tmp_path / "results", *options, "--save", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_images"] == len(targets) == 40

    targets = [target | {"image_id": index} for index, target in enumerate(targets)]
    voc, coco = evaluate(predictions, targets, SHAPE_CLASSES), COCOEvaluator(SHAPE_CLASSES)
    coco.update(predictions, targets)
    assert 0.1 < check_against_the_devkit(voc, predictions, targets) < 0.9
    for key, interpolation in (("voc", "all-point"), ("voc07", "11point")):
        assert results[key]["ap"] == pytest.approx(voc.compute(interpolation).ap, abs=1e-9)
    assert results["coco"]["bbox"]["ap"] == pytest.approx(coco.compute().ap, abs=1e-9)
    counts = analyze_errors(voc.matching()).totals("all")
    assert results["errors"]["counts"]["all"]["total"] == counts


class Painter(nn.Module):
    """Finds up to four masks in an image, as many as one of its pixels says."""

    def forward(self, images):
        found = []
        for image in images:
            num = int(255 * image[0, 5, 7]) % 5
            masks = torch.cat([image, 1 - image])[:num, None]
            found.append({"boxes": torch.zeros(num, 4), "masks": masks})
        return found


def painted(checkpoint):
    """What the processes there are find together in seven images: their numbers, run lengths."""
    _, config = load_detector(checkpoint, ["--data.test_limit=7"])
    truth, accelerator = open_dataset(config, train=False), make_accelerator(config)
    ranks = accelerator.process_index, accelerator.num_processes
    images = build_test_set(config, truth)
    loader = eval_loader(images, 2, workers=0, rank=ranks[0], num_processes=ranks[1])
    found = detect(Painter(), loader, accelerator, truth=truth)
    return [(index, prediction["masks"]) for index, prediction in found]


def work(rank, runs, checkpoint, folder):
    """Be one of two processes that evaluate."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # wanted, though not used
    store, timeout = (folder / "store").as_uri(), timedelta(seconds=60)
    dist.init_process_group("gloo", store, timeout, rank=rank, world_size=2)
    main = runpy.run_path(str(TOOL))["main"]
    with open(folder / f"{rank}.txt", "w") as file, redirect_stdout(file):
        codes = [run_tool(main, args) for args in runs]
    (folder / f"{rank}.json").write_text(json.dumps(painted(checkpoint)))
    dist.destroy_process_group()
    assert codes == [0] * len(runs)


def test_two_processes_as_one(run, run_dir, tmp_path):
    """Seven images, and one, of which the second process sees none; not batched, to the bit.

    And run-length masks, which differ in number from image to image.
    """
    runs = {
        num: [str(run_dir / "last.pt"), f"--data.test_limit={num}", "--data.eval_batch_size=1"]
        for num in (7, 1)
    }
    for num, args in runs.items():
        run(*args, "--save", tmp_path / f"one{num}")
    two = [[*args, "--save", str(tmp_path / f"two{num}")] for num, args in runs.items()]
    # Not forked: the threads that other tests have left in this process would hang that.
    mp.start_processes(work, (two, run_dir / "last.pt", tmp_path), 2, start_method="spawn")
    assert re.findall(r"(\d) images;", (tmp_path / "0.txt").read_text()) == ["7", "1"]
    assert (tmp_path / "1.txt").read_text() == ""
    masks = painted(run_dir / "last.pt")
    assert len({len(of_image) for _, of_image in masks}) > 1
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == json.dumps(masks)
    written = [path for num in runs for path in (tmp_path / f"one{num}").rglob("*.*")]
    assert len(written) == 2 * (3 + len(SHAPE_CLASSES))
    for path in written:
        other = Path(str(path).replace("/one", "/two"))
        assert other.read_bytes() == path.read_bytes(), path


def test_an_image_seen_twice_counts_once(run_dir, fresh_accelerator):
    """As padded samplers of several processes have it; in the order of the images."""
    model, config = load_detector(run_dir / "last.pt")
    truth, accelerator = open_dataset(config, train=False), make_accelerator(config)
    images = build_test_set(config, truth)
    order = [3, 0, 1, 3, 2, 6, 5, 4, 0, 7, 0]
    again = DataLoader(images, batch_size=1, sampler=order, collate_fn=collate)
    loaders = (again, eval_loader(images, 1, workers=0))
    found, expected = (detect(model, loader, accelerator, truth=truth) for loader in loaders)
    assert [index for index, _ in found] == list(range(8))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_cannot_be_evaluated_is_told_before(shapes_root, tmp_path, monkeypatch):
    config = tiny_config(shapes_root, tmp_path / "run")
    truth = open_dataset(config, train=False)
    monkeypatch.setattr(truth, "classes", ("car", "truck/bus"))
    with pytest.raises(ValueError, match="truck/bus"):
        check_before(truth, "pycocotools")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="faster-coco-eval"):
        check_before(truth, "faster-coco-eval")
