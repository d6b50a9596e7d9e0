"""What the README and the pages in docs show runs as it stands there, with public names only."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial, reduce
from itertools import dropwhile, takewhile
from operator import getitem
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from runs import command
from torch.utils.data import DataLoader

import detmix
from detmix.data import collate, write_shapes_coco
from detmix.detectors import BackboneConfig, DetectorConfig, build_detector
from detmix.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
API = PAGES["api.md"]
# Its code is no example, and test_walkthrough.py runs the walkthrough's.
APART = {"api.md": "", "walkthrough.md": PAGES["walkthrough.md"].partition("## What next")[2]}
ALL = "\n".join((PAGES | APART).values())


def blocks(language: str, page: str | None = None) -> list[str]:
    text = ALL if page is None else PAGES[page]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _small_detectors(monkeypatch):
    """What the pages ask for needs a network, and minutes."""

    def build(name, weights_backbone, num_classes):
        assert weights_backbone == "DEFAULT"
        options = {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 16}
        config = DetectorConfig(
            name, min_size=64, max_size=64, anchor_sizes=(16, 32), head_dim=16, options=options
        )
        torch.manual_seed(0)
        backbone = BackboneConfig("resnet18", fpn_channels=8, levels=(3,))
        return build_detector(config, backbone, num_classes)

    for name in ("fasterrcnn", "maskrcnn"):
        full = f"{name}_resnet50_fpn"
        monkeypatch.setattr(torchvision.models.detection, full, partial(build, name))


def samples(num):
    boxes, labels = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50]]), torch.tensor([1, 20])
    targets = [
        {"boxes": boxes[: i % 3], "labels": labels[: i % 3], "image_id": i} for i in range(num)
    ]
    return [(torch.rand(3, 64, 56 + i), target) for i, target in enumerate(targets)]


class Guesses(torch.nn.Module):
    """Finds an object of each class everywhere in an image of 64 pixels."""

    def forward(self, images):
        corners = torch.cartesian_prod(*[torch.arange(0.0, 48, 6)] * 2)
        boxes = torch.cat([corners, corners + 20], 1).repeat(5, 1)
        labels = torch.arange(1, 6).repeat_interleave(len(corners))
        return [{"boxes": boxes, "labels": labels, "scores": labels / 9} for _ in images]


def test_each_block_is_met_below():
    """Of Python, of a shell, or what something prints."""
    assert set(re.findall(r"^```(\w+)$", ALL, flags=re.MULTILINE)) == {"python", "bash"}
    examples = {page: len(blocks("python", page)) for page in PAGES if page not in APART}
    examples = {page: number for page, number in examples.items() if number}
    assert examples == {"README.md": 2, "evaluation.md": 2, "mixing.md": 1}


def test_the_loop_and_the_scoring_run(capsys):
    (_, loop), (scoring, _) = blocks("python", "README.md"), blocks("python", "evaluation.md")
    assert len(loop.strip().splitlines()) <= 16  # "in under 15 lines", imports apart
    test_loader = DataLoader(samples(3), batch_size=2, collate_fn=collate)
    names = {"dataset": samples(3), "test_loader": test_loader}
    exec(loop, names)
    assert torch.isfinite(names["loss"])
    assert not names["mix"].active  # the last epochs are unmixed
    exec(scoring, names)
    printed = capsys.readouterr().out
    assert "tvmonitor" in printed
    assert "similar class" in printed


def test_a_photograph_of_ones_own(whole_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "own").symlink_to(whole_run)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    predicting = blocks("python", "README.md")[0]
    exec(predicting.replace("0.3", "0"), names := {})
    assert len(names["found"].boxes) == len(names["found"].names) > 0
    assert names["found"].names[0] in capsys.readouterr().out


@pytest.fixture
def coco_folder(tmp_path, monkeypatch) -> Path:
    """Work in a folder with shapes in the place of COCO's images."""
    write_shapes_coco(tmp_path / "data" / "coco", num_train=10, num_test=6, image_size=64)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_wrapped_data_set_of_torchvision(coco_folder):
    # In COCO some images have no object.
    path = coco_folder / "data" / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 4]
    path.write_text(json.dumps(content))
    names: dict = {}
    torch.manual_seed(0)
    exec(blocks("python", "mixing.md")[0], names)
    assert torch.isfinite(names["loss"])
    assert len(names["images"]) == 8
    for image, target in zip(names["images"], names["targets"], strict=True):
        assert {"image_id", "boxes", "labels", "box_weights"} <= target.keys()
        if len(target["boxes"]):
            assert target["boxes"].canvas_size == tuple(image.shape[-2:])
            assert target["masks"].shape == (len(target["boxes"]), *image.shape[-2:])
    assert any(bool((target["box_weights"] < 1).any()) for target in names["targets"])


