"""A report as one HTML file: it opens from disk and loads nothing, no server, no network.

Styles and the little script are in the file and pictures are embedded, so that it can be moved and
mailed. It reads on a phone, in the dark, on paper, by keyboard and with a screen reader.
"""

import math
import os
import re
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from itertools import chain, count
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from detmix.evaluation.figures import DPI

Cell = str | int | float | None
Source = str | Path | bytes

_FORMATS = ("PNG", "JPEG", "WEBP")  # that every browser shows
_MISSING = "n/a"


@dataclass(frozen=True)
class Text:
    """Paragraphs, divided by empty lines."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands or a configuration, shown as they are.

    Attributes:
        text: its lines.
        title: what it is.
        collapsed: show the title only, until it is opened.
    """

    text: str
    title: str
    collapsed: bool = True


@dataclass(frozen=True)
class Facts:
    """The headline numbers: tiles with a name and a value.

    Attributes:
        values: by name; written as in a `Table`.
        digits: of floats after the point.
    """

    values: Mapping[str, Cell]
    digits: int = 4

    def columns(self, most: int) -> int:
        """How many tiles stand side by side, at most so many, for rows as even as can be."""
        rows = math.ceil(len(self.values) / most)
        return math.ceil(len(self.values) / max(1, rows)) or 1


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; a click on a column's head sorts by it.

    Columns of numbers, also of numbers given as text (``"37 %"``), stand to the right. Integers get
    separators of thousands; None and NaN are ``n/a``, empty text leaves a cell empty.

    Attributes:
        header: the columns' names.
        rows: each as long as the header.
        caption: what the table shows.
        highlight: indices of rows to bring out, such as the best.
        footer: a last row that stays there when the others are sorted, such as the mean.
        digits: of floats after the point.

    Raises:
        ValueError: a row of another length than the header, a highlighted row that is not there.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    highlight: Collection[int] = ()
    footer: Sequence[Cell] = ()
    digits: int = 4

    def __post_init__(self) -> None:
        for index, row in enumerate((*self.rows, self.footer or self.header)):
            if len(row) != len(self.header):
                where = f"row {index}" if index < len(self.rows) else "the footer"
                raise ValueError(
                    f"table {self.caption!r}: {where} has {len(row)} cells, "
                    f"expected {len(self.header)} as in the header"
                )
        if not set(self.highlight) <= set(range(len(self.rows))):
            raise ValueError(
                f"table {self.caption!r}: highlight is {sorted(self.highlight)}, "
                f"expected rows of 0..{len(self.rows) - 1}"
            )

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers or nothing, and at least one number."""
        cells = [row[column] for row in (*self.rows, self.footer) if row]
        given = [cell for cell in cells if cell_text(cell, 0) not in ("", _MISSING)]
        return bool(given) and all(cell_number(cell) is not None for cell in given)


@dataclass(frozen=True)
class Picture:
    """A picture, perhaps with another layout for narrow screens.

    It is shown at 120 CSS pixels an inch where the file says its resolution and that is finer, else
    at its size in pixels; smaller where there is no room.

    Attributes:
        wide: a PNG, JPEG or WebP file, or its bytes.
        alt: what it shows, for those who cannot see it.
        narrow: shown instead on a screen of at most 640 CSS pixels.
        caption: a line below.

    Raises:
        ValueError: if ``alt`` is empty.
    """

    wide: Source
    alt: str
    narrow: Source | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError(f"{_source_name(self.wide)}: alt is empty, expected what it shows")


@dataclass(frozen=True)
class Gallery:
    """Pictures in as many columns as leave the widest at least 3/4 of its size."""

    pictures: Sequence[Picture]


Block = Text | Code | Facts | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    """A part of a report with a place in its table of contents.

    Attributes:
        title: its heading.
        blocks: from top to bottom.
        anchor: the fragment that links to it, ``report.html#anchor``; made of the title if empty.
    """

    title: str
    blocks: Sequence[Block]
    anchor: str = ""


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = ""
) -> Path:
    """Write a report as one HTML file.

    The file is written under a temporary name and renamed. Equal input gives equal bytes.

    Args:
        path: the file; its folder is made where missing.
        title: its heading.
        sections: in their order.
        subtitle: a line below the heading.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if there is no file of a picture.
        TypeError: for a block of another type.
        ValueError: if a picture is none, or an anchor is no name or is used twice.
    """
    from jinja2 import Environment, StrictUndefined

    for section in sections:
        for block in section.blocks:
            if not isinstance(block, Block):
                raise TypeError(f"section {section.title!r}: expected a block, got {block!r}")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"text": cell_text, "number": cell_number, "embed": embed}
    source = files("detmix.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(source).render(
        title=title,
        subtitle=subtitle,
        sections=list(zip(_anchors(sections), sections, strict=True)),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class EmbeddedPicture(NamedTuple):
    """A picture as a ``data:`` address, with the size in CSS pixels at which it is shown."""

    uri: str
    width: int
    height: int


def embed(source: Source) -> EmbeddedPicture:
    """Read a picture.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a PNG, JPEG or WebP picture.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            kind, size = Image.MIME[str(image.format)], image.size
            dpi = float(image.info.get("dpi", (DPI,))[0])
    except FileNotFoundError:
        raise FileNotFoundError(f"{source!s}: no such picture") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise ValueError(f"{_source_name(source)}: expected a PNG, JPEG or WebP picture") from None
    # Finer pictures are for finer screens, they are not shown larger.
    width, height = (round(length * DPI / max(DPI, dpi)) for length in size)
    return EmbeddedPicture(f"data:{kind};base64,{b64encode(data).decode()}", width, height)


def cell_text(value: Cell, digits: int) -> str:
    """A cell as the reader sees it."""
    if value is None or value != value:
        return _MISSING
    if isinstance(value, str):
        return value
    # numbers.Integral, not int: NumPy's integers are none
    return format(value, "," if issubclass(type(value), Integral) else f",.{digits}f")


def cell_number(value: Cell) -> float | None:
    """The number that a cell is or spells, None for other text and for what is missing."""
    if isinstance(value, str):
        value = value.replace(",", "").replace("−", "-").removesuffix("%")
    try:
        number = math.nan if value is None else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _source_name(source: Source) -> str:
    return f"picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Every section's own anchor, or one made of its title; no two alike."""
    used = {"top", "content"}  # the template's own
    for section in sections:
        anchor = section.anchor
        if anchor in used or not re.fullmatch(r"[\w.-]*", anchor):
            raise ValueError(
                f"section {section.title!r}: the anchor is {anchor!r}, expected one "
                "of letters, digits, '-', '_' and '.' that is not used yet"
            )
        used |= {anchor} - {""}
    anchors = []
    for section in sections:
        slug = re.sub(r"\W+", "-", section.title.lower()).strip("-") or "section"
        names = chain([slug], (f"{slug}-{number}" for number in count(2)))
        anchors.append(section.anchor or next(name for name in names if name not in used))
        used |= {anchors[-1]}
    return anchors
