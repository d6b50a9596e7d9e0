"""The HTML report: whole, self-contained, everything as it was given."""

import base64
import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tiny import tiny_config

from detmix.data.shapes_coco import write_shapes_coco
from detmix.training.build import open_dataset, with_data_noted
from detmix.training.full_evaluation import evaluate_fully
from detmix.training.processes import make_accelerator
from detmix.training.run_report import write_run_report

NASTY = "<b>cat</b> & \"dog\" 'cow' {{ 7 * 7 }} {% endif %} é"
HEADINGS = [
    *("Result", "Where it fails", "Confusion", "Worst images", "Training", "Mixing", "How it ran")
]


def texts(page, *tags):
    return ["".join(each.itertext()).strip() for each in page.iter() if each.tag in tags]


def attributes(page, name, tag=None):
    return [each.attrib[name] for each in page.iter(tag) if name in each.attrib]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as if it had found the true boxes of the first image, and none of the others."""
    folder = tmp_path_factory.mktemp("report")
    data = write_shapes_coco(folder / "data", 8, 3, 64)
    for path in (data / "annotations").iterdir():  # text that breaks a page where not escaped
        text = path.read_text().replace('"circle"', json.dumps(NASTY))
        if path.name == "instances_val2017.json":  # its last object
            text = '"iscrowd": 1'.join(text.rsplit('"iscrowd": 0', 1))
        path.write_text(text)
    run = folder / NASTY.replace("/", "")
    run.mkdir()
    step = {"event": "train", "step": 1, "epoch": 0.1, "loss": 2.0, "lr": 0.01}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    config = tiny_config(data, run, "data.format=coco", "data.classes=null", "mixing.name=mixup")
    return with_data_noted(config), run


def write_report(config, run, folder):
    dataset = open_dataset(config, train=False)
    found = []
    for index in range(len(dataset))[: config.data.test_limit]:
        target = dataset.target(index)
        kept = slice(None) if index == 0 else slice(0)
        boxes, labels = target["boxes"][kept], target["labels"][kept]
        found.append((index, {"boxes": boxes, "labels": labels, "scores": labels * 0 + 0.5}))
    evaluation, _ = evaluate_fully(found, dataset, config)
    made = evaluation, found, dataset, config, run / "best.pt"
    torch.save({"position": {"epoch": 1}}, run / "best.pt")
    return evaluation, write_run_report(folder, *made, make_accelerator(config), "7 s")


@pytest.fixture(scope="module")
def report(run):
    return write_report(*run, run[1] / "evaluation")


@pytest.fixture(scope="module")
def page(report):
    """Each element is closed in its place, no attribute is given twice: it is XML."""
    return ElementTree.parse(report[1]).getroot()


def test_nothing_is_loaded(report, page):
    assert attributes(page, "http-equiv") == ["Content-Security-Policy"]
    assert attributes(page, "content")[0] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    )
    for address in attributes(page, "src") + attributes(page, "href"):
        assert address.startswith(("data:", "#"))
    assert not re.search("https?://", report[1].read_text())


def test_contents_lead_to_the_sections(page):
    assert texts(page, "h2") == texts(page, "a") == HEADINGS
    ids = attributes(page, "id")
    assert attributes(page, "href") == [f"#{name}" for name in ids]
    assert len(set(ids)) == len(HEADINGS)


def test_all_text_comes_out_as_given(run, report, page):
    config, folder = run
    evaluation, _ = report
    assert texts(page, "title") == texts(page, "h1") == [folder.name]
    assert config.data.class_names[0] == NASTY
    cells = [cell for part in evaluation.class_table() for row in part for cell in row]
    cells = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
    assert texts(page, "th", "td")[: len(cells)] == cells
    facts = dict(zip(texts(page, "dt"), texts(page, "dd"), strict=True))
    assert facts["mAP, all-point, IoU > 0.5"] == f"{evaluation.voc.mean_ap:.4f}"
    assert facts["mAP, 11-point, IoU > 0.5"] == f"{evaluation.voc07.mean_ap:.4f}"
    assert facts["COCO AP, bbox"] == f"{evaluation.coco['bbox'].ap:.4f}"
    assert facts["images"] == "3"
    data = f"{config.data.root}: annotations/instances_val2017.json, 3 images"
    assert facts["data"] == data
    assert facts["checkpoint"] == f"{folder / 'best.pt'}, after 1 of {config.epochs} epochs"
    assert re.fullmatch(rf"{date.today()} \d\d:\d\d \S+, in 7 s", facts["evaluated"])
    assert (facts["detector"], facts["device"]) == ("fasterrcnn", "CPU")
    coco, errors, setup = texts(page, "pre")
    assert coco.splitlines()[-1] == evaluation.coco["bbox"].area_lines()[-1]
    assert errors == str(evaluation.errors)
    assert "torch" in setup
    assert "alpha: 1.5" in setup


def test_the_confusion_matrix(run, report, page):
    """All found of the first image, nothing of the others; crowds do not count."""
    rows = [[*row] for row in page.iter("tr")]
    first = next(i for i, row in enumerate(rows) if row[0].text == "true ↓ found as →")
    names = [*run[0].data.class_names, "background"]
    assert ["".join(cell.itertext()) for cell in rows[first][1:]] == names
    counts = report[0].errors.confusion
    assert counts.sum() == np.trace(counts) + counts[:, -1].sum()
    for row, name, of_class in zip(rows[first + 1 :], names, counts, strict=True):
        assert row[0].text == name
        assert [cell.text for cell in row[1:]] == [str(n) if n else None for n in of_class]
        for cell, number in zip(row[1:], of_class, strict=True):
            share = re.search(r"/ ([\d.]+)\)", cell.get("style", "/ 0)"))[1]
            assert float(share) == pytest.approx(number / max(of_class.sum(), 1), abs=1e-3)


def test_pictures_are_embedded(report, page):
    folder = report[1].parent
    embedded = [source.partition(";base64,") for source in attributes(page, "src")]
    charts = [base64.b64decode(data) for kind, _, data in embedded if kind == "data:image/png"]
    names = ("precision_recall", "errors", "learning_curve", "box_weights")
    assert charts == [(folder / f"{name}.png").read_bytes() for name in names]
    photos = [base64.b64decode(data)[:2] for kind, _, data in embedded if kind == "data:image/jpeg"]
    worst = [text for text in texts(page, "figcaption") if ": F1 " in text]
    assert photos == [b"\xff\xd8"] * (len(worst) + 8)
    missed = report[0].errors.missed["all"].missed
    assert len(worst) == 2  # not the first, of which all is found
    assert all(": F1 0.00, 0 correct, 0 false, " in text for text in worst)
    assert sum(int(text.split()[-2]) for text in worst) == missed > 0
    assert all(attributes(page, "alt", "img"))


@pytest.mark.parametrize(
    ("metrics", "said", "mixing"),
    [(None, "metrics.jsonl", "none"), ('{"event": "train", "st', "line 1: ", "mixup")],
)
def test_what_is_not_there_is_said(run, tmp_path, metrics, said, mixing):
    """No metrics, or a line that a killed run has left half-written; no images to mix."""
    config, _ = run
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    coco = replace(config.data.coco, train_annotations=Path("nowhere.json"))
    data = replace(config.data, test_limit=1, coco=coco)
    config = replace(config, data=data, mixing=replace(config.mixing, name=mixing))
    page = ElementTree.parse(write_report(config, tmp_path, tmp_path / "new")[1])
    paragraphs = texts(page, "p")
    not_shown = [text for text in paragraphs if text.startswith("Not shown: ")]
    assert len(not_shown) == 2
    assert said in not_shown[0]
    assert ("nothing is mixed" if mixing == "none" else "nowhere.json") in not_shown[1]
    assert any(text.endswith(".json, the first 1 of 3 images") for text in texts(page, "dd"))
