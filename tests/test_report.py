"""The HTML report: whole, self-contained, everything as it was given."""

import base64
import math
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detmix.pictures import write_report
from detmix.pictures.report import Code, Facts, Gallery, Picture, Section, Table, Text

NASTY = "<b>cat</b> & \"dog\" 'cow' </script> {{ 7 * 7 }} {% endif %} é"
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """The elements of a page by tag: attributes and text; each is closed in its place."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def texts(self, *tags):
        return [text.strip() for tag, _, text in self.elements if tag in tags]

    def attributes(self, *tags):
        return [attributes for tag, attributes, _ in self.elements if not tags or tag in tags]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    pixels = np.random.default_rng(0).integers(0, 255, (30, 1200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "chart.png")
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def sections(folder):
    """Every kind of block, with text that breaks a page where it is not escaped."""
    rows = [("cat", 0.25, np.int64(1234)), (NASTY, np.float32(0.75), 7), ("cow", math.nan, None)]
    table = Table(("class", NASTY, "objects"), rows, f"Classes {NASTY}", ("mean", 0.5, ""), 2)
    pictures = [Picture(folder / name, f"{name} {NASTY}") for name in ("photo.jpg", "chart.png")]
    return [
        Section("Result & more", [Facts({"mAP": 0.5, NASTY: NASTY}), Text(NASTY), table]),
        Section("Pictures", [Picture(folder / "chart.png", "A chart", f"Caption {NASTY}")]),
        Section("Pictures", [Gallery(pictures), Code("x" * 300 + f"\n  {NASTY}\n", NASTY)]),
    ]


@pytest.fixture(scope="module")
def report(folder):
    return write_report(folder / "new" / "r.html", NASTY, sections(folder), subtitle=f"of {NASTY}")


@pytest.fixture(scope="module")
def page(report):
    return Page(report)


def test_nothing_is_loaded(report, page):
    for attributes in page.attributes():
        for name in {"src", "href", "srcset", "poster", "action"} & set(attributes):
            assert attributes[name].startswith(("data:", "#"))
    assert not page.attributes("script")
    (style,) = page.texts("style")
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert b"http://" not in report.read_bytes()
    assert b"https://" not in report.read_bytes()


def test_contents_lead_to_the_sections(page):
    assert page.texts("h2") == page.texts("a") == ["Result & more", "Pictures", "Pictures"]
    ids = [section["id"] for section in page.attributes("section")]
    assert [link["href"] for link in page.attributes("a")] == [f"#{name}" for name in ids]
    assert len(set(ids)) == 3


def test_all_text_comes_out_as_given(page):
    assert page.texts("title") == page.texts("h1") == [NASTY]
    assert page.texts("p") == [f"of {NASTY}", NASTY, f"Classes {NASTY}"]
    assert page.texts("dt", "dd") == ["mAP", "0.5000", NASTY, NASTY]
    assert page.texts("th", "td") == [
        *("class", NASTY, "objects"),
        *("cat", "0.25", "1,234"),
        *(NASTY, "0.75", "7"),
        *("cow", "n/a", "n/a"),
        *("mean", "0.50", ""),
    ]
    assert page.texts("figcaption") == [f"Caption {NASTY}"]
    assert page.texts("summary") == [NASTY]
    assert page.texts("code") == ["x" * 300 + f"\n  {NASTY}"]
    alts = [image["alt"] for image in page.attributes("img")]
    assert alts == ["A chart", f"photo.jpg {NASTY}", f"chart.png {NASTY}"]


def test_pictures_are_the_very_files(folder, page):
    chart, photo, _ = (image["src"].partition(";base64,") for image in page.attributes("img"))
    assert (chart[0], photo[0]) == ("data:image/png", "data:image/jpeg")
    assert base64.b64decode(chart[2]) == (folder / "chart.png").read_bytes()
    assert base64.b64decode(photo[2]) == (folder / "photo.jpg").read_bytes()


def test_a_missing_picture_leaves_the_report_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        write_report(path, "t", [Section("s", [Picture(tmp_path / "missing.png", "a")])])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_template_is_part_of_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    project = Path(__file__).parents[1]
    copy = tmp_path / "project"
    shutil.copytree(project / "detmix", copy / "detmix")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project / name, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = copy.glob("*.whl")
    assert "detmix/pictures/report.html.jinja" in zipfile.ZipFile(wheel).namelist()
