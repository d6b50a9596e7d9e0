"""A report as one HTML file: it opens from disk and loads nothing, no server, no network.

Styles are in the file and pictures are embedded, so that it can be moved and mailed.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from mimetypes import guess_type
from numbers import Integral
from pathlib import Path

from detmix.files import write_text

Cell = str | int | float | None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """A configuration, shown as it is once its title is opened."""

    text: str
    title: str


@dataclass(frozen=True)
class Facts:
    """The headline numbers by name: tiles, written as in a `Table`."""

    values: Mapping[str, Cell]
    digits: int = 4


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows, with perhaps a last row such as the mean."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    footer: Sequence[Cell] = ()
    digits: int = 4


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG file, with what it shows for those who cannot see it, and perhaps a caption."""

    path: Path
    alt: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        data = b64encode(self.path.read_bytes()).decode()
        return f"data:{guess_type(self.path.name)[0]};base64,{data}"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many as there is room for."""

    pictures: Sequence[Picture]


Block = Text | Code | Facts | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    """A part of a report, with a place in its table of contents."""

    title: str
    blocks: Sequence[Block]


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = ""
) -> Path:
    """Write a report as one HTML file.

    The file is written under a temporary name and renamed. Equal input gives equal bytes.

    Args:
        path: the file; its folder is made where missing.
        title: its heading.
        sections: in their order; of the blocks that this file has.
        subtitle: a line below the heading.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: if there is no file of a picture.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = _cell_text
    source = files("detmix.pictures").joinpath("report.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(source).render(title=title, subtitle=subtitle, sections=sections)
    path = Path(path)
    write_text(path, html)
    return path


def _cell_text(value: Cell, digits: int) -> str:
    """A cell as the reader sees it."""
    if value is None or value != value:
        return "n/a"
    if isinstance(value, str):
        return value
    # numbers.Integral, not int: NumPy's integers are none
    return format(value, "," if issubclass(type(value), Integral) else f",.{digits}f")