def test_coco_scores(coco_folder, capsys):
    names = {"model": Guesses()}
    exec(blocks("python", "evaluation.md")[1], names)
    first, second = capsys.readouterr().out.split("mean (bbox")[1:]
    assert first.split()[:5] == second.split()[:5]  # scored again, the same
    assert names["evaluator"].compute().ap > 0
    saved = json.loads(Path("runs/coco_val/predictions.json").read_text())
    assert {entry["category_id"] for entry in saved} == set(names["val_set"].category_ids)


def tool_commands() -> list[list[str]]:
    """Return the commands from the tool's name on, whoever starts the tool."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(part) for line in lines for part in line.split("&&")]
    tools = [list(dropwhile(lambda arg: not re.match("tools/|detmix$", arg), c)) for c in commands]
    return [tool for tool in tools if tool]


@pytest.mark.parametrize("shown", tool_commands(), ids=" ".join)
def test_commands_are_understood(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tool, args = Path(shown[0]).stem, shown[1:]
    if "--config" in args:
        status, out, err = command(tool, *args, "--print_config")
        assert (not status, bool(out)) == (True, True), err
        return
    options = {arg for arg in args if arg.startswith("--")}
    names = takewhile(lambda arg: not arg.startswith("-"), args)
    known = command(tool, *names, "--help")[1] + command("train", "--help")[1]
    assert options <= set(re.findall(r"--[\w.]+", known))


def test_options_and_configurations_of_the_tables_exist():
    rows = re.findall(r"^\| `([\w.]+)`", ALL, flags=re.MULTILINE)
    configurations = [row for row in rows if row.endswith(".yaml")]
    options = [row for row in rows if "." in row and not row.endswith((".yaml", ".json", ".html"))]
    assert len(configurations) > 9
    assert all((ROOT / "configs" / name).is_file() for name in configurations)
    assert len(options) >= 7
    for option in options:
        reduce(getitem, option.split("."), TrainConfig().as_dict())


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, heading = target.partition("#")
        if target.startswith("https://"):
            continue
        assert not path or (folder / path).is_file(), target
        if heading:
            name = Path(path).name or page
            text = PAGES.get(name) or (folder / path).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            titles = [re.sub(r"[^\w -]", "", title.lower()) for title in titles]
            assert heading in {title.replace(" ", "-") for title in titles}


def imported():
    """Return the modules of detmix and the names that the pages import from them."""
    found = re.findall(
        r"^from (detmix[\w.]*) import (.+)$", "\n".join(blocks("python")), re.MULTILINE
    )
    found = {(module, name.strip(" ()")) for module, names in found for name in names.split(",")}
    return found | {(m, n) for n, m in re.findall(r"(\w+)\([^`]*`\s+from `(detmix[\w.]*)`", ALL)}


def test_the_api_page_is_made_of_the_docstrings_as_they_are():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert page == API, "python docs/make_api.py, and commit docs/api.md"


def exported():
    """Yield every package of detmix with each name that it exports."""
    yield from (("detmix", name) for name in detmix.__all__)
    for package in pkgutil.iter_modules(detmix.__path__, "detmix."):
        if package.ispkg and package.name != "detmix.commands":
            names = getattr(importlib.import_module(package.name), "__all__", ())
            yield from ((package.name, name) for name in names)


def test_every_exported_name_is_on_the_api_page():
    entries = re.findall(r"(?ms)^### (\w+)\n\n```python\n(.*?)^```\n\n\S", API)
    heads, names = dict(entries), list(exported())
    assert len(entries) == len(heads) == len({name for _, name in names} - {"__version__"}) > 90
    for package, name in names:
        if name == "__version__":
            continue
        item = getattr(importlib.import_module(package), name)
        if inspect.isclass(item) or inspect.isfunction(item):
            path = re.match(r"(?:class )?detmix\.([\w.]*)", heads[name])[1]  # as it is imported
            assert callable(reduce(getattr, path.split("."), detmix)), path
            told = re.findall(r"\b(\w+)(?=:)", heads[name])
            assert set(inspect.signature(item).parameters) <= set(told), name
        else:
            assert heads[name].startswith(f"{name} = ")


class TestNames:
    def test_of_the_package(self):
        assert sorted(detmix.__all__) == [
            "DetectionCutMix", "DetectionMixUp", "MixedDataset", "RandomChoice", "__version__",
            "cutmix", "load", "mixup", "set_epoch", "unweight_losses", "weight_losses",
        ]  # fmt: skip
        assert detmix.__version__ == importlib.metadata.version("detmix")

    def test_that_the_pages_import_are_public(self):
        assert len(imported()) >= 10
        for module, name in sorted(imported()):
            assert name in importlib.import_module(module).__all__

    @pytest.mark.parametrize(
        ("module", "heavy"),
        [
            ("evaluation", "matplotlib accelerate pydantic albumentations pycocotools"),
            ("pictures", "matplotlib.pyplot"),  # its global state and warnings stay out of runs
        ],
    )
    def test_an_import_loads_nothing_heavy(self, module, heavy):
        code = f"import sys, detmix.{module}; print({set(heavy.split())} & sys.modules.keys())"
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
