"""The HTML report: whole, self-contained, accessible, right in a real browser."""

import base64
import importlib.resources
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detmix.evaluation.report import (
    Code,
    Facts,
    Gallery,
    Picture,
    Section,
    Table,
    Text,
    write_report,
)

NASTY = "<b>cat</b> & \"dog\" 'cow' </script> {{ 7 * 7 }} {% endif %} é"
VOID = {"meta", "link", "img", "source", "br", "hr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Element:
    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children, self.text = [], ""

    def __getitem__(self, name):
        return self.attributes[name]

    def all(self, *tags):
        """All elements inside of these tags, in the order of the document."""
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.all(*tags)

    def words(self):
        """The text of the element without that of its children, spaces at its ends removed."""
        return self.text.strip()


class Page(HTMLParser):
    """The tree of a page; an element that is not closed in its place is an error."""

    def __init__(self, path):
        super().__init__()
        self.open = [Element("", {})]
        self.root = self.open[0]
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()
        assert [element.tag for element in self.open] == [""]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        element = Element(tag, dict(attrs), self.open[-1])
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data


def png(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def some_sections(folder):
    """Every kind of block, with text that breaks a page where it is not escaped."""
    wide, narrow = folder / "wide.png", folder / "narrow.png"
    wide.write_bytes(png(1100, 400))
    narrow.write_bytes(png(500, 600))
    rows = [("cat", 0.25, 1234), (NASTY, 0.75, 7), ("cow", math.nan, 0), ("dog", None, 56)]
    return [
        Section(
            "Result & more",
            [
                Facts({"mAP": 0.5, NASTY: NASTY, "a path": "/very/long" * 20}),
                Text(f"First.\n\n{NASTY}"),
                Table(
                    ("class", NASTY, "objects", *(f"column number {i}" for i in range(9))),
                    [(*row, *range(9)) for row in rows],
                    f"Classes {NASTY}",
                    highlight=[1],
                    footer=("mean", 0.5, 1297, *range(9)),
                ),
                Picture(wide, f"A chart {NASTY}", narrow, f"Caption {NASTY}"),
            ],
        ),
        Section("Pictures", [Gallery([Picture(png(300, 200, i), f"{i}") for i in range(5)])]),
        Section("Pictures", [Code("x" * 300 + f"\n  {NASTY}\n", NASTY)], anchor="how.it-was_made"),
        Section("!", []),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(
        folder / "new" / "report.html", NASTY, some_sections(folder), subtitle=f"of {NASTY}"
    )


@pytest.fixture(scope="module")
def page(report):
    return Page(report).root


def one_table(tmp_path, **arguments):
    table = Table(caption="c", **arguments)
    page = Page(write_report(tmp_path / "t.html", "t", [Section("s", [table])])).root
    return next(page.all("table"))


# --------------------------------------------------------------------------------------- the page


def test_nothing_is_loaded(report, page):
    for element in page.all():
        for name in ("src", "href", "srcset", "poster", "action"):
            if name in element.attributes:
                assert element[name].startswith(("data:", "#")), (element.tag, name)
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (policy,) = (m for m in page.all("meta") if "http-equiv" in m.attributes)
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    assert b"http://" not in report.read_bytes()
    assert b"https://" not in report.read_bytes()


def test_structure(page):
    (html,) = page.all("html")
    assert html["lang"] == "en"
    assert [heading.tag for heading in page.all("h1", "h2", "h3")] == ["h1", "h2", "h2", "h2", "h2"]
    assert [title.text for title in page.all("title")] == [NASTY]
    ids = [element["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= set(ids)
    (toc,) = page.all("nav")
    links = [(link.words(), link["href"]) for link in toc.all("a")]
    assert links == [
        ("Result & more", "#result-more"),
        ("Pictures", "#pictures"),
        ("Pictures", "#how.it-was_made"),
        ("!", "#section"),
    ]
    headings = {
        f"#{section['id']}": next(section.all("h2")).words() for section in page.all("section")
    }
    assert [(headings[anchor], anchor) for _, anchor in links] == links


def test_all_text_comes_out_as_given(page):
    def texts(*tags):
        return [element.words() for element in page.all(*tags)]

    assert texts("h1") == [NASTY]
    assert texts("p")[0] == f"of {NASTY}"
    assert texts("p")[1:] == ["First.", NASTY]
    assert texts("dt")[1] == texts("dd")[1] == NASTY
    assert texts("caption") == [f"Classes {NASTY}"]
    assert next(page.all("thead")).children[0].children[1].words() == NASTY
    assert texts("strong") == [NASTY]
    assert texts("figcaption") == [f"Caption {NASTY}"]
    assert texts("summary") == [NASTY]
    assert next(page.all("code")).text == "x" * 300 + f"\n  {NASTY}"
    assert next(page.all("img"))["alt"] == f"A chart {NASTY}"


def test_scrolling_regions_are_named_and_reached_by_keyboard(page):
    regions = [element for element in page.all("div") if "role" in element.attributes]
    assert [(r["role"], r["aria-label"], r["tabindex"]) for r in regions] == [
        ("region", f"Classes {NASTY}", "0")
    ]
    assert all(pre["tabindex"] == "0" for pre in page.all("pre"))


def luminance(color):
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_contrast_in_light_and_dark(page):
    (style,) = page.all("style")
    themes = [
        dict(re.findall(r"--(\w+): (#\w{6});", body)) for body in style.text.split(":root {")[1:]
    ]
    light, dark = themes[:2]
    assert luminance(light["page"]) > 0.8
    assert luminance(dark["page"]) < 0.02
    for theme in (light, dark):
        for front in ("text", "muted", "accent"):
            for back in ("page", "surface", "highlight"):
                low, high = sorted([luminance(theme[front]), luminance(theme[back])])
                assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


# ------------------------------------------------------------------------------------------ tables


def test_cells(tmp_path):
    table = one_table(
        tmp_path,
        header=("name", "ap", "count", "share", "mixed", "year", "none"),
        rows=[
            ("a", np.float32(0.12344), np.int64(1234567), "37.5 %", "1", "2007", None),
            ("b", math.nan, 0, "−4 %", "one", "", math.nan),
            ("c", 12345.5, -1, None, "", "2012", None),
        ],
        footer=("all", 0.5, 10, "n/a", None, None, None),
        digits=2,
    )
    cells = [[cell.words() for cell in row.children] for row in table.all("tr")]
    assert cells == [
        ["name", "ap", "count", "share", "mixed", "year", "none"],
        ["a", "0.12", "1,234,567", "37.5 %", "1", "2007", "n/a"],
        ["b", "n/a", "0", "−4 %", "one", "", "n/a"],
        ["c", "12,345.50", "-1", "n/a", "", "2012", "n/a"],
        ["all", "0.50", "10", "n/a", "n/a", "n/a", "n/a"],
    ]
    for row in table.all("tr"):  # numbers to the right, in every row of the column
        right = [cell.attributes.get("class") == "number" for cell in row.children]
        assert right == [False, True, True, True, False, True, False]
    values = [
        [cell.attributes.get("data-value") for cell in row.children] for row in table.all("tr")
    ]
    assert [row[3] for row in values] == [None, "37.5", "-4.0", "", ""]
    heads = [(cell.tag, cell["scope"]) for cell in next(table.all("tr")).children]
    assert heads == [("th", "col")] * 7
    for row in list(table.all("tr"))[1:]:
        assert row.children[0]["scope"] == "row"
        assert [cell.tag for cell in row.children] == ["th"] + ["td"] * 6


def test_an_unnamed_column_has_no_head_to_read_out(tmp_path):
    table = one_table(tmp_path, header=("", "b"), rows=[("x", 1)])
    assert [cell.tag for cell in next(table.all("tr")).children] == ["td", "th"]


def test_highlight_and_footer(tmp_path):
    table = one_table(
        tmp_path, header=("a", "b"), rows=[("x", 1), ("y", 2)], highlight={1}, footer=("all", 3)
    )
    body, foot = next(table.all("tbody")), next(table.all("tfoot"))
    assert [row.attributes.get("class") for row in body.children] == [None, "highlight"]
    assert [strong.words() for strong in body.all("strong")] == ["y"]
    assert [cell.words() for cell in foot.all("th", "td")] == ["all", "3"]


def test_only_long_tables_get_their_own_height(tmp_path):
    for num_rows, expected in ((20, "table"), (80, "table long")):
        table = one_table(tmp_path, header=("a",), rows=[(i,) for i in range(num_rows)])
        assert table.parent["class"] == expected


def test_a_table_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"'AP': row 1 has 3 cells, expected 2 as in the header"):
        Table(("a", "b"), [(1, 2), (1, 2, 3)], "AP")
    with pytest.raises(ValueError, match=r"'AP': the footer has 1 cells, expected 2"):
        Table(("a", "b"), [(1, 2)], "AP", footer=(1,))
    with pytest.raises(ValueError, match=r"'AP': highlight is \[1\], expected rows of 0..0"):
        Table(("a", "b"), [(1, 2)], "AP", highlight=[1])


# ---------------------------------------------------------------------------------------- pictures


def decoded(uri):
    head, _, body = uri.partition(",")
    return head, base64.b64decode(body, validate=True)


def test_pictures_are_the_very_files(report, page):
    folder = report.parent.parent
    images = list(page.all("img"))
    assert all(image["alt"] for image in images)
    assert decoded(images[0]["src"]) == (
        "data:image/png;base64",
        (folder / "wide.png").read_bytes(),
    )
    assert (images[0]["width"], images[0]["height"]) == ("1100", "400")
    assert [decoded(image["src"])[1] for image in images[1:]] == [
        png(300, 200, i) for i in range(5)
    ]
    (narrow,) = page.all("source")
    assert decoded(narrow["srcset"])[1] == (folder / "narrow.png").read_bytes()
    assert (narrow["width"], narrow["height"]) == ("500", "600")
    assert "(max-width: 640px)" in narrow["media"]
    assert narrow.parent is images[0].parent
    assert narrow.parent.tag == "picture"


def test_a_finer_picture_is_not_shown_larger(tmp_path):
    def shown_size(**options):
        Image.new("RGB", (840, 400)).save(tmp_path / "p.png", **options)
        section = Section("s", [Picture(tmp_path / "p.png", "a")])
        (image,) = Page(write_report(tmp_path / "r.html", "t", [section])).root.all("img")
        return int(image["width"]), int(image["height"])

    assert shown_size(dpi=(200, 200)) == (504, 240)  # 4.2 x 2 inches, at 120 pixels each
    assert shown_size(dpi=(120, 120)) == shown_size(dpi=(72, 72)) == shown_size() == (840, 400)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats(tmp_path, kind):
    path = tmp_path / "picture"  # its ending does not matter
    Image.new("RGB", (20, 10)).save(path, kind)
    written = write_report(tmp_path / "r.html", "t", [Section("s", [Picture(str(path), "a")])])
    (image,) = Page(written).root.all("img")
    assert decoded(image["src"]) == (f"data:image/{kind.lower()};base64", path.read_bytes())


def test_a_bad_picture_is_named_and_leaves_the_report_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    missing, broken, vector = tmp_path / "missing.png", tmp_path / "broken.png", tmp_path / "a.svg"
    broken.write_bytes(b"no picture")
    vector.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for picture, error, message in (
        (Picture(missing, "a"), FileNotFoundError, "missing.png: no such picture"),
        (Picture(png(), "a", narrow=missing), FileNotFoundError, "missing.png: no such picture"),
        (Picture(broken, "a"), ValueError, "broken.png: expected a PNG, JPEG or WebP"),
        (Picture(vector, "a"), ValueError, "a.svg: expected a PNG, JPEG or WebP"),
        (Picture(tmp_path, "a"), ValueError, "expected a PNG, JPEG or WebP"),
        (Picture(b"abc", "a"), ValueError, "picture of 3 bytes: expected a PNG"),
    ):
        for block in (picture, Gallery([picture])):
            with pytest.raises(error, match=message):
                write_report(path, "t", [Section("s", [block])])
    assert path.read_text() == "before"
    assert not list(tmp_path.glob(".*"))


def test_a_picture_without_a_description_is_refused():
    with pytest.raises(ValueError, match=r"chart.png: alt is empty"):
        Picture("chart.png", " ")


# ---------------------------------------------------------------------------------------- the file


def test_equal_input_gives_equal_bytes(report):
    folder = report.parent.parent
    again = write_report(
        folder / "again.html", NASTY, some_sections(folder), subtitle=f"of {NASTY}"
    )
    assert again.read_bytes() == report.read_bytes()


def test_anchors_are_unique_and_checked(tmp_path):
    def anchors(*sections):
        page = Page(write_report(tmp_path / "r.html", "t", [Section(*s) for s in sections])).root
        return [section["id"] for section in page.all("section")]

    assert anchors(("Top", []), ("A b", []), ("a  B!", []), ("x", [], "a-b"), ("Größe", [])) == [
        "top-2",
        "a-b-2",
        "a-b-3",
        "a-b",
        "größe",
    ]
    with pytest.raises(ValueError, match=r"'y': the anchor is 'one', expected one .* not used"):
        anchors(("x", [], "one"), ("y", [], "one"))
    with pytest.raises(ValueError, match=r"the anchor is 'a b', expected one of letters"):
        anchors(("x", [], "a b"))


def test_an_unknown_block_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"section 's': expected a block, got 'text'"):
        write_report(tmp_path / "r.html", "t", [Section("s", ["text"])])
    assert not (tmp_path / "r.html").exists()


def test_the_template_is_part_of_the_package(tmp_path):
    assert importlib.resources.files("detmix.evaluation").joinpath("report.html.jinja").is_file()
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
    assert "detmix/evaluation/report.html.jinja" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("most", [4, 6])
def test_rows_of_tiles_are_even(most):
    for number in range(1, 30):
        columns = Facts(dict.fromkeys(map(str, range(number)), 0)).columns(most)
        rows = -(-number // columns)
        assert columns <= most
        assert rows == -(-number // most)  # none more than it takes
        assert columns * rows - number < rows  # else a column less would do
    assert Facts({}).columns(most) == 1


# --------------------------------------------------------------------------------------- a browser

WRAPPER = """<!DOCTYPE html><meta charset="utf-8">
<iframe src="report.html" width="375" height="812"></iframe>
<iframe src="report.html" width="1280" height="800"></iframe>
<pre></pre>
<script>
const column = (table, index) =>
  [...table.tBodies[0].rows].map((row) => row.cells[index].textContent);
addEventListener("load", () => {
  const results = [...document.querySelectorAll("iframe")].map((element) => {
    const frame = element.contentWindow;
    const page = frame.document, images = [...page.images];
    const table = page.querySelector("table"), sorted = [];
    for (const index of [1, 1, 2, 0, 0]) {
      page.querySelectorAll("thead button")[index].click();
      const heads = [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));
      sorted.push([column(table, index), heads.filter((sort) => sort), heads[index]]);
    }
    return {
      page: page.documentElement.scrollWidth,
      screen: frame.innerWidth,
      loaded: images.map((image) => image.complete && image.naturalWidth),
      shown: images.map((image) => image.width),
      scrolls: page.querySelector(".table").scrollWidth > page.querySelector(".table").clientWidth,
      footer: table.tFoot.rows.length,
      sorted,
    };
  });
  document.querySelector("pre").textContent = JSON.stringify(results);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_in_a_browser(report, tmp_path):
    shutil.copy(report, tmp_path / "report.html")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --allow-file-access-from-files"
    )
    done = subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--user-data-dir={tmp_path}/user",
            "--dump-dom",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    dumped = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert dumped, done.stderr
    unescaped = []
    parser = HTMLParser()
    parser.handle_data = unescaped.append
    parser.feed(dumped[1])
    parser.close()
    phone, desktop = json.loads("".join(unescaped))
    for seen in (phone, desktop):
        assert seen["page"] <= seen["screen"]  # the page does not scroll sideways, the table may
        assert seen["footer"] == 1
        values, counts = ["0.7500", "0.2500", "n/a", "n/a"], ["1,234", "56", "7", "0"]
        names = [NASTY, "cat", "cow", "dog"]
        assert [column for column, *_ in seen["sorted"]] == [
            values,
            ["0.2500", "0.7500", "n/a", "n/a"],
            counts,
            names,
            names[::-1],
        ]
        directions = ["descending", "ascending", "descending", "ascending", "descending"]
        assert [heads for _, heads, _ in seen["sorted"]] == [[sort] for sort in directions]
        assert [head for *_, head in seen["sorted"]] == directions
    assert phone["scrolls"]
    assert phone["loaded"] == [500] + 5 * [300]  # the narrow chart
    assert phone["shown"][0] >= 360  # from edge to edge
    assert desktop["loaded"] == [1100] + 5 * [300]
    assert desktop["shown"][0] > 1000
